"""One finished run of the whole road, shared by the tests of a worker."""

import pytest

from tests.experiments.small_runs import Reads, on_one_device, run_small


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """(workdir, what was read of its config)."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        run_small(workdir)
    return workdir, reads


@pytest.fixture(scope="session")
def finished(first_run):
    return first_run[0]


@pytest.fixture
def one_device():
    """For what does not depend on the mesh: every algorithm and the whole road run on eight devices."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo what it has patched itself
        on_one_device(patch)
        yield
