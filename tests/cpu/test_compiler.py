"""The compiler of CPU kernels: its cache on disk, what it does without LLVM, threads, numbers."""

import importlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.quantization import QuantizedLinear, dequantize_weight
from conftest import ROOT, forget_kernels
from torch import nn
from transformers.utils import logging as transformers_logging

from chatglm.cpu import compiler as compiling
from chatglm.cpu import fast_products, kernel_cache, linear, runtime
from chatglm.cpu.compiler import Compiler
from chatglm.cpu.runtime import Kernel
from chatglm.cpu.writer import KernelSource, KernelWriter, Processor

llvmlite = pytest.importorskip("llvmlite")


def write_counting(writer: KernelWriter, step: int) -> None:
    """Add a number to the block's place in the output."""
    at = writer.slot
    with writer.parallel_for(at("blocks")) as block:
        place = writer.address(at("output"), writer.times(block, 8))
        writer.store(writer.add(writer.load(place, writer.i64), step), place)


def write_widening(writer: KernelWriter, kind: str) -> None:
    """Make float32 of the numbers of a block of eight."""
    at, size = writer.slot, {"f32": 4, "f16": 2, "bf16": 2}[kind]
    with writer.parallel_for(at("blocks")) as block:
        source = writer.address(at("input"), writer.times(block, 8 * size))
        target = writer.address(at("output"), writer.times(block, 32))
        writer.store(writer.load_as_float(source, 8, kind), target)


def write_narrowing(writer: KernelWriter, kind: str) -> None:
    """Store a block of eight float32 numbers in another dtype."""
    at, size = writer.slot, {"f32": 4, "f16": 2, "bf16": 2}[kind]
    with writer.parallel_for(at("blocks")) as block:
        source = writer.address(at("input"), writer.times(block, 32))
        target = writer.address(at("output"), writer.times(block, 8 * size))
        writer.store_as(writer.load_as_float(source, 8, "f32"), target, kind)


COUNTING = KernelSource(("blocks", "output"), write_counting)
WIDENING = KernelSource(("blocks", "input", "output"), write_widening)
NARROWING = KernelSource(("blocks", "input", "output"), write_narrowing)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which does not exist yet."""
    forget_kernels(monkeypatch)
    transformers_logging.get_logger().warning_once.cache_clear()
    monkeypatch.setenv("CHATGLM_KERNEL_CACHE", str(tmp_path / "new" / "kernels"))
    return tmp_path / "new" / "kernels"


@pytest.fixture
def translated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that have been compiled."""
    names: list[str] = []
    translate = compiling.translate_kernel

    def note(compiler: Any, source: Any, name: str, parameters: Any) -> bytes:
        names.append(name)
        return translate(compiler, source, name, parameters)

    monkeypatch.setattr(compiling, "translate_kernel", note)
    return names


def count(step: int, threads: int = 1, blocks: int = 100) -> torch.Tensor:
    """Run the counting kernel once, and return what it added to each block."""
    kernel = compiling.find_kernel(COUNTING, step)
    assert kernel is not None
    return run_counting(kernel, threads, blocks)


def run_counting(kernel: Kernel, threads: int, blocks: int) -> torch.Tensor:
    output = torch.zeros(blocks, dtype=torch.int64)
    kernel.prepare(threads, blocks=blocks).run(output=output.data_ptr())
    return output


# The cache


