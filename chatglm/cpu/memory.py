"""Long prompts in less memory: part by part, and what the heap does not use given back.

A long prompt takes and frees tensors of many megabytes around the keys and values that stay. glibc
keeps what was freed between those, and the next tensor often does not fit: every layer then takes
more. Where there is no glibc nothing is given back.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from chatglm.cpu.products import wants_graph

PART_TOKENS = 512  # of a prompt at once in layers that are four times as wide as the others


def map_in_parts(mlp: Any, hidden_states: Tensor) -> Tensor | None:
    """Map a long prompt `(B, S, H)` by a feed-forward layer, part by part; None for a short one."""
    if hidden_states.shape[1] <= PART_TOKENS or wants_graph(hidden_states, mlp.dense_h_to_4h.bias):
        return None
    forward = type(mlp).forward.__wrapped__  # the model's own, without its twin
    parts = [forward(mlp, part) for part in hidden_states.split(PART_TOKENS, dim=1)]
    trim_heap()  # of this block, which the next one might not fit into
    return torch.cat(parts, dim=1)


@functools.cache
def _find_trim() -> Any:
    """Return glibc's `malloc_trim`; None in a process without it."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no name for the process
        return None


def trim_heap() -> None:
    """Give every free page of the heap back; takes some milliseconds."""
    trim = _find_trim()
    if trim is not None:
        trim(0)


__all__ = ["map_in_parts", "trim_heap"]
