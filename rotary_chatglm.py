"""Where a token stands, told to the network: queries and keys turned by their positions.

Owns the angles and the turning. Knows nothing of where positions come from (`masking_chatglm`) or
of attention.

Shapes: `B` batch, `N` heads, `S` tokens, `D` head dim, `P` position axes.
"""

import torch
from torch import Tensor, nn

from .configuration_chatglm import ChatGLMConfig

ROTARY_BASE = 10000.0


class RotaryEmbedding(nn.Module):
    """Turns position ids into the cosines and sines that rotate queries and keys.

    Every position axis owns `D / P` of a head's dimensions.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.rotary_dim = config.head_dim // config.num_positions

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each `(B, 1, P, S, D / P)`, for `position_ids` `(B, P, S)`."""
        exponents = torch.arange(0, self.rotary_dim, 2, device=position_ids.device).float()
        frequencies = 1.0 / ROTARY_BASE ** (exponents / self.rotary_dim)
        # The weights were trained with frequencies rounded to half; the angles stay in float32,
        # since half angles are off by up to 0.5 rad at position 2047.
        frequencies = frequencies.half().float()
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


__all__ = ["RotaryEmbedding", "apply_rotary", "rotate_half"]
