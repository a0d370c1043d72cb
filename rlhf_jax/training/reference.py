"""What a policy on preferences is measured from, where that is not the frozen base scored at each step.

Either the base's log-probabilities of all records, computed once and kept; or a role of its own that follows the
policy: TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656. Knows no loss."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import kept
from rlhf_jax.checkpoints.digest import digest
from rlhf_jax.models import lora
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as meshes


def kept_logprobs(run, stage: str, sets: dict, make_batch, batch_size: int, identity: dict) -> dict:
    """Log-probabilities under the base, from the workdir if they are there, else computed and left there.

    Args:
      sets: {name: records}. make_batch: (records, batch size) -> GroupedBatch, of one shape for all.
      identity: JSON; what decides the tokens of the records.
    Returns: {name: [N, G, R] float32 nats, on the host}.
    """
    network, path = run.network(), run.path("reference", f"{stage}.npz")
    model = {name: str(getattr(run.model.config, name)) for name in ("dtype", "eos_ids")}
    with meshes.activate(run.mesh):
        made_of = {"base": digest(run.base), "records": identity, "model": model}
        found = kept.load(path, made_of)
        if not hosts.agree(found is None):
            run.console.note(f"{stage}: reference log-probabilities read from {path}")
            return found
        found = None
        logprobs = make_logprobs(network)
        total = sum(len(records) for records in sets.values())
        run.console.note(f"{stage}: reference log-probabilities of {total} records, computed once")
        for name, records in sets.items():
            parts = []
            for i in range(0, len(records), batch_size):
                run.stop.check(
                    f"{stage}, reference log-probabilities of {name}, record {i} of {len(records)}"
                )
                batch = run.put(make_batch(records[i : i + batch_size], batch_size))
                parts.append(np.asarray(hosts.gather(logprobs(run.base, batch)), np.float32))
            if parts:
                found = (found or {}) | {name: np.concatenate(parts)[: len(records)]}
    hosts.once(lambda: kept.save(path, made_of, found))
    return found


def make_logprobs(network):
    """Jitted (base, batch) -> [B, G, R] nats under the base."""
    return jax.jit(lambda base, batch: network.logprobs(base, Role(), batch)[0])


def follower(policy: Role, base: dict, mix: float) -> Role:
    """The reference before the first step, with arrays of its own: what the policy starts as.

    With mix 1 it is only ever a copy of the policy, so an adapter is enough; else it needs weights, in float32.
    """
    if mix == 1:
        return jax.tree.map(lambda x: jnp.array(x, copy=True), policy)
    return Role(base=jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), base))


def follow(reference: Role, policy: Role, base: dict, mix: float, settings: lora.LoraConfig) -> Role:
    """mix * policy + (1 - mix) * reference, in weights.

    An adapter is merged first: a mean of factors is not the factors of a mean.
    """
    if mix == 1:
        return policy
    weights = policy.base
    if weights is None:
        weights = lora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), base), policy.adapter, settings)
    return Role(base=jax.tree.map(lambda new, old: mix * new + (1.0 - mix) * old, weights, reference.base))


def synced(update, every_steps: int, mix: float, settings: lora.LoraConfig):
    """An update of make_update, measured from state.reference, which then follows each `every_steps` steps."""

    def step(state, frozen, batch):
        state, metrics = update(state, frozen | {"reference": state.reference}, batch)
        moved = lambda: follow(state.reference, state.trained["policy"], frozen["base"], mix, settings)
        reference = jax.lax.cond(state.step % every_steps == 0, moved, lambda: state.reference)
        return state.replace(reference=reference), metrics

    return step
