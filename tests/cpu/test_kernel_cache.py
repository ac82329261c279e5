"""Compiled kernels are read only from files that this user alone can have written."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import forget_kernels
from test_compiler import count
from transformers.utils import logging

from chatglm.cpu import compiler as compiling
from chatglm.cpu import kernel_cache

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no such owners here")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one kernel."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("CHATGLM_KERNEL_CACHE", str(folder))
    logging.get_logger().warning_once.cache_clear()
    forget_kernels(monkeypatch)
    assert count(3).eq(3).all()
    forget_kernels(monkeypatch)
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are compiled, and not read."""
    names: list[str] = []
    translate = compiling.translate_kernel
    monkeypatch.setattr(
        compiling, "translate_kernel", lambda *args: names.append(args[2]) or translate(*args)
    )
    return names


def kept(folder: Path) -> Path:
    (file,) = folder.glob("*.o")
    return file


def test_the_folder_and_its_files_are_the_user_s_own(folder: Path, compiled: list[str]) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert kept(folder).stat().st_mode & 0o777 == 0o600
    assert count(3).eq(3).all() and not compiled


def test_a_folder_that_others_may_read_is_closed_to_them(folder: Path, compiled: list[str]) -> None:
    folder.chmod(0o755)
    assert count(3).eq(3).all() and not compiled
    assert folder.stat().st_mode & 0o777 == 0o700


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def open_to_group(folder: Path) -> None:
    folder.chmod(0o770)


def replace_by_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def replace_by_file(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("in the way")


def give_away(folder: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(folder, 12345, 12345)


ATTACKS = [open_to_all, open_to_group, replace_by_link, replace_by_file, give_away]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_folder_of_others_is_neither_read_nor_written(
    attack: Callable[[Path], None],
    folder: Path,
    compiled: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = kept(folder).stem
    attack(folder)
    before = sorted(folder.parent.rglob("*"))
    assert kernel_cache.read_cached(name) is None
    assert count(3).eq(3).all() and compiled == [name]
    assert sorted(folder.parent.rglob("*")) == before
    (record,) = caplog.records
    assert "neither read from" in record.message and "CHATGLM_KERNEL_CACHE" in record.message


def make_link(file: Path) -> None:
    file.rename(file.parent.parent / "planted.o")
    file.symlink_to(file.parent.parent / "planted.o")


def make_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def open_file(file: Path) -> None:
    file.chmod(0o666)


def give_file_away(file: Path) -> None:
    give_away(file)


@pytest.mark.parametrize("attack", [make_link, make_fifo, open_file, give_file_away])
def test_a_file_of_others_is_made_anew(
    attack: Callable[[Path], None], folder: Path, compiled: list[str]
) -> None:
    file = kept(folder)
    stored = file.read_bytes()
    attack(file)
    done: list[bool] = []
    worker = threading.Thread(target=lambda: done.append(bool(count(3).eq(3).all())), daemon=True)
    worker.start()
    worker.join(60)  # a FIFO that is waited for would never end
    assert done == [True] and compiled == [file.stem]
    assert not file.is_symlink() and file.read_bytes() == stored
    assert file.stat().st_uid == os.getuid() and file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("variable", ["CHATGLM_KERNEL_CACHE", "XDG_CACHE_HOME"])
def test_a_relative_folder_is_no_folder(
    variable: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHATGLM_KERNEL_CACHE")
    monkeypatch.setenv(variable, "kernels")
    assert kernel_cache.find_cache_folder() is None
    assert count(4).eq(4).all()
    assert len(list(folder.iterdir())) == 1
    (record,) = caplog.records
    assert "must be an absolute path" in record.message and "to off" in record.message


def test_without_a_home_nothing_is_written_to_the_current_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CHATGLM_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no user
    assert count(5).eq(5).all()
    assert {path.name for path in tmp_path.iterdir()} == {"kernels"}
