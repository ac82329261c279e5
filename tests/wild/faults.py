"""Has a process die, or its disk be full, at any one of the operations that change files."""

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OPERATIONS = ("replace", "rename", "mkdir", "unlink", "rmdir", "fsync", "link")
Act = Callable[[], object]


class Counter:
    """Counts operations and does something at one of them.

    Attributes:
        at: the number of that operation, from 0.
        act: what is done then.
        done: how many operations there were.
    """

    def __init__(self, at: int, act: Act) -> None:
        self.at, self.act, self.done = at, act, 0

    def step(self) -> bool:
        """Count an operation; whether it is the one."""
        self.done += 1
        return self.done - 1 == self.at


@contextlib.contextmanager
def counting(counter: Counter, names: tuple[str, ...] = OPERATIONS) -> Iterator[None]:
    """Count what is done to files by `os` and by `Path.write_bytes`, which writes half before."""
    saved: dict[str, Any] = {name: getattr(os, name) for name in names}
    write_bytes = Path.write_bytes

    def wrap(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if counter.step():
                counter.act()
            return saved[name](*args, **kwargs)

        return call

    def write_half(self: Path, content: bytes) -> int:
        if counter.step():
            write_bytes(self, content[: len(content) // 2])
            counter.act()
        return write_bytes(self, content)

    for name in names:
        setattr(os, name, wrap(name))
    Path.write_bytes = write_half  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(os, name, function)
        Path.write_bytes = write_bytes  # type: ignore[method-assign]


def run_and_kill(run: Callable[[], object], at: int) -> bool:
    """Run something in a process that is killed at an operation; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with counting(Counter(at, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
