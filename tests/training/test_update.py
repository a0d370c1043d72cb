"""The one update: microbatches, epochs and minibatches, skipped updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update


def objective(trained, frozen, controllers, batch, rng):
    """Weighted squares: the weight of a batch is the sum of its mask, which differs between microbatches."""
    error = jnp.square(batch["x"] @ trained["w"] - batch["y"])
    loss = masked_mean(error, batch["mask"])
    return loss, (
        batch["mask"].sum(),
        {"error": masked_mean(jnp.abs(error), batch["mask"]), "first_loss": loss},
    )


def make(optimizer, seed=0):
    w = jax.random.normal(jax.random.key(seed), (3,))
    return TrainState({"w": w}, optimizer.init({"w": w}), jnp.int32(0), jax.random.key(1), {})


def make_batch(n=8, seed=2):
    keys = jax.random.split(jax.random.key(seed), 2)
    mask = jnp.array([1.0, 0, 0, 1, 1, 1, 1, 0][:n])
    return {"x": jax.random.normal(keys[0], (n, 3)), "y": jax.random.normal(keys[1], (n,)), "mask": mask}


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_give_the_same_step(microbatches):
    optimizer = optax.adam(1e-2)
    state, batch = make(optimizer), make_batch()
    whole, metrics = jax.jit(make_update(objective, optimizer))(state, None, batch)
    cut, cut_metrics = jax.jit(make_update(objective, optimizer, num_microbatches=microbatches))(
        state, None, batch
    )
    np.testing.assert_allclose(whole.trained["w"], cut.trained["w"], rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], cut_metrics[name], rtol=1e-5)
    assert int(cut.step) == 1


def test_epochs_and_minibatches_visit_every_row_once_a_pass():
    """With plain SGD on a linear loss the order does not matter: each pass moves by the sum over all rows."""
    linear = lambda trained, frozen, controllers, batch, rng: (
        jnp.sum(trained["w"] * batch["x"].sum(0)),
        (jnp.float32(len(batch["x"])), {}),
    )
    optimizer = optax.sgd(0.1)
    state, batch = make(optimizer), make_batch()
    new, metrics = jax.jit(make_update(linear, optimizer, epochs=3, num_minibatches=4))(state, None, batch)
    np.testing.assert_allclose(new.trained["w"], state.trained["w"] - 0.1 * 3 * batch["x"].sum(0), rtol=1e-5)
    assert float(metrics["skipped_updates"]) == 0


def test_the_order_differs_between_steps_and_not_between_runs():
    optimizer = optax.adam(1e-2)
    update = jax.jit(make_update(objective, optimizer, epochs=2, num_minibatches=4))
    state, batch = make(optimizer), make_batch()
    one, _ = update(state, None, batch)
    np.testing.assert_array_equal(one.trained["w"], update(state, None, batch)[0].trained["w"])
    later, _ = update(state.replace(step=jnp.int32(5)), None, batch)
    assert float(jnp.abs(one.trained["w"] - later.trained["w"]).max()) > 0


def test_a_non_finite_update_changes_nothing_and_is_counted():
    optimizer = optax.adam(1e-2)
    state, batch = make(optimizer), make_batch()
    broken = batch | {"y": batch["y"].at[3].set(jnp.inf)}
    new, metrics = jax.jit(make_update(objective, optimizer))(state, None, broken)
    np.testing.assert_array_equal(new.trained["w"], state.trained["w"])
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, state.opt_state)
    assert float(metrics["skipped_updates"]) == 1 and int(new.step) == 1


def test_first_metrics_are_of_the_first_minibatch():
    optimizer = optax.sgd(10.0)  # so large that later losses explode
    state, batch = make(optimizer), make_batch()
    _, metrics = jax.jit(make_update(objective, optimizer, epochs=4))(state, None, batch)
    np.testing.assert_allclose(
        metrics["first_loss"], objective(state.trained, None, {}, batch, None)[0], rtol=1e-5
    )
    assert float(metrics["loss"]) > 100 * float(metrics["first_loss"])


def with_kl(trained, frozen, controllers, batch, rng):
    """The distance from the first weights in the place of a KL."""
    loss, (weight, metrics) = objective(trained, frozen, controllers, batch, rng)
    return loss, (weight, metrics | {"approx_kl": jnp.abs(trained["w"] - frozen).max()})


@pytest.mark.parametrize("limit, made", [(0.25, 3), (1e-9, 1), (10.0, 8)])
def test_updates_stop_where_the_policy_has_gone_too_far(limit, made):
    """Sign descent moves each weight by 0.1 an update, so the limit says how many are made."""
    optimizer = optax.sign_sgd(0.1)
    linear = lambda trained, *rest: (
        trained["w"].sum(),
        (1.0, with_kl(trained, *rest)[1][1]),
    )
    state, batch = make(optimizer), make_batch()
    stopping = jax.jit(make_update(linear, optimizer, epochs=4, num_minibatches=2, stop_kl=limit))
    new, metrics = stopping(state, state.trained["w"], batch)
    np.testing.assert_allclose(state.trained["w"] - new.trained["w"], 0.1 * made, rtol=1e-5)
    assert float(metrics["updates"]) == made and float(metrics["skipped_updates"]) == 0
    # Means are over what was computed: the updates made, and the one that found itself too far.
    seen = min(made + 1, 8)
    np.testing.assert_allclose(metrics["approx_kl"], 0.1 * np.arange(seen).mean(), rtol=1e-5)


def test_a_limit_that_is_not_reached_changes_nothing():
    optimizer, batch = optax.adam(1e-2), make_batch()
    state = make(optimizer)
    free, _ = jax.jit(make_update(with_kl, optimizer, epochs=3))(state, state.trained["w"], batch)
    bound, _ = jax.jit(make_update(with_kl, optimizer, epochs=3, stop_kl=1e3))(
        state, state.trained["w"], batch
    )
    np.testing.assert_allclose(free.trained["w"], bound.trained["w"], rtol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_auxiliary_objective_adds_its_gradient_on_fresh_rows(microbatches):
    optimizer, batch = optax.sgd(0.1), make_batch()
    auxiliary = lambda *args: (
        3.0 * objective(*args)[0],
        (args[3]["mask"].sum(), {"aux": objective(*args)[0]}),
    )
    rows = [make_batch(4, seed) for seed in (5, 6)]
    update = jax.jit(
        make_update(
            objective, optimizer, epochs=2, num_microbatches=microbatches, auxiliary_objective=auxiliary
        )
    )
    state = make(optimizer)
    new, metrics = update(state, None, batch, jax.tree.map(lambda *x: jnp.stack(x), *rows))
    w, losses = state.trained["w"], []
    for own in rows:
        total = lambda w, own=own: sum(
            k * objective({"w": w}, None, {}, b, None)[0] for k, b in ((1.0, batch), (3.0, own))
        )
        losses.append(total(w))
        w = w - 0.1 * jax.grad(total)(w)
    np.testing.assert_allclose(new.trained["w"], w, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert float(metrics["aux"]) > 0
