"""Owns direct preference optimization: the policy learns from pairs, without a reward model.

    chatglm train dpo --train_data pairs.jsonl --output dpo --beta 0.1
    chatglm train dpo --config dpo.yaml --lora_rank 8 --bits 4

The loss of a pair is -log sigmoid(beta * ((c - c_ref) - (r - r_ref))), where c and r are the log
probabilities of the better and the worse answer, `<eop>` included, and c_ref and r_ref what the
reference gives them. With LoRA that is the model without its new adapters, otherwise a second,
frozen model; `loss_type` has the variants.
"""

from typing import Any

from chatglm.training.beside import BesideTrainer
from chatglm.training.data.batches import Examples
from chatglm.training.data.reading import Data
from chatglm.training.defaults import LORA_DEFAULTS, STAGE_DEFAULTS
from chatglm.training.models import find_core, load_policy
from chatglm.training.precision import get_compute_dtype
from chatglm.training.stage import TrainerStage
from chatglm.training.stage_settings import DpoSettings
from chatglm.training.stages.trl_stages import (
    AlignmentTrainer,
    add_beside,
    build_trainer,
    build_trl_arguments,
    check_head,
    importing_trl,
    read_pair_rows,
    write_rows,
)

with importing_trl():
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]


class AnswerTrainer(BesideTrainer, AlignmentTrainer, DPOTrainer):
    """trl's trainer of direct preference optimization on rendered rows."""


def build_dpo_trainer(
    model: Any, tokenizer: Any, settings: DpoSettings, arguments: DPOConfig, data: Data
) -> AnswerTrainer:
    """Return the trainer of a model on pairs that were read."""
    check_head(find_core(model))
    held_out = data.held_out
    trainer = build_trainer(
        AnswerTrainer,
        model,
        settings,
        ref_model=load_reference(settings, arguments),
        args=arguments,
        train_dataset=write_pair_rows(data.train, "train", arguments),
        eval_dataset=write_pair_rows(held_out, "eval", arguments) if held_out else None,
        processing_class=tokenizer,
    )
    return add_beside(trainer, settings, data)


def write_pair_rows(pairs: Examples, name: str, arguments: DPOConfig) -> Any:
    """Return pairs as trl's dataset: the question once, and both answers."""

    def describe(number: int) -> dict[str, list[int]]:
        better, worse = pairs[number]
        answers = {"chosen_ids": better.answer_ids, "rejected_ids": worse.answer_ids}
        return {"prompt_ids": better.prompt_ids, **answers}

    return write_rows(pairs.lengths, describe, name, arguments)


def load_reference(settings: DpoSettings, arguments: DPOConfig) -> Any:
    """Return the frozen reference model; None where the policy itself can take its place.

    It can without its adapters, and before the training, when `precompute_ref_log_probs` asks it.
    """
    if settings.uses_lora or arguments.precompute_ref_log_probs:
        return None
    return load_policy(settings, get_compute_dtype(arguments)).requires_grad_(False)


STAGE = TrainerStage(
    "dpo",
    DpoSettings,
    DPOConfig,
    read_pair_rows,
    build_dpo_trainer,
    build_arguments=build_trl_arguments,
    defaults=STAGE_DEFAULTS["dpo"],
    lora_defaults=LORA_DEFAULTS["dpo"],
    figures=("loss", "rewards/*", "logps/*", "logits/*", "entropy", "mean_token_accuracy"),
)
