"""Owns the `chatglm` command: picks the command module, imports it, reports errors in one line.

Does not know what a command does or which options it has: each command module brings
`make_parser(subparsers=None)` and `main(args)`, and is imported only when it is the one asked for.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from chatglm import __version__, door
from chatglm.releases import list_untested

COMMANDS = {
    "chat": ("chatglm.serving.chat", "talk with a model, in the terminal or through a pipe"),
    "quantize": ("chatglm.converting.quantize", "write a model folder with 4-bit or 8-bit weights"),
    "merge": ("chatglm.converting.merge", "write a model folder with a LoRA adapter in it"),
    "train": ("chatglm.training.command", "fine-tune or align a model, a stage at a time"),
    "publish": ("chatglm.publishing.publish", "put a model folder on the Hugging Face Hub"),
    "bench": ("chatglm.benching.command", "measure how fast a model is on this machine"),
}
TRUST = "--trust-folder-code"
BAD_INPUT = 2
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
    parser = _build_parser(words[:1])
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    return run_command(args.run, args)


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command's `main`, turning an error of the caller's into one line and exit code 2.

    Args:
        run: the command's `main`.
        args: its parsed options.
    """
    _use_utf8()
    for line in list_untested():
        print(f"chatglm: {line}", file=sys.stderr)
    trusts = getattr(args, "trust_folder_code", False)
    try:
        with door.folder_code() if trusts else door.package_code():
            return run(args)
    except BrokenPipeError:
        _discard_output()
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"chatglm: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


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


def _use_utf8() -> None:
    """Read and write UTF-8 whatever the locale says: the model's languages need it."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")


def _discard_output() -> None:
    """Let the interpreter's last flush succeed after the reader of a pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
