"""Stands for a process that a `forking.server` forks: hands everything on, and ends as it ends.

    python -IS client.py SOCKET ARGUMENT...

Owns the client's side. Imports little, since it is started for every command.
"""

import contextlib
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STREAMS = (0, 1, 2)


def main() -> None:
    """Have the arguments run, by a fork or, where that is not the same, by a new interpreter."""
    address, *arguments = sys.argv[1:]
    # A signal that comes before there is someone to forward it to waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "ignores_interrupts": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(request).encode()], STREAMS)
        answer = receive(connection)
        if answer != "fresh":
            forward_signals(int(answer))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        if answer == "fresh":
            os.execv(sys.executable, [sys.executable, *arguments])
        end_like(int(receive(connection)))


def receive(connection: socket.socket) -> str:
    """Return what the server says, or end without it."""
    answer = connection.recv(64)
    if not answer:
        sys.exit("the server that forks is gone: it ended, or could not import what it should")
    return answer.decode()


def forward_signals(process: int) -> None:
    """Send what this process is sent to another one; SIGKILL reaches it through the socket."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, which this one will hear
            os.kill(process, number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)


def end_like(code: int) -> None:
    """End with an exit code, or of a signal whose negative number it is."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
