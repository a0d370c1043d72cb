"""What utilisation is measured against: a data sheet where there is one, else a measurement, made once."""

import time
import types

import jax
import pytest

from rlhf_jax.parallel import peak
from rlhf_jax.parallel.chips import CHIPS


def test_a_tpu_has_a_data_sheet():
    device = types.SimpleNamespace(device_kind="TPU v5 lite", platform="tpu", process_index=0)
    found = peak.of_devices([device] * 4, "bfloat16")
    assert found.flops == 4 * 197e12 and "v5e" in found.source
    assert set(peak.TPU_KINDS.values()) == set(CHIPS)


def test_devices_that_share_the_cores_of_a_cpu_count_once():
    began = time.perf_counter()
    one = peak.of_devices(jax.devices()[:1], "float32")
    took = time.perf_counter() - began
    assert peak.of_devices(jax.devices(), "float32") == one and 1e8 < one.flops < 1e14
    assert "measured" in one.source
    assert took < 3.0  # 0.3 s on a quiet machine


def test_the_best_of_all_sizes_is_told_and_slow_ones_are_not_repeated(monkeypatch):
    """At 0.25 s a product, one is made to compile and one to measure, and none of a larger size."""
    now, made = [0.0], []

    class Product:
        def block_until_ready(self):
            now[0] += 0.25
            return self

    monkeypatch.setattr(peak, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(peak.jax, "jit", lambda f: lambda x, y: made.append(len(x)) or Product())
    assert peak.measured("float32", (2, 4), 0.04) == pytest.approx(2 * 2**3 / 0.25)
    assert made == [2, 2]
