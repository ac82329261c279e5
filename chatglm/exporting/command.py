"""Owns `chatglm export-tokenizer`: a vocabulary in, a `tokenizer.json` and its limits out.

    chatglm export-tokenizer build/tokenizer --model ../chatglm-6b
    chatglm export-tokenizer build/tokenizer --model ../chatglm-6b --check mine.txt

Does not know how the file is made (`rust_tokenizer`); the model's own tokenizer stays what it is.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatglm.cli import add_trust, add_verify, open_parser, run_command
from chatglm.folder_lock import hold_target

DESCRIPTION = """\
Write a tokenizer.json for programs that read nothing else, with a README of what it does
otherwise than the model's own tokenizer. It is no replacement: AutoTokenizer gives our class as
before. DIR is a folder of its own, and appears only when it is complete."""
TOKENIZER_FILE, LIMITS_FILE = "tokenizer.json", "README.md"
UNFINISHED = ".unfinished"
MANY = 1000  # lines that are encoded together
SHOWN = 5  # differences, and ids of each


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm export-tokenizer`, as a command of its own or of `subparsers`."""
    parser = open_parser(subparsers, "export-tokenizer", DESCRIPTION)
    add = parser.add_argument
    add("target", metavar="DIR", help="folder to be made, or one that holds just this export")
    model = "model folder with the vocabulary (default: the small model of a clone)"
    add("--model", metavar="FOLDER", help=model)
    check = "text in UTF-8: count its lines that get other ids, and show the first ones"
    add("--check", metavar="FILE", help=check)
    add_trust(parser)
    add_verify(parser)
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Write the folder, and compare the two tokenizers if asked to.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: if the model, the text or the folder to be made cannot be used.
    """
    from transformers import AutoTokenizer

    from chatglm import door
    from chatglm.exporting.rust_tokenizer import LIMITS, build_tokenizer
    from chatglm.loading import check_model_folder, default_model_folder

    lines = read_lines(args.check) if args.check else []
    folder = check_model_folder(args.model or default_model_folder(), args.verify)
    tokenizer = door.load_from(folder, AutoTokenizer)
    built = build_tokenizer(tokenizer)
    files = {TOKENIZER_FILE: built.to_str(), LIMITS_FILE: LIMITS}
    is_new = write_folder(Path(args.target).expanduser().resolve(), files)
    state = "written" if is_new else "is so already"
    sys.stdout.write(f"{args.target}: {TOKENIZER_FILE} {state}; {LIMITS_FILE} has its limits\n")
    if args.check:
        sys.stdout.write(report_differences(args.check, lines, tokenizer, built))
    return 0


def read_lines(path: str) -> list[str]:
    """Return the lines of a text without their ends; those that are empty are left out.

    Raises:
        ValueError: if it is no file, no UTF-8 or has no line that is not empty.
    """
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"--check {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--check {path} is no UTF-8 (byte {error.start}): save it as UTF-8"
        ) from error
    lines = [line for line in text.split("\n") if line]
    if not lines:
        raise ValueError(f"--check {path} has no text in it: name a file with some lines")
    return lines


def write_folder(target: Path, files: dict[str, str]) -> bool:
    """Make a folder of these files, all or none of them.

    Args:
        target: its full path.
        files: content by name.

    Returns:
        False if they are there already, each as it is to be.

    Raises:
        ValueError: if something else is there, or if it cannot be written.
    """
    try:
        with hold_target(target, "chatglm export-tokenizer"):
            if _is_taken(target):
                _require_same(target, files)
                return False
            _write_whole(target, files)
            return True
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror}") from error


def _is_taken(target: Path) -> bool:
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _require_same(target: Path, files: dict[str, str]) -> None:
    """Refuse what is no folder of exactly these files."""
    if not target.is_dir():
        raise ValueError(f"{target} is no folder: name one that is not there yet")
    names = {path.name for path in target.iterdir()}
    if names == set(files) and all((target / name).is_file() for name in files):
        if all((target / name).read_bytes() == files[name].encode() for name in files):
            return
        raise ValueError(f"{target} holds the export of another vocabulary or release: remove it")
    other = sorted(names.difference(files)) or sorted(names)
    raise ValueError(f"{target} holds {other[0]}: name a folder that is empty or not there yet")


def _write_whole(target: Path, files: dict[str, str]) -> None:
    """Write beside the target and give the folder its name at the end."""
    unfinished = target.with_name(target.name + UNFINISHED)
    if unfinished.exists() and {path.name for path in unfinished.iterdir()} - set(files):
        raise ValueError(f"{unfinished} is in the way and is no left-over of this: remove it")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in files.items():
            (unfinished / name).write_bytes(content.encode())
        if target.exists():
            target.rmdir()  # it is empty
        unfinished.replace(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def find_differences(lines: list[str], own: Any, built: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield place, own ids and exported ids of lines that get others, without closing tokens."""
    for start in range(0, len(lines), MANY):
        part = lines[start : start + MANY]
        ours = own(part, add_special_tokens=False)["input_ids"]
        theirs = built.encode_batch(part, add_special_tokens=False)
        for place, (expected, found) in enumerate(zip(ours, theirs)):
            if expected != found.ids:
                yield start + place, expected, found.ids


def report_differences(path: str, lines: list[str], own: Any, built: Any) -> str:
    """Return how many lines get other ids, and where the first ones part."""
    found = [*find_differences(lines, own, built)]
    count = f"{len(found):,} of {len(lines):,}"
    report = [f"{path}: {count} lines that are not empty get other ids\n"]
    for place, expected, ids in found[:SHOWN]:
        same = 0
        while expected[same : same + 1] == ids[same : same + 1]:
            same += 1
        kept, others = expected[same : same + SHOWN], ids[same : same + SHOWN]
        text = json.dumps(lines[place][:60], ensure_ascii=False)
        report.append(f"  {text}: token {same + 1} on is {others}, and should be {kept}\n")
    return "".join(report)


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
