"""Owns `chatglm data`: shows how rows are read and what a training would learn of them.

    chatglm data rows.jsonl
    chatglm data rows.jsonl --stage dpo --model ../chatglm-6b --max_length 512
    chatglm data --config sft.yaml --bad_rows skip --json

The keys are those of `chatglm train STAGE`, and rows are read as that reads them. Only a model's
configuration and vocabulary are looked at, by default those of the small model of a clone.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from chatglm.cli import TRUST, open_parser, run_command
from chatglm.training.command import HELP, read_keys
from chatglm.training.keys.problems import KeyProblem
from chatglm.training.keys.reading import name_key
from chatglm.training.stage_list import STAGES

DESCRIPTION = """\
Show how rows are read and what a training learns of them, before any model is loaded.

  FILE ...       data files, folders or patterns; without one, those that the keys name
  --stage STAGE  what they are for: {stages} (default: sft)
  --show N       how many examples are shown (default: 3)
  --json         print one JSON object
  --KEY VALUE    any key of chatglm train STAGE, as --model FOLDER, --config FILE, --bad_rows skip,
                 --columns prompt=question response=reply, --max_length 512
"""
# These keys of a stage have to be there, and do not matter for its rows.
UNUSED = {"output": "unused", "reward_function": "unused:unused"}
REWARDED = ("ppo", "grpo")
LONGEST_PART = 1500  # characters of a prompt or an answer that are shown to people


class Asked(NamedTuple):
    """What a command line asks for.

    Attributes:
        stage: that the rows are for.
        show: how many examples are shown.
        is_json: whether one object is printed.
        words: keys of the stage, its files among them.
    """

    stage: str
    show: int
    is_json: bool
    words: list[str]


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm data`, as a command of its own or of `subparsers`."""
    description = DESCRIPTION.format(stages=", ".join(STAGES))
    parser = open_parser(subparsers, "data", description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "chatglm data [FILE ...] [--stage STAGE] [--json] [--KEY VALUE ...]"
    # Keys of stages stand between files and options in any order, which this reads itself.
    parser.prefix_chars = "\0"
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=main, help=parser.format_help)
    return parser


def main(args: argparse.Namespace) -> int:
    """Show the rows.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: for keys, files and rows that cannot be used.
    """
    if HELP & set(args.words):
        sys.stdout.write(args.help())
        return 0
    from chatglm import door

    words = [word for word in args.words if word != TRUST]
    with door.folder_code() if TRUST in args.words else door.package_code():
        preview(read_words(words))
    return 0


def read_words(words: Sequence[str]) -> Asked:
    """Take apart files, the options of this command, and keys of a stage.

    Words behind an option of this command, up to the next one, are files.

    Raises:
        KeyProblem: for an option without its value, or a stage that there is not.
    """
    options: dict[str, str] = {}
    files: list[str] = []
    keys: list[str] = []
    place, waiting = files, ""
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if waiting:
            options[waiting], waiting, place = word, "", files
        elif word in ("--json", "--show", "--stage") or (equals and name in ("show", "stage")):
            options[name] = value
            waiting = "" if equals or name == "json" else name
            place = files
        else:
            place = keys if word.startswith("--") else place
            place.append(word)
    stage, show = options.get("stage", "sft"), options.get("show", "3")
    if waiting or stage not in STAGES or not show.isdecimal():
        told = f"{waiting} has no value" if waiting else f"got stage {stage}, show {show}"
        stages = ", ".join(STAGES)
        raise KeyProblem(f"stage must be one of {stages}, and show a number; {told}")
    data = "eval_data" if stage == "eval" else "train_data"
    return Asked(stage, int(show), "json" in options, [*_as_key(data, files), *keys])


def _as_key(name: str, values: Sequence[str]) -> list[str]:
    return [f"--{name}", *values] if values else []


def preview(asked: Asked) -> None:
    """Print what is asked for.

    Raises:
        ValueError: for keys, files and rows that cannot be used.
    """
    settings, given = read_keys(asked.stage, [*_fill(asked), *asked.words])
    import transformers

    from chatglm.previewing.reading import read_rows
    from chatglm.training.data.measuring import find_duplicates, measure, show_first
    from chatglm.training.data.showing import describe_rows, has_colours, list_fields, show_examples
    from chatglm.training.models import load_tokenizer, read_format
    from chatglm.training.paths import check_data

    transformers.logging.set_verbosity_error()
    check_data(settings)
    source, tokenizer = read_format(settings), load_tokenizer(settings)
    data = read_rows(asked.stage, settings, given, source, tokenizer)
    measured, copies = measure(data.train, data.renderer), find_duplicates(data.train)
    shown = list(show_first(data.train, data.renderer, asked.show))
    if asked.is_json:
        fields = {"stage": asked.stage, **list_fields(measured, copies, shown)}
        if data.held_out is not None:
            held_out = measure(data.held_out, data.renderer)
            fields["held_out"] = list_fields(held_out, find_duplicates(data.held_out), [])
        sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
        return
    lines = describe_rows(measured)
    lines += [f"{copies:,} examples are there a second time"] if copies else []
    if data.held_out is not None:
        lines += ["held out:", *describe_rows(measure(data.held_out, data.renderer))]
    is_coloured = has_colours(sys.stdout)
    lines += ["", *show_examples(shown, is_coloured, LONGEST_PART)]
    sys.stdout.write("\n".join(lines) + "\n")


def _fill(asked: Asked) -> list[str]:
    """Return values for the keys that a training needs and rows do not."""
    words = {name_key(word[2:].partition("=")[0]) for word in asked.words if word[:2] == "--"}
    given = words | _list_config_keys(asked.words)
    missing = ["output"] if not given & {"output", "output_dir"} else []
    is_rewarded = given & {"reward_model", "reward_function", "reward_model_path"}
    if asked.stage in REWARDED and not is_rewarded:
        missing.append("reward_function")
    return [word for key in missing for word in (f"--{key}", UNUSED[key])]


def _list_config_keys(words: Sequence[str]) -> set[str]:
    """Return the keys in the file that the keys name, if they name one."""
    from pathlib import Path

    from chatglm.training.keys.reading import read_config, read_flags

    config = read_flags(words).get("config")
    return set() if config is None else set(read_config(Path(str(config))))


if __name__ == "__main__":
    parsed = make_parser().parse_args()
    raise SystemExit(run_command(parsed.run, parsed))
