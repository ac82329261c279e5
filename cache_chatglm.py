"""The key-value cache: keys and values with room behind them, as they are or as 8-bit integers.

A cache that concatenates copies all it holds for every token. Here each head's columns lie at the
front of a longer run of memory, and new ones are written behind them.

Owns where cached columns lie, and how they are rounded. Knows nothing of modules, masks, positions
or generation, and leaves it to transformers what a cache layer can do.

Shapes: `B` rows, `N` heads, `S` new columns, `T` all columns so far, `D` head dim (1 for scales).
"""

from collections.abc import Iterable
from functools import partialmethod
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

ROOM_STEP = 64  # columns; every head's integers and scales then begin on a cache line
ROOM_SHARE = 8  # an eighth of what is in use: a column is moved about 8 times while a cache grows

MAX_INTEGER = 127

# torch promises neither this count nor `_cdata`. Without them a cache is only slower: nothing
# proves room free.
_count_users = getattr(torch._C, "_storage_Use_Count", None)


def _count_holders(tensor: Tensor) -> int:
    """Count the tensors that share a tensor's memory, and the object that asks."""
    address = getattr(tensor.untyped_storage(), "_cdata", None)
    return 0 if _count_users is None or address is None else _count_users(address)


ALONE = max(_count_holders(torch.empty(1)), 1)


def append_columns(past: Tensor, new: Tensor) -> Tensor:
    """Return past and new columns in one tensor, `(B, N, T, D)`, written in place if that is safe.

    It is if `past` lies at the front of memory that no other tensor looks into: then what is
    behind it is nobody's. A tensor that someone else still holds, as a copy of the cache from
    before it was cropped, is left as it is, and so is memory that was not reserved here.

    Args:
        past: `(B, N, T - S, D)`. new: `(B, N, S, D)`, of the same type and device.

    Returns:
        A tensor with strides `(N * capacity * D, capacity * D, D, 1)`.
    """
    columns = extend_columns(past, new.shape[2])
    columns[:, :, past.shape[2] :].copy_(new)
    return columns


def extend_columns(past: Tensor, count: int) -> Tensor:
    """Return past columns and `count` more that are still to be written, `(B, N, T, D)`.

    They are behind the past ones if that is safe, as for `append_columns`.
    """
    batch, heads, length, width = past.shape
    total = length + count
    if _find_capacity(past) < total:
        room = past.new_empty(batch, heads, reserve_columns(total), width)
        past = room[:, :, :length].copy_(past)
    columns = past.as_strided((batch, heads, total, width), past.stride())
    # A view would keep what it is a view of, which would count as a second tensor from then on.
    return columns.detach()


