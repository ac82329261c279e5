"""Whether this process may use the processor's tile registers (AMX).

Owns the question to the system: Linux keeps no room for these registers in a thread's state until
the process asks for it.
"""

import ctypes
import functools
import platform
import sys

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # x86-64 Linux: asm/prctl.h


@functools.cache
def ask_for_tiles() -> bool:
    """Ask the system for the tile registers, for all threads; False where it has none to give."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        answer = ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)
    except (AttributeError, OSError):
        return False
    return answer == 0


__all__ = ["ask_for_tiles"]
