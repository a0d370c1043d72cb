"""What is read of compiled programs: trip counts, groups, bytes by kind; on real text of eight devices, and on lines as
the TPU's compiler writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.parallel import collectives, hlo
from rlhf_jax.parallel import mesh as meshes

L, B, D = 5, 16, 64


def everywhere(group):
    return 1e9


@pytest.fixture(scope="module")
def compiled():
    """Scanned layers whose weights are split over fsdp, and a mean: gathered a layer, summed once."""
    mesh = meshes.make_mesh(fsdp=8)

    def f(w, x):
        layer = lambda h, m: (jnp.tanh(h @ jax.lax.with_sharding_constraint(m, PartitionSpec())), None)
        return jax.lax.scan(layer, x, w)[0].sum()

    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    w = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=place(None, "fsdp"))
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=place("fsdp"))
    with meshes.activate(mesh):
        return jax.jit(f).trace(w, x).lower().compile().as_text()


def test_collectives_of_a_real_program(compiled):
    once, looped = collectives.count(hlo.Program(compiled), 8, everywhere)
    gathered = once["all-gather"]
    assert gathered.bytes == L * D * D * 4 * 7 / 8 and gathered.count == L
    assert gathered.seconds == pytest.approx(gathered.bytes / 1e9)
    assert once["all-reduce"].bytes == 2 * 4 * 7 / 8  # one float
    assert not looped


TPU = """HloModule jit_f, is_scheduled=true

%fused.1 (p0: bf16[6,256,1024], p1: s32[]) -> bf16[1,256,1024] {
  %p0 = bf16[6,256,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %c0 = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %c0, %c0)
}

%gather.a (p: bf16[1,256,1024]) -> (bf16[1,256,1024], bf16[1,1024,1024]) {
  %p = bf16[1,256,1024]{2,1,0} parameter(0)
  %all-gather.1 = bf16[1,1024,1024]{2,1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}
  ROOT %t = (bf16[1,256,1024]{2,1,0}, bf16[1,1024,1024]{2,1,0}) tuple(%p, %all-gather.1)
}

%gather.b (q: bf16[1,256,1024], r: bf16[1,1024,1024]) -> bf16[1,1024,1024] {
  %q = bf16[1,256,1024]{2,1,0} parameter(0)
  %r = bf16[1,1024,1024]{2,1,0} parameter(1)
  ROOT %all-gather.2 = bf16[1,1024,1024]{2,1,0} all-gather(%q), channel_id=7, replica_groups=mesh['a'=4] {'a'}
}

%body (w: (s32[], bf16[6,256,1024])) -> (s32[], bf16[6,256,1024]) {
  %one = s32[]{:T(128)} constant(1)
  %w = (s32[]{:T(128)}, bf16[6,256,1024]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  %weights = bf16[6,256,1024]{2,1,0} get-tuple-element(%w), index=1
  %layer = bf16[1,256,1024]{2,1,0} fusion(%weights, %i), kind=kLoop, calls=%fused.1
  %start = (bf16[1,256,1024]{2,1,0}, bf16[1,1024,1024]{2,1,0}) fusion(%layer), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%gather.a
  %s0 = bf16[1,256,1024]{2,1,0} get-tuple-element(%start), index=0
  %s1 = bf16[1,1024,1024]{2,1,0} get-tuple-element(%start), index=1
  %done = bf16[1,1024,1024]{2,1,0} fusion(%s0, %s1), kind=kCustom, \
output_to_operand_aliasing={{}: (1, {})}, calls=%gather.b
  %fast = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} custom-call(%done), custom_call_target="x"
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, bf16[6,256,1024]{2,1,0}) tuple(%next, %weights)
}

%condition (w: (s32[], bf16[6,256,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %w = (s32[]{:T(128)}, bf16[6,256,1024]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%going (w: (s32[], bf16[6,256,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(64)
  %w = (s32[]{:T(128)}, bf16[6,256,1024]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
  %more = pred[]{:T(512)} custom-call(%i), custom_call_target="unfinished"
  ROOT %and = pred[]{:T(512)} and(%lt, %more)
}

ENTRY %main (w: bf16[6,256,1024]) -> (s32[], bf16[6,256,1024]) {
  %zero = s32[]{:T(128)} constant(0)
  %w = bf16[6,256,1024]{2,1,0} parameter(0)
  %t = (s32[]{:T(128)}, bf16[6,256,1024]{2,1,0}) tuple(%zero, %w)
  %scan = (s32[]{:T(128)}, bf16[6,256,1024]{2,1,0}) while(%t), condition=%condition, body=%body
  ROOT %decode = (s32[]{:T(128)}, bf16[6,256,1024]{2,1,0}) while(%scan), condition=%going, body=%body
}
"""
WHOLE = 1024 * 1024 * 2


def test_trip_counts_and_fused_collectives():
    """A gather that overlaps with others stands in several fusions, and is one."""
    once, looped = collectives.count(hlo.Program(TPU), 4, everywhere, trips=63)
    assert once["all-gather"].count == 6 and looped["all-gather"].count == 63
    assert once["all-gather"].bytes == 6 * WHOLE * 3 / 4


def test_traffic_reads_slices_and_leaves_fast_memory_out():
    program = hlo.Program(TPU)
    moved = {run.instruction.name: program.traffic(run) for run in program.runs() if not run.by_data}
    assert moved["layer"] == 2 * WHOLE / 4 + 4  # a layer read, not all six, and written; and its number
    assert moved["start"] == WHOLE and moved["done"] == WHOLE / 4  # gathered from the shard, written once
    assert moved["fast"] == WHOLE  # read; its result stays beside the cores


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], dims", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dims", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups(text, groups):
    np.testing.assert_array_equal(hlo.groups(", channel_id=1, " + text, 8), groups)


def test_received_bytes_by_hand():
    of = lambda kind, result, operands: collectives.received(kind, result, operands, 4)
    assert of("all-gather", 400, 100) == 300
    assert of("reduce-scatter", 100, 400) == 300
    assert of("all-reduce", 400, 400) == 600
    assert of("all-to-all", 400, 400) == 300
    assert of("collective-permute", 400, 400) == 400
