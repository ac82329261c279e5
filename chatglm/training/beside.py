"""Owns plain answers that are learned beside preferences, against forgetting (`sft_share`).

Of the rows of a step a share are plain questions with answers, whose loss is that of fine-tuning.
Which rows they are follows from the seed and the step alone, so that a run that goes on needs no
memory of them. Does not know preferences or rewards.

Shapes: `B` rows, `S` columns.
"""

from typing import Any

import torch
from torch import Tensor

from chatglm.training.data.batches import Examples, PaddingCollator, find_learned, pick_rows
from chatglm.training.data.rendering import IGNORED_LABEL

# The order of the rows has the seed of the training plus this number.
SEED_SHIFT = 1


def count_beside(num_rows: int, share: float) -> int:
    """Return how many plain rows stand beside others, so that they are a share of all; 1 at least.

    Args:
        num_rows: of the others.
        share: in (0, 1).
    """
    return max(1, round(num_rows * share / (1 - share)))


def weigh_beside(share: float) -> float:
    """Return the weight of the plain rows' mean loss, where that of the others is 1.

    Both together are the mean over all rows but for one factor: learning rates keep their meaning.
    """
    return share / (1 - share)


class BesideTrainer:
    """Makes a trainer of preferences learn plain answers too; stands before the trainer's class.

    Their loss is the mean over the answer tokens of a step, in all processes and passes.

    Attributes:
        answers: what is learned beside; None for nothing.
        share: of all rows that these are.
        pad_id: the pad token.
    """

    args: Any
    state: Any
    model: Any
    accelerator: Any
    current_gradient_accumulation_steps: int
    loss_is_scaled_for_ga: bool | None
    answers: Examples | None = None
    share: float = 0.0
    pad_id: int = 0
    _drawn_for = -1
    _num_tokens_beside: Any = None

    def set_beside(self, answers: Examples, share: float, pad_id: int) -> None:
        """Learn answers beside from now on."""
        self.answers, self.share, self.pad_id = answers, share, pad_id
        self._passes: list[dict[str, Tensor]] = []
        self._losses: list[float] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, and in training that of the plain rows with it."""
        trainer: Any = super()
        loss = trainer.compute_loss(model, inputs, *args, **kwargs)
        if self.answers is None or not model.training:
            return loss
        return loss + weigh_beside(self.share) * self._compute_beside(model, self.answers)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the plain rows gave since the last line, as `sft_loss`."""
        if "loss" in logs and self.answers is not None and self._losses:
            logs["sft_loss"] = sum(self._losses) / len(self._losses)
            self._losses.clear()
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

    def _compute_beside(self, model: Any, answers: Examples) -> Tensor:
        """Return this pass's part of the loss, in the scale that the trainer's own losses have."""
        if self._drawn_for != self.state.global_step:
            self._draw(answers)
        batch = self._passes.pop(0)
        learned = find_learned(batch["labels"])
        mean = model(**batch, logits_to_keep=learned, use_cache=False).loss
        part = torch.stack([mean.float() * learned.sum(), learned.sum().float()])
        nats, tokens = self.accelerator.reduce(part.detach(), reduction="sum").tolist()
        self._losses.append(nats / tokens)
        # Gradients of processes are averaged, and so are passes, unless the trainer has done so.
        passes = 1 if self.loss_is_scaled_for_ga else self.current_gradient_accumulation_steps
        return part[0] * self.args.world_size * passes / self._num_tokens_beside

    def _draw(self, answers: Examples) -> None:
        """Take the plain rows of a step, each process its own, and count all their tokens."""
        args, passes = self.args, self.current_gradient_accumulation_steps
        size = count_beside(args.per_device_train_batch_size, self.share)
        in_step = size * args.gradient_accumulation_steps * args.world_size
        start = self.state.global_step * in_step + args.process_index * size * passes
        rows = pick_rows(len(answers), args.seed + SEED_SHIFT, start, size * passes)
        collate = PaddingCollator(self.pad_id)
        batches = [
            collate([answers[i] for i in rows[n : n + size]]) for n in range(0, len(rows), size)
        ]
        self._passes = [{k: v.to(args.device) for k, v in batch.items()} for batch in batches]
        tokens = sum((b["labels"] != IGNORED_LABEL).sum() for b in self._passes)
        self._num_tokens_beside = self.accelerator.reduce(tokens, reduction="sum")
        self._drawn_for = self.state.global_step


__all__ = ["BesideTrainer", "count_beside", "weigh_beside"]