def test_a_kernel_is_compiled_once_for_all_processes(
    folder: Path, translated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count(3).eq(3).all()
    assert count(3).eq(3).all()
    assert [file.name for file in folder.iterdir()] == [f"{translated[0]}.o"]
    forget_kernels(monkeypatch)
    assert count(3).eq(3).all()
    assert len(translated) == 1
    assert count(4).eq(4).all()
    assert len(translated) == len(list(folder.iterdir())) == 2


def flip_a_bit(stored: bytes) -> bytes:
    return stored[:200] + bytes([stored[200] ^ 1]) + stored[201:]


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, lambda stored: stored[:-1], lambda stored: stored[:20], lambda _: b""],
    ids=["flipped", "cut", "cut short", "empty"],
)
def test_a_damaged_file_is_replaced(
    damage: Callable[[bytes], bytes],
    folder: Path,
    translated: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count(3)
    (file,) = folder.iterdir()
    stored = file.read_bytes()
    file.write_bytes(damage(stored))
    forget_kernels(monkeypatch)
    assert count(3).eq(3).all()
    assert len(translated) == 2
    assert [path.read_bytes() for path in folder.iterdir()] == [stored]


def test_a_folder_that_cannot_be_written_only_costs_time(
    folder: Path, translated: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("in the way")
    with caplog.at_level(logging.INFO, kernel_cache.__name__):
        assert count(3).eq(3).all()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"Compiled kernels are not kept in {folder}"
    ]
    assert len(translated) == 1


@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()])
def test_what_was_not_finished_is_never_seen(
    error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file gets its name when it is whole: who is stopped before leaves no kernel behind."""

    def stop(file: Path, target: Path) -> None:
        assert kernel_cache.read_cached(target.stem) is None
        assert not target.exists() and file.parent.parent == target.parent
        file.rename(file.with_suffix(".o"))
        assert kernel_cache.read_cached(f"{file.parent.name}/{file.stem}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        if isinstance(error, OSError):
            assert count(3).eq(3).all()
        else:
            with pytest.raises(KeyboardInterrupt):
                count(3)
    assert not list(folder.iterdir())
    forget_kernels(monkeypatch)
    assert count(3).eq(3).all()
    assert [file.suffix for file in folder.iterdir()] == [".o"]


def test_no_cache_is_kept_when_it_is_off(
    translated: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATGLM_KERNEL_CACHE", "off")
    for _ in range(2):
        forget_kernels(monkeypatch)
        assert count(3).eq(3).all()
    assert len(translated) == 2
    assert not folder.exists() and kernel_cache.find_cache_folder() is None


def test_the_cache_lies_where_the_user_s_caches_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHATGLM_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.find_cache_folder() == tmp_path / "chatglm" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert kernel_cache.find_cache_folder() == tmp_path / "home" / ".cache" / "chatglm" / "kernels"


def test_all_that_the_code_depends_on_is_in_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Compiler()
    other = Compiler(own.processor._replace(lanes=2))
    name = compiling._name_kernel
    names = [
        name(own, COUNTING, (3,)),
        name(own, COUNTING, (4,)),
        name(own, WIDENING, (3,)),
        name(other, COUNTING, (3,)),
    ]
    assert names[0] == name(own, COUNTING, (3,))
    with monkeypatch.context() as patch:
        patch.setattr(llvmlite, "__version__", "99.0")
        names.append(name(own, COUNTING, (3,)))
    sources = sorted(ROOT.glob("chatglm/cpu/*.py"))
    assert len(sources) > 10
    for file in sources:
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compiler.py"))
    assert name(own, COUNTING, (3,)) == names[0]
    for file in sources:
        with (tmp_path / file.name).open("a") as copy:
            copy.write("# changed\n")
        names.append(name(own, COUNTING, (3,)))
    assert len(set(names)) == len(names)


# Without kernels


def assert_torch_computes() -> None:
    """Packed and plain layers do what they would do on a CPU that has no kernels."""
    torch.manual_seed(0)
    states = torch.randn(2, 64)
    for bits in (4, 8):
        layer = QuantizedLinear.from_linear(nn.Linear(64, 10), bits)
        matrix = dequantize_weight(layer.weight, layer.weight_scale, bits, torch.float32)
        expected = nn.functional.linear(states, matrix) + layer.bias
        assert torch.equal(layer(states), expected)
    plain = nn.Linear(64, 10)
    with torch.no_grad():
        expected = nn.functional.linear(states, plain.weight, plain.bias)
        with fast_products():
            assert torch.equal(plain(states), expected)


def break_import(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(importlib.import_module("sys").modules, "llvmlite", None)
    return "import of llvmlite halted"


def break_library(monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(*_: Any) -> None:
        raise OSError("libllvmlite.so: cannot open")

    monkeypatch.setattr(Compiler, "_find_processor", refuse)
    return "libllvmlite.so: cannot open"


def age(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(llvmlite, "__version__", "0.44.0")
    return "llvmlite 0.44.0 is older than 0.45"


def break_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(*_: Any) -> None:
        raise RuntimeError("LLVM IR parsing error")

    monkeypatch.setattr(Compiler, "translate", refuse)
    return "a kernel could not be compiled (LLVM IR parsing error)"


@pytest.mark.parametrize("trouble", [break_import, break_library, age, break_compiler])
def test_without_llvm_torch_computes_and_the_log_says_so_once(
    trouble: Callable[[pytest.MonkeyPatch], str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = trouble(monkeypatch)
    assert_torch_computes()
    assert compiling.find_kernel(COUNTING, 3) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert problem in record.message and "`pip install llvmlite`" in record.message
    assert not folder.exists()


def test_kernels_can_be_switched_off_without_a_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = torch.randn(2, 64)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 10), 4)
    by_kernel = layer(states)
    matrix = dequantize_weight(layer.weight, layer.weight_scale, 4, torch.float32)
    expected = nn.functional.linear(states, matrix) + layer.bias
    assert not torch.equal(by_kernel, expected)
    with kernels_off():
        assert torch.equal(layer(states), expected)
        with kernels_off():
            pass
        assert torch.equal(layer(states), expected)
    assert torch.equal(layer(states), by_kernel)
    for variable in ("CHATGLM_KERNELS", "CHATGLM_CPU_KERNELS"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "off")
            assert torch.equal(layer(states), expected)
    assert torch.equal(layer(states), by_kernel)
    assert not caplog.records


# Threads

MAX_THREADS = 8


@pytest.mark.parametrize("threads", range(1, MAX_THREADS + 1))
@pytest.mark.parametrize("has_openmp", [True, False])
def test_every_block_is_done_once(
    threads: int, has_openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_runtime = runtime.find_runtime()
    if has_openmp and found_runtime is None:
        pytest.skip("torch's OpenMP runtime cannot be reached here")
    forks: list[int] = []

    def note(address: int, argument: int, count: int, flags: int) -> None:
        forks.append(count)
        found_runtime.fork(address, argument, count, flags)

    found = found_runtime._replace(fork=note) if has_openmp else None
    monkeypatch.setattr(runtime, "find_runtime", lambda: found)
    for blocks in (0, 1, 20_000):
        assert count(3, threads, blocks).eq(3).all()
    assert forks == ([threads] * 3 if has_openmp and threads > 1 else [])


@pytest.mark.parametrize("has_openmp", [True, False])
def test_several_threads_may_ask_at_once(has_openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_openmp:
        monkeypatch.setattr(runtime, "find_runtime", lambda: None)
    kernel = compiling.find_kernel(COUNTING, 3)
    assert kernel is not None
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: run_counting(kernel, 3, 500), range(100)))
    assert all(output.eq(3).all() for output in outputs)


def test_no_more_threads_are_woken_than_there_is_work_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert runtime.count_threads(100, 2**30) == 6
    assert runtime.count_threads(4, 2**30) == 4
    assert runtime.count_threads(100, 3 * runtime.WORTH_A_THREAD) == 3
    assert runtime.count_threads(0, 0) == 1


# Numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_generic", [False, True], ids=["host", "generic"])
def test_numbers_are_converted_as_by_torch(is_generic: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    singles = torch.randint(-(2**31), 2**31, (2**16,)).int().view(torch.float32)
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = singles if dtype == torch.float32 else narrow.view(dtype)
    assert_same(convert(numbers, torch.float32, is_generic), numbers.float())
    # Also what lies between two neighbours, and the neighbours of that.
    between = numbers.float().view(torch.int32).unsqueeze(1) + torch.tensor([0xFFF, 0x1000, 0x1001])
    for wide in (numbers.float(), singles, between.flatten().view(torch.float32)):
        assert_same(convert(wide, dtype, is_generic), wide.to(dtype))


def convert(numbers: torch.Tensor, dtype: torch.dtype, is_generic: bool) -> torch.Tensor:
    """Convert from or to float32 by a kernel."""
    compiler = Compiler()
    if is_generic:
        compiler = Compiler(compiler.processor._replace(dot="generic"))
    source = NARROWING if numbers.dtype == torch.float32 else WIDENING
    kind = linear.TYPE_NAMES[dtype if source is NARROWING else numbers.dtype]
    code = compiling.translate_kernel(compiler, source, "convert", (kind,))
    call = Kernel(compiler.load(code, "convert"), source.slots).prepare(
        1, blocks=numbers.numel() // 8
    )
    output = torch.empty(numbers.shape, dtype=dtype)
    call.run(input=numbers.data_ptr(), output=output.data_ptr())
    return output


def assert_same(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare numbers and the signs of zeros; NaNs only with NaNs."""
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    is_number = ~expected.isnan()
    assert torch.equal(output[is_number].signbit(), expected[is_number].signbit())


def test_the_processor_is_this_one() -> None:
    processor = Compiler().processor
    assert processor.triple is None
    assert (processor.dot, processor.lanes) in {(dot, n) for dot, _, n in compiling.DOTS}
    found = dict.fromkeys(["avx2", "fma", "avxvnni"], True)
    compiler: Any = object.__new__(Compiler)

    class Binding:
        @staticmethod
        def get_host_cpu_features() -> Any:
            return type("Features", (dict,), {"flatten": lambda self: ",".join(self)})(found)

        @staticmethod
        def get_host_cpu_name() -> str:
            return "raptorlake"

    compiler.binding = Binding
    expected = Processor("raptorlake", "avx2,fma,avxvnni", "avx-vnni", 8)
    assert compiler._find_processor() == expected
    found["avxvnni"] = False
    assert compiler._find_processor().dot == "avx2"
    found["fma"] = False
    assert compiler._find_processor().dot == "generic"
    found.update(avx512vnni=True, avx512bw=True, avx512vl=True)
    assert compiler._find_processor()[2:4] == ("vnni", 16)
