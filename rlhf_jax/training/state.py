"""TrainState: everything that changes while a stage trains, as one pytree. A checkpoint is this and a little JSON."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import sharding


@flax.struct.dataclass
class TrainState:
    trained: dict  # {role: models.roles.Role}; what gradients and the optimizer see
    opt_state: Any
    step: jax.Array  # int32, finished steps of this stage
    rng: jax.Array  # the stage's key; step n draws from fold_in(rng, n), so nothing random is carried
    controllers: dict  # float32 scalars that adapt: kl_coeff, the normalisation of rewards, ...
    # One that follows the policy (training/reference.py); None: the frozen base.
    reference: Role | None = None
    memory: Any = None  # of a row that keeps samples from step to step (Quark's pool)


def create(
    trained: dict,
    optimizer: optax.GradientTransformation,
    rng,
    controllers: dict,
    config,
    mesh,
    *,
    reference: Role | None = None,
    memory=None,
    shardings: dict | None = None,
) -> TrainState:
    """A fresh state, every array placed on the mesh and the state's own: updates donate it.

    config: LlamaConfig, of roles of a decoder. shardings: of `trained` where that is another network; config is then
    not read.
    """
    rng = jax.random.fold_in(rng, 0)
    if shardings is None:
        shardings = trained_shardings(trained, config, mesh)
    trained = sharding.place(trained, shardings)
    moments = sharding.optimizer_shardings(optimizer, trained, shardings, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=moments)(trained)
    everywhere = sharding.replicated(mesh)
    controllers = {name: jnp.asarray(value, jnp.float32) for name, value in controllers.items()}
    step, rng, controllers, memory = sharding.place((jnp.int32(0), rng, controllers, memory), everywhere)
    if reference is not None:
        reference = sharding.place(reference, sharding.role_shardings(reference, config, mesh))
    return TrainState(trained, opt_state, step, rng, controllers, reference, memory)


def trained_shardings(trained: dict, config, mesh) -> dict:
    return {name: sharding.role_shardings(role, config, mesh) for name, role in trained.items()}


def abstract(state: TrainState):
    """Shapes, dtypes and shardings: what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
