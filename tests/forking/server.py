"""Imports libraries once, and forks for every command that a `forking.client` hands it.

    server.py DESCRIPTOR LIBRARY...      DESCRIPTOR is a socket that listens

Owns the server's side and what makes a fork equal a new interpreter. Ends when its standard input
does. A fork returns from `serve` to the end of this file, and so ends as any program does: its
threads are waited for and its exit functions called.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types
from typing import Any, NamedTuple

LARGEST_REQUEST = 2**20  # bytes
# Variables that say who a process is, or are read when they are needed: they may differ. All others
# may have been read while the libraries were imported.
OF_ONE_PROCESS = {
    *("COLUMNS", "DS_ACCELERATOR", "LINES", "OLDPWD", "PWD", "PYTEST_CURRENT_TEST", "PYTHONPATH"),
    *("PYTHON_EXEC", "RANK", "SHLVL", "WORLD_SIZE", "_"),
}
FAMILIES_OF_ONE_PROCESS = (
    *("ACCELERATE_", "COV_", "GROUP_", "LOCAL_", "MASTER_", "ROLE_", "TORCHELASTIC_"),
    "TORCH_NCCL_",
)


class Request(NamedTuple):
    """What a client asks for: the words behind `python`, and what a process has beside them."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    ignores_interrupts: bool


class Child(NamedTuple):
    """A fork that runs: its number, a descriptor that tells of its end, and its client."""

    process: int
    end: int
    connection: socket.socket


def load(libraries: list[str]) -> None:
    """Import modules, with no thread beside this one."""
    # The only library here that starts one would do so for its allocator.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    for library in libraries:
        module, _, attribute = library.partition(":")
        imported = importlib.import_module(module)
        if attribute:
            getattr(imported, attribute)
    del os.environ["JE_ARROW_MALLOC_CONF"]
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise RuntimeError(f"{len(threads)} threads run after the imports: a fork would lack them")
    gc.freeze()  # no collection of a fork writes to pages that are shared


class Server:
    """Forks, waits for the forks, and kills those whose client was killed.

    Args:
        listener: clients connect to it.
        environment: of this process before it imported anything.
    """

    def __init__(self, listener: socket.socket, environment: dict[str, str]) -> None:
        self.listener, self.environment = listener, environment
        self.changed = {k: v for k, v in os.environ.items() if environment.get(k) != v}
        self.lifetime = os.dup(0)
        self.selector = selectors.DefaultSelector()
        for waited in (self.listener, self.lifetime):
            self.selector.register(waited, selectors.EVENT_READ)
        self.children: list[Child] = []

    def serve(self) -> tuple[Request, list[int]]:
        """Return, in a fork, what it has to run and its streams; in the server, never."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    found = self.accept()
                    if found is not None:
                        return found
                elif key.fileobj == self.lifetime:
                    self.end()
                else:
                    self.look_after(key.data, key.fd)

    def accept(self) -> tuple[Request, list[int]] | None:
        """Fork for a client, or send it away; return the request in the fork only."""
        connection, _ = self.listener.accept()
        data, streams, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 3)
        if not data:  # the client was killed
            connection.close()
            return None
        request = Request(**json.loads(data))
        if not self.is_alike(request):
            connection.send(b"fresh")
            connection.close()
        elif process := os.fork():
            self.keep(process, connection)
        else:
            self.forget(connection)
            return request, streams
        for stream in streams:
            os.close(stream)
        return None

    def is_alike(self, request: Request) -> bool:
        """Tell whether a new interpreter would be as this one is, but for what a fork changes."""
        first = next((word for word in request.arguments if word != "-u"), "-")
        is_plain = first in ("-c", "-m") or not first.startswith("-")
        wanted, own = (
            {k: v for k, v in variables.items() if not self.may_differ(k)}
            for variables in (request.environment, self.environment)
        )
        return is_plain and wanted == own

    def may_differ(self, variable: str) -> bool:
        """Tell whether a variable does not matter, or is what an import made it."""
        known = OF_ONE_PROCESS | self.changed.keys()
        return variable in known or variable.startswith(FAMILIES_OF_ONE_PROCESS)

    def keep(self, process: int, connection: socket.socket) -> None:
        """Tell the client of its fork, and watch both."""
        child = Child(process, os.pidfd_open(process), connection)
        self.children.append(child)
        for waited in (child.end, connection):
            self.selector.register(waited, selectors.EVENT_READ, child)
        with contextlib.suppress(OSError):
            connection.send(str(process).encode())

    def look_after(self, child: Child, descriptor: int) -> None:
        """Kill a fork without a client; tell the client of a fork that has ended."""
        if child not in self.children:
            return  # both came at once
        if descriptor != child.end:
            self.selector.unregister(child.connection)
            os.kill(child.process, signal.SIGKILL)
            return
        _, status = os.waitpid(child.process, 0)
        with contextlib.suppress(OSError):
            child.connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        for waited in (child.end, child.connection):
            with contextlib.suppress(KeyError):
                self.selector.unregister(waited)
        os.close(child.end)
        child.connection.close()
        self.children.remove(child)

    def forget(self, connection: socket.socket) -> None:
        """Close, in a fork, all that is the server's."""
        self.selector.close()
        self.listener.close()
        os.close(self.lifetime)
        for child in self.children:
            os.close(child.end)
            child.connection.close()
        connection.close()

    def end(self) -> None:
        """Kill what still runs, and end."""
        for child in self.children:
            os.kill(child.process, signal.SIGKILL)
            os.waitpid(child.process, 0)
        os._exit(0)


def become(request: Request, streams: list[int], changed: dict[str, str]) -> None:
    """Take over what a client has: streams, folder, environment and interrupts."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for name in ("stdin", "stdout", "stderr"):
        open_stream(name)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment | changed)
    if request.ignores_interrupts:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    seed()


def seed() -> None:
    """Take random numbers from the system, as a new interpreter does; `random` does by itself."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()


def open_stream(name: str, is_buffered: bool = True) -> None:
    """Replace a stream of `sys`, which may have asked its old file whether it can seek."""
    old = getattr(sys, name)
    is_buffered &= not (name == "stdout" and old.write_through)
    file: Any = io.FileIO(old.fileno(), old.mode, closefd=False)
    if is_buffered:
        file = (io.BufferedReader if name == "stdin" else io.BufferedWriter)(file)
    by_lines = name == "stderr" or (is_buffered and file.isatty())
    form = {"encoding": old.encoding, "errors": old.errors, "line_buffering": by_lines}
    stream = io.TextIOWrapper(file, **form, write_through=not is_buffered)
    stream.mode = old.mode
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def run(arguments: list[str]) -> None:
    """Run a `-c`, a `-m` or a script, as Python does."""
    while arguments[0] == "-u":
        open_stream("stdout", is_buffered=False)
        arguments = arguments[1:]
    kind, *rest = arguments
    first = {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(os.path.realpath(kind)))
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [first, *given]
    sys.argv = [kind, *rest[kind in ("-c", "-m") :]]
    if kind == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(kind, run_name="__main__")


def main() -> None:
    """Be the server, and in forks the commands."""
    environment = dict(os.environ)
    del sys.path[0]  # the folder of this file
    descriptor, *libraries = sys.argv[1:]
    load(libraries)
    server = Server(socket.socket(fileno=int(descriptor)), environment)
    request, streams = server.serve()
    become(request, streams, server.changed)
    run(request.arguments)


if __name__ == "__main__":
    main()
