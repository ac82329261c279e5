"""Owns `chatglm adopt`: a folder of 2023 gets what today's transformers need to load it.

    chatglm adopt ../chatglm-6b --dry-run               # what would be written, replaced and moved
    chatglm adopt ../chatglm-6b                         # what is replaced is kept in original/
    chatglm adopt ../chatglm-6b --undo                  # as it was, byte for byte
    chatglm adopt ../chatglm-6b --out ../new            # a folder beside; the weights are linked
    chatglm adopt ../chatglm-6b --out ../new --bits 4   # also --lora, --safetensors, --ptuning

Does not know what a folder needs (`plan`), how files change places (`journal`), nor how a new
folder is made (`copying`, `converting.conversion`).
"""

import argparse
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from chatglm import __version__
from chatglm.cli import add_any_base, open_parser, run_command

NAME = "chatglm adopt"
DESCRIPTION = """\
Write into a model folder what it needs to be loaded with trust_remote_code=True by today's
transformers: the model's Python files, complete configurations, the chat template, a card. What is
replaced is kept in FOLDER/original, and no weight file is touched. All of it is done or nothing; a
command that was stopped is ended by the next one."""
# Options that make new weights, and so a new folder, by their names in the parsed arguments.
REWRITING = {"bits": "--bits", "lora": "--lora", "safetensors": "--safetensors"}


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm adopt`, as a command of its own or of `subparsers`."""
    parser = open_parser(subparsers, "adopt", DESCRIPTION)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="model folder of any generation or fork, or a prefix")
    add("--dry-run", action="store_true", help="print what would be done, and do nothing")
    add("--undo", action="store_true", help="bring an adopted folder back to what it was")
    out = "leave FOLDER as it is and make a new one; weights are linked, where that can be"
    add("--out", metavar="DIR", help=out)
    add("--bits", type=int, choices=(4, 8), help="quantize the weights of the new folder")
    lora = "merge this LoRA adapter of peft into the new weights; again for the next one"
    add("--lora", metavar="DIR", action="append", help=lora)
    add_any_base(parser)
    add("--safetensors", action="store_true", help="write the new weights as safetensors")
    ptuning = "put this P-Tuning prefix, of the official scripts or of peft, into the new folder"
    add("--ptuning", metavar="DIR", help=ptuning)
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Adopt a folder, or undo that, and say what was done.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: for a folder or options with which it cannot be done.
    """
    check_options(args)
    import transformers

    from chatglm.adopting.place import find_folder

    transformers.logging.set_verbosity_error()
    folder = find_folder(args.folder)
    if args.undo:
        return undo(folder, args.dry_run)
    if args.out is None:
        return adopt(folder, args.dry_run)
    if any(getattr(args, name) for name in REWRITING):
        return convert(folder, args)
    ptuning = None if args.ptuning is None else find_folder(args.ptuning)
    return copy(folder, args.out, ptuning, args.dry_run, args.any_base)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: naming them and the remedy.
    """
    rewriting = [option for name, option in REWRITING.items() if getattr(args, name)]
    asked = [*rewriting, *(["--ptuning"] if args.ptuning else [])]
    if args.undo and (asked or args.out):
        others = ", ".join([*asked, *(["--out"] if args.out else [])])
        raise ValueError(f"--undo goes without {others}: what --out made is undone by removing it")
    if asked and args.out is None:
        raise ValueError(
            f"{', '.join(asked)} makes new weights, and those of FOLDER stay as they are: name a "
            "new folder (--out DIR)"
        )
    if args.ptuning and rewriting:
        raise ValueError(
            f"--ptuning does not go with {', '.join(rewriting)}: make a folder with the prefix "
            "first, and adopt that one with the others"
        )


def adopt(folder: Path, is_dry: bool) -> int:
    """Adopt a folder where it is, having ended what was begun there before."""
    from chatglm.adopting import journal
    from chatglm.adopting.kinds import check_family
    from chatglm.adopting.place import check_changeable
    from chatglm.folder_lock import hold_folder

    check_changeable(folder)
    check_family(folder)
    journal.check_aside(folder)
    with hold_folder(folder, NAME):
        if journal.is_unfinished(folder):
            if is_dry:
                sys.stdout.write(f"{folder}: a run that was stopped would be ended first\n")
                return 0
            journal.finish(folder)
        return _adopt_held(folder, is_dry)


def _adopt_held(folder: Path, is_dry: bool) -> int:
    from chatglm.adopting import journal
    from chatglm.adopting.place import check_links
    from chatglm.adopting.plan import find_changes

    record = journal.read_record(folder)
    changes = find_changes(folder, record)
    check_links(folder, [*changes.written, *changes.moved])
    _warn(changes.remarks)
    if not changes.written and not changes.moved:
        what = "was adopted already" if record else "has all it needs"
        sys.stdout.write(f"{folder} {what}: nothing to do\n")
        return 0
    if not is_dry:
        _change(folder, changes.written, changes.moved)
    sys.stdout.write(format_changes(changes.written, changes.moved))
    done = f"adopted; chatglm adopt {folder} --undo brings back what was"
    _end(str(folder), done, is_dry)
    return 0


def _change(folder: Path, written: Mapping[str, bytes], moved: Collection[str]) -> None:
    """Change the folder; say what state it is in if the disk is full, or the folder refuses."""
    from chatglm.adopting import journal

    try:
        journal.change(folder, __version__, written, moved)
    except OSError as error:
        state = "it is as it was; make room, or name a new folder (--out DIR)"
        if journal.is_unfinished(folder):
            state = "run the same command again, or bring back what was (--undo)"
        raise ValueError(f"{folder} could not be adopted ({error.strerror}): {state}") from error


def undo(folder: Path, is_dry: bool) -> int:
    """Bring a folder back to what it was."""
    from chatglm.adopting import journal
    from chatglm.adopting.place import check_changeable
    from chatglm.folder_lock import hold_folder

    check_changeable(folder)
    with hold_folder(folder, f"{NAME} --undo"):
        record = journal.check_undo(folder) if is_dry else journal.undo(folder)
    gone = sorted((record.written.keys() | set(record.vanish())) - record.kept.keys())
    lines = [f"bring back  {name}\n" for name in sorted(record.kept)]
    lines += [f"remove      {name}\n" for name in gone]
    sys.stdout.write("".join(lines))
    _end(str(folder), "as it was before it was adopted", is_dry)
    return 0


def copy(
    folder: Path, target: str, ptuning: Path | None, is_dry: bool, any_base: bool = False
) -> int:
    """Make an adopted folder beside one that stays as it is."""
    from chatglm.adapters.kinds import announce, stack_adapters
    from chatglm.adopting.copying import plan_copy, write_copy
    from chatglm.converting.staging import check_target

    place = check_target(folder, target)
    planned = plan_copy(folder, ptuning)
    if ptuning is not None:
        announce(stack_adapters([ptuning], folder, any_base))
    _warn(planned.remarks)
    copied = [] if is_dry else write_copy(folder, place, planned)
    lines = [f"link     {n}\n" for n in planned.weights if n not in copied]
    lines += [f"copy     {n}  (no links from there to here)\n" for n in copied]
    lines += [f"copy     {name}\n" for name in planned.others]
    lines += [f"write    {name}\n" for name in sorted(planned.written)]
    lines += [f"leave    {name}  (no part of the model)\n" for name in planned.left]
    sys.stdout.write("".join(lines))
    _end(str(place), f"adopted from {folder}, which is as it was", is_dry)
    return 0


def convert(folder: Path, args: argparse.Namespace) -> int:
    """Make an adopted folder with new weights, by the walk of quantize and merge."""
    from chatglm.adapters.kinds import announce, stack_adapters
    from chatglm.adopting.kinds import check_convertible
    from chatglm.converting.command import run_conversion
    from chatglm.converting.conversion import (
        PackedFormat,
        list_results,
        merge_checkpoint,
        quantize_checkpoint,
    )
    from chatglm.converting.staging import check_target

    check_convertible(folder)
    place = check_target(folder, args.out)
    packed_format = PackedFormat(args.bits or 0)
    if args.lora:
        announce(stack_adapters(args.lora, folder, args.any_base))
    if args.dry_run:
        results = list_results(folder, packed_format, args.lora, args.any_base)
        sys.stdout.write("".join(f"write    {name}\n" for name in results))
        _end(str(place), "", is_dry=True)
        return 0
    if args.bits:
        size = run_conversion(
            lambda: quantize_checkpoint(
                folder, place, packed_format, args.lora, NAME, args.any_base
            ),
            args.out,
        )
    else:
        size = run_conversion(
            lambda: merge_checkpoint(
                folder, place, args.lora, command=NAME, any_base=args.any_base
            ),
            args.out,
        )
    sys.stdout.write(f"{place}: adopted from {folder}, which is as it was, {size}\n")
    return 0


def format_changes(written: Mapping[str, bytes], moved: Collection[str]) -> str:
    """Return a line for each file that is written, replaced or moved."""
    lines: list[str] = []
    for name in sorted({*written, *moved}):
        if name not in moved:
            lines.append(f"write    {name}\n")
        elif name in written:
            lines.append(f"replace  {name}  (the old one: original/{name})\n")
        else:
            lines.append(f"move     {name}  (to original/{name})\n")
    return "".join(lines)


def _warn(remarks: Collection[str]) -> None:
    for remark in remarks:
        sys.stderr.write(f"chatglm: {remark}\n")


def _end(place: str, done: str, is_dry: bool) -> None:
    sys.stdout.write(f"{place}: {'nothing was changed (--dry-run)' if is_dry else done}\n")


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
