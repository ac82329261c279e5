"""C8: what a shell, a key or a typo does to a command: one line, an exit code, no traceback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from conftest import ROOT

from chatglm import cli
from chatglm.training import command as training
from chatglm.training.keys.values import check_kind
from chatglm.training.settings import KeyProblem

CHATGLM = (sys.executable, "-m", "chatglm")
ON_UNIX = pytest.mark.skipif(os.name != "posix", reason="needs a Unix shell")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def heed_ctrl_c() -> Iterator[None]:
    """A process that a shell's `&` began ignores Ctrl-C, and so do those that it begins."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_shell(line: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell, in which `$C` is the command chatglm."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=ENVIRONMENT | {"C": " ".join(CHATGLM)},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        **more,
    )


CLOSED = {
    "stdin": (
        "$C chat --greedy <&-",
        2,
        "",
        "chatglm: standard input is closed, and quest",
    ),
    "stdout": ("$C check . >&-", 2, "", "chatglm: standard output is closed: let it go to a file"),
    "stderr": ("$C check nowhere 2>&-", 2, "", ""),
    "all of them": ("$C check . <&- >&- 2>&-", 2, "", ""),
    "a reader that leaves": ("$C check . | true", 0, "", ""),
    "a reader that leaves the help": ("$C chat --help | true; exit ${PIPESTATUS[0]}", 0, "", ""),
}


@ON_UNIX
@pytest.mark.parametrize("case", CLOSED)
def test_streams_that_are_closed(case: str) -> None:
    line, code, out, err = CLOSED[case]
    done = run_shell(line)
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err) and done.stderr.count("\n") == bool(err)


