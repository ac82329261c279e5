"""Free memory of the heap goes back to the system, where the system has a way."""

import ctypes
import subprocess
import sys

import pytest
from conftest import ROOT

from chatglm.process_memory import read_status

GAPS = """
import ctypes, sys
sys.path.insert(0, {root!r})
from chatglm.process_memory import read_status
from memory_cpu import release_gaps

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(100_000) for _ in range(2_000)]  # below what mmap is asked for
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[:-1:2] + pieces[1:-1:2]:
    libc.free(piece)
before = read_status("VmRSS")
release_gaps()
print(before - read_status("VmRSS"))
"""


def has_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "malloc_trim") and read_status("VmRSS") is not None


@pytest.mark.skipif(sys.platform == "win32" or not has_glibc(), reason="needs glibc on Linux")
def test_gaps_go_back_to_the_system() -> None:
    code = GAPS.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000_000


def test_a_system_without_glibc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from chatglm_6b import memory_cpu

    for failure in (OSError, TypeError):

        def refuse(name: None, failure: type[Exception] = failure) -> None:
            raise failure(name)

        monkeypatch.setattr(ctypes, "CDLL", refuse)
        memory_cpu._find_trim.cache_clear()
        memory_cpu.release_gaps()
        assert memory_cpu._find_trim() is None
    memory_cpu._find_trim.cache_clear()
