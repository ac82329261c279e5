"""Owns what the stages on transformers' Trainer share: arguments, the loop around it, its outputs.

A loss that is no number ends the training; a run can be killed at any time and goes on from its
newest whole checkpoint. What is shown meanwhile is `progress`'s. Does not know what is trained.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from chatglm.loading import check_model_folder
from chatglm.training.data.batches import LengthSampler, find_learned
from chatglm.training.models import find_base, name_as_before, save_trained
from chatglm.training.precision import check_launcher
from chatglm.training.progress import Meter, build_callbacks
from chatglm.training.settings import SETTINGS_FILE, KeyProblem, RowSettings, Settings, read_config
from chatglm.training.settings import write_settings as write_settings_file

# Every stage starts from these values; the configuration file and the flags go before them.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 3,
    "eval_steps": 500,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    # There are no unused parameters, and the search for them takes time.
    "ddp_find_unused_parameters": False,
    "report_to": ["tensorboard"],
    "seed": 42,
}
# These keys of the library are refused, since they follow from the keys of ours beside them.
RESERVED = {"output_dir": "output", "resume_from_checkpoint": "resume", "do_train": "STAGE"}
RESERVED |= {"train_sampling_strategy": "group_by_length"}
# Newer releases of transformers have other names for these keys, and warn about the old ones.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# These keys may differ when a run goes on: they change how long it is and what is shown, not what a
# step does.
FREE_ON_RESUME = ("resume", "verify", "logging_steps", "report_to", "disable_tqdm")
FREE_ON_RESUME += ("sample_prompts", "sample_steps", "save_total_limit", "eval_steps", "max_steps")
FREE_ON_RESUME += ("save_steps",)


def build_arguments(
    arguments_class: type, settings: Settings, given: Mapping[str, Any], **defaults: Any
) -> Any:
    """Return the library's arguments of a stage; from here on random numbers follow its seed.

    Args:
        arguments_class: `TrainingArguments` or a child.
        settings: ours.
        given: the keys that a user set.
        defaults: the stage's own.

    Raises:
        KeyProblem: for a key that is ours, or a value that the library refuses.
    """
    for key, ours in RESERVED.items():
        if key in given:
            raise KeyProblem(f"{key} is not for the configuration: it follows from {ours}")
    values = {**DEFAULTS, **defaults}
    if settings.eval_data:
        values["eval_strategy"] = "steps"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        values["use_cpu"] = True
    values |= given
    if values.get("gradient_checkpointing"):
        # The other way, the default until transformers 5, gives adapters no gradient.
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    check_launcher(values)
    names = {item.name for item in fields(arguments_class)}
    for old, new in RENAMED.items():
        if old in values and new in names:
            values.setdefault(new, values.pop(old))
    try:
        arguments = arguments_class(output_dir=settings.output, **values)
    except (TypeError, ValueError, ImportError) as error:
        raise KeyProblem(f"the configuration cannot be used: {error}") from error
    set_seed(arguments.seed)
    return arguments


def restore_on_cpu(storage: Any, location: str) -> Any:
    """Return a stored tensor's values as they are where they belong on a CPU with a number.

    Of several processes on CPUs accelerate numbers the devices, transformers before 5.23 reads an
    optimizer's checkpoint to such a one, and torch knows "cpu" alone.
    """
    return storage if location.startswith("cpu:") else None


# The number is where torch looks for another place of a tensor: behind its own, from 10 on.
torch.serialization.register_package(100, lambda storage: None, restore_on_cpu)


def prepare_output(settings: Settings, given: Mapping[str, Any]) -> Path | None:
    """Verify the model if asked, open the output folder, and return the checkpoint to go on from.

    Of several processes the first one looks, and all do as it found.

    Raises:
        ValueError: if the model's files are not as their hashes say; if the folder holds anything
            and the run is not a resumed one, or if it is and its settings are not those of the
            first run.
    """
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            if settings.verify:
                check_model_folder(find_base(settings), verify=True)
            found = [_open_output(settings, given), None]
        except ValueError as problem:
            found = [None, problem]
    checkpoint, problem = broadcast_object_list(found)
    if problem is not None:
        raise problem
    return checkpoint


def _open_output(settings: Settings, given: Mapping[str, Any]) -> Path | None:
    folder = Path(settings.output)
    # The settings alone are left of a run that was refused, by its data say, before it began.
    begun = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if begun <= {SETTINGS_FILE}:
        folder.mkdir(parents=True, exist_ok=True)
        write_settings_file(settings, given, folder)
        return None
    if not settings.resume:
        raise ValueError(
            f"the output folder {folder} is not empty: name another one, or set resume: true to "
            "go on with what was begun there"
        )
    _check_same_run(settings, given, folder)
    return find_checkpoint(folder)


def _check_same_run(settings: Settings, given: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings, which would be another run."""
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{folder} was not begun by chatglm train: it has no {SETTINGS_FILE}")
    before = read_config(folder / SETTINGS_FILE)
    now = {**vars(settings), **given}
    for key in sorted({*before, *now} - set(FREE_ON_RESUME)):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{key} was {before.get(key)!r} when {folder} was begun and is {now.get(key)!r} "
                "now: resume with the same settings, or begin anew in another folder"
            )


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole: a killed run may leave half of one."""
    broken = []
    while (last := get_last_checkpoint(str(folder))) is not None:
        state = Path(last) / TRAINER_STATE_NAME
        try:
            json.loads(state.read_text(encoding="utf-8"))
            break
        except (OSError, json.JSONDecodeError):
            # Out of the library's sight, for good: it would write into it.
            broken.append(Path(last).rename(Path(last).with_name(f"broken-{Path(last).name}")))
    return None if last is None else Path(last)


def count_token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Reduce logits to what perplexity needs, before they pile up.

    Args:
        logits: `(B, S, V)`, or `(places, V)` of those that `find_learned` finds, or a tuple that
            begins with them.
        labels: `(B, S)`.

    Returns:
        `(B, 3)`: each row's summed loss in nats, its tokens, and how many were the likeliest.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    is_counted = find_learned(labels)
    if logits.dim() == 3:
        logits = logits[is_counted]
    targets = labels[:, 1:][is_counted[:, :-1]]
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    sums = torch.zeros(3, *labels.shape, device=labels.device)
    is_right = logits.argmax(-1) == targets
    sums[:, is_counted] = torch.stack([losses, torch.ones_like(losses), is_right.float()])
    return sums.sum(-1).T  # (3, B, S) -> (B, 3)


def summarize_losses(prediction: EvalPrediction) -> dict[str, float]:
    """Return perplexity and accuracy over all answer tokens, each counted once."""
    loss, tokens, right = np.asarray(prediction.predictions).sum(axis=0)
    mean = float(loss / tokens)
    return {
        "token_loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": float(right / tokens),
    }


class CheckedSteps:
    """Makes a trainer stop at a loss that is no number; stands before the trainer's class.

    Its log has tokens a second, if it counts them, and memory. What it saves can be loaded under
    FSDP2 too.

    Attributes:
        groups_rows: whether rows of like length share a batch.
    """

    args: Any
    state: Any
    model: Any
    train_dataset: Any
    groups_rows = False
    meter: Meter | None = None
    _num_tokens = 0

    @property
    def tokens_seen(self) -> int:
        """The tokens that this process was trained on since the start; 0 if nobody counts."""
        return self._num_tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what a step gave, and what it took."""
        if self.meter is not None and "loss" in logs:
            logs |= self.meter.measure()
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step.

        Raises:
            ValueError: if the loss is no number, naming the step and what is left of the run.
        """
        if self.meter is None:
            self.meter = Meter(lambda: self.tokens_seen, self.args.world_size)
        trainer: Any = super()
        loss = trainer.training_step(*args, **kwargs)
        check_loss(loss, self.state.global_step, Path(self.args.output_dir))
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = super()
        if not self.groups_rows:
            return trainer._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        # Of a step only the rows of a pass are alike, so that its gradients are of long and short.
        size = self.args.train_batch_size * self.args.world_size
        return LengthSampler(find_lengths(rows), size, self.args.seed)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        name_as_before(self.model)
        trainer: Any = super()
        trainer._save(*args, **kwargs)


def find_lengths(rows: Any) -> Sequence[int]:
    """Return the lengths of a dataset's rows, which it has as a column or as an attribute."""
    return list(rows["length"]) if hasattr(rows, "column_names") else rows.lengths


