"""Mistakes found in well-known group-relative trainers, each of which must fail here.

Each test says what the wrong code computes, and checks that ours computes something else, and the right thing."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.grpo import grpo_loss

ONE = jnp.ones((1, 1))


def slope(log_ratio, advantage, logprob=-1.0, **arguments):
    """Gradient of the loss of one token by its log-probability."""
    at = jnp.full((1, 1), logprob)
    loss = lambda lp: grpo_loss(lp, at - log_ratio, None, jnp.array([advantage]), ONE, **arguments)[0]
    return float(jax.grad(loss)(at)[0, 0])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "gspo", "luspo"])
def test_b2_the_clip_is_pessimistic_for_negative_advantages(loss_type):
    # With max in place of min, A = -1 gave slope 0.5 at ratio 0.5 (it goes on pushing down what is far down already)
    # and 0 at ratio 1.5 (it leaves alone a bad token that grew likelier).
    assert slope(np.log(0.5), -1.0, loss_type=loss_type) == 0.0
    np.testing.assert_allclose(slope(np.log(1.5), -1.0, loss_type=loss_type), 1.5, rtol=1e-5)
    # The other sign, where max and min had changed places too.
    assert slope(np.log(1.5), 1.0, loss_type=loss_type) == 0.0
    np.testing.assert_allclose(slope(np.log(0.5), 1.0, loss_type=loss_type), -0.5, rtol=1e-5)


@pytest.mark.parametrize("logprob", [-0.1, -1.0, -3.0])
@pytest.mark.parametrize("advantage", [1.0, -2.0])
def test_b3_cispo_weights_are_constants(logprob, advantage):
    # Without stop-gradient the slope is -(1 + log pi) A on-policy: of the wrong sign for every token below 1/e.
    got = slope(0.0, advantage, logprob, loss_type="cispo", clip_high=5.0)
    np.testing.assert_allclose(got, -advantage, rtol=1e-6)
    # Off-policy the slope is the capped ratio: it is never lost, and never grows past the cap.
    got = slope(np.log(8.0), advantage, logprob, loss_type="cispo", clip_high=5.0)
    np.testing.assert_allclose(got, -5.0 * advantage, rtol=1e-6)


def expected_kl_gradient(kind):
    """The penalty's gradient by the policy's logits, averaged over every token that the policy can draw."""
    logits, ref_logits = jnp.array([0.3, -1.2, 2.0, 0.1]), jnp.array([-0.5, 0.4, 0.9, 1.1])
    drawn = jax.nn.softmax(logits)

    def loss_of_draw(logits, token):
        lp = jax.nn.log_softmax(logits)[token]
        ref = jax.nn.log_softmax(ref_logits)[token]
        arrays = [jnp.broadcast_to(x, (1, 1)) for x in (lp, ref)]
        kind_argument = {} if kind is None else {"kl_kind": kind}
        return grpo_loss(arrays[0], arrays[0], arrays[1], jnp.zeros(1), ONE, beta=1.0, **kind_argument)[0]

    grads = jax.vmap(jax.grad(loss_of_draw), (None, 0))(logits, jnp.arange(4))
    p, q = np.float64(drawn), np.float64(jax.nn.softmax(ref_logits))
    d = np.log(p / q)
    return np.asarray(drawn @ grads), p * (d - (p * d).sum()), p - q


def test_b6_k1_in_the_loss_pulls_nowhere_and_is_not_the_default():
    k1, _, _ = expected_kl_gradient("k1")
    np.testing.assert_allclose(k1, 0.0, atol=1e-6)  # beta would do nothing
    assert inspect.signature(grpo_loss).parameters["kl_kind"].default == "k3"
    default, _, reverse = expected_kl_gradient(None)
    # d KL(reference || policy) / d logits = p - q: towards the reference, of size 0.4 here.
    np.testing.assert_allclose(default, reverse, atol=1e-6)
    assert np.abs(default).max() > 0.3


@pytest.mark.parametrize("kind", ["k2", "k3+"])
def test_b6_k2_has_the_gradient_of_the_kl(kind):
    # d KL(policy || reference) / d logits = p (log p/q - KL).
    got, forward, _ = expected_kl_gradient(kind)
    np.testing.assert_allclose(got, forward, atol=1e-6)


def test_b6_a_penalty_never_vanishes_in_silence():
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(ONE, ONE, None, jnp.ones(1), ONE, beta=0.04)
