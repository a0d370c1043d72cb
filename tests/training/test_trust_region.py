"""TRPO's step: conjugate gradient, closed forms, the limit under fire, and the Fisher matrix of a policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from rlhf_jax.models import attention, heads, llama, lora
from rlhf_jax.models.roles import Role
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.trust_region import conjugate_gradient, trust_region
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch

ROW = ALGORITHMS["trpo"]


def spd(seed, n=6, condition=100.0):
    """A symmetric matrix with eigenvalues from 1 to `condition`."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return q @ np.diag(np.geomspace(1.0, condition, n)) @ q.T


# Conjugate gradient


@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradient_solves(seed):
    a, b = spd(seed), np.random.default_rng(seed + 10).normal(size=6)
    as_tree = lambda x: {"a": x[:2], "b": x[2:].reshape(2, 2)}
    flat = lambda tree: jnp.concatenate([tree["a"], tree["b"].ravel()])
    product = lambda v: as_tree(jnp.asarray(a, jnp.float32) @ flat(v))
    x, residual = jax.jit(lambda b: conjugate_gradient(product, as_tree(b), 30, 1e-5))(
        jnp.asarray(b, jnp.float32)
    )
    np.testing.assert_allclose(flat(x), np.linalg.solve(a, b), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(flat(residual), b - a @ np.asarray(flat(x), np.float64), atol=1e-4)


def test_conjugate_gradient_ends_by_tolerance_by_count_and_on_a_flat_direction():
    a, b = jnp.asarray(spd(0, condition=1e4), jnp.float32), jnp.ones(6)
    relative = lambda residual: float(jnp.linalg.norm(residual) / jnp.linalg.norm(b))
    solve = lambda n, tolerance: conjugate_gradient(lambda v: a @ v, b, n, tolerance)
    one, _ = solve(1, 0.0)
    np.testing.assert_allclose(one, b * (b @ b) / (b @ a @ b), rtol=1e-5)  # one step: steepest descent
    assert relative(solve(100, 0.1)[1]) <= 0.1 < relative(solve(1, 0.1)[1])
    # The null space has no curvature: what of b lies in it stays as residual, and nothing is divided by 0.
    x, residual = conjugate_gradient(lambda v: jnp.array([2.0, 0.0]) * v, jnp.array([1.0, 0.0]), 10, 1e-6)
    np.testing.assert_allclose(x, [0.5, 0.0])
    for b in ([0.0, 3.0], [0.0, 0.0]):
        x, residual = conjugate_gradient(lambda v: 0.0 * v, jnp.array(b), 10, 1e-6)
        np.testing.assert_array_equal(x, [0.0, 0.0])
        np.testing.assert_array_equal(residual, b)


# The step on functions whose answer is known


def quadratic(seed, curved=0.0):
    """(gradient at 0, F, value_and_kl_fn, fisher_fn): KL = x F x / 2, loss = g x + curved |x|^2 / 2."""
    f, g = spd(seed), np.random.default_rng(seed + 20).normal(size=6)
    f32, g32 = jnp.asarray(f, jnp.float32), jnp.asarray(g, jnp.float32)
    both = lambda x: (g32 @ x + 0.5 * curved * x @ x, 0.5 * x @ f32 @ x)
    return g, f, dict(value_and_kl_fn=both, fisher_fn=lambda v: f32 @ v)


def one_step(g, extras, params=None, **options):
    params = jnp.zeros(6) if params is None else params
    optimizer = trust_region(**options)
    step = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p, **extras))
    updates, state = step(jnp.asarray(g, jnp.float32), params)
    return updates, {name: float(x) for name, x in state.step_metrics.items()}


