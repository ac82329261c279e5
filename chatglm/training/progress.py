"""Owns what a person sees of a training: the bar, figures, sample answers, curves.

Does not know what is trained or how.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from chatglm.data.records import Record
from chatglm.training.early_stopping import EarlyStop
from chatglm.training.json_lines import append_line, cut_lines
from chatglm.training.models import find_core
from chatglm.training.settings import KeyProblem, Settings

SAMPLES_FILE = "samples.jsonl"
SAMPLE_TOKENS = 128
# No curve is drawn of these figures, which are about the run itself, nor of those that end so.
NO_CURVES = ("epoch", "step", "total_flos")
NO_CURVES_END = ("runtime", "per_second", "flos")


class FigureBar(TrainerCallback):
    """A bar of the steps, with the last figures at its end instead of lines between.

    While held-out rows are gone through a second one shows how far that is.
    """

    shown = ("loss", "eval_loss", "reward", "tokens/s", "GB")

    def __init__(self) -> None:
        self.steps: Any = None
        self.held_out: Any = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin at the step that the training begins at."""
        if state.is_world_process_zero:
            total, begun = state.max_steps, state.global_step
            self.steps = tqdm(total=total, initial=begun, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        if self.steps is not None:
            self.steps.update(state.global_step - self.steps.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest value of every figure, whichever a line of the log has."""
        if self.steps is not None and logs:
            self.figures |= {key: _shorten(logs[key]) for key in self.shown if key in logs}
            self.steps.set_postfix(self.figures)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count a batch of held-out rows."""
        if state.is_world_process_zero:
            if self.held_out is None:
                total, stays = len(eval_dataloader), self.steps is None
                self.held_out = tqdm(total=total, leave=stays, dynamic_ncols=True)
            self.held_out.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the second bar away."""
        if self.held_out is not None:
            self.held_out.close()
        self.held_out = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the first."""
        if self.steps is not None:
            self.steps.close()
        self.steps = None


class Meter:
    """Measures tokens a second and memory between two lines of a log.

    Args:
        count_tokens: returns how many this process has trained on so far.
        num_processes: that train together, each with as many tokens.
    """

    def __init__(self, count_tokens: Callable[[], int], num_processes: int) -> None:
        self.count_tokens, self.num_processes = count_tokens, max(1, num_processes)
        self.last = (time.monotonic(), count_tokens())

    def measure(self) -> dict[str, float]:
        """Return the figures since the last time."""
        (before, counted), now = self.last, (time.monotonic(), self.count_tokens())
        self.last = now
        figures = {"GB": round(read_memory() / 1e9, 2)}
        if now[1] > counted:
            rate = self.num_processes * (now[1] - counted) / (now[0] - before)
            figures["tokens/s"] = round(rate, 1)
        return figures


def read_memory() -> int:
    """Return the most bytes that were in use: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    from chatglm.process_memory import read_peak

    return read_peak()


class Samples(TrainerCallback):
    """Lets the model answer some questions now and then, to be read.

    Args:
        prompts: the questions.
        steps: how often; 0 is with every evaluation.
        tokenizer: the model's.
        folder: `samples.jsonl` is written there.
    """

    def __init__(self, prompts: Sequence[str], steps: int, tokenizer: Any, folder: Path) -> None:
        self.prompts, self.steps = prompts, steps
        self.tokenizer, self.folder = tokenizer, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take out the answers of steps that are taken once more, behind a checkpoint."""
        if state.is_world_process_zero:
            cut_lines(self.folder / SAMPLES_FILE, state.global_step or None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer every so many steps."""
        if self.steps and state.global_step % self.steps == 0:
            self.answer(kwargs["model"], state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer with every evaluation."""
        if not self.steps:
            self.answer(kwargs["model"], state)

    def answer(self, model: Any, state: Any) -> None:
        """Write the answers as they are now, greedy ones."""
        if not state.is_world_process_zero:
            return
        core, was_training = find_core(model), model.training
        model.eval()
        for prompt in self.prompts:
            text, _ = core.chat(
                self.tokenizer, prompt, do_sample=False, max_new_tokens=SAMPLE_TOKENS
            )
            line = {"step": state.global_step, "prompt": prompt, "answer": text}
            append_line(self.folder / SAMPLES_FILE, line)
        model.train(was_training)


class Curves(TrainerCallback):
    """Draws what was logged into `curves.png`, with every checkpoint and at the end.

    Args:
        folder: where it is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw what there is so far."""
        if state.is_world_process_zero:
            draw_curves(state.log_history, self.folder / "curves.png")

    on_train_end = on_save


def draw_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every figure of a log over its steps; held-out ones into the figure they belong to.

    Args:
        history: lines with `step` and figures.
        path: of the PNG.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in history:
        for key, value in line.items():
            is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_figure and key not in NO_CURVES and not key.endswith(NO_CURVES_END):
                curves.setdefault(key, []).append((line["step"], float(value)))
    panels: dict[str, list[str]] = {}
    for key in curves:
        panels.setdefault(key.removeprefix("eval_"), []).append(key)
    if panels:
        _draw_panels(panels, curves, path)


def _draw_panels(
    panels: dict[str, list[str]], curves: dict[str, list[tuple[float, float]]], path: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, keys) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for key in keys:
            axes.plot(*zip(*curves[key]), marker="." if len(curves[key]) < 30 else "", label=key)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def build_callbacks(settings: Settings, trainer: Trainer) -> list[TrainerCallback]:
    """Return what shows a training, and take the library's own bar away.

    Raises:
        KeyProblem: for sample prompts that no process has the weights to answer.
    """
    folder = Path(settings.output)
    if settings.sample_prompts and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise KeyProblem(
            "sample_prompts are answered by one process, which has but a part of the weights under "
            "FSDP and ZeRO-3: leave the key out"
        )
    callbacks: list[TrainerCallback] = [Curves(folder)]
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        callbacks.append(FigureBar())
    if settings.sample_prompts:
        tokenizer = trainer.processing_class
        steps = settings.sample_steps
        callbacks.append(Samples(frame_prompts(settings), steps, tokenizer, folder))
    if trainer.args.metric_for_best_model:
        callbacks.append(EarlyStop(settings))
    return callbacks


def frame_prompts(settings: Settings) -> list[str]:
    """Return the sample questions behind the system text that rows without one are given."""
    system = settings.default_system
    return [Record("", [], query, system=system).frame()[0] for query in settings.sample_prompts]


def _shorten(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


__all__ = [
    "Curves",
    "FigureBar",
    "Meter",
    "Samples",
    "build_callbacks",
    "draw_curves",
    "frame_prompts",
]
