"""Owns what a stage of `chatglm train` is, a record, and how all that have a trainer are run.

Does not know any stage: each module that has one fills in a record, under the name `STAGE`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chatglm.training.checkpoints import telling_full_disk
from chatglm.training.data.reading import Data
from chatglm.training.early_stopping import check_metric
from chatglm.training.models import (
    PromptFormat,
    check_adapters,
    check_weights,
    keeps_weights,
    load_policy,
    load_tokenizer,
    read_format,
)
from chatglm.training.paths import check_paths
from chatglm.training.precision import get_compute_dtype, keep_launcher
from chatglm.training.resuming import note_finished, open_output
from chatglm.training.settings import Settings
from chatglm.training.telling import Teller
from chatglm.training.trainer import build_arguments, train_and_evaluate, write_outputs

# Of stages that learn answers.
FIGURES = ("loss", "token_loss", "perplexity", "token_accuracy")


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
        read_data: reads and renders all rows, of prompt format, tokenizer, settings and arguments;
            called before a model is loaded.
        build_trainer: makes the trainer, of model, tokenizer, settings, arguments and data.
        build_arguments: makes the arguments, of their class, settings, the keys that were set, and
            the stage's own defaults as keywords.
        defaults: the keys of the library that the stage starts from.
        lora_defaults: those that go before them where adapters are trained.
        figures: patterns of the figures of held-out rows, of which the best model is chosen by one.
        check_start: looks at what is begun from, of settings, before rows are read.
        load_model: loads what is trained, of settings and the dtype that is computed in.
        write: writes what was trained, of trainer and settings; called in every process.
    """

    name: str
    settings: type[Settings]
    arguments: type
    read_data: Callable[[PromptFormat, Any, Any, Any], Data]
    build_trainer: Callable[[Any, Any, Any, Any, Data], Any]
    build_arguments: Callable[..., Any] = build_arguments
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lora_defaults: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[str, ...] = FIGURES
    check_start: Callable[[Any], Any] = check_adapters
    load_model: Callable[..., Any] = load_policy
    write: Callable[[Any, Any], None] = write_outputs

    def run(self, settings: Any, given: Mapping[str, Any]) -> dict[str, float]:
        """Read, load, train and write; returns the last figures, those of what is held out too.

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
        check_metric(arguments, self.figures)
        check_weights(settings, keeps_weights(settings))
        check_paths(settings)
        self.check_start(settings)
        with (
            open_output(settings, given, arguments) as begun,
            telling_full_disk(Path(settings.output)),
        ):
            if begun.figures is not None:
                return begun.figures
            tokenizer = load_tokenizer(settings)
            data = self.read_data(read_format(settings), tokenizer, settings, arguments)
            teller = Teller(self.name, settings)
            teller.tell_rows(data.renderer, data.train, data.held_out)
            model = self.load_model(settings, get_compute_dtype(arguments))
            trainer = self.build_trainer(model, tokenizer, settings, arguments, data)
            figures = train_and_evaluate(trainer, settings, begun.checkpoint, teller)
            self.write(trainer, settings)
            note_finished(settings, arguments, trainer.state.global_step, figures)
            return figures


__all__ = ["Stage", "TrainerStage"]
