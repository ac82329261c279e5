"""The rotation of queries and keys by positions.

Owns the cosines and sines of positions, how far windows beyond the trained one slow them down, and
the turning of heads. Which position a token has comes from `masking_chatglm`.

Shapes: `B` batch, `S` new tokens, `N` heads, `D` head dim, `P` position axes, `F` frequencies.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_chatglm import ROTARY_BASE, ChatGLMConfig, RopeScaling
from .masking_chatglm import count_cached_columns


class RotaryEmbedding(nn.Module):
    """The cosines and sines of positions; each of the axes owns `D / P` of a head's dimensions."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.rotary_dim = config.head_dim // config.num_positions
        self.scaling = RopeScaling.of_config(config)

    def forward(
        self, position_ids: Tensor, dtype: torch.dtype, past_key_values: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each `(B, 1, P, S, D / P)`, for `position_ids` `(B, P, S)`."""
        if self.scaling is not None and getattr(past_key_values, "is_of_rows", False):
            parts = [self(ids, dtype, row) for ids, row in past_key_values.split(position_ids, -1)]
            cos, sin = (torch.cat(part, dim=3) for part in zip(*parts))  # each row has its length
            return cos, sin
        exponents = torch.arange(0, self.rotary_dim, 2, device=position_ids.device).float()
        # Frequencies were half in training; half angles would be off by 0.5 rad at position 2047.
        frequencies = (1.0 / ROTARY_BASE ** (exponents / self.rotary_dim)).half().float()
        frequencies = slow_rotation(frequencies, position_ids, self.scaling, past_key_values)
        angles = position_ids.unsqueeze(-1).float() * frequencies  # (B, P, S, D/2P)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # (B, 1, P, S, D/P)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(states: Tensor) -> Tensor:
    """Map the two halves (a, b) of the last dimension to (-b, a)."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by all of their positions.

    With two axes the first half of every head turns with the token's position, the second half
    with its block position, which is 0 (no turn) over the context.

    Args:
        states: `(B, N, S, D)`.
        cos, sin: `(B, 1, P, S, D / P)`.
    """
    num_positions = cos.shape[2]
    parts = states.unflatten(-1, (num_positions, -1)).transpose(2, 3)  # (B, N, P, S, D/P)
    rotated = parts * cos + rotate_half(parts) * sin
    return rotated.transpose(2, 3).flatten(-2)  # (B, N, S, D)


def measure_lengths(position_ids: Tensor, past_key_values: Any) -> Tensor:
    """Return how many positions of each axis every row has come to, `(B, P)`.

    The first axis goes back to the blank behind a prompt, whose keys were turned for all of it: a
    cache is told how far that was. (The block position only grows.)

    Args:
        position_ids: `(B, P, S)`, of the new tokens.
        past_key_values: a cache, or None.
    """
    lengths = position_ids.amax(dim=-1) + 1
    if past_key_values is None:
        return lengths
    noted: Any = getattr(past_key_values, "noted_length", None)  # (B,)
    # A compiled step cannot ask, and follows a prompt that was not compiled.
    has_past = torch.compiler.is_compiling() or count_cached_columns(past_key_values) > 0
    if has_past and noted is not None and noted.shape == lengths.shape[:1]:
        lengths[:, 0] = lengths[:, 0].maximum(noted.to(lengths))
    past_key_values.noted_length = lengths[:, 0]
    return lengths


def slow_rotation(
    frequencies: Tensor, position_ids: Tensor, scaling: Any, past_key_values: Any
) -> Tensor:
    """Slow rotary frequencies down so that a row's positions stay in what was trained.

    "linear" divides those of the first axis by the factor, whatever the length: prompts are what
    grows. "dynamic" leaves them as they are up to the trained length, and slows an axis that is
    longer, the less the faster a frequency is (NTK); so does "linear" with the block position,
    which is short in nearly all answers. A row's company in the batch does not matter. Keys in a
    cache stay as they were turned: a prompt's are all turned alike, and only an answer that grows
    beyond the trained length has older ones.

    Args:
        frequencies: `(F,)`, radians a position, the fastest first.
        position_ids: `(B, P, S)`, of the new tokens.
        scaling: a `RopeScaling`, or None to change nothing.
        past_key_values: as for `measure_lengths`.

    Returns:
        `(B, P, 1, F)`, or the frequencies as they are.
    """
    if scaling is None:
        return frequencies
    lengths = measure_lengths(position_ids, past_key_values)
    stretch = scaling.factor * lengths / scaling.trained_length - (scaling.factor - 1)
    shares = torch.linspace(0, 1, frequencies.numel(), device=frequencies.device)
    slowed = frequencies / stretch.clamp(min=1)[..., None, None] ** shares  # (B, P, 1, F)
    if scaling.rope_type == "linear":
        slowed[:, 0] = frequencies / scaling.factor
    return slowed


__all__ = ["RotaryEmbedding", "apply_rotary"]