@ON_UNIX
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints must not end up in a file that the command opened next."""
    code = (
        "import os, sys\n"
        "from chatglm import cli\n"
        "def run(args):\n"
        "    with open('next', 'w') as file:\n"
        "        os.write(1, str(file.fileno()).encode())\n"
        "    return 0\n"
        "sys.exit(cli.run_command(run, None))\n"
    )
    (tmp_path / "run.py").write_text(code)
    line = f"cd {tmp_path} && {sys.executable} run.py <&- 2>&-"
    done = run_shell(line)
    assert (done.returncode, int(done.stdout) > 2) == (0, True)


STOPS_ITSELF = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"


@ON_UNIX
@pytest.mark.parametrize("module", ["transformers", "torch", "chatglm_stub_of_argparse"])
def test_ctrl_c_during_imports(tmp_path: Path, module: str) -> None:
    """A library in whose import the key is pressed, and one that the command line itself needs."""
    name = module.removeprefix("chatglm_stub_of_")
    (tmp_path / f"{name}.py").write_text(STOPS_ITSELF)
    done = subprocess.run(
        [*CHATGLM, "chat", "."],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (130, "")


@ON_UNIX
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.6, 1.2, 1.8, 2.5, 3.5])
def test_ctrl_c_at_any_time(seconds: float) -> None:
    child = subprocess.Popen(
        [*CHATGLM, "chat", ".", "--greedy"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    # Python ends by the signal itself where a string that it executes was interrupted; shells call
    # both 130.
    assert child.returncode in (130, -signal.SIGINT) and b"Traceback" not in err


@ON_UNIX
def test_an_unreadable_file(tiny_repo: Path, tmp_path: Path) -> None:
    """As a user who may not read it: the tests may run as one who may read everything."""
    folder = tmp_path / "model"
    subprocess.run(["cp", "-r", tiny_repo, folder], check=True)
    (folder / "config.json").chmod(0)
    if os.access(folder / "config.json", os.R_OK):
        pytest.skip("this user may read everything")
    for words in (["check", str(folder)], ["chat", str(folder)]):
        assert cli.main(words) in (1, 2)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    return file


WRONG_KEYS = {
    "learning_rate": ("abc", "learning_rate must be of type float, got 'abc'"),
    "max_steps": ("1.5", "max_steps must be of type int, got 1.5"),
    "warmup_steps": ("many", "warmup_steps must be of type float or int, got 'many'"),
    "weight_decay": ("[1]", r"weight_decay must be of type float, got [1]"),
    "bf16": ("maybe", "bf16 must be of type bool, got 'maybe'"),
    "seed": ("x", "seed must be of type int, got 'x'"),
}


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_a_value_of_another_kind(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    value, message = WRONG_KEYS[key]
    words = ["--train_file", str(rows), "--output_dir", str(tmp_path / "out"), f"--{key}", value]
    assert cli.main(["train", "sft", *words]) == 2
    out, err = capsys.readouterr()
    for kinds in ("of type int,", "of type float,"):  # releases of transformers differ
        message = message.replace("of type float or int,", kinds) if kinds in err else message
    assert out == "" and err.splitlines()[-1] == f"chatglm: {message}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1),
        (1.0, int, 1),
        (1e-4, float, 1e-4),
        (True, bool, True),
        (None, int, None),
        ("cosine", str, "cosine"),
        ("auto", int | str, "auto"),
        (5, int | None, 5),
        ([1], list[int], [1]),
    ],
)
def test_values_of_the_right_kind_are_left_alone(value: Any, hint: Any, expected: Any) -> None:
    kept = check_kind("key", value, hint)
    assert kept == expected and type(kept) is type(expected)


@pytest.mark.parametrize(("value", "hint"), [(True, int), (1, bool), ("1", float), (1.5, int)])
def test_values_of_the_wrong_kind_are_refused(value: Any, hint: Any) -> None:
    with pytest.raises(KeyProblem, match="key must be of type "):
        check_kind("key", value, hint)


@pytest.mark.parametrize("name", ["wandb", "comet_ml", "nobody"])
def test_a_tracker_that_is_not_installed(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = ["--train_file", str(rows), "--output_dir", str(tmp_path / "out"), "--report_to", name]
    assert cli.main(["train", "sft", *words]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"chatglm: report_to names {name}, which is not insta")


def test_an_output_folder_that_cannot_be_made(
    rows: Path, tmp_path: Path, tiny_repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    place = str(tmp_path / "file" / "out")
    train = ["train", "sft", str(tiny_repo), "--train_file", str(rows), "--output_dir", place]
    for words in (train, ["quantize", str(tiny_repo), place, "--bits", "4"]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert place in err.splitlines()[-1] or str(tmp_path / "file") in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("chatglm: ") and "Traceback" not in err


@ON_UNIX
def test_names_with_spaces_lines_and_other_bytes(tiny_repo: Path, tmp_path: Path) -> None:
    """A folder of any name is looked at; one that is no UTF-8 cannot be opened, and is named."""
    plain = tmp_path / "a b\n模型"
    plain.symlink_to(tiny_repo)
    done = run_shell(f"echo hi | $C chat {str(plain)!r} --max-new-tokens 2".replace("\\n", "\n"))
    assert (done.returncode, done.stderr) == (0, "")
    odd = os.fsencode(tmp_path) + b"/x\xff"
    os.symlink(os.fsencode(tiny_repo), odd)
    for command in (b"check", b"chat"):
        called = subprocess.run(
            [*CHATGLM, command, odd], cwd=ROOT, env=ENVIRONMENT, capture_output=True, stdin=-3
        )
        if command == b"check":
            assert called.returncode in (0, 2)
        assert b"Traceback" not in called.stderr and called.stderr.count(b"\n") <= 1


@ON_UNIX
def test_no_home(tiny_repo: Path) -> None:
    line = f"env -i PYTHONPATH={ROOT} OMP_NUM_THREADS=1 $C check {tiny_repo}"
    done = run_shell(line)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_shell(f"env -i PYTHONPATH={ROOT} $C check '~nobody-there/model'")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_stage_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        training.make_parser().parse_args(["sfd"])
    assert capsys.readouterr().err.count("\n") == 1
