"""The P-Tuning v2 prefix: trained keys and values in front of every layer's own.

Owns the encoder under its official names and how its states become a layer's. Knows nothing of
blocks, masks or tokens. Source: https://arxiv.org/abs/2110.07602.

Shapes: `B` batch, `L` layers, `N` heads, `D` head dim, `H` hidden, `K` keys.
"""

import torch
from torch import Tensor, nn

from .configuration_chatglm import ChatGLMConfig

PREFIX_DROPOUT = 0.1


class PrefixTable(nn.Embedding):
    """The rows that make a prefix, which start wider than those of tokens."""


class PrefixEncoder(nn.Module):
    """The states of a prefix: a table, with `prefix_projection` behind a two-layer network."""

    def __init__(self, config: ChatGLMConfig, pre_seq_len: int) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.head_dim = config.head_dim
        self.prefix_projection = config.prefix_projection
        self.dropout = nn.Dropout(PREFIX_DROPOUT)
        states_size = config.num_layers * config.hidden_size * 2
        if config.prefix_projection:
            self.embedding = PrefixTable(pre_seq_len, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, states_size),
            )
        else:
            self.embedding = PrefixTable(pre_seq_len, states_size)

    def forward(self, batch_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return each layer's keys and values, L times `(2, B, N, pre_seq_len, D)`."""
        states = self.embedding.weight
        states = self.trans(states) if self.prefix_projection else states
        states = states.to(dtype).expand(batch_size, -1, -1)  # (B, pre_seq_len, L * 2 * H)
        states = states.unflatten(-1, (self.num_layers, 2, -1, self.head_dim))
        return self.dropout(states).permute(2, 3, 0, 4, 1, 5).unbind(0)


def prepend_prefix(prefix_states: Tensor, key_states: Tensor, value_states: Tensor) -> list[Tensor]:
    """Put a layer's prefix `(2, B, N, pre_seq_len, D)` before keys and values `(B, N, K, D)`."""
    pairs = zip(prefix_states.to(key_states.dtype), (key_states, value_states))
    return [torch.cat((prefix, states), dim=2) for prefix, states in pairs]


__all__ = ["PrefixEncoder", "PrefixTable", "prepend_prefix"]
