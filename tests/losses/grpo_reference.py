"""The GRPO family in float64 with loops over rows and tokens, inputs for it, and ours compiled once a loss type."""

import functools

import jax
import numpy as np

from rlhf_jax.losses.grpo import grpo_loss

MAX_LENGTH = 9
LENGTHS = (6, 4, 1, 0, 3)  # one token, and none


def token_kl(d, d_now, kind):
    """An estimate of KL at d = log(policy / reference); d_now is the same number, held fixed where gradient is."""
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        return np.exp(-d) + d - 1
    return (np.exp(-d_now) + d_now - 1) + 0.5 * (d * d - d_now * d_now)


def reference(
    logprobs, old, ref, advantages, mask, *, now, loss_type, low, high, beta, kl_kind="k3", num_tokens=None
):
    """`now` is logprobs again, and stays put where the loss stops gradient: differences then give its gradient."""
    sums, means, count = [], [], 0
    for b in range(mask.shape[0]):
        real = [t for t in range(mask.shape[1]) if mask[b, t]]
        A, losses = advantages[b], []
        for t in real:
            log_weight = logprobs[b, t] - old[b, t]
            if loss_type in ("gspo", "luspo"):
                log_weight = sum(logprobs[b, u] - old[b, u] for u in real) / len(real)
            if loss_type == "gspo_token":
                log_weight = sum(now[b, u] - old[b, u] for u in real) / len(real) + logprobs[b, t] - now[b, t]
            r = np.exp(log_weight)
            if loss_type == "cispo":
                loss = -min(np.exp(now[b, t] - old[b, t]), high) * A * logprobs[b, t]
            elif loss_type == "sapo":
                tau = 1.0 if A > 0 else 1.05
                loss = -A * 4 / tau / (1 + np.exp(-tau * (r - 1)))
            else:
                loss = max(-r * A, -min(max(r, 1 - low), 1 + high) * A)
            if ref is not None:
                loss += beta * token_kl(logprobs[b, t] - ref[b, t], now[b, t] - ref[b, t], kl_kind)
            losses.append(loss)
        sums.append(sum(losses))
        means.append(sum(losses) / max(len(real), 1))
        count += len(real)
    if loss_type in ("grpo", "gspo", "gspo_token", "sapo"):
        return sum(means) / len(means)
    if loss_type == "luspo":
        return sum(sums) / len(sums)
    if loss_type == "dr_grpo":
        return sum(sums) / (len(sums) * MAX_LENGTH)
    if loss_type == "bnpo" or num_tokens is None:
        return sum(sums) / max(count, 1)
    return sum(sums) / num_tokens


def numbers(seed, spread=0.5, lengths=LENGTHS, T=6):
    """(logprobs, old, ref, advantages, mask); NaN wherever nothing real is."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    mask = (np.arange(T) < np.array(lengths)[:, None]).astype(np.int32)
    old = rng.normal(-2.0, 0.7, (B, T))
    logprobs, ref = old + rng.normal(0, spread, (B, T)), old + rng.normal(0, spread, (B, T))
    advantages = rng.normal(0, 1.0, B) + np.where(np.arange(B) % 2, 0.3, -0.3)
    arrays = [np.where(mask > 0, x, np.nan) for x in (logprobs, old, ref)]
    arrays.append(np.where(mask.any(-1), advantages, np.nan))
    return [np.float32(x) for x in arrays] + [mask]


@functools.cache
def compiled(loss_type, kl_kind="k3", with_ref=True, **fixed):
    def run(logprobs, old, ref, advantages, mask, low, high, beta):
        ref = ref if with_ref else None
        return grpo_loss(
            logprobs,
            old,
            ref,
            advantages,
            mask,
            clip_low=low,
            clip_high=high,
            beta=beta if with_ref else 0.0,
            kl_kind=kl_kind,
            loss_type=loss_type,
            max_length=MAX_LENGTH,
            **fixed,
        )

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def differences(f, x, mask, step=1e-5):
    out = np.zeros(x.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            ends.append(f(moved))
        out[at] = (ends[0] - ends[1]) / (2 * step)
    return out


def clips(loss_type):
    return (0.2, 1.3) if loss_type == "cispo" else (0.2, 0.28)
