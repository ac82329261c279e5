"""Owns what a training loop of our own leaves behind of its figures: files, TensorBoard, a bar.

`log.jsonl` has a line for every few steps, `samples.jsonl` answers to read, `curves.png` draws the
log, `runs/` is TensorBoard's. A run that goes on after it was killed takes up the files where its
checkpoint was written. Does not know what is trained.
"""

import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from chatglm.training.json_lines import append_line, cut_lines
from chatglm.training.progress import SAMPLES_FILE, draw_curves, read_memory

LOG_FILE, CURVES_FILE = "log.jsonl", "curves.png"
SHOWN = ("reward", "kl", "loss", "tokens/s", "GB")


class RunLog:
    """The figures of a run; only the main process keeps any.

    Args:
        folder: of the outputs.
        accelerator: hands figures to TensorBoard and others, and knows the main process.
        begun: steps that were done before; None at the very beginning.
        max_steps: of the whole run.
        logging_steps: how many steps share a line, which has their means.
        shows_bar: whether there is a bar.

    Attributes:
        pending: figures of the steps that have no line yet.
        history: the lines.
        all_tokens: that were gone over since this process began, in all processes.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Any,
        begun: int | None,
        max_steps: int,
        logging_steps: int,
        shows_bar: bool = True,
    ) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.max_steps, self.logging_steps = max_steps, logging_steps
        self.is_main: bool = accelerator.is_main_process
        self.pending: list[dict[str, float]] = []
        self.history: list[dict[str, Any]] = []
        if self.is_main:
            self.history = cut_lines(folder / LOG_FILE, begun)
            cut_lines(folder / SAMPLES_FILE, begun)
        is_hidden = not (self.is_main and shows_bar)
        self.bar = tqdm(total=max_steps, initial=begun or 0, disable=is_hidden, unit="step")
        self.tokens, self.since = 0, time.monotonic()
        self.all_tokens = 0

    def add(self, step: int, figures: dict[str, float], tokens: int) -> bool:
        """Take the figures of a step; write a line if one is due.

        Args:
            step: steps that are done.
            figures: of this one.
            tokens: that it went over, in all processes.

        Returns:
            Whether a line was due.
        """
        self.pending.append(figures)
        self.tokens += tokens
        self.all_tokens += tokens
        is_due = step % self.logging_steps == 0 or step == self.max_steps
        if is_due:
            self.write(step, {**_average(self.pending), **self._measure()})
            self.pending = []
        self.bar.update(1)
        return is_due

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Write a line at once, and show it."""
        self.accelerator.log(figures, step=step)
        if not self.is_main:
            return
        self.history.append({"step": step, **figures})
        append_line(self.folder / LOG_FILE, self.history[-1])
        shown = {key: f"{figures[key]:.4g}" for key in SHOWN if key in figures}
        self.bar.set_postfix(shown, refresh=False)

    def say(self, sentence: str) -> None:
        """Write a sentence above the bar."""
        if self.is_main:
            self.bar.write(sentence, file=sys.stderr)

    def write_sample(self, step: int, prompt: str, answer: str, score: float) -> None:
        """Keep an answer to read."""
        if self.is_main:
            line = {"step": step, "prompt": prompt, "answer": answer, "score": score}
            append_line(self.folder / SAMPLES_FILE, line)

    def _measure(self) -> dict[str, float]:
        """Return tokens a second since the last line, and memory."""
        now = time.monotonic()
        speed = self.tokens / (now - self.since)
        self.tokens, self.since = 0, now
        return {"tokens/s": round(speed, 1), "GB": round(read_memory() / 1e9, 2)}

    def draw(self) -> None:
        """Draw the curves of all lines so far."""
        if self.is_main:
            draw_curves(self.history, self.folder / CURVES_FILE)

    def find_latest(self) -> dict[str, Any]:
        """Return the last value of every figure."""
        latest: dict[str, Any] = {}
        for line in self.history:
            latest |= line
        return latest

    def close(self) -> None:
        """End the bar, and what others show."""
        self.bar.close()
        self.accelerator.end_training()


def _average(lines: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure of the last line over the lines that have it."""
    columns = {key: [line[key] for line in lines if key in line] for key in lines[-1]}
    return {key: sum(values) / len(values) for key, values in columns.items()}


__all__ = ["RunLog"]
