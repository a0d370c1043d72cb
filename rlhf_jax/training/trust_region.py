"""TRPO's step as an optax transformation: natural gradient, scaled to a KL limit, behind a line search that keeps it.

Knows parameters as a pytree and three functions of them; nothing of policies or batches. Schulman et al. 2015,
arXiv:1502.05477, section 6 and appendix C."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import tree


class TrustRegionState(NamedTuple):
    """Of the last step, float32 scalars; see `trust_region`. No moments: the next step starts from nothing."""

    step_metrics: dict


METRICS = (
    "step_kl_per_token",
    "step_accepted",
    "line_search_steps",
    "improvement",
    "expected_improvement",
    "cg_residual",
)


def trust_region(
    max_kl_per_token: float,
    *,
    cg_iterations: int = 10,
    cg_tolerance: float = 1e-3,
    cg_damping: float = 0.1,
    backtrack_factor: float = 0.8,
    backtrack_steps: int = 10,
    accept_ratio: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """Steps to where the loss is lower and KL(old || new) is at most `max_kl_per_token`, or nowhere.

    Its update takes, beside the gradient of the loss at the parameters:
      value_and_kl_fn: params -> (loss, mean KL(old || params) in nats a token), old being the parameters of this call.
      fisher_fn: tangent -> Fisher matrix of old times tangent, both like the parameters; the Hessian of that KL at old.

    The direction x solves (F + c I) x = gradient by conjugate gradient. The first candidate is x scaled by
    sqrt(2 max_kl_per_token / x^T F x), whose KL is the limit as far as F tells; each further one is shorter by
    backtrack_factor. Taken is the first whose true KL is within the limit and whose true gain is above 0 and
    at least accept_ratio of what the gradient promises. If none is (a NaN is never), the update is zero.

    Args:
      max_kl_per_token: nats, mean over tokens: the states of the paper are prompts with what was written so far.
      cg_iterations, cg_tolerance: it ends at so many products, or at a residual of so much of the gradient's norm.
      cg_damping: c as a fraction of the curvature along the gradient, g^T F g / g^T g: it means the same for a network
        of any size and for any units of the loss.
    State: `step_metrics` with KL of the step taken (0 if none), whether it was taken, candidates measured, true and
      promised gain of the one taken (0 if none), and the relative residual of conjugate gradient.
    """

    def init(params):
        del params
        return TrustRegionState({name: jnp.zeros((), jnp.float32) for name in METRICS})

    def update(grads, state, params=None, *, value_and_kl_fn, fisher_fn, **unused):
        del state, unused
        length = tree.vdot(grads, grads)
        curvature = tree.vdot(grads, fisher_fn(grads)) / jnp.where(length > 0, length, 1.0)
        damping = cg_damping * curvature
        damped = lambda v: tree.add_scale(fisher_fn(v), damping, v)
        direction, residual = conjugate_gradient(damped, grads, cg_iterations, cg_tolerance)
        norm = jnp.sqrt(length)
        # F x is g - residual - c x: no further product.
        bend = tree.vdot(direction, tree.sub(grads, residual)) - damping * tree.vdot(direction, direction)
        scale = jnp.where(bend > 0, jnp.sqrt(2.0 * max_kl_per_token / jnp.where(bend > 0, bend, 1.0)), 0.0)
        full = tree.scale(-scale, direction)
        promised = -tree.vdot(grads, full)
        before, _ = value_and_kl_fn(params)

        def candidate(carry):
            tried, *_ = carry
            fraction = backtrack_factor ** tried.astype(jnp.float32)
            step = tree.scale(fraction, full)
            value, kl = value_and_kl_fn(optax.apply_updates(params, step))
            gain = before - value
            good = (kl <= max_kl_per_token) & (gain > 0) & (gain >= accept_ratio * fraction * promised)
            return tried + 1, good, step, kl, gain, fraction * promised

        zero = jnp.zeros((), jnp.float32)
        start = (jnp.int32(0), jnp.asarray(False), full, zero, zero, zero)
        going = lambda carry: ~carry[1] & (carry[0] <= backtrack_steps) & (promised > 0)
        tried, good, step, *found = jax.lax.while_loop(going, candidate, start)
        step = jax.tree.map(lambda x: jnp.where(good, x, 0.0).astype(x.dtype), step)
        kl, gain, expected = (jnp.where(good, x, 0.0) for x in found)
        left = tree.norm(residual) / jnp.where(norm > 0, norm, 1.0)
        values = (kl, good, tried, gain, expected, left)
        metrics = {name: jnp.asarray(x, jnp.float32) for name, x in zip(METRICS, values, strict=True)}
        return step, TrustRegionState(metrics)

    return optax.GradientTransformationExtraArgs(init, update)


def conjugate_gradient(product, b, iterations: int, tolerance: float):
    """(x, b - A x) with A x near b, from x = 0. Hestenes and Stiefel 1952.

    Args:
      product: v -> A v for a symmetric matrix without negative eigenvalues; b and v: pytrees of one structure, float32.
      iterations: at most so many products; fewer once |b - A x| is at most tolerance * |b|, or the curvature along a
        direction is not positive, where rounding has taken over.
    """
    goal = tolerance**2 * tree.vdot(b, b)

    def going(carry):
        n, _, _, _, squared, alive = carry
        return (n < iterations) & (squared > goal) & alive

    def step(carry):
        n, x, residual, direction, squared, _ = carry
        image = product(direction)
        bend = tree.vdot(direction, image)
        alive = bend > 0
        length = jnp.where(alive, squared / jnp.where(alive, bend, 1.0), 0.0)
        x = tree.add_scale(x, length, direction)
        residual = tree.add_scale(residual, -length, image)
        new_squared = tree.vdot(residual, residual)
        direction = tree.add_scale(residual, new_squared / squared, direction)
        return n + 1, x, residual, direction, new_squared, alive

    squared = tree.vdot(b, b)
    start = (jnp.int32(0), tree.zeros_like(b), b, b, squared, jnp.asarray(True))
    _, x, residual, *_ = jax.lax.while_loop(going, step, start)
    return x, residual
