"""TRPO: PPO's advantages, the unclipped surrogate, and a step inside a KL limit in the place of AdamW's.

The Fisher matrix is that of the whole vocabulary at every completion position, J^T (diag(p) - p p^T) J: tangents are
pushed to the states (J), through the softmax by vocabulary chunk, and pulled back (J^T). Neither matrix nor logits are
ever held. The KL that limits the step is exact in the same sense. Knows no optimizer but by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.losses import fisher
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.losses.policy_gradient import policy_gradient_loss
from rlhf_jax.training.algorithms import actor_critic
from rlhf_jax.training.algorithms.actor_critic import CriticSettings
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.shared import control_kl, sequences, token_mask, with_entropy
from rlhf_jax.training.trust_region import trust_region
from rlhf_jax.training.update import microbatches


@dataclasses.dataclass(frozen=True)
class TRPOSettings(CriticSettings):
    """Schulman et al. 2015, arXiv:1502.05477, with GAE (arXiv:1506.02438)."""

    max_kl_per_token: float = 0.01  # nats, mean over tokens, of KL(before || after) the step; never exceeded
    cg_iterations: int = 10
    cg_tolerance: float = 1e-3  # of the gradient's norm
    cg_damping: float = 0.1  # of the curvature along the gradient
    backtrack_factor: float = 0.8
    backtrack_steps: int = 10
    accept_ratio: float = 0.1  # of the gain that the gradient promises
    # The limit is one step's, on the batch it was measured on.
    rollout_epochs: int = 1
    num_minibatches: int = 1
    num_microbatches: int = 1

    def check(self) -> str | None:
        for name in ("rollout_epochs", "num_minibatches"):
            if getattr(self, name) != 1:
                return (
                    f"{name} is {getattr(self, name)}; expected 1: TRPO makes one step a rollout, on all of it. For a "
                    "longer step raise max_kl_per_token; for less memory, num_microbatches."
                )
        if not self.backtrack_factor < 1:
            return f"backtrack_factor is {self.backtrack_factor}; expected a number below 1."
        return super().check()


def objective(settings, network, trained, frozen, controllers, batch, rng):
    """The surrogate of the policy beside the loss of the value, which leaves the policy's states alone: with the head
    on these (value "shared") its gradient would be mixed into the one that the trust region is for."""
    logprobs, entropy, states = network.logprobs(frozen["base"], trained["policy"], batch)
    policy_loss, metrics = _policy_loss(logprobs, batch)
    states = jax.lax.stop_gradient(states)
    return actor_critic.with_value(
        settings, network, trained, frozen, batch, states, entropy, policy_loss, metrics, ("squared", 0.0)
    )


def optimizer(settings, adamw):
    """The trust region for the policy, AdamW for the value."""
    names = [field.name for field in dataclasses.fields(settings)]
    keys = [name for name in names if name.startswith(("max_kl_", "cg_", "backtrack_", "accept_"))]
    step = trust_region(**{name: getattr(settings, name) for name in keys})
    return optax.partition({"policy": step, "value": adamw}, {"policy": "policy", "value": "value"})


def extras(settings, network, trained, frozen, batch):
    """{value_and_kl_fn, fisher_fn} of `trust_region`, over the whole batch, one microbatch in memory at a time.

    With one microbatch the decoder is linearised once, and what it keeps for that serves every Fisher product; with
    more, each product computes it again."""
    base, old = frozen["base"], trained["policy"]
    tokens = jnp.maximum(token_mask(batch).sum(), 1.0)
    head = network.unembedding(base, old)
    options = network.reading(head)
    head_is_trained = old.base is not None  # an adapter leaves it as it is

    def outputs(part, policy):
        """What makes the logits, as far as it is trained. States outside the mask may hold anything, so they go."""
        states = jnp.where(_inside(part), network.states(base, policy, part), 0.0)
        return (states, network.unembedding(base, policy)) if head_is_trained else (states,)

    def noted(states):
        return states, fisher.softmax_moments(states, head, **options)

    def value_and_kl(policy, part, before):
        states, (normaliser, _) = before
        logprobs, entropy, new = network.logprobs(base, policy, part)
        loss, _ = _policy_loss(logprobs, part)
        mask = token_mask(part)
        loss = with_entropy(settings, loss, masked_mean(sequences(entropy), mask))
        kl = fisher.softmax_kl(states, head, normaliser, new, network.unembedding(base, policy), **options)
        return jnp.stack([loss, masked_mean(sequences(kl), mask)]) * mask.sum() / tokens

    def product(push, part, before):
        """v -> this part's share of the Fisher matrix times v. push: the decoder's linear part at old."""
        pull = jax.linear_transpose(push, old)
        weights = token_mask(part).reshape(part.completion_mask.shape) / tokens

        def times(vector):
            tangent, *of_head = push(vector)
            back = fisher.fisher_product(
                before[0],
                head,
                before[1],
                tangent,
                weights,
                unembedding_tangent=of_head[0] if of_head else None,
                **options,
            )
            return pull(back if head_is_trained else back[:1])[0]

        return times

    count = settings.num_microbatches
    if count == 1:
        first, push = jax.linearize(functools.partial(outputs, batch), old)
        before = noted(first[0])
        times = product(push, batch, before)
        measured = lambda policy: value_and_kl(policy, batch, before)
    else:
        parts = microbatches(batch, count)
        parts = (parts, jax.lax.map(lambda part: noted(outputs(part, old)[0]), parts))

        def times(vector):
            def one(part, before):
                _, push = jax.linearize(functools.partial(outputs, part), old)
                return product(push, part, before)(vector)

            return _total(one, parts)

        measured = lambda policy: _total(functools.partial(value_and_kl, policy), parts)
    return {
        "value_and_kl_fn": lambda params: tuple(measured(params["policy"])),
        "fisher_fn": lambda vector: {**vector, "policy": times(vector["policy"])},
    }


def _total(one, parts):
    """The sum of one(*part) over the leading axis of parts."""
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda p: one(*p), first))
    return jax.lax.scan(lambda sums, p: (jax.tree.map(jnp.add, sums, one(*p)), None), zeros, parts)[0]


def _policy_loss(logprobs, batch):
    return policy_gradient_loss(
        sequences(logprobs), sequences(batch.old_logprobs), sequences(batch.advantages), token_mask(batch)
    )


def _inside(batch):
    return token_mask(batch).reshape(*batch.completion_mask.shape, 1) > 0


ROWS = {
    "trpo": Algorithm(
        TRPOSettings,
        objective,
        actor_critic.prepare,
        control_kl,
        trains=("policy", "value"),
        optimizer=optimizer,
        extras=extras,
        linearises=True,
    )
}
