"""Owns `chatglm train`: picks the stage, reads its settings, runs it.

    chatglm train sft ../chatglm-6b --train_data data.jsonl --output out
    chatglm train dpo --config dpo.yaml --learning_rate 1e-6

Does not know what a stage does: each module brings a record `STAGE` (`stage`), and is imported only
when it is the one asked for.
"""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from chatglm import door
from chatglm.cli import TRUST, choose_folder, open_parser, run_command
from chatglm.training.processes import leave

STAGES = {
    "pretrain": "go on with the pre-training: blanks in plain text",
    "sft": "learn answers: the whole model, LoRA, or LoRA over packed weights",
    "ptuning": "learn a P-Tuning v2 prefix",
    "reward": "learn which of two answers is better",
    "ppo": "reinforcement learning, rewarded by a reward model or a function",
    "dpo": "learn from pairs of answers without a reward model",
    "grpo": "reinforcement learning in groups of answers, without a value model",
    "eval": "measure perplexity, choices, or the text of answers",
}
MODULES = {name: f"chatglm.training.stages.{name}" for name in STAGES} | {
    "ppo": "chatglm.training.ppo.trainer",
    "eval": "chatglm.evaluating.evaluation",
}


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm train`, as a command of its own or of `subparsers`."""
    stages = "\n".join(f"  {name:<10}{summary}" for name, summary in STAGES.items())
    parser = open_parser(subparsers, "train", f"Fine-tune or align a model. Stages:\n\n{stages}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage", choices=list(STAGES), metavar="STAGE", help="what to do")
    parser.add_argument(
        "keys",
        nargs=argparse.REMAINDER,
        metavar="[FOLDER] [--trust-folder-code] --config FILE --KEY VALUE",
        help="the model folder, a YAML file of keys, and keys that go before it; STAGE --help "
        "lists them; --trust-folder-code runs the folder's own Python files",
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
    if {"-h", "--help"} & set(args.keys):
        sys.stdout.write(describe_stage(args.stage))
        return 0
    import transformers
    from accelerate import PartialState

    from chatglm.training.settings import read_settings

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stage = find_stage(args.stage)
    keys = [word for word in args.keys if word != TRUST]
    settings, given = read_settings(stage.settings, stage.arguments, name_folder(keys))
    with door.folder_code() if TRUST in args.keys else door.package_code():
        figures = stage.run(settings, given)
    if PartialState().is_main_process:
        sys.stdout.write(json.dumps(figures, ensure_ascii=False) + "\n")
    return 0


def find_stage(name: str) -> Any:
    """Return the record of a stage, a `Stage` or a `TrainerStage`.

    Raises:
        ImportError: if a library that the stage is built on is not installed.
    """
    return importlib.import_module(MODULES[name]).STAGE


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


def describe_stage(name: str) -> str:
    """Return the keys of a stage, for `--help`."""
    from chatglm.training.settings import describe_settings

    stage = find_stage(name)
    own = f"keys, with their defaults:\n{describe_settings(stage.settings)}\n"
    library = stage.arguments
    more = f"\nand every field of {library.__module__}.{library.__name__}\n"
    has_more = bool(dataclasses.fields(library))
    return f"chatglm train {name}: {STAGES[name]}\n\n{own}{more if has_more else ''}"


if __name__ == "__main__":
    parsed = make_parser().parse_args()
    leave(run_command(parsed.run, parsed))
