"""Gives back to the system what the heap of this process holds and does not use.

A long prompt takes and frees tensors of many megabytes around the keys and values that stay. glibc
keeps what was freed between those, and the next tensor often does not fit: every layer then takes
more. Knows nothing of tensors; where there is no glibc it does nothing.
"""

import ctypes
import functools
from typing import Any


@functools.cache
def _find_trim() -> Any:
    """Return glibc's `malloc_trim`; None in a process without it."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no name for the process
        return None


def release_gaps() -> None:
    """Give every free page of the heap back; takes some milliseconds."""
    trim = _find_trim()
    if trim is not None:
        trim(0)


__all__ = ["release_gaps"]
