"""Losses, advantages, KL estimates and controllers: arrays in, arrays out.

May import jax, optax, chex and its own folder. Never a model, a file, a mesh, a config or a batch type, so that the
folder can be taken away and used elsewhere. Reductions are float32; masks are 1 where a token counts, and what stands
where they are 0, NaN included, reaches neither a value nor a gradient."""