@pytest.mark.parametrize("seed", range(3))
def test_step_is_the_closed_form_on_a_quadratic(seed):
    """-sqrt(2 limit / g F^-1 g) F^-1 g, and the linear loss falls by as much as the gradient promises."""
    g, f, extras = quadratic(seed)
    found, metrics = one_step(
        g, extras, max_kl_per_token=0.0101, cg_iterations=30, cg_tolerance=1e-6, cg_damping=0.0
    )
    natural = np.linalg.solve(f, g)
    expected = -np.sqrt(2 * 0.0101 / (g @ natural)) * natural
    # The first candidate is on the limit itself: rounding says whether it or the next is taken.
    fraction = 0.8 ** (metrics["line_search_steps"] - 1)
    np.testing.assert_allclose(found, fraction * expected, rtol=2e-3, atol=1e-5)
    assert metrics["line_search_steps"] <= 2 and metrics["step_accepted"] == 1
    np.testing.assert_allclose(metrics["step_kl_per_token"], fraction**2 * 0.0101, rtol=1e-3)
    np.testing.assert_allclose(metrics["improvement"], -g @ np.asarray(found), rtol=1e-3)
    np.testing.assert_allclose(metrics["expected_improvement"], metrics["improvement"], rtol=1e-3)
    assert metrics["cg_residual"] < 1e-4


def test_damping_is_a_share_of_the_curvature_along_the_gradient():
    g, f, extras = quadratic(1)
    found, _ = one_step(g, extras, max_kl_per_token=0.01, cg_iterations=30, cg_tolerance=1e-6, cg_damping=0.5)
    damped = np.linalg.solve(f + 0.5 * (g @ f @ g) / (g @ g) * np.eye(6), g)
    cosine = -(found @ damped) / np.linalg.norm(found) / np.linalg.norm(damped)
    np.testing.assert_allclose(cosine, 1.0, atol=1e-5)


def test_step_does_not_depend_on_the_units_of_the_loss():
    g, _, extras = quadratic(2)
    scaled = dict(
        extras,
        value_and_kl_fn=lambda x: (1e3 * extras["value_and_kl_fn"](x)[0], extras["value_and_kl_fn"](x)[1]),
    )
    one, _ = one_step(g, extras, max_kl_per_token=0.01)
    other, _ = one_step(1e3 * g, scaled, max_kl_per_token=0.01)
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_step_shortens_until_the_true_gain_is_enough():
    """The loss turns up along the way: the full step gains too little, and the one taken is the first that does not."""
    g, _, extras = quadratic(3, curved=40.0)
    options = dict(max_kl_per_token=0.5, accept_ratio=0.4, backtrack_factor=0.5)
    found, metrics = one_step(g, extras, **options)
    value = lambda x: float(extras["value_and_kl_fn"](x)[0])
    gains = lambda x: -value(x) >= 0.4 * -float(jnp.asarray(g, jnp.float32) @ x)
    assert metrics["line_search_steps"] > 2 and gains(found) and not gains(2 * found)


@pytest.mark.parametrize("kind", ["uphill", "far", "nan loss", "nan kl", "nan curvature", "no gradient"])
def test_no_acceptable_step_leaves_the_parameters_bit_for_bit(kind):
    g, _, extras = quadratic(0)
    params = jax.random.normal(jax.random.key(0), (6,))
    both = extras["value_and_kl_fn"]
    broken = {
        "uphill": lambda x: (-both(x - params)[0], both(x - params)[1]),
        "far": lambda x: (both(x - params)[0], 1.0 + both(x - params)[1]),
        "nan loss": lambda x: (both(x)[0] * jnp.nan, 0.0 * both(x)[1]),
        "nan kl": lambda x: (both(x)[0], both(x)[1] * jnp.nan),
    }
    changed = dict(extras, value_and_kl_fn=broken.get(kind, both))
    if kind == "nan curvature":
        changed["fisher_fn"] = lambda v: v * jnp.nan
    gradient = 0.0 * g if kind == "no gradient" else g
    updates, metrics = one_step(gradient, changed, params, max_kl_per_token=0.01, backtrack_steps=3)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), params)
    assert metrics["step_accepted"] == 0 and metrics["step_kl_per_token"] == 0 and metrics["improvement"] == 0
    assert metrics["line_search_steps"] == (0 if kind in ("no gradient", "nan curvature") else 4)


