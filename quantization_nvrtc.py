"""NVRTC, which compiles the kernels of packed weights, and the driver, which launches them.

Owns where the two libraries are found, which architecture is compiled for, and what their error
codes say. Knows nothing of the kernels.

Every CUDA build of torch carries NVRTC and loads the driver; nothing else is needed, no compiler
and no package. Both libraries are called by ctypes.
"""

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


class KernelError(RuntimeError):
    """Why the kernels cannot be used on a device."""


# NVRTC


def compile_source(nvrtc: Any, source: str, capability: int, options: list[str]) -> bytes:
    """Compile CUDA C for a device.

    Args:
        nvrtc: the library, or what stands in for it.
        source: CUDA C that includes nothing.
        capability: of the device, 10 * major + minor.
        options: further options of the compiler.

    Returns:
        Machine code if NVRTC knows the device; otherwise, as for devices newer than it, zero-ended
        PTX of the newest architecture before the device's, for the driver to translate.

    Raises:
        KernelError: if NVRTC knows no such architecture, or refuses the source.
    """
    architecture = choose_architecture(nvrtc, capability)
    is_exact = architecture == capability
    target = f"--gpu-architecture={'sm' if is_exact else 'compute'}_{architecture}"
    encoded = [option.encode() for option in (target, *options)]
    arguments = (ctypes.c_char_p * len(encoded))(*encoded)
    program = ctypes.c_void_p()
    slot, name = ctypes.byref(program), b"quantization.cu"
    _check_nvrtc(nvrtc, nvrtc.nvrtcCreateProgram(slot, source.encode(), name, 0, None, None))
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(encoded), arguments)
        _check_nvrtc(nvrtc, code, program)
        return _read_nvrtc(nvrtc, program, "CUBIN" if is_exact else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(slot)


def choose_architecture(nvrtc: Any, capability: int) -> int:
    """Return the newest architecture of NVRTC that is not newer than the device.

    Raises:
        KernelError: if all are newer.
    """
    count = ctypes.c_int()
    _check_nvrtc(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check_nvrtc(nvrtc, nvrtc.nvrtcGetSupportedArchs(known))
    if capability < min(known):
        raise KernelError(
            f"NVRTC compiles from sm_{min(known)} on, and this GPU is sm_{capability}"
        )
    return max(architecture for architecture in known if architecture <= capability)


def _read_nvrtc(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check_nvrtc(nvrtc: Any, code: int, program: ctypes.c_void_p | None = None) -> None:
    """Raise what an error code of NVRTC means, with the first error of the program's log."""
    if code == 0:
        return
    reason = f"NVRTC failed with error {code}"
    if program:
        lines = _read_nvrtc(nvrtc, program, "ProgramLog").decode(errors="replace").splitlines()
        reason += "".join([f": {line}" for line in lines if "error" in line][:1])
    raise KernelError(reason)


def load_nvrtc() -> Any:
    """Load the NVRTC that torch was built with.

    Raises:
        KernelError: if it is nowhere to be found.
    """
    for name in list_nvrtc_files(Path(torch.__file__).parent, torch.version.cuda or ""):
        try:
            # NVRTC looks for its built-in functions by a bare name, which finds what is mapped. A
            # bare name of its own has no folder: never load from the current one.
            if Path(name).is_absolute():
                for builtins in Path(name).parent.glob("libnvrtc-builtins*.so*"):
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
        except OSError as error:
            logger.debug("%s: %s", name, error)
    raise KernelError(f"there is no NVRTC of CUDA {torch.version.cuda} that can be loaded")


def list_nvrtc_files(torch_folder: Path, version: str) -> Iterator[str]:
    """Yield where NVRTC may be, best first: mapped, in packages, with torch, known to the loader.

    Args:
        torch_folder: the folder of the package torch.
        version: of CUDA, as in torch.version.cuda.
    """
    major = version.partition(".")[0]
    maps = Path("/proc/self/maps")
    if maps.exists():
        yield from sorted(set(re.findall(r"/.*/libnvrtc\.so\S*", maps.read_text())))
    for folder, pattern in (
        (torch_folder.parent, f"nvidia/*/lib/libnvrtc.so.{major}*"),
        (torch_folder.parent, f"nvidia/*/bin/**/nvrtc64_{major}?_0.dll"),
        (torch_folder, f"lib/libnvrtc-????????.so.{major}*"),
        (torch_folder, f"lib/nvrtc64_{major}?_0.dll"),
    ):
        yield from (str(path) for path in sorted(folder.glob(pattern)))
    suffix = "11.2" if major == "11" else major  # the loader's names stayed at 11.2
    windows = f"nvrtc64_{suffix.replace('.', '').ljust(3, '0')}_0.dll"
    yield windows if sys.platform == "win32" else f"libnvrtc.so.{suffix}"


# The driver


def load_driver() -> Any:
    """Load the driver's library, which torch has loaded before.

    Raises:
        OSError: if there is none.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def check_driver(driver: Any, code: int, action: str) -> None:
    """Raise what an error code of the driver means."""
    if code == 0:
        return
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    raise KernelError(f"{action} failed: {(name.value or b'unknown').decode()} ({code})")


__all__ = [
    "KernelError",
    "check_driver",
    "choose_architecture",
    "compile_source",
    "list_nvrtc_files",
    "load_driver",
    "load_nvrtc",
]
