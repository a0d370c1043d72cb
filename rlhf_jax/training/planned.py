"""A run in which every array is a shape: the same roles and programs on a described slice, and nothing is allocated.

What a real run finds out from its data (the longest prompt, the tokenizer's end tokens) is taken from the config and
the model's. Reads no records."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.training import state as states
from rlhf_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class PlannedTokenizer:
    """What programs read of a tokenizer."""

    vocabulary_size: int
    eos_ids: tuple[int, ...]
    pad_id: int = 0


class PlannedRun(Run):
    def __init__(self, config, devices):
        """devices: of the slice, as the compiler describes them."""
        super().__init__(config, workdir="", console=None, stop=None)
        self.devices, self._traced = devices, None  # key and base, while roles are made of them

    @functools.cached_property
    def mesh(self):
        return meshes.make_mesh(**self.config.mesh.to_dict(), devices=self.devices)

    @functools.cached_property
    def _loaded(self):
        config = huggingface.shape_of(self.config.model.path)
        self.check_lengths(config)
        section = self.config.model
        shapes, names = sharding.llama_abstract(config, jnp.dtype(section.param_dtype), section.quantise)
        return config, placed(shapes, sharding.named(names, shapes, self.mesh))

    @property
    def base(self):
        """Supervised fine-tuning gives weights of the same shapes."""
        return self.raw_base if self._traced is None else self._traced[1]

    @functools.cached_property
    def tokenizer(self):
        config = self._loaded[0]
        return PlannedTokenizer(config.vocab_size, config.eos_ids or (0,))

    @property
    def prompt_length(self) -> int:
        return self.config.data.prompt_tokens

    def has_role(self, name: str) -> bool:
        return True  # stages before have left theirs

    @functools.cached_property
    def key(self):
        """Of any stage."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return placed(key, sharding.replicated(self.mesh))

    def rng(self, stage: str, member: int = 0):
        return self.key if self._traced is None else self._traced[0]

    def roles(self, make, *arguments) -> dict[str, Role]:
        """What make(*arguments) -> {name: Role} gives, as shapes on the mesh; it may read this run's base and keys."""

        def traced(key, base, *arguments):
            self._traced = (key, base)
            try:
                return make(*arguments)
            finally:
                self._traced = None

        made = jax.eval_shape(traced, self.key, self.raw_base, *arguments)
        return placed(made, states.trained_shardings(made, self.model.config, self.mesh))

    def rows(self, *shape, dtype=jnp.int32, axis: int = 0):
        """An array of a batch, split over its rows, as `put` places it.  Raises: InputError if it cannot be."""
        ways = sharding.batch_ways(self.mesh)
        if shape[axis] % ways:
            raise InputError(
                f"a batch of {shape[axis]} rows cannot be split over {ways} devices (mesh axes "
                f"{dict(sharding.RULES)['batch']}); make the stage's batch_size a multiple of {ways}, or change "
                "config.mesh."
            )
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(self.mesh, axis))

    def as_batch(self, tree):
        """Shapes [B, ...], as rows of a batch."""
        return jax.tree.map(lambda x: self.rows(*x.shape, dtype=x.dtype), tree)

    def everywhere(self, tree):
        return placed(tree, sharding.replicated(self.mesh))

    def state(
        self, trained: dict, optimizer, controllers: dict, *, reference=None, memory=None, shardings=None
    ):
        """states.create, as shapes."""
        shardings = shardings or states.trained_shardings(trained, self.model.config, self.mesh)
        moments = sharding.optimizer_shardings(optimizer, trained, shardings, self.mesh)
        opt_state = placed(jax.eval_shape(optimizer.init, trained), moments)
        scalars = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in controllers}
        step = jax.ShapeDtypeStruct((), jnp.int32)
        step, scalars, memory = self.everywhere((step, scalars, memory))
        return states.TrainState(trained, opt_state, step, self.key, scalars, reference, memory)


def placed(tree, shardings):
    """Shapes with their shardings: one for all, or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
