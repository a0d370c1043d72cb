"""Tuned and untuned on the same prompts, with the same random numbers or by beam search: completions, rewards, KL.

Writes eval_results_untuned.jsonl, eval_results_tuned.jsonl (the files of Vertex's bulk inference) and
evaluation.json. Knows nothing of how the policy was trained."""

import json
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.batching import pad_prompts
from rlhf_jax.losses.logprobs import fused_token_logprobs
from rlhf_jax.models import placement, roles
from rlhf_jax.models.llama import unembedding
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts
from rlhf_jax.rewards import learned
from rlhf_jax.sampling.beam import BeamConfig, beam_search
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import GroupedBatch

FILES = {"untuned": "eval_results_untuned.jsonl", "tuned": "eval_results_tuned.jsonl"}


def completions_of(
    model,
    base,
    role: Role,
    prompts: list[list[int]],
    *,
    prompt_length: int,
    batch_size: int,
    sampling,
    tokenizer,
    put: Callable,
    rng,
    reward: tuple | None = None,  # (role, mean, std)
    against: Role | None = None,  # the role to measure KL to
    vocab_chunk: int = 8192,
    check: Callable = lambda: None,  # called between batches
    suffix: tuple[int, ...] = (),  # ids that the role, and nobody else, reads after each prompt
    rounds: int = 1,  # draws of G completions; the first is the same whatever the number
) -> dict:
    """{"texts": [N][G], "completion_length", "finished", "reward", "kl": [N, G] where asked}, prompts in order.

    sampling: SamplingConfig, or BeamConfig for the best beams. With rounds, G is rounds times its num_completions: one
      round's after another's.
    kl: sum over the completion of log p - log p_against at the sampling temperature, in nats; not for greedy. Beams
      are no samples and their mean is no KL: of them it is "log_ratio", which says how each side rates this text.
    """
    by_beams = isinstance(sampling, BeamConfig)
    G = sampling.num_return if by_beams else rounds * sampling.num_completions
    rows = []
    scorer, *units = reward or (None,)
    measure = make_measure(model, sampling, units, against, vocab_chunk)
    for start in range(0, len(prompts), batch_size):
        check()
        chosen = prompts[start : start + batch_size]
        filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
        ids, mask = asked = put(pad_prompts(filled, prompt_length, sampling.pad_id))
        if suffix:
            longer = [[*prompt, *suffix] for prompt in filled]
            asked = put(pad_prompts(longer, prompt_length + len(suffix), sampling.pad_id))
        params, key, drawn = role.params(base), jax.random.fold_in(rng, start), []
        for number in range(rounds):
            if by_beams:
                made = beam_search(model, params, *asked, sampling, role.adapter)
            else:
                own = jax.random.fold_in(key, number) if number else key
                made = generate(model, params, *asked, own, sampling, role.adapter)
            batch = GroupedBatch(ids, mask, made.ids, made.mask, old_logprobs=made.logprobs)
            found = measure(base, scorer, batch)
            found |= {"completion_length": made.mask.sum(-1), "finished": made.finished}
            drawn.append(hosts.gather((made.ids, made.mask, found)))
        made_ids, made_mask, found = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *drawn)
        texts = decoded(tokenizer, made_ids, made_mask)
        rows.append((texts[: len(chosen)], {name: x[: len(chosen)] for name, x in found.items()}))
    arrays = {name: np.concatenate([found[name] for _, found in rows]) for name in rows[0][1]}
    texts = [group for texts, _ in rows for group in texts]
    assert all(len(group) == G for group in texts)
    return {"texts": texts, **arrays}


def decoded(tokenizer, ids, mask) -> list[list[str]]:
    """[N][G] texts of completions [N, G, R]; each process decodes its share."""
    text = lambda row, kept: tokenizer.decode_completion(row[kept > 0].tolist())

    def of(rows):
        groups = zip(ids[rows], mask[rows], strict=True)
        return [[text(*one) for one in zip(*group, strict=True)] for group in groups]

    return hosts.spread(len(ids), of)


