"""Owns what a run tells of itself: what it is about to learn, at its start, and what it did.

At the start some lines go to standard error, the rows' before a model is loaded; at the end
`summary.json` is written to the output folder. Only the main process tells anything. Does not know
how a stage trains.
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from chatglm import __version__
from chatglm.checkpoints.durable import write_whole
from chatglm.training.checkpoints import tell
from chatglm.training.data.measuring import Measured, measure, show_first
from chatglm.training.data.rendering import Renderer
from chatglm.training.data.showing import describe_rows, show_examples
from chatglm.training.estimate.memory import Job, plan_memory
from chatglm.training.estimate.report import read_job, read_shape
from chatglm.training.models import find_base
from chatglm.training.settings import Settings

SUMMARY_FILE = "summary.json"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets")
# A start is read at a glance: so many lines about files, and characters of a part of an example.
MOST_LINES, LONGEST_PART = 10, 160
# Stages that hold more than the one model which the estimate is about.
MORE_THAN_ONE = ("reward", "dpo", "ppo", "grpo")


class Parameters(NamedTuple):
    """How many parameters there are.

    Attributes:
        trained: that change.
        total: of the model and what is trained beside it, packed ones counted as what they stand
            for.
    """

    trained: int
    total: int


class Teller:
    """What one run tells, from its start to its end.

    Args:
        stage: its name.
        settings: ours.

    Attributes:
        measured: the counts of what is trained on.
        held_out: of what is held out; None if nothing is.
        parameters: None until the model is there.
    """

    def __init__(self, stage: str, settings: Settings) -> None:
        self.stage, self.settings = stage, settings
        self.measured: Measured | None = None
        self.held_out: Measured | None = None
        self.parameters: Parameters | None = None
        self.memory = 0
        self.since = time.monotonic()

    def tell_rows(self, renderer: Renderer, train: Any, held_out: Any) -> None:
        """Tell what was read, and the first example as it is learned.

        Args:
            renderer: of the rows.
            train, held_out: datasets of the stage; None where nothing is held out.
        """
        if not PartialState().is_main_process:
            return
        self.measured = measure(train, renderer)
        lines = describe_rows(self.measured)
        if held_out is not None:
            self.held_out = measure(held_out, renderer)
            count, tokens = self.held_out.examples, self.held_out.num_tokens
            lines.append(f"held out: {count:,} examples of {tokens:,} tokens")
        more = len(lines) - MOST_LINES
        if more > 0:
            remedy = "chatglm data shows all of them"
            lines = [*lines[: MOST_LINES // 2], f"({more} lines more: {remedy})", *lines[-5:]]
        shown = show_examples(show_first(train, renderer, 1), False, LONGEST_PART)
        for line in (*lines, *(line.replace("\n", "\\n") for line in shown)):
            tell(line)

    def tell_run(self, model: Any, arguments: Any, steps: int, rows: int) -> None:
        """Tell what is trained, for how long, and what memory that is expected to take.

        Args:
            model: what is trained, before or behind its wrapper.
            arguments: the library's, or PPO's.
            steps: of the whole run.
            rows: that all processes learn from in a step.
        """
        if not PartialState().is_main_process:
            return
        self.parameters = count_parameters(model, self.settings)
        trained, total = self.parameters
        tell(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.3g} %)")
        epochs = arguments.num_train_epochs
        length = "" if arguments.max_steps > 0 else f" in {epochs:g} epochs"
        tell(f"{steps:,} steps{length}, each of {rows:,} rows")
        self.memory = estimate_memory(self.settings, arguments, self._find_longest())
        if self.memory:
            least = "at least " if self.stage in MORE_THAN_ONE else "about "
            tell(f"{least}{self.memory / 1e9:.3g} GB of memory are expected to be used at once")

    def _find_longest(self) -> int:
        lengths = () if self.measured is None else self.measured.lengths
        return int(max(lengths)) if len(lengths) else 0

    def write_summary(
        self,
        history: Sequence[Mapping[str, Any]],
        figures: Mapping[str, Any],
        steps: int,
        tokens: int,
    ) -> dict[str, Any]:
        """Write what the run did, and return its last figures, which are never none.

        Args:
            history: the lines of its log.
            figures: of what is held out, or the last ones.
            steps: that are done.
            tokens: that were trained on in this process, all processes together.
        """
        seconds = round(time.monotonic() - self.since, 1)
        losses = list_losses(history)
        told = {"first": losses[0], "last": losses[-1], "best": min(losses)} if losses else {}
        short = {"steps": steps, "seconds": seconds, **({"loss": losses[-1]} if losses else {})}
        figures = {**short, **figures}
        if PartialState().is_main_process:
            fields = {**self._list_start(), "steps": steps, "trained_tokens": tokens}
            fields |= {"seconds": seconds, "losses": told, "figures": figures, **_list_machine()}
            text = json.dumps(fields, ensure_ascii=False, indent=2) + "\n"
            write_whole(Path(self.settings.output) / SUMMARY_FILE, text.encode())
        return figures

    def _list_start(self) -> dict[str, Any]:
        """Return what was told at the start, as fields."""
        fields: dict[str, Any] = {"stage": self.stage}
        for prefix, measured in (("", self.measured), ("held_out_", self.held_out)):
            if measured is not None:
                fields[f"{prefix}rows"] = measured.rows
                fields[f"{prefix}examples"] = measured.examples
                fields[f"{prefix}tokens"] = measured.num_tokens
                fields[f"{prefix}skipped"] = [item._asdict() for item in measured.left_out]
        if self.measured is not None:
            fields |= {"dialects": dict(self.measured.report.dialects)}
            fields |= {"lengths": self.measured.list_lengths()}
            fields |= {"learned_tokens": self.measured.num_learned}
        if self.parameters is not None:
            fields |= {"parameters": self.parameters._asdict(), "expected_bytes": self.memory}
        return fields


def list_losses(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the losses of a log's lines; the mean of all steps where no line was due."""
    for key in ("loss", "train_loss"):
        losses = [float(line[key]) for line in history if key in line]
        if losses:
            return losses
    return []


