"""Owns what the stages on transformers' Trainer share: arguments, the loop around it, its outputs.

A loss that is no number ends the training. What is shown meanwhile is `progress`'s, the run's
folder `resuming`'s, and what makes a checkpoint whole is known to `checkpoints`. Does not know what
is trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import EvalPrediction

from chatglm.training.adapters import record_base
from chatglm.training.checkpoint_callback import CheckpointCallback
from chatglm.training.checkpoints import list_whole
from chatglm.training.data.batches import LengthSampler, find_learned
from chatglm.training.defaults import DEFAULTS
from chatglm.training.early_stopping import plan_best
from chatglm.training.keys.refusals import RESERVED
from chatglm.training.models import name_as_before, save_trained, share_ties
from chatglm.training.precision import check_launcher
from chatglm.training.processes import check_parts, keep_to_one_gpu
from chatglm.training.progress import Meter, build_callbacks
from chatglm.training.settings import KeyProblem, RowSettings, Settings
from chatglm.training.telling import RunTold, Teller

# Newer releases of transformers have other names for these keys, and warn about the old ones.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def build_arguments(
    arguments_class: type, settings: Settings, given: Mapping[str, Any], **defaults: Any
) -> Any:
    """Return the library's arguments of a stage; from here on random numbers follow its seed.

    Of several GPUs without a launcher they take one.

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
    if settings.held_out_data:
        values["eval_strategy"] = "steps"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        values["use_cpu"] = True
    values |= given
    plan_best(settings, given, values)
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
    check_reporters(arguments.report_to)
    keep_to_one_gpu(arguments)
    set_seed(arguments.seed)
    return arguments


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a tracker of figures that is not installed, which would be told when it is asked.

    Raises:
        KeyProblem: naming it, and what is installed.
    """
    installed = [str(name) for name in get_available_reporting_integrations()]
    for name in names:
        if name not in installed:
            raise KeyProblem(
                f"report_to names {name}, which is not installed: install it, or name none or one "
                f"of {', '.join(installed) or 'none'}"
            )


def restore_on_cpu(storage: Any, location: str) -> Any:
    """Return a stored tensor's values as they are where they belong on a CPU with a number.

    Of several processes on CPUs accelerate numbers the devices, transformers before 5.23 reads an
    optimizer's checkpoint to such a one, and torch knows "cpu" alone.
    """
    return storage if location.startswith("cpu:") else None


# The number is where torch looks for another place of a tensor: behind its own, from 10 on.
torch.serialization.register_package(100, lambda storage: None, restore_on_cpu)


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
    accelerator: Any
    is_fsdp_enabled: bool
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of a step; none when all steps are done.

        A run that goes on from its last step would take another one before the library looks.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        trainer: Any = super()
        return trainer.get_batch_samples(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = super()
        if not self.groups_rows:
            return trainer._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        # Of a step only the rows of a pass are alike, so that its gradients are of long and short.
        size = self.args.train_batch_size * self.args.world_size
        return LengthSampler(find_lengths(rows), size, self.args.seed)

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        name_as_before(self.model)
        if state_dict is not None and self.is_fsdp_enabled:  # gathered: tied weights came apart
            state_dict = share_ties(self.model, state_dict)
        trainer: Any = super()
        trainer._save(output_dir, state_dict=state_dict)
        folder = Path(output_dir or self.args.output_dir)
        record_base(self.accelerator.unwrap_model(self.model), folder)


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
    whole = list_whole(folder)
    kept = (
        f"{whole[-1]} is the last good checkpoint" if whole else "no checkpoint was written before"
    )
    raise ValueError(
        f"the loss was {loss.item()} in step {step + 1}; {kept}. Lower learning_rate, look at the "
        "rows of this step, or compute in bf16 or float32 instead of fp16"
    )


def train_and_evaluate(
    trainer: Any, settings: Settings, checkpoint: Path | None, teller: Teller
) -> dict[str, float]:
    """Train, and return the last figures, those of the held-out rows if there are any.

    Args:
        trainer: with everything it needs.
        settings: of the stage.
        checkpoint: to go on from.
        teller: of the run; it writes its summary.

    Raises:
        ValueError: if FSDP was asked for and cannot be had.
    """
    check_parts(trainer)
    told = RunTold(teller)
    trainer.add_callback(told)
    limit = trainer.args.save_total_limit
    # The library counts what is there instead of what is whole, so it is to delete nothing.
    trainer.args.save_total_limit = None
    trainer.add_callback(CheckpointCallback(Path(settings.output), limit, checkpoint))
    for callback in build_callbacks(settings, trainer):
        trainer.add_callback(callback)
    trainer.groups_rows = isinstance(settings, RowSettings) and settings.group_by_length
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    figures = _evaluate(trainer, told) if settings.held_out_data else {}
    state, tokens = trainer.state, trainer.tokens_seen * trainer.args.world_size
    return teller.write_summary(state.log_history, figures, state.global_step, tokens)


def _evaluate(trainer: Any, told: RunTold) -> dict[str, float]:
    """Return the figures of held-out rows by the model as it is at the end.

    The last step may have been evaluated already, of the same weights.
    """
    step, figures = told.evaluated or (-1, {})
    if step == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return figures
    return trainer.evaluate()


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
    "train_and_evaluate",
    "write_outputs",
]
