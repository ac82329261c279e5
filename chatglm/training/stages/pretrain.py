"""Owns continued pre-training: blanks in plain text are filled, as GLM learned its language.

    chatglm train pretrain --train_data texts.jsonl --output out

A row is cut into pieces as long as the window. Of each piece either a span inside is taken out and
`[MASK]` left in its place, or all that follows some point, and `[gMASK]` left there; the model
learns to write what is missing behind `<sop>`. Which, and where, is drawn anew in every epoch, from
the seed. Source: https://arxiv.org/abs/2103.10360, section 2.
"""

import random
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from chatglm.training.data.batches import PaddingCollator
from chatglm.training.data.records import RecordFiles, open_records, read_texts
from chatglm.training.data.rendering import Example, Renderer
from chatglm.training.models import find_core
from chatglm.training.settings import RowSettings, require
from chatglm.training.stage import TrainerStage
from chatglm.training.trainer import ChatTrainer, build_chat_trainer

# A piece shares the window with three tokens: its blank, <sop> and <eop>.
MARKERS = 3
# A text needs as many tokens for something to be left when something is taken out.
SHORTEST_TEXT = 2


@dataclass
class PretrainSettings(RowSettings):
    """What pre-training can be told beside what every stage can.

    Attributes:
        mask_share: share of the pieces that lose a span inside; the others lose their end.
        span_ratio: the span's share of its piece, on average.
        suffix_ratio: the least share of its piece that is taken as its end; the most is all but
            one token.
    """

    mask_share: float = 0.5
    span_ratio: float = 0.15
    suffix_ratio: float = 0.5

    def check(self) -> None:
        """Refuse shares that are none."""
        super().check()
        require(0 <= self.mask_share <= 1, "mask_share", self.mask_share, "in [0, 1]")
        require(0 < self.span_ratio <= 0.5, "span_ratio", self.span_ratio, "in (0, 0.5]")
        require(0 < self.suffix_ratio <= 1, "suffix_ratio", self.suffix_ratio, "in (0, 1]")


class Blanks(Dataset):
    """Pieces of texts with blanks in them.

    Args:
        records: the texts.
        renderer: of the ids, and the length of a piece.
        settings: how blanks are drawn.
        special_ids: of `[MASK]`, `[gMASK]` and `<sop>`.
        seed: of the draws.

    Attributes:
        epoch: whose blanks are drawn.
        lengths: tokens of each piece.
    """

    def __init__(
        self,
        records: RecordFiles,
        renderer: Renderer,
        settings: PretrainSettings,
        special_ids: tuple[int, int, int],
        seed: int,
    ) -> None:
        self.records, self.renderer, self.settings = records, renderer, settings
        self.mask_id, self.gmask_id, self.bos_id = special_ids
        self.seed, self.epoch = seed, 0
        self.room = renderer.max_length - MARKERS
        self.places: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        for number in range(len(records)):
            length = len(renderer.encode_text(records[number].query))
            starts = range(0, max(0, length - SHORTEST_TEXT + 1), self.room)
            self.places += [(number, start) for start in starts]
            self.lengths += [min(self.room, length - start) for start in starts]
        if not self.places:
            raise ValueError(f"no text has {SHORTEST_TEXT} tokens or more: give longer ones")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        """Return a piece with its blank, and what was there."""
        number, start = self.places[index]
        piece = self.renderer.encode_text(self.records[number].query)[start : start + self.room]
        rng = random.Random(f"{self.seed}/{self.epoch}/{index}")
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


def build_trainer(
    model: Any, tokenizer: Any, settings: PretrainSettings, arguments: TrainingArguments
) -> ChatTrainer:
    """Return the trainer of a model on the texts of the settings' files."""
    core = find_core(model)
    renderer = Renderer(core, tokenizer, settings.max_length)
    config = core.config
    special_ids = (config.mask_token_id, config.gmask_token_id, config.bos_token_id)
    train, held_out = (
        Blanks(
            open_records(paths, read_texts, settings),
            renderer,
            settings,
            special_ids,
            arguments.seed,
        )
        if paths
        else None
        for paths in (settings.train_data, settings.eval_data)
    )
    trainer = build_chat_trainer(
        model, tokenizer, arguments, (train, held_out), PaddingCollator(renderer.pad_id)
    )
    if train is not None:
        trainer.add_callback(EpochNoter(train))
    return trainer


STAGE = TrainerStage("pretrain", PretrainSettings, TrainingArguments, build_trainer)
