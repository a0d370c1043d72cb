"""What a run is rewarded for: the learned reward, functions of text, or a mixture, as config.rewards names them.

Knows no algorithm. A learned reward alone stays on the device; text is decoded only for functions that read it."""

import contextlib
import math
from collections import Counter

import numpy as np

from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.rewards import mixture, specs
from rlhf_jax.rewards.functions import RewardFunction
from rlhf_jax.rewards.models.function import ModelFunction

LEARNED = "learned"


def check(section) -> None:
    """section: config.rewards.  Raises: InputError naming the key or the reward."""
    if not section.components:
        raise InputError(
            f"config.rewards.components is empty; name {LEARNED}, a rule, or package.module:function."
        )
    if len(section.weights) != len(section.components):
        raise InputError(
            f"config.rewards.weights has {len(section.weights)} values for {len(section.components)} components; "
            "give one each."
        )
    if section.clip and len(section.clip) != len(section.components):
        raise InputError(
            f"config.rewards.clip has {len(section.clip)} values for {len(section.components)} components; give one "
            "each, 0 where there is no bound, or none at all."
        )
    if any(not bound >= 0 for bound in section.clip):
        raise InputError(f"config.rewards.clip is {tuple(section.clip)}; expected numbers of 0 or more.")
    _components(section)
    for spec in section.components:
        if spec != LEARNED:
            specs.parse(spec)


def _components(section) -> list[mixture.Component]:
    """One a component; rewards of the same name are numbered."""
    names = [spec if spec == LEARNED else specs.parse(spec).name for spec in section.components]
    seen, components = Counter(), []
    bounds = [float(bound) or math.inf for bound in section.clip] or [math.inf] * len(names)
    for name, weight, bound in zip(names, section.weights, bounds, strict=True):
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        components.append(mixture.Component(name, float(weight), section.normalise, -bound, bound))
    return components


class Rewards(contextlib.AbstractContextManager):
    """The components of config.rewards. In a `with`: functions of the user's own have processes of their own."""

    def __init__(self, section, log, mesh=None):
        """
        Args:
          section: config.rewards.
          log: called with a line for each sample that could not be scored.
          mesh: where the weights of rewards that are models go, once they are asked; None: on one device.
        """
        self.components, self._specs = _components(section), section.components

        options = dict(timeout_seconds=section.timeout_seconds, failure_score=section.failure_score)

        def made(spec):
            if spec == LEARNED:
                return None
            if specs.parse(spec).model:
                return ModelFunction(spec, log, failure_score=options["failure_score"], mesh=mesh)
            return RewardFunction(spec, log, **options)

        self._functions = [made(spec) for spec in section.components]

    def __exit__(self, *exception):
        for function in filter(None, self._functions):
            function.close()

    @property
    def learned(self) -> bool:
        """Whether the reward model takes part."""
        return None in self._functions

    @property
    def plain(self) -> bool:
        """Whether the learned reward is all there is, as it comes."""
        (first, *others), learned_alone = self.components, self._functions == [None]
        return learned_alone and not others and first == mixture.Component(LEARNED)

    @property
    def by_model(self) -> bool:
        """Whether a model other than the run's reward model takes part."""
        return any(isinstance(function, ModelFunction) for function in self._functions)

    def check_fields(self, prompts: list) -> None:
        """Raises: InputError if a function needs a field that no record of the prompts has, or a model is not there."""
        for function in self._functions:
            if isinstance(function, ModelFunction):
                function.check()
        known = {"prompts", "completions", *_columns(prompts)}
        for spec, function in zip(self._specs, self._functions, strict=True):
            missing = [] if function is None else [name for name in function.required if name not in known]
            if missing:
                raise InputError(
                    f"reward {spec!r} needs the field {missing[0]!r}, which the prompts' records do not have; they "
                    f"give {', '.join(sorted(known))}."
                )

    def check_group(self, num_completions: int, key: str) -> None:
        """Raises: InputError if a component compares completions and there are none to compare. key: of the config."""
        for spec, function in zip(self._specs, self._functions, strict=True):
            least = getattr(function, "least", 1)
            if num_completions < least:
                raise InputError(
                    f"reward {spec!r} compares the completions of a prompt with each other, and {key} makes "
                    f"{num_completions}; it needs {least} or more."
                )

    def total(self, learned, prompts: list, completions: list[list[str]], mask=None, *, normalise=True):
        """The mixture.

        Args:
          learned: [B, G] normalised learned rewards; None without that component.
          prompts: B records (formats.Prompt); their fields are handed to functions that ask for them.
          completions: [B][G] texts. mask: [B, G], 1 where a completion counts in statistics; None: everywhere.
          normalise: False adds up the scores as they come, to compare two policies.
        Returns: (total [B, G] float32; metrics: reward/NAME and its deviation, their weighted sum `reward`, and
          `failed_reward_fraction`).
        """
        G, scores, failures = len(completions[0]), [], []
        for function in self._functions:
            if function is None:
                scores.append(learned)
                continue
            if isinstance(function, ModelFunction):
                found, failed = function.score([prompt.text for prompt in prompts], completions)
            else:
                found, failed = self._asked(function, prompts, completions)
            scores.append(found.reshape(-1, G))
            failures.append(failed.mean())
        components = self.components
        if not normalise:
            components = [one.as_it_comes() for one in components]
        total, metrics = mixture.mix(components, scores, mask)
        # As the scores come: normalised ones have the mean 0 whatever the policy does.
        metrics["reward"] = sum(one.weight * metrics[f"reward/{one.name}"] for one in components)
        return total, metrics | ({"failed_reward_fraction": np.mean(failures)} if failures else {})

    @staticmethod
    def _asked(function: RewardFunction, prompts, completions):
        """(scores, failed) [B * G]; each process asks for its share of the prompts."""

        def of(rows):
            repeated = [one for one in prompts[rows] for _ in completions[0]]
            texts = [text for group in completions[rows] for text in group]
            asked = [readable(prompt.text) for prompt in repeated]
            found = function.score(asked, texts, _columns(repeated))
            size = (-1, len(completions[0]))
            return list(zip(*(x.reshape(size).tolist() for x in found), strict=True))

        scores, failed = zip(*hosts.spread(len(prompts), of), strict=True)
        return np.array(scores, np.float32).ravel(), np.array(failed, bool).ravel()


def _columns(prompts: list) -> dict[str, list]:
    """{field: its value in the record of each prompt, None where it has none}."""
    rows = [prompt.row.fields if prompt.row is not None else {} for prompt in prompts]
    names = {name for row in rows for name in row} - {"prompts", "completions"}
    return {name: [row.get(name) for row in rows] for name in sorted(names)}
