"""Owns the `chatglm` command: picks the command module, imports it, reports errors in one line.

Does not know what a command does or which options it has: each command module brings
`make_parser(subparsers=None)` and `main(args)`, and is imported only when it is the one asked for.
"""

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from chatglm import __version__, door
from chatglm.releases import list_untested

COMMANDS = {
    "chat": ("chatglm.serving.chat", "talk with a model, in the terminal or through a pipe"),
    "check": ("chatglm.checking.command", "say what a folder is and what is wrong with it"),
    "adopt": ("chatglm.adopting.command", "have a folder of 2023 load in today's transformers"),
    "quantize": ("chatglm.converting.quantize", "write a model folder with 4-bit or 8-bit weights"),
    "merge": ("chatglm.converting.merge", "write a model folder with a LoRA adapter in it"),
    "export-tokenizer": ("chatglm.exporting.command", "write a tokenizer.json for other programs"),
    "train": ("chatglm.training.command", "fine-tune or align a model, a stage at a time"),
    "data": ("chatglm.previewing.command", "show how rows are read and what a training learns"),
    "publish": ("chatglm.publishing.publish", "put a model folder on the Hugging Face Hub"),
    "bench": ("chatglm.benching.command", "measure how fast a model is on this machine"),
}
TRUST = "--trust-folder-code"
BAD_INPUT = 2
LAST_STREAM = 2  # the number of standard error
INTERRUPTED = 130  # 128 + SIGINT, what a shell expects


class CommandParser(argparse.ArgumentParser):
    """An argument parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and one line, instead of the usage text and a line."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def open_parser(subparsers: Any, command: str, description: str) -> argparse.ArgumentParser:
    """The still empty parser of a command: one of `subparsers`, or its module's own if None."""
    if subparsers is not None:
        return subparsers.add_parser(command, description=description)
    return CommandParser(prog=f"python -m {COMMANDS[command][0]}", description=description)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the one option under which a command executes Python files of a model folder."""
    trust = "run the folder's own Python files, in place of the installed model"
    parser.add_argument(TRUST, action="store_true", help=trust)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the option under which a command reads a model folder twice, to compare it first."""
    verify = "compare the model's files with its SHA256SUMS first"
    parser.add_argument("--verify", action="store_true", help=verify)


def add_folder(parser: argparse.ArgumentParser, name: str = "FOLDER") -> None:
    """Add the model folder to a command's options, by its place or by its name.

    Args:
        parser: of the command.
        name: of the place.
    """
    folder = "model folder (default: the small model of a clone)"
    parser.add_argument("folder", metavar=name, nargs="?", help=folder)
    parser.add_argument("--model", metavar="PATH", help=f"the same as {name}")
    add_trust(parser)
    add_verify(parser)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add the options under which adapters act on the model of a command."""
    adapter = "LoRA, prefix or P-Tuning folders, in order (without FOLDER: onto their own base)"
    parser.add_argument("--adapter", metavar="DIR", nargs="+", action="extend", help=adapter)
    add_any_base(parser)


def add_any_base(parser: argparse.ArgumentParser) -> None:
    """Add the option under which an adapter goes onto another base than its own."""
    other = "take an adapter onto another base than the one it was trained on"
    parser.add_argument("--any-base", action="store_true", help=other)


def choose_folder(folder: str | None, model: str | None) -> str | None:
    """Return the folder that a caller named, either way, or None.

    Raises:
        ValueError: if there are two.
    """
    if folder and model and folder != model:
        raise ValueError(f"two folders are named, {folder} and --model {model}: leave one out")
    return folder or model


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after `chatglm`; those of the process if None.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return _in_one_line(lambda: _run_words(words))


def _run_words(words: list[str]) -> int:
    parser = _build_parser(words[:1])
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    return _run(args.run, args)


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command's `main`, turning an error of the caller's into one line and exit code 2.

    Args:
        run: the command's `main`.
        args: its parsed options.
    """
    return _in_one_line(lambda: _run(run, args))


def _run(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    for line in list_untested():
        print(f"chatglm: {line}", file=sys.stderr)
    trusts = getattr(args, "trust_folder_code", False)
    with door.folder_code() if trusts else door.package_code():
        return run(args)


def _in_one_line(call: Callable[[], int]) -> int:
    """Return the exit code of what is called, and say what a caller did wrong in one line."""
    try:
        _open_streams()
        try:
            return call()
        finally:
            sys.stdout.flush()  # its reader may have gone, which would be told at the very end
    except BrokenPipeError:
        _discard_output()
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"chatglm: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


def _leave_interrupted(number: int, frame: Any) -> NoReturn:
    """Take a signal as its last act, without the destructors of C++."""
    os._exit(INTERRUPTED)


@contextmanager
def leaving_at_once() -> Generator[None, None, None]:
    """Let Ctrl-C end the process where it is, while the statements inside only import and read.

    An exception in the middle of what C++ begins with may abort a process (SIGABRT, seen once as
    PyTorch was imported). Whoever takes or ignores the signal otherwise keeps it so.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave_interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _build_parser(asked: Sequence[str]) -> CommandParser:
    """The parser with every command listed, and the options of the one that is asked for."""
    parser = CommandParser(prog="chatglm", description="ChatGLM-6B: chat with it, or quantize it.")
    parser.add_argument("--version", action="version", version=f"chatglm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary) in COMMANDS.items():
        if name in asked:
            importlib.import_module(module).make_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _open_streams() -> None:
    """Read and write UTF-8 whatever the locale says: the model's languages need it.

    Names of files need not be UTF-8: output has them as they are, an error with their numbers.

    Raises:
        ValueError: if standard output is closed.
    """
    _fill_closed_streams()
    if sys.stdout is None:
        raise ValueError("standard output is closed: let it go to a file, or to /dev/null")
    streams = {"stdin": "strict", "stdout": "surrogateescape", "stderr": "backslashreplace"}
    for name, errors in streams.items():
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _fill_closed_streams() -> None:
    """Put something in the place of standard streams that a caller closed.

    The next file that is opened would have their numbers, and what libraries print would go there.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (opened := os.open(os.devnull, os.O_RDWR)) <= LAST_STREAM:
        pass
    os.close(opened)
    if sys.stderr is None:
        sys.stderr = os.fdopen(LAST_STREAM, "w", encoding="utf-8")


def _discard_output() -> None:
    """Let the interpreter's last flush succeed after the reader of a pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
