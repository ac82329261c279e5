"""Owns the list of stages: what each is for, where it is, and where its keys stand.

Imports nothing of a stage, so that any of them can be named and its keys be told at once.
"""

import importlib
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, get_type_hints

from chatglm.training.defaults import DEFAULTS, STAGE_DEFAULTS
from chatglm.training.keys.library import LibraryKey, list_fields, read_library
from chatglm.training.keys.refusals import REFUSED, REFUSED_BEGINNING, RESERVED
from chatglm.training.settings import Settings
from chatglm.training.trl_import import importing_trl

KEYS = "chatglm.training.stage_settings"
TRAINER = "transformers.training_args:TrainingArguments"
PPO_KEYS = "chatglm.training.ppo.settings"
# Libraries whose classes are read from their source; ours are imported, which takes no time.
SLOW = ("transformers.", "trl.")


class StageEntry(NamedTuple):
    """A stage that can be named.

    Attributes:
        summary: what it is for.
        module: that has its record, under the name `STAGE`.
        settings: "module:Class" of the keys that are ours.
        library: the same of the keys that are a library's; "" if there are none.
    """

    summary: str
    module: str
    settings: str
    library: str = ""


STAGES = {
    "pretrain": StageEntry(
        "go on with the pre-training: blanks in plain text",
        "chatglm.training.stages.pretrain",
        f"{KEYS}:PretrainSettings",
        TRAINER,
    ),
    "sft": StageEntry(
        "learn answers: the whole model, LoRA, or LoRA over packed weights",
        "chatglm.training.stages.sft",
        f"{KEYS}:SftSettings",
        TRAINER,
    ),
    "ptuning": StageEntry(
        "learn a P-Tuning v2 prefix",
        "chatglm.training.stages.ptuning",
        f"{KEYS}:PtuningSettings",
        TRAINER,
    ),
    "reward": StageEntry(
        "learn which of two answers is better",
        "chatglm.training.stages.reward",
        f"{KEYS}:RewardSettings",
        "trl.trainer.reward_config:RewardConfig",
    ),
    "ppo": StageEntry(
        "reinforcement learning, rewarded by a reward model or a function",
        "chatglm.training.ppo.trainer",
        f"{PPO_KEYS}:PpoSettings",
        f"{PPO_KEYS}:PpoArguments",
    ),
    "dpo": StageEntry(
        "learn from pairs of answers without a reward model",
        "chatglm.training.stages.dpo",
        f"{KEYS}:DpoSettings",
        "trl.trainer.dpo_config:DPOConfig",
    ),
    "grpo": StageEntry(
        "reinforcement learning in groups of answers, without a value model",
        "chatglm.training.stages.grpo",
        f"{KEYS}:GrpoSettings",
        "trl.trainer.grpo_config:GRPOConfig",
    ),
    "eval": StageEntry(
        "measure perplexity, choices, or the text of answers",
        "chatglm.evaluating.stage",
        "chatglm.evaluating.settings:EvalSettings",
    ),
    "score": StageEntry(
        "score pairs or answers by a finished reward model",
        "chatglm.evaluating.reward_scores",
        "chatglm.evaluating.settings:ScoreSettings",
    ),
}


def find_stage(name: str) -> Any:
    """Return the record of a stage, a `Stage` or a `TrainerStage`.

    Raises:
        ImportError: if a library that the stage is built on is not installed.
    """
    return importlib.import_module(STAGES[name].module).STAGE


def find_settings(name: str) -> type[Settings]:
    """Return the dataclass of a stage's keys that are ours."""
    return _import(STAGES[name].settings)


def find_library(name: str) -> Mapping[str, LibraryKey]:
    """Return the keys of a stage that are a library's, without importing it.

    Their defaults are those that the stage starts from.

    Raises:
        ImportError: if it is not installed.
    """
    place = STAGES[name].library
    if not place:
        return {}
    if not place.startswith(SLOW):
        return list_fields(_import(place))
    with importing_trl() if place.startswith("trl.") else nullcontext():
        keys = read_library(place)
    own = {**DEFAULTS, **STAGE_DEFAULTS.get(name, {})}
    changed = {k: keys[k]._replace(default=repr(value)) for k, value in own.items() if k in keys}
    return {**keys, **changed}


def find_owners(key: str) -> list[str]:
    """Return the stages that have a key, ours or of a library that is installed."""
    owners = []
    for name in STAGES:
        with suppress(ImportError):
            if key in get_type_hints(find_settings(name)) or key in find_library(name):
                owners.append(name)
    return owners


def is_refused(key: str, stage: str) -> bool:
    """Whether a library's key can have no value in a stage but the one it has."""
    is_trl = STAGES[stage].library.startswith("trl.")
    is_theirs = key in REFUSED or key.startswith(REFUSED_BEGINNING)
    return key in RESERVED or (is_trl and is_theirs)


def _import(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


__all__ = [
    "STAGES",
    "StageEntry",
    "find_library",
    "find_owners",
    "find_settings",
    "find_stage",
    "is_refused",
]
