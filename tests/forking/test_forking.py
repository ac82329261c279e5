"""A fork is like a new interpreter: exit codes, signals, streams, environment, and alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forking

pytestmark = pytest.mark.skipif(not forking.IS_SUPPORTED, reason="needs Linux's pidfd_open")
IS_FORK = "sys.orig_argv[1].endswith('server.py')"


@pytest.fixture(scope="module")
def server() -> Iterator[forking.ForkServer]:
    server = forking.ForkServer(["numpy", "concurrent.futures:ThreadPoolExecutor"])
    yield server
    server.close()


@pytest.fixture
def python(server: forking.ForkServer) -> str:
    return server.executable


def run(python: str, *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([python, *words], capture_output=True, text=True, timeout=60, **options)


def start(python: str, code: str) -> "subprocess.Popen[str]":
    """Start code that has printed its process number when this returns."""
    code = f"import os, signal, time\nprint(os.getpid(), flush=True)\n{code}"
    return subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True)


def read_number(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_fork_has_the_libraries_already(python: str) -> None:
    code = f"import sys; print({IS_FORK}, 'numpy' in sys.modules)"
    assert run(python, "-c", code).stdout == "True True\n"
    assert run(sys.executable, "-c", code).stdout == "False False\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('a reason')", 1),
        ("raise ValueError('a reason')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os; os.abort()", -signal.SIGABRT),
    ],
)
def test_it_ends_as_it_would(python: str, code: str, expected: int) -> None:
    done, twin = run(python, "-c", code), run(sys.executable, "-c", code)
    assert done.returncode == twin.returncode == expected
    assert ("a reason" in done.stderr) == ("a reason" in twin.stderr) == ("a reason" in code)


def test_what_a_program_put_off_happens_at_its_end(python: str, tmp_path: Path) -> None:
    code = """
import atexit, threading, time
file = open("late.txt", "w")  # nobody closes it
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), file.write("written"), print("thread"))).start()
"""
    assert run(python, "-c", code, cwd=tmp_path).stdout == "thread\nat exit\n"
    assert (tmp_path / "late.txt").read_text() == "written"


def test_signals_reach_the_fork(python: str) -> None:
    code = "signal.signal({0}, lambda *_: exit(9))\nprint('ready', flush=True)\ntime.sleep(60)"
    for name in ("signal.SIGINT", "signal.SIGTERM"):
        with start(python, code.format(name)) as process:
            read_number(process)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            process.send_signal(eval(name))
            assert process.wait(timeout=30) == 9
    interrupted = """
try:
    print('ready', flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    exit(130)
"""
    with start(python, interrupted) as process:
        read_number(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


def test_a_killed_process_takes_its_fork_along(python: str) -> None:
    with start(python, "time.sleep(60)") as process:
        number = read_number(process)
        assert number != process.pid and is_running(number)
        process.kill()
        process.communicate()  # the fork had the other end of the pipe
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while is_running(number) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(number)


def test_streams_are_the_callers(python: str) -> None:
    code = "import sys; text = sys.stdin.read(); print(text, end=''); sys.stderr.write(text[::-1])"
    done = run(python, "-c", code, input="问题")
    assert (done.stdout, done.stderr) == ("问题", "题问")
    lost = "import os, sys; sys.stdout.write('a'); os._exit(0)"
    for options in ([], ["-u"]):
        expected = run(sys.executable, *options, "-c", lost).stdout
        assert run(python, *options, "-c", lost).stdout == expected
    assert expected == "a"
    reconfigured = "import sys; sys.stdout.reconfigure(encoding='utf-16-le'); print('a', end='')"
    assert run(python, "-c", reconfigured).stdout == "a\0"


DESCRIBE = """
import json, os, sys
facts = {"argv": sys.argv[1:], "path": sys.path[:2], "folder": os.getcwd(), "name": __name__}
facts |= {"main": sys.modules["__main__"].facts is facts, "RANK": os.environ.get("RANK")}
print(json.dumps(facts))
"""


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_commands_are_run_as_python_runs_them(kind: str, python: str, tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(DESCRIBE)
    (tmp_path / "package").mkdir()
    words = {"-c": ["-c", DESCRIBE], "-m": ["-m", "told"], "script": [str(tmp_path / "told.py")]}
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "package"), "RANK": "3"}
    found, expected = (
        run(program, *words[kind], "one", "--two", cwd=tmp_path, env=environment)
        for program in (python, sys.executable)
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == json.loads(expected.stdout)
    assert json.loads(found.stdout)["RANK"] == "3"


def test_what_is_not_alike_is_run_by_a_new_interpreter(python: str) -> None:
    code = f"import sys, os; print({IS_FORK}, os.environ.get('OMP_NUM_THREADS'))"
    environment = os.environ | {"OMP_NUM_THREADS": "17"}
    assert run(python, "-c", code, env=environment).stdout == "False 17\n"
    del environment["OMP_NUM_THREADS"]
    if "OMP_NUM_THREADS" in os.environ:
        assert run(python, "-c", code, env=environment).stdout == "False None\n"
    assert run(python, "-W", "error", "-c", code).stdout.startswith("False ")
    assert run(python, "-c", code, env=os.environ | {"MASTER_PORT": "1"}).stdout.startswith("True ")


def test_forks_know_nothing_of_one_another(python: str, tmp_path: Path) -> None:
    code = """
import os, random, sys, numpy
print(hasattr(numpy, "mark"), os.environ.get("MARK"), random.random(), numpy.random.rand())
numpy.mark = os.environ["MARK"] = "seen"
os.chdir("/")
"""
    lines = [run(python, "-c", code, cwd=tmp_path).stdout.split() for _ in range(2)]
    assert [line[:2] for line in lines] == [["False", "None"]] * 2
    assert len({number for line in lines for number in line[2:]}) == 4
    with start(python, "time.sleep(60)") as sleeper:
        read_number(sleeper)
        assert run(python, "-c", "print('meanwhile')").stdout == "meanwhile\n"
        sleeper.kill()


def test_a_fork_may_fork(python: str) -> None:
    code = """
import os
process = os.fork()
if process:
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
else:
    os._exit(4)
"""
    assert run(python, "-c", code).stdout == "4\n"


def test_the_end_of_a_server_is_the_end_of_its_forks() -> None:
    server = forking.ForkServer(["json"])
    with start(server.executable, "time.sleep(60)") as process:
        number = read_number(process)
        server.close()
        assert process.wait(timeout=30) != 0
    assert not is_running(number)
    assert not Path(server.executable).exists()


def test_threads_beside_the_imports_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    thread = "import threading, time; threading.Thread(target=time.sleep, args=[1]).start()"
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "threaded.py").write_text(thread)
    monkeypatch.setattr(forking, "HERE", folder)
    for name in ("server.py", "client.py"):
        (folder / name).symlink_to(Path(forking.__file__).with_name(name))
    server = forking.ForkServer(["numpy", "threaded"])
    assert run(server.executable, "-c", "print('no')").returncode != 0
    server.close()
