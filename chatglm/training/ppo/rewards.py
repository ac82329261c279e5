"""Owns what answers are rewarded by: a reward model, or a function of somebody's own.

    reward_model: out/reward                    a folder that `chatglm train reward` wrote
    reward_function: my_package.rewards:judge   or rewards.py:judge

A function is called with three lists of texts, prompts, answers and references (the answers of the
data, "" where there is none), and returns a list of numbers, one for each answer. Does not know
what is trained with the scores.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from chatglm import door
from chatglm.loading import check_model_folder
from chatglm.training.data.batches import pad_rows
from chatglm.training.models import ADAPTER_FILE

# The names of classes with scores end so; peft has a name of its own for what they do.
SCORER = "ForSequenceClassification"
SCORER_TASK = "SEQ_CLS"
SPECIAL_IDS = ("pad_token_id", "mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id")
TextReward = Callable[[list[str], list[str], list[str]], Sequence[float]]


class Sampled(NamedTuple):
    """Answers that are to be scored; a list entry for each.

    Attributes:
        prompt_ids: of the prompts, `[gMASK] <sop>` at the end.
        answer_ids: of the answers, `<eop>` at the end unless they were cut off before.
        prompts, answers: their texts, without special tokens.
        references: what the data answers; "" where it does not.
    """

    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]
    prompts: list[str]
    answers: list[str]
    references: list[str]


Reward = Callable[[Sampled], Tensor]


class RewardModel:
    """Scores answers by a frozen model with one score a row, that of the answer's `<eop>`.

    An answer that was cut off is given its `<eop>`, as all that the model was trained on had one.

    Args:
        scorer: the model, on its device.
        batch_size: rows at once.
    """

    def __init__(self, scorer: Any, batch_size: int = 8) -> None:
        self.scorer, self.batch_size = scorer.eval().requires_grad_(False), batch_size
        self.pad_id: int = scorer.config.pad_token_id
        self.end_id: int = scorer.config.eos_token_id

    @torch.no_grad()
    def __call__(self, sampled: Sampled) -> Tensor:
        """Return the scores `(B,)`, in float32.

        Raises:
            ValueError: if one is no number.
        """
        rows = [
            [*prompt, *answer, *([] if answer[-1:] == [self.end_id] else [self.end_id])]
            for prompt, answer in zip(sampled.prompt_ids, sampled.answer_ids)
        ]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.zeros(len(rows))
        for start in range(0, len(rows), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self._score([rows[i] for i in batch]).cpu()
        return _check_finite(scores, "the reward model")

    def _score(self, rows: list[list[int]]) -> Tensor:
        ids, mask = (x.to(self.scorer.device) for x in pad_rows(rows, self.pad_id))
        logits = self.scorer(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.squeeze(-1).float()  # (B, 1) -> (B,)


class RewardFunction:
    """Scores answers by a function of their texts.

    Args:
        function: as in the file's description.
        name: what messages call it.
    """

    def __init__(self, function: TextReward, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, sampled: Sampled) -> Tensor:
        """Return the scores `(B,)`, in float32.

        Raises:
            ValueError: if the function fails or returns anything but a number for each answer.
        """
        try:
            scores = self.function(
                list(sampled.prompts), list(sampled.answers), list(sampled.references)
            )
        except Exception as error:
            # The function is somebody else's: say whose, and go no further.
            raise ValueError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        try:
            values = torch.tensor([float(score) for score in scores], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name} must return a list of numbers, got {scores!r:.60}"
            ) from error
        if len(values) != len(sampled.answers):
            raise ValueError(
                f"{self.name} must return a score for each of {len(sampled.answers)} answers, got "
                f"{len(values)}"
            )
        return _check_finite(values, self.name)


def _check_finite(scores: Tensor, name: str) -> Tensor:
    if not bool(scores.isfinite().all()):
        raise ValueError(f"{name} gave an answer the score {scores[~scores.isfinite()][0].item()}")
    return scores


def load_function(entry_point: str) -> RewardFunction:
    """Return the reward function of an entry point, "module:function" or "file.py:function".

    Raises:
        ValueError: if there is no such module, file or function, or importing it fails.
    """
    place, colon, name = entry_point.rpartition(":")
    if not (colon and place and name):
        raise ValueError(
            f"reward_function must be module:function or file.py:function, got {entry_point!r}"
        )
    try:
        is_file = place.endswith(".py")
        module = _import_file(Path(place)) if is_file else importlib.import_module(place)
    except Exception as error:
        # The code of a module may raise anything when it is run.
        raise ValueError(
            f"reward_function {entry_point}: {place} cannot be imported: {type(error).__name__}: "
            f"{error}"
        ) from error
    function: TextReward | None = getattr(module, name, None)
    if not callable(function):
        kind = "is no function" if hasattr(module, name) else "is not there"
        raise ValueError(f"reward_function {entry_point}: {name} {kind} in {place}")
    return RewardFunction(function, f"reward_function {entry_point}")


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, which no other module has."""
    path = path.expanduser().resolve(strict=True)
    name = f"chatglm_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look for their module there.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_reward_model(
    folder: str, policy_config: Any, tokenizer: Any, compute_dtype: torch.dtype | None = None
) -> Any:
    """Return the model of a folder of the `reward` stage, a whole one or adapters, frozen.

    Args:
        folder: of the model or its adapters.
        policy_config: of the model that is to be rewarded.
        tokenizer: of that model.
        compute_dtype: of the weights; None for float32.

    Raises:
        ValueError: if it is no reward model, or its vocabulary is not the policy's.
    """
    path = Path(folder).expanduser()
    adapter = path if (path / ADAPTER_FILE).is_file() else None
    base = check_model_folder(_find_adapter_base(path) if adapter else path)
    if not adapter:
        _check_head(base)
    check_vocabulary(base, policy_config, tokenizer)
    # The head of a whole reward model is its own; below adapters there is none yet.
    options = {"num_labels": 1} if adapter else {}
    scorer: Any = door.load_from(
        base, AutoModelForSequenceClassification, dtype=compute_dtype or torch.float32, **options
    )
    if adapter:
        from peft import PeftModel

        scorer = PeftModel.from_pretrained(scorer, str(adapter))
    return scorer.eval().requires_grad_(False)


