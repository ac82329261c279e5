"""Owns what the stages on trl share: the keys that are refused, the rows, the trainers' manners.

trl tokenizes, pads, packs and loads on its own where it is let; here rows come rendered, models
loaded, and what is wrong for a prefix language model is refused. Does not know losses or rewards.
"""

import functools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from chatglm.data.dialects import read_pairs
from chatglm.data.files import open_records
from chatglm.training.data.batches import Examples, read_examples
from chatglm.training.data.reading import Data, read_both
from chatglm.training.data.rendering import Renderer
from chatglm.training.defaults import DEFAULTS
from chatglm.training.keys.refusals import REFUSED, REFUSED_BEGINNING
from chatglm.training.models import PromptFormat
from chatglm.training.resuming import ROWS_FOLDER
from chatglm.training.settings import KeyProblem, Settings
from chatglm.training.stage_settings import BesideSettings
from chatglm.training.trainer import CheckedSteps, build_arguments
from chatglm.training.trl_import import importing_trl

ROWS_AT_ONCE = 1000


def refuse_keys(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse keys of trl that are wrong for a prefix language model, or that would do nothing.

    Args:
        given: what a user set.
        defaults: what holds without them, and may be written down.

    Raises:
        KeyProblem: naming the key, the value and the reason.
    """
    for key, value in given.items():
        is_vllm = key.startswith(REFUSED_BEGINNING)
        reason = REFUSED["use_vllm"] if is_vllm else REFUSED.get(key)
        if reason and value != defaults.get(key, MISSING):
            raise KeyProblem(f"{key} cannot be {value!r}: {reason}. Leave the key out")


def build_trl_arguments(
    arguments_class: type, settings: Settings, given: Mapping[str, Any], **defaults: Any
) -> Any:
    """Return trl's arguments of a stage; numbers are computed in as in the other stages.

    Args:
        arguments_class: `RewardConfig`, `DPOConfig` or `GRPOConfig`.
        settings: ours.
        given: the keys that a user set.
        defaults: the stage's own.

    Raises:
        KeyProblem: for a key that is refused, or a value that trl refuses.
    """
    own: dict[str, Any] = {
        "bf16": False,
        "gradient_checkpointing": False,
        # trl loads a reference model itself where a key asks for one.
        "trust_remote_code": True,
        "disable_dropout": not settings.lora_dropout,
        **defaults,
    }
    theirs = {item.name: item.default for item in fields(arguments_class)}
    refuse_keys(given, {**theirs, **DEFAULTS, **own})
    if settings.lora_dropout and given.get("disable_dropout"):
        raise KeyProblem(
            f"disable_dropout takes away lora_dropout={settings.lora_dropout}: set one of the two"
        )
    if settings.uses_lora and given.get("sync_ref_model"):
        raise KeyProblem(
            "sync_ref_model moves a reference model, and with LoRA the reference is this model "
            "without its new adapters: leave the key out, or set lora_rank to 0"
        )
    return build_arguments(arguments_class, settings, given, **own)


def check_head(core: Any) -> None:
    """Refuse a model whose head is packed: trl multiplies with its weights itself.

    Raises:
        KeyProblem: naming the format.
    """
    dtype = core.get_output_embeddings().weight.dtype
    if not dtype.is_floating_point:
        raise KeyProblem(
            f"model has a packed head ({dtype}), with which trl cannot compute: take a folder "
            "whose embeddings are not quantized; bits packs the blocks' matrices only"
        )


class AlignmentTrainer(CheckedSteps):
    """Makes a trainer of trl take rows as they are; stands before the trainer's class.

    It sends no figures about itself anywhere and writes no card of its own.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, and count its tokens if it is trained on."""
        if model.training:
            self._num_tokens += self.count_tokens(inputs)
        trainer: Any = super()
        return trainer.compute_loss(model, inputs, *args, **kwargs)

    def count_tokens(self, inputs: dict[str, Any]) -> int:
        """Return how many tokens a batch has, pads left out."""
        return int(inputs["attention_mask"].sum())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: settings.yaml says how the model was made."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return rendered rows as they are."""
        return dataset


def build_trainer(trainer_class: Any, model: Any, settings: Settings, **parts: Any) -> Any:
    """Return a trainer of trl, its reference settled.

    Args:
        trainer_class: of the stage.
        model: to train.
        settings: of the stage.
        parts: what else the trainer takes.

    Raises:
        KeyProblem: for keys that do not go together.
    """
    own = list_adapters(model)
    try:
        trainer = trainer_class(model=model, **parts)
    except NotImplementedError as error:
        raise KeyProblem(f"the configuration cannot be used: {error}") from error
    _settle_reference(model, own, is_new=not settings.goes_on)
    return trainer


def read_beside(settings: Settings, renderer: Renderer) -> Examples | None:
    """Return the answers of `sft_data`; None if a stage learns none beside.

    Raises:
        ValueError: for files and rows that cannot be used.
    """
    if not isinstance(settings, BesideSettings) or not settings.sft_data:
        return None
    return read_examples(settings.sft_data, settings, renderer)


def add_beside(trainer: Any, settings: BesideSettings, data: Data) -> Any:
    """Have a trainer learn plain answers beside, if there are any, and return it."""
    if data.beside is not None:
        trainer.set_beside(data.beside, settings.sft_share, data.renderer.pad_id)
    return trainer


def list_adapters(model: Any) -> list[str]:
    """Return the names of a model's adapters."""
    return list(getattr(model, "peft_config", {}))


def _settle_reference(model: Any, own: list[str], is_new: bool) -> None:
    """Keep trl's frozen copy of the adapters only where it is needed, and out of what is saved.

    New adapters change nothing yet: without them the model is the reference. Those of a folder are
    part of it. A checkpoint with two adapters could not be gone on from.

    Args:
        model: with the adapters.
        own: the names of those that it had before trl copied any.
        is_new: whether they are new.
    """
    copies = [name for name in list_adapters(model) if name not in own]
    if is_new:
        for name in copies:
            model.delete_adapter(name)
    elif copies:
        save = functools.partial(model.save_pretrained, selected_adapters=own)
        model.save_pretrained = save


def read_pair_rows(
    source: PromptFormat, tokenizer: Any, settings: Settings, arguments: TrainingArguments
) -> Data:
    """Return the rendered pairs of the settings' files.

    Raises:
        ValueError: for files and rows that cannot be used.
    """
    renderer = Renderer(source, tokenizer, settings.max_length, settings.long_rows)

    def read(paths: Sequence[Any]) -> Examples:
        return Examples(open_records(paths, read_pairs, settings), renderer.render_pair)

    return Data(renderer, *read_both(settings, read), read_beside(settings, renderer))


def write_rows(
    lengths: Sequence[int],
    describe: Callable[[int], dict[str, Any]],
    name: str,
    arguments: TrainingArguments,
) -> Any:
    """Put rows into a file on the disk, which trl's `datasets.Dataset` then looks into.

    What is in memory of it is up to the system, however many rows there are.

    Args:
        lengths: of the rows, in tokens.
        describe: makes the columns of the row with a number, in texts and ids.
        name: of the file.
        arguments: of the stage; every machine's first process writes.

    Returns:
        The dataset, with each row's number (`row`) and size in tokens (`length`) beside its
        columns.
    """
    from datasets import Dataset

    path = Path(str(arguments.output_dir)) / ROWS_FOLDER / f"{name}.arrow"
    with arguments.main_process_first(desc=f"rendering of the {name} rows"):
        if arguments.local_process_index == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Machines that share the folder write the same: whoever is last may replace it.
            part = path.with_name(f"{name}-{platform.node()}-{os.getpid()}.part")
            _write_arrow(lengths, describe, part)
            part.replace(path)
    return Dataset.from_file(str(path))


def _write_arrow(lengths: Sequence[int], describe: Callable[[int], Any], path: Path) -> None:
    """Write rows as an Arrow stream."""
    import pyarrow

    schema = _build_schema(describe(0))
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(lengths), ROWS_AT_ONCE):
            rows = [
                {**describe(i), "row": i, "length": lengths[i]}
                for i in range(start, min(start + ROWS_AT_ONCE, len(lengths)))
            ]
            stream.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))


def _build_schema(columns: dict[str, Any]) -> Any:
    """Return the types of a row's columns: texts and ids."""
    import pyarrow

    ids, number = pyarrow.list_(pyarrow.int32()), pyarrow.int64()
    types = [(k, pyarrow.string() if isinstance(v, str) else ids) for k, v in columns.items()]
    return pyarrow.schema([*types, ("row", number), ("length", number)])


__all__ = [
    "AlignmentTrainer",
    "add_beside",
    "build_trainer",
    "build_trl_arguments",
    "check_head",
    "importing_trl",
    "read_beside",
    "read_pair_rows",
    "refuse_keys",
    "write_rows",
]