def _list_machine() -> dict[str, Any]:
    """Return what a run ran on and with, as fields."""
    versions = {"chatglm": __version__}
    for name in LIBRARIES:
        if name in sys.modules:
            versions[name] = metadata.version(name)
    state: Any = PartialState()
    is_gpu = torch.cuda.is_available()
    return {
        "processes": state.num_processes,
        "device": torch.cuda.get_device_name() if is_gpu else state.device.type,
        "versions": versions,
        "command": shlex.join(["chatglm", *sys.argv[1:]]),
    }


def count_parameters(model: Any, settings: Settings) -> Parameters:
    """Return how many parameters are trained, and of how many.

    Args:
        model: what is trained.
        settings: say which model it began as.
    """
    sizes = {
        name: (getattr(p, "ds_numel", p.numel()), p.requires_grad)
        for name, p in model.named_parameters()
    }
    trained = sum(size for size, is_trained in sizes.values() if is_trained)
    total = sum(size for size, _ in sizes.values())
    # Several packed weights share an element, so what is there is too few.
    return Parameters(trained, max(total, read_shape(find_base(settings)).parameters))


def estimate_memory(settings: Settings, arguments: Any, longest: int) -> int:
    """Return the most bytes that a step of the model is expected to take; 0 if nobody can say.

    Args:
        settings: ours.
        arguments: the library's.
        longest: tokens of the longest row; 0 is the window.
    """
    keys = get_type_hints(Job).keys()
    values = {k: v for k, v in {**_list(arguments), **vars(settings)}.items() if k in keys}
    values |= {"gpus": PartialState().num_processes, "max_length": longest}
    values |= {"optim": getattr(values.get("optim"), "value", values.get("optim"))}
    try:
        shape = read_shape(find_base(settings))
        told = {key: value for key, value in values.items() if value is not None}
        return plan_memory(shape, read_job(told, shape)).peak
    except ValueError:  # an optimizer, say, whose states are not known
        return 0


def _list(arguments: Any) -> dict[str, Any]:
    names = (item.name for item in dataclasses.fields(arguments))
    return {name: getattr(arguments, name, None) for name in names}


class RunTold(TrainerCallback):
    """Tells what is trained and how long when a trainer begins, and keeps its last evaluation.

    Args:
        teller: of the run.

    Attributes:
        evaluated: the step of the last evaluation in this process, and its figures.
    """

    def __init__(self, teller: Teller) -> None:
        self.teller = teller
        self.evaluated: tuple[int, dict[str, float]] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Tell what is about to happen."""
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.teller.tell_run(model, args, state.max_steps, rows)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Keep the figures."""
        self.evaluated = (state.global_step, dict(metrics or {}))


__all__ = ["SUMMARY_FILE", "RunTold", "Teller", "count_parameters", "estimate_memory"]
