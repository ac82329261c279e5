"""Owns supervised fine-tuning: answers learned behind their questions.

    chatglm train sft --train_data data.jsonl --output out
    chatglm train sft --config sft.yaml --lora_rank 8 --bits 4

The whole model, LoRA adapters, or adapters over packed weights. Only answers are learned, each with
its end token; `packing` fills rows with several documents, none of which sees another.
"""

import random
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from chatglm.data.dialects import read_answers
from chatglm.data.records import Record
from chatglm.data.streaming import RecordStream
from chatglm.training.data.batches import (
    Examples,
    Packed,
    PackingCollator,
    PaddingCollator,
    read_examples,
)
from chatglm.training.data.reading import Data, read_both
from chatglm.training.data.rendering import Example, Renderer
from chatglm.training.data.streams import StreamedExamples, check_streaming
from chatglm.training.models import PromptFormat, find_core
from chatglm.training.stage import TrainerStage
from chatglm.training.stage_settings import SftSettings
from chatglm.training.trainer import ChatTrainer, build_chat_trainer

PAD_MULTIPLE = 8


class AnswerMaker:
    """Makes the example of a record of a stream, if it is short enough.

    Args:
        renderer: of the ids.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    def __call__(self, record: Record, rng: random.Random) -> list[Example]:
        """Return the example, or none."""
        example = self.renderer.render(record)
        return [] if example is None else [example]


def read_data(
    source: PromptFormat, tokenizer: Any, settings: SftSettings, arguments: TrainingArguments
) -> Data:
    """Return the rendered rows of the settings' files.

    Raises:
        ValueError: for files and rows that cannot be used.
    """
    limits = (settings.max_source_length, settings.max_target_length)
    renderer = Renderer(source, tokenizer, settings.max_length, settings.long_rows, limits)
    if settings.streaming:
        check_streaming(arguments.max_steps)

    def read(paths: Sequence[Any]) -> Any:
        if settings.streaming and paths == settings.train_data:
            stream = RecordStream(paths, read_answers, settings)
            head = Examples(stream.head, renderer.render)
            return StreamedExamples(stream, AnswerMaker(renderer), arguments.seed, head)
        return read_examples(paths, settings, renderer)

    train, held_out = read_both(settings, read)
    if settings.packing:
        train, held_out = (d and Packed(d, renderer.max_length) for d in (train, held_out))
    return Data(renderer, train, held_out)


def build_trainer(
    model: Any, tokenizer: Any, settings: SftSettings, arguments: TrainingArguments, data: Data
) -> ChatTrainer:
    """Return the trainer of a model on rows that were read."""
    pad_id = data.renderer.pad_id
    collator: Any = PaddingCollator(pad_id, PAD_MULTIPLE)
    if settings.packing:
        collator = PackingCollator(pad_id, find_core(model).locate_documents)
    return build_chat_trainer(model, tokenizer, arguments, (data.train, data.held_out), collator)


STAGE = TrainerStage("sft", SftSettings, TrainingArguments, read_data, build_trainer)
