"""What the GPUs' own compiler, ptxas, makes of the kernels: registers, and nothing spilled."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from chatglm_6b.quantization_cuda_source import MODULES, SOURCES, Variant
from chatglm_6b.quantization_nvrtc import compile_source
from ptx.cases import NEWER, OLDER, TENSOR
from ptx.driver import NVCC, NvccAsNvrtc, list_nvcc_architectures

PTXAS = shutil.which("ptxas")
pytestmark = pytest.mark.skipif(
    not (NVCC and PTXAS), reason="nvcc and ptxas are not on the path; the CUDA toolkit has them"
)
# With 128 four blocks of 128 threads fit a multiprocessor, with 168 three do.
MAX_REGISTERS = {"products": 128, "tensor": 168}
VARIANTS = [
    Variant(bits, wide, grouped) for bits in (4, 8) for wide in (0, 1) for grouped in (0, 1)
]
REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def write_ptx(variant: Variant, architecture: int, folder: Path, module: str) -> Path:
    front_end = NEWER if architecture >= 100 else TENSOR if architecture >= 80 else OLDER
    source, options = SOURCES[module], variant.list_options()
    image = compile_source(NvccAsNvrtc(), source, front_end, options)
    # One front end writes the same PTX for all of its architectures, but for this line.
    target = f".target sm_{architecture}"
    file = folder / "kernels.ptx"
    file.write_text(re.sub(r"\.target sm_\d+", target, image.rstrip(b"\0").decode()))
    return file


def assemble(file: Path, architecture: int, *options: str) -> dict[str, tuple[int, ...]]:
    """Return stack, spilled and reloaded bytes and registers of each kernel."""
    command = [PTXAS or "ptxas", "-v", f"-arch=sm_{architecture}", *options, "-o", "/dev/null"]
    report = subprocess.run([*command, str(file)], capture_output=True, text=True, check=True)
    return {name: tuple(map(int, numbers)) for name, *numbers in REPORT.findall(report.stderr)}


def list_builds() -> list[tuple[int, Variant]]:
    """Pair every architecture with two variants, and so every variant with some architectures.

    All pairs would take as long as all other tests of the kernels together.
    """
    architectures = list_nvcc_architectures() if NVCC else []
    return [(a, VARIANTS[(2 * i + k) % 8]) for i, a in enumerate(architectures) for k in (0, 1)]


@pytest.mark.parametrize(("architecture", "variant"), list_builds(), ids=str)
def test_kernels_fit_the_registers_of_every_gpu(
    architecture: int, variant: Variant, tmp_path: Path
) -> None:
    for module, names in MODULES.items():
        kernels = assemble(write_ptx(variant, architecture, tmp_path, module), architecture)
        has_none = module == "tensor" and architecture < 80 and variant.is_bfloat16
        assert set(kernels) == (set() if has_none else set(names))
        for name, (stack, stored, loaded, registers) in kernels.items():
            assert (stack, stored, loaded) == (0, 0, 0), name
            assert registers <= MAX_REGISTERS[module], name


def test_a_kernel_that_spills_would_be_seen(tmp_path: Path) -> None:
    file = write_ptx(VARIANTS[0], 75, tmp_path, "products")
    file.write_text(re.sub(r"\.maxntid.*", "", file.read_text()))  # it would win over the option
    stack, stored, loaded, registers = assemble(file, 75, "-maxrregcount=32")["multiply_4x2"]
    assert min(stack, stored, loaded) > 0
    assert registers <= 32


def test_a_front_end_writes_the_same_for_its_architectures() -> None:
    options = VARIANTS[0].list_options()
    for module, builds in (
        ("products", ((75, OLDER), (90, TENSOR))),
        ("tensor", ((80, 81), (90, TENSOR))),
    ):
        images = [compile_source(NvccAsNvrtc([a]), SOURCES[module], b, options) for a, b in builds]
        # But for the target, and for what nvcc puts into the names of shared memory.
        own = rb"\.target sm_\d+|_INTERNAL_[0-9a-f]+"
        assert len({re.sub(own, b"", image) for image in images}) == 1
