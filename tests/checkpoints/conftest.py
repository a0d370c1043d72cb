"""What tests of checkpoints begin with: states and a directory of two steps, made once, and a saved model."""

import pytest

from rlhf_jax.checkpoints import huggingface
from tests.checkpoints.made_models import config_of, random_params
from tests.checkpoints.made_states import make, open_store


@pytest.fixture(scope="session")
def states():
    return {step: make(step) for step in (1, 2, 3)}


@pytest.fixture(scope="session")
def two_steps(states, tmp_path_factory):
    """A directory with steps 1 and 2; tests copy it."""
    directory = tmp_path_factory.mktemp("two_steps")
    with open_store(directory) as store:
        for step in (1, 2):
            store.save(step, states[step], {"position": step}, {"reward": step})
    return directory


@pytest.fixture
def saved(tmp_path):
    """(directory of a small checkpoint, its config, its params)"""
    config = config_of()
    params = random_params(config)
    huggingface.save_llama(str(tmp_path / "model"), config, params)
    return tmp_path / "model", config, params
