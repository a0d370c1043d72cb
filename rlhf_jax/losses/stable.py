"""Functions of log-probabilities whose plain form overflows or cancels in float32.

Knows numbers; nothing of what they stand for. Where a function ends, its tangent goes on: a value past the end stays
finite and keeps the sign of its gradient, where a clamp would leave none."""

import jax
import jax.numpy as jnp

EXPONENT_LIMIT = 30.0  # nats. exp(30) is 1e13: times a log ratio of 1e4, and squared, it still is a float32.
LOG1MEXP_LIMIT = 1e-6  # nats below 0, about the rounding of a log-probability


def box_cox(log_x: jax.Array, power: float | jax.Array) -> jax.Array:
    """(x^power - 1) / power from log x, and log x itself, its limit, at power 0.

    Args:
      log_x: any shape. power: a number.
    Returns: float32 of that shape, exact to rounding while power * log_x is at most `EXPONENT_LIMIT`, the tangent
      from there on. 0 at x = 1, with slope 1 in log x, for every power.
    """
    log_x, power = jnp.asarray(log_x, jnp.float32), jnp.asarray(power, jnp.float32)
    exponent = power * log_x
    beyond = jnp.maximum(exponent - EXPONENT_LIMIT, 0.0)
    inside = jnp.minimum(exponent, EXPONENT_LIMIT)
    # jax takes the slope of expm1 from its value plus 1, which has lost e^-20; that of exp has not.
    less_1 = jnp.where(jnp.abs(inside) < 0.5, jnp.expm1(inside), jnp.exp(inside) - 1.0)
    grown = less_1 + jnp.exp(EXPONENT_LIMIT) * beyond
    return jnp.where(power == 0.0, log_x, grown / jnp.where(power == 0.0, 1.0, power))


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x): from the log-probability of an event, that of its contrary.

    Args:
      x: any shape, nats, at most 0 but for rounding.
    Returns: float32 of that shape; from -`LOG1MEXP_LIMIT` on the tangent, since -inf waits at 0. Two branches, as in
      Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    x = jnp.asarray(x, jnp.float32)
    inside = jnp.minimum(x, -LOG1MEXP_LIMIT)
    beyond = jnp.maximum(x + LOG1MEXP_LIMIT, 0.0)
    value = jnp.where(inside > -jnp.log(2.0), jnp.log(-jnp.expm1(inside)), jnp.log1p(-jnp.exp(inside)))
    return value - beyond / jnp.expm1(LOG1MEXP_LIMIT)
