"""Floating-point operations of a traced program, by walking it: every product, times the trips of its loops.

The compiler's own count has the body of a loop once, so a decoder of scanned layers would come out with one layer.
Counts what the matrix unit does (2 a multiply-add); elementwise work is memory traffic, not arithmetic. Knows jaxprs,
nothing of models."""

import dataclasses
import math

from jax.extend import core
from jax.interpreters import partial_eval


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of all devices together."""

    once: float = 0.0  # outside of loops that the data end
    looped: float = 0.0  # inside of those: decoding, token by token

    @property
    def total(self) -> float:
        return self.once + self.looped


def count(jaxpr, trips: int = 1) -> Flops:
    """Of a closed jaxpr. trips: of a loop that the data end (lax.while_loop), at most; those of a scan are known.

    Of the branches of a condition the dearest counts. Results that nothing reads are not counted: the compiler drops
    them. A sharded region counts once for each device; a kernel by its own estimate, or its body once a grid cell.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _walk(live, trips)


def _walk(jaxpr, trips) -> Flops:
    once = looped = 0.0
    for equation in jaxpr.eqns:
        found = _equation(equation, trips)
        once, looped = once + found.once, looped + found.looped
    return Flops(once, looped)


def _equation(equation, trips) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(_dot(equation))
    if name == "conv_general_dilated":
        return Flops(_convolution(equation))
    if name == "while":
        return Flops(looped=trips * _walk(params["body_jaxpr"].jaxpr, trips).total)
    if name == "cond":
        return max((_walk(branch.jaxpr, trips) for branch in params["branches"]), key=lambda one: one.total)
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate is not None and estimate.flops:
            return Flops(float(estimate.flops))
        return _times(_walk(params["jaxpr"], trips), math.prod(params["grid_mapping"].grid))
    factor = 1
    if name == "scan":
        factor = params["length"]
    elif name == "shard_map":
        factor = params["mesh"].size
    inner = [_times(_walk(sub, trips), factor) for sub in _jaxprs(params)]
    return Flops(sum(one.once for one in inner), sum(one.looped for one in inner))


def _times(found: Flops, factor) -> Flops:
    return Flops(found.once * factor, found.looped * factor)


def _jaxprs(params):
    """Those of a call; of a derivative rule beside it nothing runs."""
    for name, value in params.items():
        if name in ("jvp_jaxpr_fun", "fwd", "bwd", "fwd_jaxpr_thunk", "transpose_jaxpr", "cond_jaxpr"):
            continue
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, core.Jaxpr):
                yield one


def _dot(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)


def _convolution(equation) -> float:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
