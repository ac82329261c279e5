"""Owns the training of reward models: a score for each answer, the better one's the higher.

    chatglm train reward --train_data pairs.jsonl --eval_data held_out.jsonl --output reward
    chatglm train reward --config reward.yaml --lora_rank 8 --bits 4

The loss of a pair is -log sigmoid(score of the better - score of the worse), the score that of the
answer's `<eop>`. Held-out pairs are reported by what is wrong with the worse answer, beside the
rule that the longer answer wins, which costs nothing: `pairs.json`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import EvalPrediction

from chatglm.evaluating.pairs import summarize_pairs, write_pairs
from chatglm.training.data.batches import Examples, pad_rows
from chatglm.training.data.reading import Data
from chatglm.training.defaults import LORA_DEFAULTS, STAGE_DEFAULTS
from chatglm.training.models import load_scorer
from chatglm.training.stage import TrainerStage
from chatglm.training.stage_settings import RewardSettings
from chatglm.training.stages.trl_stages import (
    AlignmentTrainer,
    build_trainer,
    build_trl_arguments,
    importing_trl,
    read_pair_rows,
    write_rows,
)
from chatglm.training.trainer import write_outputs

with importing_trl():
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportPrivateImportUsage]

# The key under which a batch has the index of each of its pairs in the data.
INDICES = "rows"


def build_reward_trainer(
    model: Any, tokenizer: Any, settings: RewardSettings, arguments: RewardConfig, data: Data
) -> "PairTrainer":
    """Return the trainer of a model on pairs that were read."""
    held_out = data.held_out
    return build_trainer(
        PairTrainer,
        model,
        settings,
        args=arguments,
        data_collator=PairCollator(data.renderer.pad_id, arguments.pad_to_multiple_of),
        train_dataset=write_pair_rows(data.train, "train", arguments),
        eval_dataset=write_pair_rows(held_out, "eval", arguments) if held_out else None,
        processing_class=tokenizer,
        compute_metrics=PairFigures(held_out) if held_out else None,
    )


def write_pair_rows(pairs: Examples, name: str, arguments: RewardConfig) -> Any:
    """Return pairs as trl's dataset, each answer behind its question."""

    def describe(number: int) -> dict[str, list[int]]:
        better, worse = pairs[number]
        return {"chosen_ids": better.input_ids, "rejected_ids": worse.input_ids}

    return write_rows(pairs.lengths, describe, name, arguments)


class PairCollator:
    """Pads pairs on the right: all better answers, then all worse ones.

    Args:
        pad_id: the pad token.
        multiple: columns are a multiple of it; None for any number.
    """

    def __init__(self, pad_id: int, multiple: Any = None) -> None:
        self.pad_id, self.multiple = pad_id, multiple or 1

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` `(2 B, S)`, and the pairs' indices `(B,)`."""
        rows = [pair[key] for key in ("chosen_ids", "rejected_ids") for pair in pairs]
        input_ids, attention_mask = pad_rows(rows, self.pad_id, self.multiple)
        indices = torch.tensor([pair["row"] for pair in pairs])
        return {"input_ids": input_ids, "attention_mask": attention_mask, INDICES: indices}


class PairTrainer(AlignmentTrainer, RewardTrainer):
    """trl's trainer of reward models, which lets the figures see the two scores of every pair."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch of pairs, with the outputs if they are asked for."""
        batch = {key: value for key, value in inputs.items() if key != INDICES}
        return super().compute_loss(model, batch, *args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the loss, the scores `(B, 2)`, better first, and the pairs' indices `(B,)`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        scores = torch.stack(outputs.logits.squeeze(-1).float().chunk(2), dim=1)
        return loss.detach(), scores, inputs[INDICES]

    def write_pairs(self, folder: Path) -> None:
        """Write what the last look at the held-out pairs showed, if there was one."""
        figures: Any = self.compute_metrics
        if figures is not None and figures.summary is not None:
            write_pairs(figures.summary, folder)


class PairFigures:
    """Turns the scores of held-out pairs into figures.

    Args:
        pairs: what was rendered of them.

    Attributes:
        summary: of the last scores, as in `pairs.json`; None before.
    """

    def __init__(self, pairs: Examples) -> None:
        self.kinds = [pairs.records[number].kind for number in pairs.kept]
        answers = ([len(answer.answer_ids) for answer in pairs[i]] for i in range(len(pairs)))
        self.lengths = np.array(list(answers))  # (N, 2)
        self.summary: dict[str, Any] | None = None

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the figures of scores `(N, 2)` of the pairs with the indices `(N,)`."""
        indices = np.asarray(prediction.label_ids)
        scores = np.asarray(prediction.predictions)
        kinds = [self.kinds[index] for index in indices]
        summary = summarize_pairs(scores, self.lengths[indices], kinds)
        self.summary = summary
        by_kind = {f"pair_accuracy/{k}": s["accuracy"] for k, s in summary["kinds"].items()}
        return {
            "pair_accuracy": summary["accuracy"],
            "pair_margin": summary["mean_margin"],
            "longer_wins": summary["longer_wins"],
            **by_kind,
        }


def write_scorer(trainer: Any, settings: RewardSettings) -> None:
    """Write the reward model, and the figures of held-out pairs beside it."""
    write_outputs(trainer, settings)
    if trainer.is_world_process_zero():
        trainer.write_pairs(Path(settings.output))


STAGE = TrainerStage(
    "reward",
    RewardSettings,
    RewardConfig,
    read_pair_rows,
    build_reward_trainer,
    build_arguments=build_trl_arguments,
    defaults=STAGE_DEFAULTS["reward"],
    lora_defaults=LORA_DEFAULTS["reward"],
    figures=("loss", "accuracy", "margin", "*_reward", "pair_*", "longer_wins"),
    load_model=load_scorer,
    write=write_scorer,
)
