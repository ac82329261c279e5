"""Owns what the commands that convert a model folder have in common.

Does not know what is converted into what (`conversion`).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from chatglm.cli import add_verify, choose_folder
from chatglm.converting.staging import unfinished_folder


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Add the two folders to a command's options; the first one also has a name."""
    source = "model folder with float weights, of any generation or fork"
    parser.add_argument("source", metavar="SRC", nargs="?", help=source)
    parser.add_argument("target", metavar="DST", help="folder to be made")
    parser.add_argument("--model", metavar="SRC", help="the same as SRC")
    add_verify(parser)


def choose_source(args: argparse.Namespace) -> str:
    """Return the folder to convert, having verified it if that was asked for.

    Raises:
        ValueError: if none is named, or two, or if one is not as its hashes say.
    """
    source = choose_folder(args.source, args.model)
    if source is None:
        raise ValueError(f"no folder to make {args.target} from is named: SRC DST, or --model SRC")
    if args.verify:
        from chatglm.loading import check_model_folder

        check_model_folder(source, verify=True)
    return source


def run_conversion(convert: Callable[[], int], target: str) -> str:
    """Make a folder and return how large its weights are; if stopped, say how to go on.

    Args:
        convert: makes it and returns the bytes.
        target: the folder.

    Raises:
        ValueError: if the folders, the weights or the adapter cannot be converted so.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return f"{convert() / 1e6:,.0f} MB"
    except KeyboardInterrupt:
        unfinished = unfinished_folder(Path(target).expanduser().resolve())
        if unfinished.is_dir():
            sys.stderr.write(
                f"\nchatglm: stopped; the same command goes on from {unfinished}, or remove it\n"
            )
        raise
