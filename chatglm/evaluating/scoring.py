"""Owns what a model is asked without being trained: passes over rows in batches, no gradients.

Rows are padded on the left, so that their answers end in the same column and only the last columns
need logits. A row's figures are those it has alone. Does not know where rows come from.

Shapes: `B` batch, `S` columns, `N` rows in all.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from chatglm.training.data.batches import Examples, pad_rows
from chatglm.training.data.rendering import IGNORED_LABEL, Example
from chatglm.training.trainer import count_token_losses


class BatchedModel:
    """A model that takes rows in batches.

    Args:
        model: in evaluation mode, with or without adapters.
        pad_id: its pad token.
        batch_size: rows of a pass.
    """

    def __init__(self, model: Any, pad_id: int, batch_size: int) -> None:
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size

    @torch.no_grad()
    def measure_answers(
        self, examples: Sequence[Example] | Examples, lengths: Sequence[int]
    ) -> Tensor:
        """Return `(N, 3)`: each answer's summed loss in nats, its tokens, how many were likeliest.

        Args:
            examples: the rows.
            lengths: their tokens.

        Raises:
            ValueError: if a loss is no number.
        """
        measured = torch.zeros(len(lengths), 3, dtype=torch.float64)
        for batch in self._iter_batches(lengths, "rows"):
            rows = [examples[i] for i in batch]
            labels, _ = pad_rows([row.labels for row in rows], IGNORED_LABEL, side="left")
            width = max(len(row.answer_ids) for row in rows) + 1
            logits = self._forward([row.input_ids for row in rows], width)
            labels = labels[:, -width:].to(logits.device)
            measured[batch] = count_token_losses(logits, labels).double().cpu()
        return self._check(measured)

    @torch.no_grad()
    def score_next(self, prompts: Sequence[list[int]], token_ids: Sequence[int]) -> Tensor:
        """Return how likely some tokens are behind prompts, `(N, tokens)`, as log probabilities.

        Raises:
            ValueError: if one is no number.
        """
        scores = torch.zeros(len(prompts), len(token_ids), dtype=torch.float64)
        for batch in self._iter_batches([len(prompt) for prompt in prompts], "questions"):
            logits = self._forward([prompts[i] for i in batch], 1)[:, -1]
            chosen = logits.float().log_softmax(dim=-1)[:, list(token_ids)]
            scores[batch] = chosen.double().cpu()
        return self._check(scores)

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[list[int]]:
        """Return the ids that follow each prompt.

        Args:
            prompts: their ids.
            options: of the model's `generate`.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in self._iter_batches([len(prompt) for prompt in prompts], "answers"):
            input_ids, mask = self._pad([prompts[i] for i in batch])
            outputs = self.model.generate(input_ids=input_ids, attention_mask=mask, **options)
            for i, row in zip(batch, outputs[:, input_ids.shape[1] :].tolist()):
                answers[i] = row
        return answers

    def _forward(self, rows: Sequence[list[int]], columns: int) -> Tensor:
        """Return the logits of the last columns, `(B, columns, V)`."""
        input_ids, mask = self._pad(rows)
        return self.model(
            input_ids=input_ids, attention_mask=mask, use_cache=False, logits_to_keep=columns
        ).logits

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, each `(B, S)`, on the model's device."""
        input_ids, mask = pad_rows(rows, self.pad_id, side="left")
        return input_ids.to(self.model.device), mask.to(self.model.device)

    def _iter_batches(self, lengths: Sequence[int], unit: str) -> Iterator[list[int]]:
        """Yield the numbers of rows of like length, the longest first, and show how far it is."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        with tqdm(total=len(order), unit=f" {unit}", disable=None, leave=False) as progress:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                yield batch
                progress.update(len(batch))

    def _check(self, figures: Tensor) -> Tensor:
        if not bool(figures.isfinite().all()):
            raise ValueError(
                f"the model's scores are no numbers in {self.model.dtype}: set dtype to float32 or "
                "bfloat16"
            )
        return figures


__all__ = ["BatchedModel"]
