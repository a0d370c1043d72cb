"""A language model's preferences in the place of people's (RLAIF): pairs with the probability that it gives them.

Lee et al. 2023, arXiv:2309.00267; Bai et al. 2022, arXiv:2212.08073, section 4."""

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import specs


class Labeller:
    """Rows of pairs from a judge, named as in config.rewards: judge:path=org/name,template=true."""

    def __init__(self, spec: str, kind: str, gold=None, mesh=None):
        """gold: a rule to measure the labels by, or None. Raises: InputError for a spec or kind that does not fit."""
        check(spec, kind)
        self._model, self._gold = specs.parse(spec).load(mesh=mesh), gold

    def rows(self, asked: list[tuple], number: int = 0) -> list[dict]:
        """One row each, the completion that the judge prefers first.

        asked: (prompt, two completions). number: of the batch, which changes nothing.
        """
        if not asked:
            return []
        prompts = [prompt for prompt, _ in asked]
        chances = self._model.prefer(prompts, *zip(*(texts for _, texts in asked), strict=True))
        rows = []
        for (prompt, texts), chance in zip(asked, chances.tolist(), strict=True):
            better = 0 if chance >= 0.5 else 1
            ordered = [texts[better], texts[1 - better]]
            row = {"prompt": prompt, "chosen": ordered[0], "rejected": ordered[1]}
            row |= {"soft_label": max(chance, 1.0 - chance), "choice": 0}
            if self._gold is not None:
                row |= zip(("gold_0", "gold_1"), self._gold([prompt] * 2, ordered), strict=True)
            rows.append(row)
        return rows


def check(spec: str, kind: str) -> None:
    """kind: of the reward model."""
    if not specs.parse(spec).model or specs.parse(spec).name != "judge":
        raise InputError(
            f"config.preferences.labeller is {spec!r}; expected a judge, such as judge:path=org/name, or nothing."
        )
    if kind not in ("pairwise", "token_level"):
        raise InputError(
            f"config.preferences.labeller compares two completions, and config.reward_model.kind {kind} does not "
            "learn from pairs; choose pairwise or token_level."
        )