def reserve_columns(length: int) -> int:
    """Return the capacity for `length` columns, with room for more."""
    capacity = length + max(ROOM_STEP, length // ROOM_SHARE)
    return -(-capacity // ROOM_STEP) * ROOM_STEP


def _find_capacity(columns: Tensor) -> int:
    """Return how many columns fit in the memory that holds some, 0 if others may look into it."""
    if columns.is_inference() and not torch.is_inference_mode_enabled():
        return 0  # torch forbids to write there
    batch, heads, _, width = columns.shape
    capacity = columns.stride(1) // width
    is_row_of_heads = columns.stride() == (heads * capacity * width, capacity * width, width, 1)
    size = columns.untyped_storage().nbytes()
    if not is_row_of_heads or size != batch * columns.stride(0) * columns.itemsize:
        return 0
    return capacity if _count_holders(columns) == ALONE else 0


def _can_follow(past: Tensor, new: Tensor) -> bool:
    """Say whether plain tensors match in all but their columns and no gradient is asked for."""
    if type(past) is not Tensor or type(new) is not Tensor:
        return False
    if torch.is_grad_enabled() and (past.requires_grad or new.requires_grad):
        return False
    batch, heads, _, width = past.shape
    is_alike = new.shape == (batch, heads, new.shape[2], width)
    return is_alike and past.dtype == new.dtype and past.device == new.device


class ReservedLayer(DynamicLayer):
    """A layer's keys and values, `(B, N, T, D)` each, that grow without being copied.

    `keys` and `values` are all there is: whatever cuts or replaces them may do so. The room behind
    them is found again at the next update, or made anew. Where it cannot be used (gradients,
    compiled code, tensors that are not plain ones) they are concatenated as in the base class.
    """

    keys: Any  # a tensor, or None at first
    values: Any

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `(B, N, S, D)` each and return all keys and values, `(B, N, T, D)` each."""
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if self.get_seq_length() == 0:
            # What a layer notes about its tensors at first differs between releases.
            super().update(key_states[:, :, :0], value_states[:, :, :0], *args, **kwargs)
        if not (_can_follow(self.keys, key_states) and _can_follow(self.values, value_states)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = append_columns(self.keys, key_states)
        self.values = append_columns(self.values, value_states)
        return self.keys, self.values

    def extend(self, count: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values, and behind them `count` columns that the caller writes."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        self.keys, self.values = extend_columns(keys, count), extend_columns(values, count)
        return self.keys, self.values

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Cut as transformers does, and let go of what was cut off."""
        super().crop(*args, **kwargs)
        if self.get_seq_length() > 0 and not (self.keys.requires_grad or self.values.requires_grad):
            # As views they would hold on to the longer tensors, as if someone still used those.
            self.keys, self.values = self.keys.detach(), self.values.detach()

    def reset(self) -> None:
        """Drop all columns; transformers before 5.23 sets them to 0 and keeps them."""
        self.keys = self.values = None
        self.is_initialized = False


def quantize_columns(states: Tensor) -> tuple[Tensor, Tensor]:
    """Round every head's vector of every column to 8 bits.

    The greatest magnitude becomes 127; halves go to the even integer. An element is then off by at
    most half a scale, unless the scale is below float32's normal numbers. A vector of zeros has
    scale 0. One with an infinity or NaN has that for a scale, and comes back as NaN throughout.

    Args:
        states: `(B, N, S, D)`.

    Returns:
        Integers `(B, N, S, D)` in -127 ... 127, and float32 scales `(B, N, S, 1)`.
    """
    scales = states.abs().amax(dim=-1, keepdim=True).float() / MAX_INTEGER
    integers = (states / scales).nan_to_num_(0).round_().clamp_(-MAX_INTEGER, MAX_INTEGER)
    return integers.to(torch.int8), scales


class RoundedColumns(ReservedLayer):
    """Keys or values of a layer: its own keys are the integers, its values the scales."""

    @property
    def scales(self) -> Tensor:
        """`(B, N, T)`."""
        return self.values.squeeze(-1)

    def __init__(self, states: Tensor | None = None) -> None:
        super().__init__()
        if states is not None and states.dim() == 4:
            self.append(states.detach())

    def append(self, states: Tensor) -> None:
        self.states_dtype = states.dtype
        self.update(*quantize_columns(states))

    def read(self) -> Tensor | None:
        """Return all states, rounded, `(B, N, T, D)`."""
        return None if self.keys is None else (self.keys * self.values).to(self.states_dtype)


class QuantizedReservedLayer(ReservedLayer):
    """A layer's keys and values as 8-bit integers with one float32 scale per column and head.

    All columns are rounded, the newest too, so that it does not matter in which pieces they come.
    `keys` and `values` are computed whenever they are asked for, in the type of the newest states.
    Integers are `(B, N, T, D)` and scales `(B, N, T)`, with each head's columns side by side;
    whoever holds on to one makes the next update copy it.
    """

    key_integers = property(attrgetter("_key_part.keys"))
    key_scales = property(attrgetter("_key_part.scales"))
    value_integers = property(attrgetter("_value_part.keys"))
    value_scales = property(attrgetter("_value_part.scales"))

    @property
    def keys(self) -> Any:
        """All keys `(B, N, T, D)`, or None; what is assigned is rounded."""
        return self._key_part.read()

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._key_part = RoundedColumns(states)

    @property
    def values(self) -> Any:
        """All values `(B, N, T, D)`, or None; what is assigned is rounded."""
        return self._value_part.read()

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._value_part = RoundedColumns(states)

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Round and append `(B, N, S, D)` each, and compute nothing else.

        Raises:
            ValueError: if gradients are asked for, which rounding would end unnoticed.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "A cache of 8-bit integers passes no gradients on, but the keys or values to be "
                "cached require them; run the model in torch.no_grad(), or with another cache."
            )
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._key_part.append(key_states)
        self._value_part.append(value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `(B, N, S, D)` each and return all keys and values, rounded, `(B, N, T, D)` each.

        This is the slow twin of a kernel that reads the integers after `append`.
        """
        self.append(key_states, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._key_part.get_seq_length()

    def _do_to_parts(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Do to integers and scales what transformers does to keys and values."""
        for part in (self._key_part, self._value_part):
            getattr(part, name)(*args, **kwargs)

    extend: Any = partialmethod(_do_to_parts, "extend")
    crop: Any = partialmethod(_do_to_parts, "crop")
    reorder_cache: Any = partialmethod(_do_to_parts, "reorder_cache")
    batch_repeat_interleave: Any = partialmethod(_do_to_parts, "batch_repeat_interleave")
    batch_select_indices: Any = partialmethod(_do_to_parts, "batch_select_indices")
    offload: Any = partialmethod(_do_to_parts, "offload")
    prefetch: Any = partialmethod(_do_to_parts, "prefetch")


LAYERS = {None: ReservedLayer, 8: QuantizedReservedLayer}


class ChatGLMCache(DynamicCache):
    """The cache that a ChatGLM model makes for itself; `bits=8` halves it.

    Args:
        ddp_cache_data: for each layer its keys and values, `(B, N, T, D)` each, to begin with.
        config: a model's configuration, to have all layers from the start.
        bits: 8 to keep keys and values as integers and scales, None to keep them as they are.
        **kwargs: as in `DynamicCache`.

    Raises:
        ValueError: for other numbers of bits.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor | None, ...]] | None = None,
        config: Any = None,
        *,
        bits: int | None = None,
        **kwargs: Any,
    ) -> None:
        if bits not in LAYERS:
            raise ValueError(f"bits must be 8, or None for no rounding, got {bits!r}.")
        super().__init__(**kwargs)
        self.layer_class_to_replicate = LAYERS[bits]
        if config is not None:
            self.layers = [LAYERS[bits]() for _ in range(config.num_hidden_layers)]
        for layer_idx, (key_states, value_states, *_) in enumerate(ddp_cache_data or ()):
            if key_states is not None and value_states is not None:
                self.update(key_states, value_states, layer_idx)

    @property
    def max_cache_len(self) -> int:
        """Return -1, which is transformers' word for no limit.

        peft asks before there is any layer, of which transformers 4 would look for the largest.
        """
        return -1


class KeyValues(NamedTuple):
    """Keys and values as they stand: `(B, N, K, D)`, or integers with scales `(B, N, K)`."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def as_floats(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values, `(B, N, K, D)` each, in a float dtype."""
        if self.key_scale is None or self.value_scale is None:
            return self.key, self.value
        key = self.key * self.key_scale.unsqueeze(-1)
        return key.to(dtype), (self.value * self.value_scale.unsqueeze(-1)).to(dtype)


def extend_cache(
    cache: Any, layer_idx: int, new: KeyValues, cache_position: Tensor | None = None
) -> KeyValues:
    """Append keys and values to any cache, and return all of them; without a cache, the new ones.

    Args:
        cache: a cache of transformers, ours, or None.
        layer_idx: whose they are.
        new: `(B, N, S, D)` each.
        cache_position: `(S,)`, the columns that they take in a static cache; only transformers
            before 5.13 asks for it.

    Returns:
        `(B, N, T, D)` each; of a layer that keeps integers those, and scales `(B, N, T)`.
    """
    if cache is None:
        return new
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, QuantizedReservedLayer):
        where = {"cache_position": cache_position}
        return KeyValues(*cache.update(new.key, new.value, layer_idx, where))
    layer.append(new.key, new.value)
    scales = layer.key_scales, layer.value_scales
    return KeyValues(layer.key_integers, layer.value_integers, *scales)


def prepend_prefix(prefix_states: Tensor | None, past: KeyValues, dtype: torch.dtype) -> KeyValues:
    """Put a layer's prefix `(2, B, N, pre_seq_len, D)`, if it has one, before `(B, N, K, D)`."""
    if prefix_states is None:
        return past
    pairs = zip(prefix_states.to(dtype), past.as_floats(dtype))
    return KeyValues(*(torch.cat((prefix, states), dim=2) for prefix, states in pairs))


__all__ = [
    "ChatGLMCache",
    "KeyValues",
    "QuantizedReservedLayer",
    "ReservedLayer",
    "extend_cache",
    "prepend_prefix",
]
