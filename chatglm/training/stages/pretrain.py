"""Owns continued pre-training: blanks in plain text are filled, as GLM learned its language.

    chatglm train pretrain --train_data texts.jsonl --output out

A row is cut into pieces as long as the window. Of each piece either a span inside is taken out and
`[MASK]` left in its place, or all that follows some point, and `[gMASK]` left there; the model
learns to write what is missing behind `<sop>`. Which, and where, is drawn anew in every epoch, from
the seed. Source: https://arxiv.org/abs/2103.10360, section 2.
"""

import random
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from chatglm.data.dialects import read_texts
from chatglm.data.files import RecordFiles, open_records
from chatglm.data.records import Record
from chatglm.data.streaming import RecordStream
from chatglm.training.data.batches import PaddingCollator
from chatglm.training.data.reading import Data, read_both
from chatglm.training.data.rendering import Example, Renderer
from chatglm.training.data.streams import StreamedExamples, check_streaming
from chatglm.training.models import PromptFormat
from chatglm.training.stage import TrainerStage
from chatglm.training.stage_settings import PretrainSettings
from chatglm.training.trainer import ChatTrainer, build_chat_trainer

# A piece shares the window with three tokens: its blank, <sop> and <eop>.
MARKERS = 3
# A text needs as many tokens for something to be left when something is taken out.
SHORTEST_TEXT = 2


class Blanks(Dataset):
    """Pieces of texts with blanks in them.

    Args:
        records: the texts.
        maker: cuts and blanks them.
        seed: of the draws.

    Attributes:
        epoch: whose blanks are drawn.
        lengths: tokens of each piece.
    """

    def __init__(self, records: RecordFiles, maker: "BlankMaker", seed: int) -> None:
        self.records, self.maker = records, maker
        self.seed, self.epoch = seed, 0
        self.places: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        for number in range(len(records)):
            for start, piece in maker.cut(records[number]):
                self.places.append((number, start))
                self.lengths.append(len(piece))
        if not self.places:
            raise ValueError(f"no text has {SHORTEST_TEXT} tokens or more: give longer ones")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        """Return a piece with its blank, and what was there."""
        number, start = self.places[index]
        piece = dict(self.maker.cut(self.records[number]))[start]
        return self.maker.blank(piece, random.Random(f"{self.seed}/{self.epoch}/{index}"))


class BlankMaker:
    """Cuts texts into pieces, and makes blanks in them.

    Args:
        renderer: of the ids, and the length of a piece.
        settings: how blanks are drawn.
        special_ids: of `[MASK]`, `[gMASK]` and `<sop>`.
    """

    def __init__(
        self, renderer: Renderer, settings: PretrainSettings, special_ids: tuple[int, int, int]
    ) -> None:
        self.renderer, self.settings = renderer, settings
        self.mask_id, self.gmask_id, self.bos_id = special_ids
        self.room = renderer.max_length - MARKERS

    def __call__(self, record: Record, rng: random.Random) -> list[Example]:
        """Return the pieces of a record of a stream, each with a blank."""
        return [self.blank(piece, rng) for _, piece in self.cut(record)]

    def cut(self, record: Record) -> list[tuple[int, list[int]]]:
        """Return the pieces of a text, each with its place; none of a text that is too short."""
        ids = self.renderer.encode_text(record.query)
        starts = range(0, max(0, len(ids) - SHORTEST_TEXT + 1), self.room)
        return [(start, ids[start : start + self.room]) for start in starts]

    def blank(self, piece: list[int], rng: random.Random) -> Example:
        """Return a piece with something left out, and what that was."""
        if rng.random() < self.settings.mask_share:
            return self._blank_inside(piece, rng)
        return self._blank_end(piece, rng)

    def _blank_inside(self, piece: list[int], rng: random.Random) -> Example:
        longest = max(1, round(2 * self.settings.span_ratio * len(piece)))
        length = rng.randint(1, min(longest, len(piece) - 1))
        start = rng.randint(0, len(piece) - length)
        end = start + length
        prompt_ids = [*piece[:start], self.mask_id, *piece[end:], self.bos_id]
        return Example(prompt_ids, [*piece[start:end], self.renderer.end_id])

    def _blank_end(self, piece: list[int], rng: random.Random) -> Example:
        longest = len(piece) - 1
        shortest = min(longest, max(1, round(self.settings.suffix_ratio * len(piece))))
        kept = len(piece) - rng.randint(shortest, longest)
        prompt_ids = [*piece[:kept], self.gmask_id, self.bos_id]
        return Example(prompt_ids, [*piece[kept:], self.renderer.end_id])


class EpochNoter(TrainerCallback):
    """Tells a dataset which epoch it is read for.

    Args:
        blanks: the dataset.
    """

    def __init__(self, blanks: Blanks) -> None:
        self.blanks = blanks

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the epoch, which after a resume is the one that was broken off."""
        self.blanks.epoch = int(state.epoch or 0)


def list_special_ids(source: PromptFormat) -> tuple[int, int, int]:
    """Return the ids of `[MASK]`, `[gMASK]` and `<sop>`."""
    config = source.config
    return config.mask_token_id, config.gmask_token_id, config.bos_token_id


def read_data(
    source: PromptFormat, tokenizer: Any, settings: PretrainSettings, arguments: TrainingArguments
) -> Data:
    """Return the texts of the settings' files, in pieces.

    Raises:
        ValueError: for files and texts that cannot be used.
    """
    renderer = Renderer(source, tokenizer, settings.max_length)
    maker = BlankMaker(renderer, settings, list_special_ids(source))
    if settings.streaming:
        check_streaming(arguments.max_steps)

    def read(paths: Sequence[Any]) -> Any:
        if settings.streaming and paths == settings.train_data:
            stream = RecordStream(paths, read_texts, settings)
            head = Blanks(stream.head, maker, arguments.seed)
            return StreamedExamples(stream, maker, arguments.seed, head)
        return Blanks(open_records(paths, read_texts, settings), maker, arguments.seed)

    return Data(renderer, *read_both(settings, read))


def build_trainer(
    model: Any, tokenizer: Any, settings: PretrainSettings, arguments: TrainingArguments, data: Data
) -> ChatTrainer:
    """Return the trainer of a model on texts that were read."""
    collator = PaddingCollator(data.renderer.pad_id)
    rows = (data.train, data.held_out)
    trainer = build_chat_trainer(model, tokenizer, arguments, rows, collator)
    if not settings.streaming:
        trainer.add_callback(EpochNoter(data.train))
    return trainer


STAGE = TrainerStage("pretrain", PretrainSettings, TrainingArguments, read_data, build_trainer)
