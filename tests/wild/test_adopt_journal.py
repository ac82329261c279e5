"""Files change places wholly or not at all: killed at every step, on a full disk, and back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import import_from_package
from faults import Counter, counting, fill_disk, run_and_kill
from old_folders import list_folders, snapshot

journal = import_from_package("chatglm.adopting.journal")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
WRITTEN = {"config.json": b"new\n", "code.py": b"new code\n", "peft/adapter.bin": b"0123"}
MOVED = ["code.py", "config.json", "dead.py"]
LATER = {"code.py": b"newer code\n", "more.py": b"more\n"}


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "code.py", "dead.py", "weights.bin"):
        (folder / name).write_text(f"the first {name}\n")
    return folder


def change(folder: Path) -> None:
    journal.change(folder, "1", WRITTEN, MOVED)


def change_again(folder: Path) -> None:
    """As a later version would: one file new, one other, one needed no more."""
    journal.change(folder, "2", LATER, ["code.py", "config.json"])


def read(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without what the journal keeps."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    inside = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
    return {name: text for name, text in inside.items() if not name.startswith("original/")}


def test_what_is_written_kept_and_brought_back(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    before, first = snapshot(folder), read(folder)
    change(folder)
    assert read(folder) == {"weights.bin": first["weights.bin"], **WRITTEN}
    kept = {p.name: p.read_bytes() for p in (folder / "original").iterdir()}
    record = kept.pop("adopted.json")
    assert kept == {name: first[name] for name in MOVED} and b'"version": "1"' in record
    change_again(folder)
    assert read(folder) == {
        "weights.bin": first["weights.bin"],
        "peft/adapter.bin": b"0123",
        **LATER,
    }
    kept = {p.name: p.read_bytes() for p in (folder / "original").iterdir()}
    assert {name: kept[name] for name in MOVED} == {name: first[name] for name in MOVED}
    journal.undo(folder)
    assert snapshot(folder) == before and list_folders(folder) == set()
    with pytest.raises(ValueError, match="was not adopted"):
        journal.undo(folder)


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_kill_at_any_step_loses_nothing(tmp_path: Path, is_second: bool, goes_on: bool) -> None:
    """The next run ends it, or the folder is as it was; and undoing brings back what was first."""
    base = make_folder(tmp_path / "base")
    before = snapshot(base)
    if is_second:
        change(base)
    start = read(base)
    run = change_again if is_second else change
    done = shutil.copytree(base, tmp_path / "done")
    run(done)
    ends = [start, read(done)]
    seen = set()
    step = 0
    while True:
        folder = shutil.copytree(base, tmp_path / f"killed-{step}")
        was_killed = run_and_kill(lambda f=folder: run(f), step)
        if goes_on:
            journal.finish(folder)
            assert not journal.is_unfinished(folder)
            assert read(folder) in ends
            seen.add(ends.index(read(folder)))
            if read(folder) == start:
                run(folder)
            assert read(folder) == ends[1]
        undo_all(folder)
        assert snapshot(folder) == before and list_folders(folder) == set(), step
        if not was_killed:
            break
        step += 1
    assert step > 15
    assert seen == ({0, 1} if goes_on else set())


def undo_all(folder: Path) -> None:
    """Undo; a folder of which nothing had been changed yet says so."""
    try:
        journal.undo(folder)
    except ValueError as problem:
        assert "was not adopted" in str(problem)
        journal.finish(folder)


@pytest.mark.parametrize("goes_on", [False, True])
def test_undoing_can_be_killed_too(tmp_path: Path, goes_on: bool) -> None:
    base = make_folder(tmp_path / "base")
    before = snapshot(base)
    change(base)
    change_again(base)
    step = 0
    while run_and_kill_undo(shutil.copytree(base, folder := tmp_path / f"{step}"), step):
        if goes_on:  # adopting it again ends the undoing first
            journal.finish(folder)
            if not (folder / "original").exists():
                change(folder)
        undo_all(folder)
        assert snapshot(folder) == before and list_folders(folder) == set(), step
        step += 1
    assert step > 10


def run_and_kill_undo(folder: Path, step: int) -> bool:
    return run_and_kill(lambda: journal.undo(folder), step)


@pytest.mark.parametrize("is_second", [False, True])
def test_a_full_disk_at_any_write_leaves_the_folder_as_it_was(
    tmp_path: Path, is_second: bool
) -> None:
    base = make_folder(tmp_path / "base")
    if is_second:
        change(base)
    before, folders = snapshot(base), list_folders(base)
    run = change_again if is_second else change
    step = failures = 0
    while True:
        folder = shutil.copytree(base, tmp_path / f"{step}")
        counter = Counter(step, fill_disk)
        try:
            # On a full disk files can still be renamed and removed.
            with counting(counter, ("mkdir", "fsync")):
                run(folder)
            if counter.done <= step:
                break
        except OSError as error:
            assert "No space" in str(error)
            failures += 1
            assert_whole(folder, before, folders, run)
        step += 1
    assert failures > 5


def assert_whole(folder: Path, before: Any, folders: set[str], run: Callable[[Path], None]) -> None:
    """The folder is as before, or all was decided already and the next run ends it."""
    if journal.is_unfinished(folder):
        journal.finish(folder)
        assert read(folder) == read_done(folder, run)
    else:
        assert snapshot(folder) == before and list_folders(folder) == folders
        run(folder)


def read_done(folder: Path, run: Callable[[Path], None]) -> dict[str, bytes]:
    done = make_folder(folder.with_name(f"{folder.name}-done"))
    change(done)
    if run is change_again:
        change_again(done)
    return read(done)


@pytest.mark.parametrize("name", ["replace", "unlink"])
def test_a_folder_that_refuses_a_renaming_goes_back_by_itself(tmp_path: Path, name: str) -> None:
    base = make_folder(tmp_path / "base")
    before = snapshot(base)
    step = 0
    while True:
        folder = shutil.copytree(base, tmp_path / f"{step}")
        counter = Counter(step, fill_disk)
        try:
            with counting(counter, (name,)):
                change(folder)
            break
        except OSError:
            undo_all(folder)
            assert snapshot(folder) == before
        step += 1
    assert step > 0 or name == "unlink"


# What is refused


def test_changed_files_are_not_undone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    before = snapshot(folder)
    change(folder)
    state = snapshot(folder)
    (folder / "config.json").write_text("mine\n")
    (folder / "dead.py").write_text("mine too\n")
    with pytest.raises(ValueError, match=r"changed since it was adopted, config.json, dead.py: mo"):
        journal.undo(folder)
    assert (folder / "config.json").read_text() == "mine\n"
    assert snapshot(folder).keys() == state.keys() | {"dead.py"}
    for name in ("config.json", "dead.py"):
        (folder / name).rename(tmp_path / name)  # as the line says
    journal.undo(folder)
    assert snapshot(folder) == before


def test_lost_originals_are_told(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    change(folder)
    state = snapshot(folder)
    (folder / "original" / "config.json").unlink()
    (folder / "original" / "dead.py").write_text("?")
    told = r"original/config.json, original/dead.py missing or changed: put the files back"
    with pytest.raises(ValueError, match=told):
        journal.undo(folder)
    assert snapshot(folder).keys() == state.keys() - {"original/config.json"}


def test_an_original_of_somebody_else_s_is_left_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    (folder / "original").mkdir()
    journal.check_aside(folder)  # an empty one is no one's
    (folder / "original" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"was not made by chatglm adopt.*rename it"):
        journal.check_aside(folder)


def test_what_a_user_put_into_original_stays(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    before = snapshot(folder)
    change(folder)
    (folder / "original" / "mine.txt").write_text("mine")
    journal.undo(folder)
    assert snapshot(folder).keys() == before.keys() | {"original/mine.txt"}


def test_a_file_does_not_take_the_place_of_another_original(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    change(folder)
    (folder / "dead.py").write_text("another\n")
    state = snapshot(folder)
    with pytest.raises(ValueError, match=r"dead.py would take the place of .*original.dead.py"):
        journal.change(folder, "2", {}, ["dead.py"])
    assert snapshot(folder) == state


BAD_RECORDS = {
    "nothing": {},
    "lists": {"version": "1", "kept": [], "written": {}, "replaced": {}},
    "outside": {"version": "1", "kept": {}, "written": {"../weights.bin": "0"}, "replaced": {}},
    "absolute": {"version": "1", "kept": {"/etc/x": "0"}, "written": {}, "replaced": {}},
    "deep": {"version": "1", "kept": {}, "written": {}, "replaced": {"a/../../x": "0"}},
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_that_is_none_is_told(tmp_path: Path, case: str) -> None:
    """It may have come with a folder from anywhere, and say anything."""
    folder = make_folder(tmp_path / "a")
    change(folder)
    (folder / "original" / "adopted.json").write_text(json.dumps(BAD_RECORDS[case]))
    before = snapshot(tmp_path)
    for run in (journal.undo, journal.read_record):
        with pytest.raises(ValueError, match="is no record of chatglm adopt: restore"):
            run(folder)
    assert snapshot(tmp_path) == before


def test_an_original_elsewhere_is_not_ours(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    change(folder)
    (folder / "original").rename(tmp_path / "elsewhere")
    (folder / "original").symlink_to(tmp_path / "elsewhere")
    for run in (journal.undo, journal.check_aside):
        with pytest.raises(ValueError, match="was not made by chatglm adopt"):
            run(folder)
