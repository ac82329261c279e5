"""Owns how the rows of a stage are read to be shown: as the stage reads them, but without it.

trl and the trainers on it are not imported: what a stage reads is known by its name. Does not know
how rows are shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from chatglm.data.dialects import read_pairs, read_texts
from chatglm.data.files import open_records
from chatglm.training.data.batches import Examples, read_examples
from chatglm.training.data.reading import Data, read_both
from chatglm.training.data.rendering import Renderer
from chatglm.training.keys.values import guess_number
from chatglm.training.models import PromptFormat
from chatglm.training.settings import Settings
from chatglm.training.stage_list import find_library

PAIRED = ("reward", "dpo")
ASKED = ("ppo", "grpo")
SEED = 42  # that trainings start from


def read_rows(
    stage: str,
    settings: Settings,
    given: Mapping[str, Any],
    source: PromptFormat,
    tokenizer: Any,
) -> Data:
    """Return the rows of the settings' files as a stage reads them.

    Args:
        stage: as people type it.
        settings: of the stage.
        given: the library's keys that were set.
        source, tokenizer: of the model.

    Raises:
        ValueError: for files and rows that cannot be used, those of every file.
    """
    limits = (
        getattr(settings, "max_source_length", 0),
        getattr(settings, "max_target_length", 0),
    )
    renderer = Renderer(source, tokenizer, settings.max_length, settings.long_rows, limits)

    def read(paths: Sequence[Any]) -> Any:
        if stage in PAIRED:
            return Examples(open_records(paths, read_pairs, settings), renderer.render_pair)
        if stage in ASKED:
            from chatglm.training.ppo.rollouts import Prompts

            return Prompts(paths, settings, renderer, find_room(stage, settings, given))
        if stage == "pretrain":
            from chatglm.training.stages.pretrain import BlankMaker, Blanks, list_special_ids

            records, ids = open_records(paths, read_texts, settings), list_special_ids(source)
            seed = int(given.get("seed", SEED))
            return Blanks(records, BlankMaker(renderer, settings, ids), seed)  # type: ignore[arg-type]
        return read_examples(paths, settings, renderer)

    if stage == "eval":
        return Data(renderer, read(settings.eval_data))
    return Data(renderer, *read_both(settings, read))


def find_room(stage: str, settings: Any, given: Mapping[str, Any]) -> int:
    """Return how many tokens an answer may have that a stage samples."""
    if stage == "ppo":
        return settings.max_new_tokens
    default = guess_number(find_library(stage)["max_completion_length"].default)
    return int(given.get("max_completion_length", default))


__all__ = ["find_room", "read_rows"]
