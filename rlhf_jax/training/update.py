"""The one update: gradient over microbatches, minibatches and epochs of one batch, in one jitted function.

Knows no algorithm: an objective is handed in. Non-finite updates are skipped exactly and counted."""

import jax
import jax.numpy as jnp
import optax


def make_update(objective, optimizer, *, epochs=1, num_minibatches=1, num_microbatches=1):
    """Returns update(state, frozen, batch) -> (state, metrics).

    Args:
      objective: (trained, frozen, controllers, batch, rng) -> (mean loss, (weight, metrics)). `weight` is what the
        means are over (tokens, or pairs): weighting by it makes any number of microbatches give the same step.
      epochs, num_minibatches: passes over the batch and optimizer updates a pass, reshuffled each pass.
      num_microbatches: pieces of a minibatch whose gradients are summed before its update.
    Metrics are means over the updates; those named `first_...` are of the first update alone.
    """
    grad_fn = jax.value_and_grad(objective, has_aux=True)

    def gradient(state, frozen, minibatch, rng):
        def weighted_sums(microbatch, rng):
            (loss, (weight, metrics)), grads = grad_fn(
                state.trained, frozen, state.controllers, microbatch, rng
            )
            return weight, jax.tree.map(lambda x: weight * x, (grads, {"loss": loss, **metrics}))

        if num_microbatches == 1:
            weight, sums = weighted_sums(minibatch, rng)
        else:
            # Interleaved, so that every row stays on its device; contiguous blocks would be sent around.
            cut = lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
            parts = (jax.tree.map(cut, minibatch), jax.random.split(rng, num_microbatches))
            first = jax.tree.map(lambda x: x[0], parts)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(weighted_sums, *first))
            add = lambda total, part: (jax.tree.map(jnp.add, total, weighted_sums(*part)), None)
            (weight, sums), _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / jnp.maximum(weight, 1), sums)

    def one(frozen, batch, state, indices_and_rng):
        indices, rng = indices_and_rng
        whole = epochs * num_minibatches == 1
        minibatch = batch if whole else jax.tree.map(lambda x: x[indices], batch)
        grads, metrics = gradient(state, frozen, minibatch, rng)
        norm = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        keep = lambda new, old: jnp.where(finite, new, old)
        trained = jax.tree.map(keep, optax.apply_updates(state.trained, updates), state.trained)
        state = state.replace(trained=trained, opt_state=jax.tree.map(keep, opt_state, state.opt_state))
        skipped = 1.0 - finite.astype(jnp.float32)
        return state, {**metrics, "grad_norm": norm, "skipped_updates": skipped}

    def update(state, frozen, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        size = jax.tree.leaves(batch)[0].shape[0]
        shuffles = jax.vmap(lambda key: jax.random.permutation(key, size))(jax.random.split(rng, epochs))
        rngs = jax.random.split(jax.random.fold_in(rng, 1), epochs * num_minibatches)
        scanned = (shuffles.reshape(epochs * num_minibatches, -1), rngs)
        step = lambda state, part: one(frozen, batch, state, part)
        state, metrics = jax.lax.scan(step, state, scanned)
        metrics = {
            name: x[0] if name.startswith("first_") else x.sum() if name == "skipped_updates" else x.mean()
            for name, x in metrics.items()
        }
        return state.replace(step=state.step + 1), metrics

    return update
