"""Free memory of the heap goes back to the system, where the system has a way."""

import ctypes
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, build_model

from chatglm.cpu import memory
from chatglm.process_memory import read_status

GAPS = """
import ctypes, sys
sys.path.insert(0, {root!r})
from chatglm.process_memory import read_status
from chatglm.cpu.memory import trim_heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(100_000) for _ in range(2_000)]  # below what mmap is asked for
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
for piece in pieces[:-1:2] + pieces[1:-1:2]:
    libc.free(piece)
before = read_status("VmRSS")
trim_heap()
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
    for failure in (OSError, TypeError):

        def refuse(name: None, failure: type[Exception] = failure) -> None:
            raise failure(name)

        monkeypatch.setattr(ctypes, "CDLL", refuse)
        memory._find_trim.cache_clear()
        memory.trim_heap()
        assert memory._find_trim() is None
    memory._find_trim.cache_clear()


@pytest.mark.parametrize("bits", [0, 4])
def test_a_long_prompt_goes_through_part_by_part(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model().quantize(bits)
    ids = torch.tensor([[*range(5, 90), 301, 304, 7]])
    with torch.no_grad():
        whole = model(ids).logits
    released: list[int] = []
    monkeypatch.setattr(memory, "PART_TOKENS", 20)
    monkeypatch.setattr(memory, "trim_heap", lambda: released.append(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-5)
    assert len(released) == model.config.num_layers
    model(ids).logits.sum().backward()  # gradients see the whole
    assert len(released) == model.config.num_layers
