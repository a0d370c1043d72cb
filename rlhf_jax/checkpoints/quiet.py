"""Keeps orbax from printing what it also raises, so that a failure is one message: ours."""

import contextlib
import logging
import os
import sys


@contextlib.contextmanager
def no_unraisable():
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def quiet_orbax() -> None:
    """It logs tracebacks of errors that it also raises; ours is the one message."""
    from absl import logging as absl_logging  # its own logger knows the file that a record comes from

    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        if _is_not_orbax not in logger.filters:
            logger.addFilter(_is_not_orbax)


def _is_not_orbax(record) -> bool:
    text = record.getMessage() if "never retrieved" in str(record.msg) else record.pathname
    return f"{os.sep}orbax{os.sep}" not in text and "tensorstore" not in text
