"""What the processes of one run tell each other outside of jitted code. With one process, nothing."""

import jax
import numpy as np


def agree(code: int) -> int:
    """The worst code of all processes."""
    if jax.process_count() == 1:
        return code
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(code)).max())


def sync() -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("checkpoint directories")
