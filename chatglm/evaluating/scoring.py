"""Owns what a model is asked without being trained: passes over rows in batches, no gradients.

Rows are padded on the left, and a row's figures are those it has alone. How likely an answer is the
model itself knows (`scoring_chatglm.score_rows`). Does not know where rows come from.

Shapes: `B` batch, `S` columns, `N` rows in all.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from chatglm.answering import answer_prompts
from chatglm.training.data.batches import Examples, pad_rows
from chatglm.training.data.rendering import Example

if TYPE_CHECKING:  # a type checker does not know chatglm.model: see there
    from scoring_chatglm import check_scores, score_rows
else:
    from chatglm.model.scoring_chatglm import check_scores, score_rows


class BatchedModel:
    """A model that takes rows in batches.

    Args:
        model: in evaluation mode, with or without adapters.
        pad_id: its pad token.
        batch_size: rows of a pass.
    """

    def __init__(self, model: Any, pad_id: int, batch_size: int) -> None:
        self.model, self.pad_id, self.batch_size = model, pad_id, batch_size

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
        for batch in iter_batches(lengths, self.batch_size, "rows"):
            measured[batch] = score_rows(self.model, [examples[i] for i in batch])
        return measured * torch.tensor([-1.0, 1.0, 1.0])  # losses of log probabilities

    @torch.no_grad()
    def score_next(self, prompts: Sequence[list[int]], token_ids: Sequence[int]) -> Tensor:
        """Return how likely some tokens are behind prompts, `(N, tokens)`, as log probabilities.

        Raises:
            ValueError: if one is no number.
        """
        scores = torch.zeros(len(prompts), len(token_ids), dtype=torch.float64)
        lengths = [len(prompt) for prompt in prompts]
        for batch in iter_batches(lengths, self.batch_size, "questions"):
            input_ids, mask = self._pad([prompts[i] for i in batch])
            options = {"use_cache": False, "logits_to_keep": 1}
            logits = self.model(input_ids=input_ids, attention_mask=mask, **options).logits[:, -1]
            chosen = logits.float().log_softmax(dim=-1)[:, list(token_ids)]
            scores[batch] = chosen.double().cpu()
        return check_scores(scores, self.model.dtype)

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: dict[str, Any],
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return the ids that follow each prompt.

        Args:
            prompts: their ids.
            options: of the model's `generate`.
            seeds: one an answer, if they are drawn at random.
        """
        bar = tqdm(total=len(prompts), unit=" answers", disable=None, leave=False)
        with bar as progress:
            size = self.batch_size
            return answer_prompts(self.model, prompts, options, seeds, size, progress.update)

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, each `(B, S)`, on the model's device."""
        input_ids, mask = pad_rows(rows, self.pad_id, side="left")
        return input_ids.to(self.model.device), mask.to(self.model.device)


def iter_batches(lengths: Sequence[int], batch_size: int, unit: str) -> Iterator[list[int]]:
    """Yield the numbers of rows of like length, the longest first, and show how far it is.

    Args:
        lengths: of the rows.
        batch_size: rows of a pass.
        unit: what the bar counts.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(order), unit=f" {unit}", disable=None, leave=False) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            yield batch
            progress.update(len(batch))


__all__ = ["BatchedModel", "iter_batches"]