# The Fisher matrix of a policy


def make_batch(config, seed=0, advantages=1.0, B=2, G=2, P=3, R=4):
    """Ragged completions; one weighs nothing. NaN wherever nothing may be read."""
    rng = np.random.default_rng(seed)
    lengths = np.array([[4, 2], [1, 3]] * (B // 2))
    mask = (np.arange(R) < lengths[..., None]).astype(np.int32)
    weights = np.ones((B, G), np.float32)
    weights[0, 1] = 0.0
    masked = lambda x: np.where(mask > 0, x, np.nan).astype(np.float32)
    return GroupedBatch(
        prompt_ids=rng.integers(3, config.vocab_size, (B, P)).astype(np.int32),
        prompt_mask=np.ones((B, P), np.int32),
        completion_ids=rng.integers(3, config.vocab_size, (B, G, R)).astype(np.int32),
        completion_mask=mask,
        weights=weights,
        finished=lengths < R,
        advantages=masked(advantages * rng.normal(size=mask.shape)),
        returns=masked(rng.normal(size=mask.shape)),
        old_values=masked(rng.normal(size=mask.shape)),
    )


def make_roles(model, base, kind, seed=3):
    """A policy in the middle of its training: both factors of its adapter differ from 0."""
    if kind == "full":
        policy = Role(base=jax.tree.map(lambda x: x + 0.01, base))
    else:
        adapter = lora.init(
            jax.random.key(1), model.config, lora.LoraConfig(rank=2, targets=("q_proj", "down_proj"))
        )
        leaves, tree = jax.tree.flatten(adapter)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        drawn = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        policy = Role(adapter=jax.tree.unflatten(tree, drawn))
    return {"policy": policy, "value": Role(head=heads.init_value(model.config.hidden_size))}


def on_policy(logprobs_fn, base, trained, batch):
    """The batch with the log-probabilities of the policy itself, as a rollout has them."""
    logprobs, _, _ = logprobs_fn(base, trained["policy"], batch)
    return jax.tree.map(jnp.asarray, batch.replace(old_logprobs=np.asarray(logprobs)))


@pytest.mark.parametrize("kind, microbatches", [("lora", 2), ("full", 1)])
def test_fisher_product_is_the_hessian_of_the_exact_kl(tiny_llama, monkeypatch, kind, microbatches):
    """Second derivative of KL(old || new), written out over the whole vocabulary, along the drawn direction."""
    model, base = tiny_llama
    network, trained = Network(model, vocab_chunk=24, temperature=0.8), make_roles(model, base, kind)
    batch = jax.tree.map(jnp.asarray, make_batch(model.config).replace(old_logprobs=jnp.zeros((2, 2, 4))))
    settings = ROW.settings(num_microbatches=microbatches)
    mask = batch.completion_mask * batch.weights[..., None]
    flat, unravel = ravel_pytree(trained["policy"])

    def logits(policy):
        return network.states(base, policy, batch) @ network.unembedding(base, policy) / 0.8

    old = jax.nn.log_softmax(logits(trained["policy"]))

    def kl(policy):
        terms = jnp.exp(old) * (old - jax.nn.log_softmax(logits(policy)))
        return jnp.where(mask > 0, terms.sum(-1), 0.0).sum() / mask.sum()

    v = unravel(jax.random.normal(jax.random.key(5), flat.shape))

    @jax.jit
    def both(v):
        extras = ROW.extras(settings, network, trained, {"base": base}, batch)
        with monkeypatch.context() as patch:  # products that can be differentiated twice
            patch.setattr(llama, "contract", llama._contract)
            patch.setattr(attention, "_by_second", attention._dot)
            hessian = jax.jvp(jax.grad(kl), (trained["policy"],), (v,))[1]
        return extras["fisher_fn"]({"policy": v, "value": optax.MaskedNode()})["policy"], hessian

    found, expected = (ravel_pytree(x)[0] for x in both(v))
    assert float(jnp.abs(expected).max()) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4 * float(jnp.abs(expected).max()))
    assert float(found @ ravel_pytree(v)[0]) > 0


def exact_kl(network, states_fn, base, old, new, batch):
    """float64, nats a token, by way of all logits."""

    def logprobs(policy):
        states = states_fn(base, policy, batch)
        z = np.asarray(states, np.float64) @ np.asarray(network.unembedding(base, policy), np.float64)
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = logprobs(old), logprobs(new)
    mask = np.asarray(batch.completion_mask * batch.weights[..., None])
    return float(((np.exp(p) * (p - q)).sum(-1) * mask).sum() / mask.sum())


def test_the_limit_is_never_exceeded(tiny_llama):
    """Many batches, among them advantages of any size: each step taken is within the limit by a KL in float64."""
    model, base = tiny_llama
    network, limit = Network(model, vocab_chunk=24), 0.05
    settings = ROW.settings(max_kl_per_token=limit, entropy_coeff=0.01)
    optimizer = ROW.optimizer(settings, optax.adamw(1e-2))
    extras = functools.partial(ROW.extras, settings, network)
    update = jax.jit(
        make_update(functools.partial(ROW.objective, settings, network), optimizer, extras=extras)
    )
    distance = functools.partial(exact_kl, network, jax.jit(network.states), base)
    score, taken = jax.jit(network.logprobs), []
    for seed, size in enumerate([1.0, 1e-6, 1e3, 1e12, 30.0]):
        trained = make_roles(model, base, "lora", seed)
        batch = make_batch(model.config, seed, size)
        state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jax.random.key(0), {})
        for _ in range(3):
            batch = on_policy(score, base, state.trained, batch)
            new, metrics = update(state, {"base": base}, batch)
            kl = distance(state.trained["policy"], new.trained["policy"], batch)
            assert kl <= limit * (1 + 1e-4), (seed, kl)
            np.testing.assert_allclose(metrics["step_kl_per_token"], kl, rtol=1e-3, atol=1e-6)
            taken.append(float(metrics["step_accepted"]))
            value_moved = jnp.abs(
                new.trained["value"].head["kernel"] - state.trained["value"].head["kernel"]
            ).max()
            assert float(value_moved) > 0
            state = new
    assert np.mean(taken) > 0.8, taken