def make_measure(model, sampling, units, against: Role | None, vocab_chunk: int):
    """Jitted (base, reward role or None, batch) -> {"reward", "kl": [B, G]}, of those that are asked for.

    units: mean and deviation that rewards are told in. The rest as in completions_of.
    """
    by_beams = isinstance(sampling, BeamConfig)
    temperature = 1.0 if by_beams else sampling.temperature

    @jax.jit
    def measure(base, reward, batch):
        found = {}
        if reward is not None:
            found["reward"] = learned.score(model, base, reward, batch, sampling.eos_ids, *units)
        if against is not None and temperature > 0:
            states = roles.predicting_states(model, base, against, batch)
            vocabulary = unembedding(against.params(base))
            logprobs, _ = fused_token_logprobs(
                states,
                vocabulary,
                batch.completion_ids,
                chunk_size=placement.columns_at_a_time(vocabulary.shape[-1], vocab_chunk),
                temperature=temperature,
            )
            log_ratio = jnp.where(batch.completion_mask > 0, batch.old_logprobs - logprobs, 0.0)
            found["log_ratio" if by_beams else "kl"] = log_ratio.sum(-1)
        return found

    return measure


def with_gold(found: dict, prompts: list[str], gold: Callable | None) -> dict:
    """`found` with "gold_reward" [N, G] by a rule on text."""
    if gold is None:
        return found
    flat = [text for group in found["texts"] for text in group]
    repeated = [prompt for prompt, group in zip(prompts, found["texts"], strict=True) for _ in group]
    scores = np.array(gold(repeated, flat), np.float64).reshape(len(prompts), -1)
    return found | {"gold_reward": scores}


def write(
    workdir: str,
    prompts: list[str],
    untuned: dict,
    tuned: dict,
    *,
    gold_name: str,
    sampling: dict,
    best_of: dict | None = None,  # of the tuned side: n, and means by n
) -> dict:
    """Write the three files, each whole or not at all; returns the summary."""
    sides = {"untuned": untuned, "tuned": tuned}
    for name, side in sides.items():
        lines = [
            json.dumps(
                {
                    "inputs": {"inputs_pretokenized": prompt, "targets_pretokenized": ""},
                    "prediction": group[0],
                },
                ensure_ascii=False,
            )
            for prompt, group in zip(prompts, side["texts"], strict=True)
        ]
        _write(os.path.join(workdir, FILES[name]), "\n".join(lines) + "\n")
    summary = {}
    for name, side in sides.items():
        for key in ("reward", "gold_reward", "kl", "log_ratio", "completion_length", "finished"):
            if key in side:
                values = np.asarray(side[key], np.float64)
                summary[f"{name}/{key}"] = float(values.mean())
                if len(values) > 1:  # of one prompt there is none, and NaN is not JSON
                    # Completions of one prompt are not independent: the error is over prompts.
                    summary[f"{name}/{key}_stderr"] = float(values.mean(1).std(ddof=1) / len(values) ** 0.5)
    evaluation = {
        "num_prompts": len(prompts),
        "num_completions": len(untuned["texts"][0]),
        "gold_name": gold_name,
        "sampling": sampling,
        "summary": summary,
        "prompts": prompts,
    }
    if best_of:
        evaluation["best_of"] = best_of
    for name, side in sides.items():
        # Column by column: the first num_prompts entries are the completions of the side-by-side files.
        arrays = {
            key: np.asarray(x, np.float64).T.ravel().tolist() for key, x in side.items() if key != "texts"
        }
        texts = [group[g] for g in range(len(side["texts"][0])) for group in side["texts"]]
        evaluation[name] = {"gold_reward": None, **arrays, "texts": texts}
    _write(os.path.join(workdir, "evaluation.json"), json.dumps(evaluation, ensure_ascii=False))
    return summary


def _write(path: str, text: str) -> None:
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)
