"""C7: two processes write to one place: the second is told who holds it, and breaks nothing."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, import_from_package
from model_folders import hashes, make_adapter, old_name
from old_folders import make_small, snapshot

cli = import_from_package("chatglm.cli")
folder_lock = import_from_package("chatglm.folder_lock")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
Arguments = list[str]


@contextmanager
def stopped_inside(words: Arguments, owner: Any, name: str) -> Iterator[int]:
    """Run a command in another process that stands still where it calls a function, then dies."""
    ready, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:

            def stand_still(*args: Any, **kwargs: Any) -> None:
                os.write(write_end, b"!")
                time.sleep(600)

            setattr(owner, name, stand_still)
            cli.main(words)
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(ready, 1) == b"!", "the other process ended before it came there"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run_refused(words: Arguments, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Errno" not in err
    return err


def assert_told(line: str, place: Path, command: str, pid: int) -> None:
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    assert re.fullmatch(
        rf"chatglm: {re.escape(str(place))} is being written by {command} \(process {pid}, since "
        rf"{since}\): wait until it is done, or stop it, and run the same command again\n",
        line,
    ), line


def test_quantize_and_merge(
    tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of the two comes second; and after the first one died its work is gone on with."""
    from chatglm.converting import conversion

    new = tmp_path / "deep" / "new"
    words = ["quantize", str(tiny_repo), str(new), "--bits", "4"]
    with stopped_inside(words, conversion, "_write_rest") as pid:
        unfinished = snapshot(tmp_path)
        for others in (words, [*words[:-1], "8"]):
            assert_told(run_refused(others, capsys), new, "chatglm quantize", pid)
        assert snapshot(tmp_path) == unfinished
    assert cli.main(words) == 0
    assert [path.name for path in new.parent.iterdir()] == ["new"]
    assert "exists and is not empty" in run_refused(words, capsys)


@old_name
def test_merge(tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from chatglm.converting import conversion

    make_adapter(tiny_repo, tmp_path / "lora")
    words = ["merge", str(tiny_repo), str(tmp_path / "new"), "--lora", str(tmp_path / "lora")]
    with stopped_inside(words, conversion, "write_shards") as pid:
        assert_told(run_refused(words, capsys), tmp_path / "new", "chatglm merge", pid)
    assert cli.main(words) == 0


@pytest.mark.parametrize("second", [[], ["--undo"], ["--dry-run"]], ids=str)
def test_adopt(tmp_path: Path, second: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    from chatglm.adopting import journal

    folder = make_small(tmp_path / "old")
    before = snapshot(folder)
    words = ["adopt", str(folder)]
    with stopped_inside(words, journal, "_take_places") as pid:
        unfinished = snapshot(folder)
        line = run_refused([*words, *second], capsys)
        assert_told(line, folder, "chatglm adopt", pid)
        assert snapshot(folder) == unfinished
    assert cli.main(words) == 0
    assert not (folder / ".chatglm.lock").exists()
    assert cli.main([*words, "--undo"]) == 0
    assert snapshot(folder) == before


def test_adopt_into_a_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from chatglm.adopting import copying

    folder, new = make_small(tmp_path / "old"), tmp_path / "new"
    words = ["adopt", str(folder), "--out", str(new)]
    others = [words, ["quantize", str(folder), str(new), "--bits", "4"]]
    with stopped_inside(words, copying, "_write_bytes") as pid:
        for second in others:
            assert_told(run_refused(second, capsys), new, "chatglm adopt", pid)
    assert cli.main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


ROWS = [{"prompt": "你好", "response": "你好！"}] * 4


def test_train(tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that would go on with what the other is training."""
    from chatglm.training import stage

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", "sft", str(tiny_repo), "--train_data", str(data), "--use_cpu", "true"]
    words += ["--output", str(tmp_path / "out"), "--max_steps", "1", "--report_to", "none"]
    words += ["--disable_tqdm", "true"]
    with stopped_inside(words, stage, "load_tokenizer") as pid:
        for more in ([], ["--resume", "true"]):
            line = run_refused([*words, *more], capsys)
            assert_told(line, tmp_path / "out", "chatglm train", pid)
    assert (tmp_path / "out" / ".chatglm.lock").exists()  # of a dead process
    assert cli.main(words) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / ".chatglm.lock").exists()


def test_both_at_once(tiny_repo: Path, tmp_path: Path, quick_python: str) -> None:
    """Started together one makes the folder, and the others say a line."""
    command = [quick_python, "-m", "chatglm", "quantize", str(tiny_repo), str(tmp_path / "new")]
    command += ["--bits", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        )
        for _ in range(2)
    ]
    ended = [(*run.communicate(timeout=200), run.returncode) for run in runs]
    codes = sorted(code for _, _, code in ended)
    assert codes == [0, 2], ended
    (error,) = (err for _, err, code in ended if code == 2)
    assert re.search(r"is being written by|exists and is not empty", error), error
    assert "Traceback" not in error and "Errno" not in error
    assert cli.main(["quantize", str(tiny_repo), str(tmp_path / "again"), "--bits", "4"]) == 0
    found, expected = hashes(tmp_path / "new"), hashes(tmp_path / "again")
    assert found == expected


# The lock itself


def test_a_lock_of_a_dead_process_is_none(tmp_path: Path) -> None:
    file = tmp_path / ".chatglm.lock"
    file.write_text('{"pid": 1}')
    with folder_lock.hold_folder(tmp_path, "a"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": 3}'])
def test_a_holder_without_a_name(tmp_path: Path, note: str) -> None:
    """It has not written who it is yet, or its disk is full."""
    with folder_lock.hold_folder(tmp_path, "a"):
        (tmp_path / ".chatglm.lock").write_text(note)
        with (
            pytest.raises(ValueError, match="is being written by another process of chatglm: wait"),
            folder_lock.hold_folder(tmp_path, "b"),
        ):
            raise AssertionError


def test_nobody_else_is_ever_inside(tmp_path: Path) -> None:
    """Four processes count to a hundred each, though the file is removed at every release."""
    count = tmp_path / "count"
    count.write_text("0")
    pids = [fork_and_count(tmp_path, count, 100) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    assert count.read_text() == "400"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def fork_and_count(folder: Path, count: Path, times: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        left = times
        while left:
            try:
                with folder_lock.hold_folder(folder, "count"):
                    number = int(count.read_text())
                    time.sleep(0.0001)
                    count.write_text(str(number + 1))
                    left -= 1
            except ValueError as problem:
                assert "is being written by" in str(problem)
        code = 0
    finally:
        os._exit(code)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock.hold_folder(tmp_path, "a"):
        pass


def test_parents_that_were_made_in_vain_go(tmp_path: Path) -> None:
    with folder_lock.hold_target(tmp_path / "a" / "b" / "c", "x"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with folder_lock.hold_target(tmp_path / "a" / "b" / "c", "x"):
        (tmp_path / "a" / "b" / "c").mkdir()
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_place_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\): make"),
        folder_lock.hold_folder(tmp_path, "a"),
    ):
        raise AssertionError
