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
from accelerate import PartialState
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from chatglm import door
from chatglm.adapters.bases import check_base, find_base
from chatglm.adapters.kinds import SCORER_TASK, read_kind
from chatglm.checkpoints.reading import open_shards
from chatglm.checkpoints.recognize import ADAPTER_FILE, ADAPTER_WEIGHTS, SCORER
from chatglm.loading import check_model_folder
from chatglm.training.data.batches import pad_rows

SCORE_ENDING = "score.weight"  # how the name of the head's tensor ends
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


class RewardFolder(NamedTuple):
    """Where a reward model is.

    Attributes:
        base: the model folder.
        adapter: its adapters with the score head; None if the model is a whole one.
    """

    base: Path
    adapter: Path | None = None


def find_reward_model(folder: str, adapter: str = "", any_base: bool = False) -> RewardFolder:
    """Return where the reward model of a folder is.

    Args:
        folder: of a whole model, of adapters that name their base, or of the base of `adapter`.
        adapter: of adapters with a score head.
        any_base: whether adapters are taken whose base is another one by now.

    Raises:
        ValueError: if it is no reward model, not whole, or of another base.
    """
    path = Path(adapter or folder).expanduser()
    if (path / ADAPTER_FILE).is_file():
        path = read_kind(path).folder
        base = _find_adapter_base(path, folder if adapter else "", any_base)
        _check_score_weights(path)
        return RewardFolder(base, path)
    if adapter:
        raise ValueError(f"adapter {path} has no {ADAPTER_FILE}: name a folder of train reward")
    base = check_model_folder(path)
    _check_head(base)
    return RewardFolder(base)


def load_found(found: RewardFolder, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Return a reward model, frozen.

    Args:
        found: where it is.
        dtype: of its weights; None for float32.
        options: of `from_pretrained`.
    """
    # The head of a whole reward model is its own; below adapters there is none yet.
    options |= {"num_labels": 1} if found.adapter else {}
    options["dtype"] = dtype or torch.float32
    scorer: Any = door.load_from(found.base, AutoModelForSequenceClassification, **options)
    if found.adapter:
        from peft import PeftModel

        scorer = PeftModel.from_pretrained(scorer, str(found.adapter))
    return scorer.eval().requires_grad_(False)


def load_reward_model(
    folder: str,
    policy_config: Any,
    tokenizer: Any,
    compute_dtype: torch.dtype | None = None,
    any_base: bool = False,
) -> Any:
    """Return the model of a folder of the `reward` stage, a whole one or adapters, frozen.

    Args:
        folder: of the model or its adapters.
        policy_config: of the model that is to be rewarded.
        tokenizer: of that model.
        compute_dtype: of the weights; None for float32.
        any_base: whether adapters are taken whose base is another one by now.

    Raises:
        ValueError: if it is no reward model, its adapters are of another base, or its vocabulary is
            not the policy's.
    """
    found = find_reward_model(folder, any_base=any_base)
    check_vocabulary(found.base, policy_config, tokenizer)
    return load_found(found, compute_dtype)


def _find_adapter_base(folder: Path, named: str, any_base: bool) -> Path:
    """Return the folder of the model that a reward model's adapters were trained on.

    Args:
        folder: of the adapters.
        named: the base that somebody names instead of them; "" if nobody does.

    Raises:
        ValueError: if they belong to another head, the folder is not there any more, or it holds
            other weights now.
    """
    kind = read_kind(folder)
    if kind.task != SCORER_TASK:
        _refuse_head(folder, f"adapters for {kind.task or 'no task'}")
    try:
        base = check_model_folder(named or find_base(folder))
    except ValueError as error:
        raise ValueError(f"the reward model {folder} is adapters: {error}") from error
    note = check_base(folder, base, any_base=any_base)
    if note and PartialState().is_main_process:
        sys.stderr.write(f"chatglm: {note}\n")
    return base


def _check_score_weights(folder: Path) -> None:
    """Refuse adapters without the head that they were trained with: it would be drawn at random."""
    files = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder} has no weights: put {' or '.join(ADAPTER_WEIGHTS)} there")
    if not any(name.endswith(SCORE_ENDING) for name in open_shards(files[:1])):
        _refuse_head(folder, f"adapters without a tensor {SCORE_ENDING}")


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
    "RewardFolder",
    "RewardFunction",
    "RewardModel",
    "Sampled",
    "find_reward_model",
    "load_found",
    "load_function",
    "load_reward_model",
]
