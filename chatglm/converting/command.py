"""Owns what the commands that convert a model folder have in common.

Does not know what is converted into what (`conversion`).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from chatglm.checkpoints.recognize import CONFIG_FILE
from chatglm.cli import add_any_base, add_verify, choose_folder
from chatglm.converting.staging import unfinished_folder


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Add the two folders to a command's options; the first one also has a name."""
    source = "model folder with float weights, of any generation or fork (default: the base of DIR)"
    parser.add_argument("source", metavar="SRC", nargs="?", help=source)
    parser.add_argument("target", metavar="DST", nargs="?", help="folder to be made")
    parser.add_argument("--model", metavar="SRC", help="the same as SRC")
    add_verify(parser)


def add_lora(parser: argparse.ArgumentParser, is_required: bool = False) -> None:
    """Add the options under which adapters are merged into weights."""
    lora = "the LoRA adapter of peft, or several in order, to merge into the weights"
    parser.add_argument(
        "--lora", metavar="DIR", nargs="+", action="extend", required=is_required, help=lora
    )
    add_any_base(parser)


def place_folders(args: argparse.Namespace) -> None:
    """Give the folders of a command line their names, wherever among the options they stand.

    `--lora A DST` and `SRC --lora A DST` read as if DST were an adapter too, and a folder that
    stands alone is the one to be made.

    Raises:
        ValueError: if no folder to be made is named.
    """
    if args.target is None:
        args.source, args.target = None, args.source
    folders: list[str] = args.lora or []
    is_alone = args.source is None and (args.target is None or _is_model(args.target))
    if is_alone and len(folders) > 1 and not _holds_files(folders[-1]):
        args.source, args.target = args.target, folders.pop()
    if args.target is None:
        raise ValueError("no folder to be made is named: the following is required: DST")


def _is_model(path: str) -> bool:
    return (Path(path).expanduser() / CONFIG_FILE).is_file()


def _holds_files(path: str) -> bool:
    folder = Path(path).expanduser()
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


def choose_source(args: argparse.Namespace) -> str:
    """Return the folder to convert, having verified it if that was asked for.

    What is to be said of adapters, and which base of theirs is taken, is said.

    Raises:
        ValueError: if none is named, or two, if one is not as its hashes say, or if adapters are
            not for it.
    """
    place_folders(args)
    source = choose_folder(args.source, args.model)
    if source is None and not args.lora:
        raise ValueError(f"no folder to make {args.target} from is named: SRC DST, or --model SRC")
    if args.lora:
        from chatglm.adapters.kinds import announce, stack_adapters
        from chatglm.loading import check_model_folder

        base = check_model_folder(source) if source else None
        stack = stack_adapters(args.lora, base, args.any_base)
        announce(stack)
        source = str(stack.base)
    assert source is not None, args
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
