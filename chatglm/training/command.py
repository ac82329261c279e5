"""Owns `chatglm train`: picks the stage, reads its settings, runs it.

    chatglm train sft ../chatglm-6b --train_data data.jsonl --output out
    chatglm train dpo --config dpo.yaml --learning_rate 1e-6

Does not know what a stage does: each module brings a record `STAGE` (`stage`), and is imported only
when it is the one asked for.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from chatglm import door
from chatglm.cli import TRUST, choose_folder, leaving_at_once, open_parser, run_command
from chatglm.training.keys.describing import describe_keys, describe_whole, list_own
from chatglm.training.processes import leave
from chatglm.training.settings import read_settings
from chatglm.training.stage_list import (
    STAGES,
    find_library,
    find_owners,
    find_settings,
    find_stage,
    is_refused,
)

HELP = {"-h", "--help"}


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm train`, as a command of its own or of `subparsers`."""
    stages = "\n".join(f"  {name:<10}{entry.summary}" for name, entry in STAGES.items())
    parser = open_parser(subparsers, "train", f"Fine-tune or align a model. Stages:\n\n{stages}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage", choices=list(STAGES), metavar="STAGE", help="what to do")
    parser.add_argument(
        "keys",
        nargs=argparse.REMAINDER,
        metavar="[FOLDER] [--trust-folder-code] --config FILE --KEY VALUE",
        help="the model folder, a YAML file of keys, and keys that go before it; STAGE --help "
        "lists them, STAGE --help KEY tells all of one; --trust-folder-code runs the folder's own "
        "Python files",
    )
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Run a stage; its last figures are one line of JSON on standard output.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: for a key, a value, data or a folder that cannot be used.
    """
    if HELP & set(args.keys):
        sys.stdout.write(describe_stage(args.stage, [w for w in args.keys if w not in HELP]))
        return 0
    keys = [word for word in args.keys if word != TRUST]
    settings, given = read_keys(args.stage, name_folder(keys))
    with leaving_at_once():
        import transformers
        from accelerate import PartialState

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        stage = find_stage(args.stage)
    with door.folder_code() if TRUST in args.keys else door.package_code():
        figures = stage.run(settings, given)
    if PartialState().is_main_process:
        sys.stdout.write(json.dumps(figures, ensure_ascii=False) + "\n")
    return 0


def read_keys(stage: str, words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Return the settings of a stage and the library's keys, before anything is imported for it.

    Raises:
        KeyProblem: for keys and values that cannot be, all of them.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    say = say_line if is_first else lambda line: None
    return read_settings(find_settings(stage), find_library(stage), words, say, find_owners)


def say_line(line: str) -> None:
    """Tell a person something beside the output."""
    sys.stderr.write(f"chatglm: {line}\n")


def name_folder(keys: Sequence[str]) -> list[str]:
    """Return the words of a command line with the folder at their head as a key.

    Raises:
        ValueError: if another folder is named as the key `model` too.
    """
    if not keys or keys[0].startswith("-"):
        return list(keys)
    folder, *rest = keys
    named = [word.removeprefix("--model=") for word in rest if word.startswith("--model=")]
    named += [value for word, value in pairwise(rest) if word == "--model"]
    for other in named:
        choose_folder(folder, other)
    return rest if named else ["--model", folder, *rest]


def describe_stage(name: str, asked: Sequence[str] = ()) -> str:
    """Return the keys of a stage, for `--help`.

    Args:
        name: of the stage.
        asked: keys to tell all about, as `--KEY` or `KEY`; none for a line on each key.

    Raises:
        KeyProblem: for a key that is asked for and is not there.
    """
    own, library = list_own(find_settings(name)), find_library(name)
    if asked:
        words = [word.removeprefix("--").replace("-", "_") for word in asked]
        return describe_whole({**library, **own}, words)
    shown = {key: told for key, told in library.items() if not is_refused(key, name)}
    return f"chatglm train {name}: {STAGES[name].summary}\n\n{describe_keys(own, shown)}"


if __name__ == "__main__":
    parsed = make_parser().parse_args()
    leave(run_command(parsed.run, parsed))
