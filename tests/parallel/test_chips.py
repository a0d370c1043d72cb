"""Slices by name, links between chips, the bound, and the compiler's words about memory."""

import re

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import chips, roofline
from rlhf_jax.parallel.aot import out_of_memory
from rlhf_jax.parallel.chips import GIB


def test_slices():
    assert chips.parse("v5e:4x8").chips == 32
    assert chips.parse("v4:2x2x4").devices == 16
    assert chips.parse("v3:4x4").devices == 32  # two a chip
    assert chips.parse("v5:2x2x1").name == "v5p:2x2x1"


@pytest.mark.parametrize("name", ["v7x:2x2", "v5e", "v5e:4", "v4:4x4", "v5e:4x0", "v5e:a", "", "v5e:4x4x"])
def test_unknown_slices_are_told_with_those_there_are(name):
    with pytest.raises(InputError, match=re.escape(repr(name)) + ".*(v5e:|v4:2x2x4)"):
        chips.parse(name)


def test_links_that_a_group_can_use():
    """v5e closes a dimension of 16 to a ring, v4 one of 4: two links there, else one at the ends of a line."""
    line = [(x, 0, 0) for x in range(4)]
    square = [(x, y, 0) for x in range(4) for y in range(4)]
    v5e, v4 = chips.parse("v5e:4x4"), chips.parse("v4:4x4x4")
    assert v5e.reach(line) == 45e9 and v5e.reach(square) == 90e9
    assert v4.reach(line) == 90e9 and v4.reach(square) == 180e9
    assert v4.reach(line[:2]) == 45e9  # half of a ring is a line
    assert chips.parse("v5e:16x16").reach([(x, 0, 0) for x in range(16)]) == 90e9


def test_the_slowest_binds():
    bound = roofline.bound(2e12, 3e9, 0.001, peak_flops=1e12, hbm_bandwidth=1e9)
    assert (bound.compute, bound.memory, bound.interconnect) == (2.0, 3.0, 0.001)
    assert bound.seconds == 3.0 and bound.binds == "memory"
    assert roofline.bound(4e12, 3e9, 5.0, peak_flops=1e12, hbm_bandwidth=1e9).binds == "interconnect"


def test_out_of_memory_is_read():
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (15.78G) exceeds available HBM (15.75G). HLO module: jit_sample."
    )
    needs, said = out_of_memory(text)
    assert needs == 15.78 * GIB and said == "needs 15.78 of 15.75 GiB"
    assert out_of_memory(text.replace("15.78G", "3.91T"))[0] == 3.91 * 1024 * GIB
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.21G of 15.75G hbm. Exceeded by 1.46G."
    assert out_of_memory(used) == (17.21 * GIB, "needs 17.21 of 15.75 GiB")
    assert out_of_memory("INVALID_ARGUMENT: something else") == (0.0, None)
