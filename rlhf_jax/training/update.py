"""The one update: gradient over microbatches, minibatches and epochs of one batch, in one jitted function.

Knows no algorithm: an objective is handed in. Non-finite updates are skipped exactly and counted."""

import jax
import jax.numpy as jnp
import optax


def make_update(
    objective,
    optimizer,
    *,
    epochs=1,
    num_minibatches=1,
    num_microbatches=1,
    auxiliary_objective=None,
    stop_kl=0.0,
    extras=None,
):
    """Returns update(state, frozen, batch, auxiliary=None) -> (state, metrics).

    Args:
      objective: (trained, frozen, controllers, batch, rng) -> (mean loss, (weight, metrics)). `weight` is what the
        means are over (tokens, or pairs): weighting by it makes any number of microbatches give the same step.
      epochs, num_minibatches: passes over the batch and optimizer updates a pass, reshuffled each pass.
      num_microbatches: pieces of a minibatch whose gradients are summed before its update.
      auxiliary_objective: another one, whose gradient on a stream of its own is added (PPO-ptx). `auxiliary` has a
        leading axis of epochs * num_minibatches: fresh rows for every update.
      stop_kl: an update before which `approx_kl` has passed it is not made, nor any after it; 0: all are made.
      extras: (trained, frozen, minibatch) -> {name: what the optimizer takes beside the gradient}; None: nothing. The
        `step_metrics` of an optimizer's state, if it has any, join the metrics.
    Metrics are means over the updates; those named `first_...` are of the first update alone. With stop_kl, `updates`
    is how many were made.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def gradient(objective, state, frozen, minibatch, rng):
        grad_fn = jax.value_and_grad(objective, has_aux=True)

        def weighted_sums(microbatch, rng):
            (loss, (weight, metrics)), grads = grad_fn(
                state.trained, frozen, state.controllers, microbatch, rng
            )
            return weight, jax.tree.map(lambda x: weight * x, (grads, {"loss": loss, **metrics}))

        if num_microbatches == 1:
            weight, sums = weighted_sums(minibatch, rng)
        else:
            parts = (microbatches(minibatch, num_microbatches), jax.random.split(rng, num_microbatches))
            first = jax.tree.map(lambda x: x[0], parts)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(weighted_sums, *first))
            add = lambda total, part: (jax.tree.map(jnp.add, total, weighted_sums(*part)), None)
            (weight, sums), _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / jnp.maximum(weight, 1), sums)

    def one(frozen, batch, state, part):
        indices, rng, rows = part
        whole = epochs * num_minibatches == 1
        minibatch = batch if whole else jax.tree.map(lambda x: x[indices], batch)
        grads, metrics = gradient(objective, state, frozen, minibatch, rng)
        if auxiliary_objective is not None:
            more, of_rows = gradient(auxiliary_objective, state, frozen, rows, rng)
            grads = jax.tree.map(jnp.add, grads, more)
            metrics |= of_rows | {"loss": metrics["loss"] + of_rows["loss"]}
        norm = optax.global_norm(grads)
        measures = {} if extras is None else extras(state.trained, frozen, minibatch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained, **measures)
        metrics |= optax.tree.get(opt_state, "step_metrics", {})
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        near = metrics["approx_kl"] <= stop_kl if stop_kl else True
        keep = lambda new, old: jnp.where(finite & near, new, old)
        trained = jax.tree.map(keep, optax.apply_updates(state.trained, updates), state.trained)
        state = state.replace(trained=trained, opt_state=jax.tree.map(keep, opt_state, state.opt_state))
        metrics |= {"grad_norm": norm, "skipped_updates": 1.0 - finite.astype(jnp.float32)}
        if stop_kl:
            metrics["updates"] = (finite & near).astype(jnp.float32)
        return state, metrics, near

    def update(state, frozen, batch, auxiliary=None):
        rng = jax.random.fold_in(state.rng, state.step)
        size = jax.tree.leaves(batch)[0].shape[0]
        shuffles = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(rng, epochs))
        rngs = jax.random.split(jax.random.fold_in(rng, 1), epochs * num_minibatches)
        parts = (shuffles.reshape(epochs * num_minibatches, -1), rngs, auxiliary)
        make_one = lambda state, part: one(frozen, batch, state, part)
        if not stop_kl:
            state, metrics = jax.lax.scan(lambda state, part: make_one(state, part)[:2], state, parts)
            reached = jnp.ones(epochs * num_minibatches)
        else:
            state, metrics, reached = _until_stopped(make_one, state, parts)
        mean = lambda x: x.mean() if not stop_kl else (x * reached).sum() / reached.sum()
        metrics = {
            name: x[0] if name.startswith("first_") else x.sum() if name in COUNTS else mean(x)
            for name, x in metrics.items()
        }
        return state.replace(step=state.step + 1), metrics

    return update


COUNTS = ("skipped_updates", "updates")


def _until_stopped(make_one, state, parts):
    """The scan, in which everything after the first update that is too far costs nothing and has metrics of 0.

    Returns (state, metrics of each update, 1 for each that was computed)."""
    first = jax.tree.map(lambda x: x[0], parts)
    _, shapes, _ = jax.eval_shape(make_one, state, first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(carry, part):
        state, going = carry
        idle = lambda state: (state, nothing, jnp.bool_(False))
        state, metrics, near = jax.lax.cond(going, lambda state: make_one(state, part), idle, state)
        return (state, going & near), (metrics, going)

    (state, _), (metrics, reached) = jax.lax.scan(step, (state, jnp.bool_(True)), parts)
    return state, metrics, reached.astype(jnp.float32)


def microbatches(batch, count: int):
    """[B, ...] -> [count, B / count, ...], rows interleaved: each stays on its device, where blocks would be sent."""
    cut = lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(cut, batch)
