"""The arithmetic that a workload cannot do without, of rlhf_jax/models/arithmetic.py, over the machine's best matmul
rate: what no program goes below.

Log-probabilities and values of the behaviour policy come from sampling."""

from benchmarks.workloads import Workload
from rlhf_jax.models import arithmetic


def flops(workload: Workload) -> float:
    """Floating-point operations of one iteration."""
    w = workload
    tokens = arithmetic.Tokens.of_groups([w.prompt] * w.rows, [[w.completion] * w.completions] * w.rows)
    forward = arithmetic.forward(w.model, tokens)
    update = forward.times(arithmetic.training_passes(full=not w.lora))
    if w.kind in ("sft", "dpo"):
        return update if w.kind == "sft" else update + forward.times(1, 1, 1)
    sampling = reference = forward.times(1, 1, 1)
    if w.kind == "sample":
        return sampling
    reward = forward.times(1, 0, 1) if w.kind == "ppo" else 0.0
    return sampling + reference + reward + w.epochs * update


def matmul_rate(seconds: float = 1.0) -> float:
    """The best of several large float32 products here, in floating-point operations a second."""
    from rlhf_jax.parallel import peak

    return peak.measured("float32", (1024, 2048, 4096), seconds)
