"""A Python for tests that start many processes: it has imported the libraries, and forks.

Nearly all that a short command takes is the import of torch, transformers and what these import. A
`ForkServer` imports them once. Its `executable` is used like `sys.executable` (by `subprocess`, by
torchrun through PYTHON_EXEC): it takes a `-c`, a `-m` or a script, and its exit code, its signals
and its three streams are those of a fork that runs them. A fork imports the project's own code
itself. Where a fork would not be as a new interpreter is (another variable of the environment, an
option of Python's), a new interpreter runs instead.

What differs still: `Popen.pid` is a process that waits for the fork, so memory and processor time
are not to be read of it; the fork leads a session of its own; limits and the file mode mask are
the server's.
"""

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
IS_SUPPORTED = sys.platform == "linux" and hasattr(os, "pidfd_open")


class ForkServer:
    """An interpreter that has imported some modules and waits.

    Args:
        libraries: names of modules, or of attributes of modules that import more when they are
            asked for, as "transformers:Trainer".
    """

    def __init__(self, libraries: Sequence[str]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="chatglm-tests-")
        address = Path(self.folder.name) / "socket"
        self.executable = str(self._write_executable(address))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(address))
            listener.listen(64)  # a client waits there while the server still imports
            self.process = subprocess.Popen(
                [sys.executable, HERE / "server.py", str(listener.fileno()), *libraries],
                env=environment,
                stdin=subprocess.PIPE,  # its end tells the server to end, however this one dies
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def _write_executable(self, address: Path) -> Path:
        """Write the file that is started in the place of Python."""
        words = shlex.join([sys.executable, "-IS", str(HERE / "client.py"), str(address)])
        file = address.with_name("python")
        file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        file.chmod(0o700)
        return file

    def close(self) -> None:
        """End the server, and what it has forked and still runs."""
        self.process.communicate()
        self.folder.cleanup()
