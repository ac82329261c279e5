"""Owns supervised fine-tuning: answers learned behind their questions.

    chatglm train sft --train_data data.jsonl --output out
    chatglm train sft --config sft.yaml --lora_rank 8 --bits 4

The whole model, LoRA adapters, or adapters over packed weights. Only answers are learned, each with
its end token; `packing` fills rows with several documents, none of which sees another.
"""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from chatglm.training.data.batches import (
    Packed,
    PackingCollator,
    PaddingCollator,
    read_examples,
)
from chatglm.training.data.rendering import Renderer
from chatglm.training.models import find_core
from chatglm.training.settings import RowSettings
from chatglm.training.stage import TrainerStage
from chatglm.training.trainer import ChatTrainer, build_chat_trainer

PAD_MULTIPLE = 8


@dataclass
class SftSettings(RowSettings):
    """What supervised fine-tuning can be told beside what every stage can.

    Attributes:
        packing: put several documents into a row, which wastes no padding.
    """

    packing: bool = False


def build_trainer(
    model: Any, tokenizer: Any, settings: SftSettings, arguments: TrainingArguments
) -> ChatTrainer:
    """Return the trainer of a model on the rows of the settings' files."""
    core = find_core(model)
    renderer = Renderer(core, tokenizer, settings.max_length, settings.long_rows)
    train, held_out = (
        read_examples(paths, settings, renderer) if paths else None
        for paths in (settings.train_data, settings.eval_data)
    )
    collator: Any = PaddingCollator(renderer.pad_id, PAD_MULTIPLE)
    if settings.packing:
        train, held_out = (d and Packed(d, renderer.max_length) for d in (train, held_out))
        collator = PackingCollator(renderer.pad_id, core.locate_documents)
    return build_chat_trainer(model, tokenizer, arguments, (train, held_out), collator)


STAGE = TrainerStage("sft", SftSettings, TrainingArguments, build_trainer)