class ChatTrainer(CheckedSteps, Trainer):
    """transformers' Trainer for a prefix language model and the losses of this package.

    It stops at a loss that is no number, counts tokens, builds no cache, and computes logits only
    where something is learned.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """Return the loss of a batch, with the outputs if they are asked for."""
        inputs["use_cache"] = False
        if model.training:
            self._num_tokens += int((inputs["input_ids"] != self.pad_id).sum())
        # A label smoother wants the logits of all places.
        if self.label_smoother is None:
            inputs["logits_to_keep"] = find_learned(inputs["labels"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def pad_id(self) -> int:
        """The pad token, which is no token that was trained on."""
        tokenizer: Any = self.processing_class
        return tokenizer.pad_token_id


def build_chat_trainer(
    model: Any,
    tokenizer: Any,
    arguments: TrainingArguments,
    datasets: tuple[Any, Any],
    collator: Callable[[Any], dict[str, Tensor]],
) -> ChatTrainer:
    """Return the trainer of a language model, which reports perplexity over held-out tokens.

    Args:
        model: with its adapters.
        tokenizer: the model's.
        arguments: of the training.
        datasets: what is trained on and what is held out, None for either that there is not.
        collator: makes batches of their rows.
    """
    train, held_out = datasets
    return ChatTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=summarize_losses,
        preprocess_logits_for_metrics=count_token_losses,
    )


def check_loss(loss: Tensor, step: int, folder: Path) -> None:
    """Refuse to go on behind a loss that is no number.

    Raises:
        ValueError: naming the step, the last good checkpoint and the remedy.
    """
    if bool(torch.isfinite(loss).all()):
        return
    last = find_checkpoint(folder)
    kept = f"{last} is the last good checkpoint" if last else "no checkpoint was written before"
    raise ValueError(
        f"the loss was {loss.item()} in step {step + 1}; {kept}. Lower learning_rate, look at the "
        "rows of this step, or compute in bf16 or float32 instead of fp16"
    )


def train_and_evaluate(
    trainer: Any, settings: Settings, checkpoint: Path | None
) -> dict[str, float]:
    """Train, and return the figures of the held-out rows.

    Args:
        trainer: with everything it needs.
        settings: of the stage.
        checkpoint: to go on from.
    """
    for callback in build_callbacks(settings, trainer):
        trainer.add_callback(callback)
    trainer.groups_rows = isinstance(settings, RowSettings) and settings.group_by_length
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.evaluate() if settings.eval_data else {}


def write_outputs(trainer: Trainer, settings: Settings) -> None:
    """Write the trained model to the output folder, put together if it was cut into parts."""
    weights: Any = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # All processes take part in putting the weights together.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_trained(model, settings, Path(settings.output), weights)


__all__ = [
    "ChatTrainer",
    "build_arguments",
    "prepare_output",
    "train_and_evaluate",
    "write_outputs",
]
