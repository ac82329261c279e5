"""Owns what a stage of `chatglm train` is, a record, and how all that have a trainer are run.

Does not know any stage: each module that has one fills in a record, under the name `STAGE`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from chatglm.training.models import load_policy, load_tokenizer
from chatglm.training.precision import get_compute_dtype, keep_launcher
from chatglm.training.settings import Settings
from chatglm.training.trainer import (
    build_arguments,
    prepare_output,
    train_and_evaluate,
    write_outputs,
)


class Stage(NamedTuple):
    """A stage with a loop of its own.

    Attributes:
        name: as people type it.
        settings: the dataclass of the keys that are ours.
        arguments: the dataclass of the keys that are a library's.
        run: takes settings and the library's keys that were set, does what the stage is for, and
            returns the last figures.
    """

    name: str
    settings: type[Settings]
    arguments: type
    run: Callable[[Any, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class TrainerStage:
    """A stage on a trainer of transformers or trl; it has all that `Stage` has.

    Attributes:
        name, settings, arguments: as of `Stage`.
        build_trainer: makes the trainer, of model, tokenizer, settings and arguments.
        build_arguments: makes the arguments, of their class, settings, the keys that were set, and
            the stage's own defaults as keywords.
        defaults: the keys of the library that the stage starts from.
        lora_defaults: those that go before them where adapters are trained.
        load_model: loads what is trained, of settings and the dtype that is computed in.
        write: writes what was trained, of trainer and settings; called in every process.
    """

    name: str
    settings: type[Settings]
    arguments: type
    build_trainer: Callable[[Any, Any, Any, Any], Any]
    build_arguments: Callable[..., Any] = build_arguments
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lora_defaults: Mapping[str, Any] = field(default_factory=dict)
    load_model: Callable[..., Any] = load_policy
    write: Callable[[Any, Any], None] = write_outputs

    def run(self, settings: Any, given: Mapping[str, Any]) -> dict[str, float]:
        """Open the output folder, load, train and write; returns the figures of what is held out.

        Args:
            settings: ours.
            given: the library's keys that were set.

        Raises:
            ValueError: for settings, rows or a folder that cannot be used.
        """
        with keep_launcher():
            return self._train(settings, given)

    def _train(self, settings: Any, given: Mapping[str, Any]) -> dict[str, float]:
        defaults = {**self.defaults, **(self.lora_defaults if settings.uses_lora else {})}
        arguments = self.build_arguments(self.arguments, settings, given, **defaults)
        checkpoint = prepare_output(settings, given)
        model, tokenizer = (
            self.load_model(settings, get_compute_dtype(arguments)),
            load_tokenizer(settings),
        )
        trainer = self.build_trainer(model, tokenizer, settings, arguments)
        figures = train_and_evaluate(trainer, settings, checkpoint)
        self.write(trainer, settings)
        return figures


__all__ = ["Stage", "TrainerStage"]
