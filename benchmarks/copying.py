"""Makes a random model copy: behind each token it gives the one that has the next number.

What prompt lookup gains depends on how often the answer repeats the prompt, and the answers of
random weights repeat nothing. Here the blocks are so faint that the last token alone decides, and
the head's rows are those of the embedding moved by one: the answer counts upwards. A prompt that
counts is then copied, one with errors is corrected, and any other has nothing to be copied. The
work of a step is as before.

Tokens are numbers below the period in which the random rows of the embedding repeat.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.full_size import PATTERN

FAINT = 1e-3
# One token in so many of the prompt differs from the answer, as where a text is corrected.
EDITED = 12
TEXTS = ("copy", "edit", "new")


def make_copier(model: Any) -> int:
    """Let a model of `full_size` count upwards; return how many tokens it counts through.

    Its kernels must not have prepared the weights yet.
    """
    with torch.no_grad():
        for block in model.transformer.layers:
            for layer in (block.attention.dense, block.mlp.dense_4h_to_h):
                (layer.weight_scale if hasattr(layer, "weight_scale") else layer.weight).mul_(FAINT)
        table: Tensor = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(table.roll(1, 0), requires_grad=False)
    return min(PATTERN // table.shape[1], table.shape[0])


def draw_text(model: Any, length: int, text: str, period: int) -> Tensor:
    """Return a prompt `(1, S)` that the answer copies, corrects, or shares nothing with.

    Args:
        model: a copier.
        length: S, with the two markers at the end.
        text: one of `TEXTS`.
        period: tokens that the model counts through.

    Raises:
        ValueError: for another text.
    """
    if text not in TEXTS:
        raise ValueError(f"a text is one of {', '.join(TEXTS)}, got {text}")
    first = (model.config.bos_token_id + 1) % period
    generator = random.Random(length)
    ids = [(first + place) % period for place in range(length - 2)]
    if text == "new":
        ids = [generator.randrange(period) for _ in ids]
    if text == "edit":
        for place in range(EDITED, len(ids), EDITED):
            ids[place] = generator.randrange(period)
    return torch.tensor([[*ids, model.config.gmask_token_id, model.config.bos_token_id]])
