"""AdamW with warm-up, a schedule and global-norm clipping, from plain arguments.

Only what is trained reaches the optimizer, so there is nothing to freeze or mask here."""

import jax
import optax

from rlhf_jax.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(kind: str, peak: float, warmup_steps: int, total_steps: int):
    """Learning rate by optimizer update: linear warm-up to `peak`, then constant, or linear or cosine to 0."""
    if kind not in SCHEDULES:
        raise InputError(f"optimizer.schedule is {kind!r}; expected one of {', '.join(SCHEDULES)}.")
    decay_steps = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    }[kind]
    if not warmup_steps:
        return after
    # The first update moves too: (n + 1) / warm-up, not n / warm-up.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0, head_multiplier=1.0
):
    """optax.adamw behind a clip of the global norm (0: no clip). eps stands outside the root, as torch has it.

    head_multiplier: times the learning rate, for reward and value heads. They start from nothing, and a step of Adam
    moves each weight by the learning rate however small the state that it reads.
    """
    parts = [optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)]
    if clip_norm:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if head_multiplier != 1.0:
        parts.append(optax.masked(optax.scale(head_multiplier), _heads))
    return optax.chain(*parts)


def _heads(trained):
    """True for the leaves of heads in {role: Role}."""
    names = lambda path: [getattr(key, "name", None) for key in path]
    return jax.tree_util.tree_map_with_path(lambda path, _: "head" in names(path), trained)