def test_the_value_leaves_the_direction_of_the_policy_alone(tiny_llama):
    """With the head on the policy's states, returns of any size change the head and not the policy's gradient."""
    model, base = tiny_llama
    network, trained, settings = (
        Network(model, vocab_chunk=0),
        make_roles(model, base, "lora"),
        ROW.settings(),
    )
    batch = on_policy(jax.jit(network.logprobs), base, trained, make_batch(model.config))

    @jax.jit
    def gradient(batch):
        loss = lambda trained: ROW.objective(settings, network, trained, {"base": base}, {}, batch, None)[0]
        return jax.grad(loss)(trained)

    plain, other = gradient(batch), gradient(batch.replace(returns=100.0 * batch.returns))
    jax.tree.map(np.testing.assert_array_equal, plain["policy"], other["policy"])
    assert float(jnp.abs(plain["value"].head["bias"] - other["value"].head["bias"])) > 0


@pytest.mark.parametrize("changes, message", [
    (dict(rollout_epochs=2), "rollout_epochs is 2; expected 1"),
    (dict(num_minibatches=4), "num_minibatches is 4; expected 1"),
    (dict(backtrack_factor=1.0), "backtrack_factor is 1.0; expected a number below 1"),
])  # fmt: skip
def test_settings_that_contradict_the_limit_are_refused(changes, message):
    assert ROW.settings().check() is None
    assert message in ROW.settings(**changes).check()