def _find_adapter_base(folder: Path) -> Path:
    """Return the folder of the model that a reward model's adapters were trained on.

    Raises:
        ValueError: if they belong to another head, or the folder is not there any more.
    """
    config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    if config.get("task_type") != SCORER_TASK:
        _refuse_head(folder, f"adapters for {config.get('task_type')}")
    base = Path(config.get("base_model_name_or_path") or "")
    if not base.is_dir():
        raise ValueError(
            f"the reward model {folder} is adapters of {base}, which is no folder here: put its "
            f"place under base_model_name_or_path in {folder / ADAPTER_FILE}"
        )
    return base


def _check_head(folder: Path) -> None:
    """Refuse a model without scores, whose head would be drawn at random, or with several."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or ["a model of no known class"]
    if not any(name.endswith(SCORER) for name in names):
        _refuse_head(folder, ", ".join(names))
    # Without names transformers takes two labels.
    labels = config.get("id2label") or {0: "", 1: ""}
    if len(labels) != 1:
        _refuse_head(folder, f"a classifier with {len(labels)} scores a row")


def _refuse_head(folder: Path, found: str) -> None:
    raise ValueError(
        f"{folder} is no reward model but {found}: train one with chatglm train reward"
    )


def check_vocabulary(folder: Path, policy_config: Any, tokenizer: Any) -> None:
    """Refuse a reward model that reads other tokens from the same ids.

    Args:
        folder: of the reward model, or of the model that its adapters belong to.
        policy_config, tokenizer: of the model that is to be rewarded.

    Raises:
        ValueError: naming what differs.
    """
    config = door.load_from(folder, AutoConfig)
    for key in ("vocab_size", *SPECIAL_IDS):
        theirs, ours = getattr(config, key), getattr(policy_config, key)
        if theirs != ours:
            _refuse_vocabulary(folder, f"its {key} is {theirs}, the policy's {ours}")
    theirs = door.load_from(folder, AutoTokenizer).get_vocab()
    ours = tokenizer.get_vocab()
    if theirs != ours:
        piece, number = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))
        _refuse_vocabulary(folder, f"only one of the two has {piece!r} with the id {number}")


def _refuse_vocabulary(folder: Path, difference: str) -> None:
    raise ValueError(
        f"the reward model {folder} has another vocabulary than the policy: {difference}. Train a "
        "reward model from the policy's own base, or use a reward_function, which reads texts"
    )


__all__ = [
    "Reward",
    "RewardFunction",
    "RewardModel",
    "Sampled",
    "load_function",
    "load_reward_model",
]
