"""NVRTC is looked for where torch keeps it, and compiles what the simulator runs."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.quantization_cuda_source import SOURCES
from chatglm_6b.quantization_nvrtc import (
    KernelError,
    compile_source,
    list_nvrtc_files,
    load_nvrtc,
)
from ptx.cases import (
    SMALL_CASES,
    assert_dequantizes,
    assert_multiplies,
    simulate,
)


@pytest.mark.parametrize(
    ("version", "files", "last"),
    [
        ("13.0", ["nvidia/cu13/lib/libnvrtc.so.13"], "libnvrtc.so.13"),
        ("12.6", ["nvidia/cuda_nvrtc/lib/libnvrtc.so.12"], "libnvrtc.so.12"),
        ("11.8", ["torch/lib/libnvrtc-672ee683.so.11.2"], "libnvrtc.so.11.2"),
    ],
)
def test_nvrtc_is_looked_for_where_torch_keeps_it(
    version: str, files: list[str], last: str, tmp_path: Path
) -> None:
    decoys = (
        *("nvidia/cu13/lib/libnvrtc-builtins.so.13.0", "nvidia/cu13/lib/libnvrtc.alt.so.13"),
        *("nvidia/cuda_nvrtc/lib/libnvrtc.so.99", "torch/lib/libnvrtc-builtins-8a2c.so.11.8"),
    )
    for name in (*files, *decoys):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list(list_nvrtc_files(tmp_path / "torch", version))
    assert found[-len(files) - 1 :] == [*(str(tmp_path / name) for name in files), last]


def test_nvrtc_is_looked_for_by_its_windows_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    folder = tmp_path / "torch" / "lib"
    folder.mkdir(parents=True)
    for name in ("nvrtc64_120_0.dll", "nvrtc64_120_0.alt.dll", "nvrtc-builtins64_126.dll"):
        (folder / name).touch()
    found = list(list_nvrtc_files(tmp_path / "torch", "12.6"))
    assert found[-2:] == [str(folder / "nvrtc64_120_0.dll"), "nvrtc64_120_0.dll"]
    assert list(list_nvrtc_files(tmp_path, "11.8"))[-1] == "nvrtc64_112_0.dll"


def test_nvrtc_is_loaded_after_its_builtins_and_never_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def open_library(name: str, mode: int = 0) -> Any:
        if Path(name).is_absolute() and not name.startswith(str(tmp_path)):
            raise OSError("mapped by torch itself")
        opened.append(name)

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "libnvrtc-builtins.so.13.0").touch()
    load_nvrtc()
    assert opened == ["libnvrtc.so.13"]

    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    names = [str(folder / "libnvrtc-builtins.so.13.0"), str(folder / "libnvrtc.so.13")]
    for name in names:
        Path(name).touch()
    load_nvrtc()
    assert opened[1:] == names


def test_real_nvrtc_compiles_what_the_simulator_runs() -> None:
    try:
        nvrtc = load_nvrtc()
    except KernelError as error:
        pytest.skip(str(error))
    with simulate(nvrtc=nvrtc) as machine:
        assert_dequantizes(machine.kernels, SMALL_CASES[0])
        assert_multiplies(machine.kernels, SMALL_CASES[0], 1)
    code = compile_source(
        nvrtc, SOURCES["products"], 80, ["-DBITS=4", "-DBFLOAT16=1", "-DGROUPED=1"]
    )
    assert code.startswith(b"\x7fELF")
    with pytest.raises(KernelError, match=r"NVRTC failed with error 6: .*wrong.*undefined"):
        compile_source(nvrtc, "__global__ void error() { wrong(); }", 80, [])
