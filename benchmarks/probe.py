"""How fast this machine reads its memory: the limit that decoding is measured against.

    python -m benchmarks.probe [--threads N] [--floats N] [--serve]

Reads a gigabyte of float32 with as many threads as the contenders have, by torch's sum and, where
llvmlite can be imported, by a vector sum of our own; the faster of all repetitions counts. A
contender of `benchmarks.serving`, so that it can be asked between any two measurements.
"""

import argparse
import ctypes
import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving import serve

FLOATS = 2**28
REPEATS = 3
STRIDE = 64  # floats that a step of the kernel adds
# Four sums side by side, or each addition would wait for the one before.
KERNEL = """
define void @add_up(ptr %data, i64 %count, ptr %result) {
begin:
  br label %step
step:
  %at = phi i64 [0, %begin], [%next, %step]
  %a = phi <16 x float> [zeroinitializer, %begin], [%a1, %step]
  %b = phi <16 x float> [zeroinitializer, %begin], [%b1, %step]
  %c = phi <16 x float> [zeroinitializer, %begin], [%c1, %step]
  %d = phi <16 x float> [zeroinitializer, %begin], [%d1, %step]
  %pa = getelementptr float, ptr %data, i64 %at
  %pb = getelementptr float, ptr %pa, i64 16
  %pc = getelementptr float, ptr %pa, i64 32
  %pd = getelementptr float, ptr %pa, i64 48
  %va = load <16 x float>, ptr %pa, align 4
  %vb = load <16 x float>, ptr %pb, align 4
  %vc = load <16 x float>, ptr %pc, align 4
  %vd = load <16 x float>, ptr %pd, align 4
  %a1 = fadd <16 x float> %a, %va
  %b1 = fadd <16 x float> %b, %vb
  %c1 = fadd <16 x float> %c, %vc
  %d1 = fadd <16 x float> %d, %vd
  %next = add i64 %at, 64
  %more = icmp slt i64 %next, %count
  br i1 %more, label %step, label %end
end:
  %ab = fadd <16 x float> %a1, %b1
  %cd = fadd <16 x float> %c1, %d1
  %all = fadd <16 x float> %ab, %cd
  store <16 x float> %all, ptr %result, align 4
  ret void
}
"""


class VectorSum:
    """The kernel above, compiled for this processor and run by threads of its own.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        binding: Any = importlib.import_module("llvmlite.binding")
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten()
        )
        self.engine = binding.create_mcjit_compiler(binding.parse_assembly(KERNEL), machine)
        self.engine.finalize_object()
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self.kernel = signature(self.engine.get_function_address("add_up"))
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, values: Tensor) -> float:
        """Return the sum of float32 values, a multiple of `STRIDE` of them for each thread."""
        share = values.numel() // self.threads
        if values.numel() % (self.threads * STRIDE) or share == 0:
            raise ValueError(
                f"{values.numel()} values cannot be shared by {self.threads} threads in steps of "
                f"{STRIDE}: pass a multiple of {self.threads * STRIDE}"
            )
        return sum(self.pool.map(self._add_part, values.split(share)))

    def _add_part(self, part: Tensor) -> float:
        result = (ctypes.c_float * 16)()
        self.kernel(part.data_ptr(), part.numel(), ctypes.addressof(result))
        return sum(result)


class Probe:
    """Reads the same gigabyte again and again.

    Args:
        threads: that read.
        floats: how many float32 values; more than the caches hold.
    """

    def __init__(self, threads: int, floats: int = FLOATS) -> None:
        torch.set_num_threads(threads)
        unit = threads * STRIDE
        self.threads = threads
        self.values = torch.ones(floats // unit * unit)
        self.ways: dict[str, Callable[[Tensor], object]] = {"torch.sum": torch.sum}
        if importlib.util.find_spec("llvmlite") is not None:
            self.ways["vector sum"] = VectorSum(threads)

    def describe(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        return {"versions": ", ".join(self.ways), "threads": self.threads}

    def read(self) -> dict[str, Any]:
        """Return the bytes per second of the fastest reading, and which way it was."""
        best: dict[str, float] = {}
        for _ in range(REPEATS):
            for name, way in self.ways.items():
                began = time.perf_counter()
                way(self.values)
                rate = self.values.nbytes / (time.perf_counter() - began)
                best[name] = max(rate, best.get(name, 0.0))
        name = max(best, key=lambda way: best[way])
        return {"rate": best[name], "way": name}


def main() -> None:
    """Print the bandwidth, or serve."""
    parser = argparse.ArgumentParser(description="Read bandwidth of this machine.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--floats", type=int, default=FLOATS, help="that are read (2**28)")
    parser.add_argument("--serve", action="store_true", help="answer JSON lines")
    args = parser.parse_args()
    if args.serve:
        serve(lambda: Probe(args.threads, args.floats))
        return
    probe = Probe(args.threads, args.floats)
    for _ in range(5):
        found = probe.read()
        print(f"{found['rate'] / 1e9:.1f} GB/s ({found['way']}, {args.threads} threads)")


if __name__ == "__main__":
    main()
