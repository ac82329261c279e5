"""Rows: answers that are decoded side by side, each as if it were alone.

Owns what a row is, how its prompt is read block by block, and a step of many rows: their pending
tokens go through the network as one sequence `(1, S, H)`, and only where they look back does each
row stand alone, with its own cache. Nothing is padded or masked, and nothing is copied when rows
join or leave. Knows nothing of text, and of draws: who decodes appends the tokens.

A step is a pass of the model itself, so adapters, hooks and prefixes act as they always do.

Shapes: `N` rows, `S` pending tokens of all rows together, `P` position axes, `H` hidden,
`V` vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .cache_chatglm import ChatGLMCache
from .environment_chatglm import (
    CACHE_NAME,
    find_input_device,
    find_learned_prompt,
    with_fast_products,
)
from .masking_chatglm import RowPlaces, build_attention_bias, count_cached_columns


class Row:
    """A prompt and its answer so far.

    `input_ids` are changed by `append` and `crop` alone, which keep the places of tokens in step.

    Attributes:
        input_ids: all tokens, of the prompt and the answer. Those behind the cached ones are
            pending: the next step reads them.
        prompt_length: tokens of the prompt. Pads before it are left out.
    """

    def __init__(self, model: Any, input_ids: Sequence[int], cache: Any = None) -> None:
        network = find_model(model).transformer
        self.input_ids = _drop_pads(list(input_ids), network.special_ids.pad)
        self.prompt_length = len(self.input_ids)
        self._is_own = cache is None
        self._cache: Any = ChatGLMCache() if cache is None else _check_cache(cache)
        self._network = network
        self._places = RowPlaces(network.special_ids, network.config.num_positions)
        self._places.note(self.input_ids, 0)

    @property
    def cache(self) -> Any:
        """Keys and values of the cached tokens; it says of which, as one that `generate` fills."""
        self._note_tokens()
        return self._cache

    def _note_tokens(self) -> None:
        ids = torch.tensor([self.input_ids[: self.num_cached]], device=self._network.device)
        self._cache.noted_tokens = ids

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are cached."""
        return count_cached_columns(self._cache)

    @property
    def pending(self) -> list[int]:
        """Tokens that the next step reads."""
        return self.input_ids[self.num_cached :]

    @property
    def position(self) -> int:
        """The last token's place on the first axis: behind `<sop>` that of the blank."""
        return self._places.find(len(self.input_ids) - 1)[0]

    @property
    def block_position(self) -> int:
        """The last token's place in the answer, 1 for `<sop>`; 0 before, and with one axis."""
        return (*self._places.find(len(self.input_ids) - 1), 0)[1]

    def share_prompt(self, other: "Row") -> None:
        """Put a copy of what another row has cached of the same prompt in the place of its own.

        Raises:
            ValueError: if the prompts differ, or this one is read already.
        """
        if other.input_ids != self.input_ids or self.num_cached:
            raise ValueError(
                f"A row of {len(self.input_ids)} tokens, {self.num_cached} of them cached, cannot "
                f"take over the cache of one of {len(other.input_ids)}: that needs the same prompt "
                "and a row that has read nothing."
            )
        self._cache = copy.deepcopy(other._cache)

    def append(self, *token_ids: int) -> None:
        """Add tokens to the answer."""
        self._places.note(token_ids, len(self.input_ids))
        self.input_ids.extend(token_ids)

    def crop(self, length: int) -> None:
        """Forget all tokens behind so many, cached ones too, as of a draft that was not taken.

        Raises:
            ValueError: if that would cut the prompt, whose tokens know of all that follow.
        """
        if length < self.prompt_length:
            raise ValueError(
                f"A row of a prompt of {self.prompt_length} tokens cannot be cut to {length}: its "
                "tokens have seen one another. Read the shorter prompt as a row of its own."
            )
        del self.input_ids[length:]
        self._places.forget(length)
        surplus = self.num_cached - length
        if surplus > 0:
            self._cache.crop(-surplus)  # the sign that all releases of transformers take

    def find_pending_places(self) -> list[tuple[int, ...]]:
        """Return the P places of each pending token."""
        return [self._places.find(n) for n in range(self.num_cached, len(self.input_ids))]


def _drop_pads(ids: list[int], pad: int | None) -> list[int]:
    """Return a prompt without the pads before it, which count nowhere."""
    start = next((n for n, token in enumerate(ids) if token != pad), len(ids))
    if start == len(ids):
        raise ValueError(f"A prompt needs a token, got {len(ids)}, all of them pads.")
    return ids[start:]


def _check_cache(cache: Any) -> Any:
    """Return a cache that a row can have.

    Raises:
        ValueError: if it is full already, or of a fixed size.
    """
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"A row cannot grow in a {type(cache).__name__}, which has a fixed size: pass a "
            "DynamicCache, or leave the cache out."
        )
    if count_cached_columns(cache):
        raise ValueError(
            f"The cache of a new row must be empty, got one of {count_cached_columns(cache)} "
            "columns: pass an empty one, or leave it out."
        )
    return cache


def find_model(model: Any) -> Any:
    """Return the model that computes rows: what is given, or what is within one of peft.

    Raises:
        ValueError: for an adapter in place of a prompt, which is not in the layers.
    """
    config = find_learned_prompt(model)
    if config is not None:
        raise ValueError(
            f"Rows cannot be decoded through an adapter of {config.peft_type}, which stands before "
            "the prompt: use chat or generate, or an adapter of the layers such as LoRA."
        )
    within = getattr(model, "get_base_model", None)
    return model if within is None else within()


class PromptReading:
    """A prompt that is being read, block by block; between two, any other step may run.

    The logits are bit-equal to those of a pass at once. A model whose pass as a whole is watched,
    by hooks or by accelerate, is read by one such pass.

    Attributes:
        row: what comes of it.
        logits: `(1, V)`, of the first token of the answer; None before the end.
    """

    def __init__(self, model: Any, input_ids: Sequence[int], cache: Any = None) -> None:
        self.model = find_model(model)
        self.row = Row(self.model, input_ids, cache)
        self.logits: Tensor | None = None
        self._inputs: Any = None
        self._block = 0

    @torch.no_grad()
    def advance(self) -> bool:
        """Run the next block; return whether the prompt is read."""
        if self.logits is None:
            _advance(self.model, self)
        return self.logits is not None

    def read_block(self) -> None:
        """Run a block, after the first preparations and before the last product."""
        network, cache = self.model.transformer, self.row._cache
        if self._inputs is None:
            self._inputs = network.prepare(self._ids(), None, None, None, cache)
        hidden_states, _ = network.layers[self._block](
            *self._inputs[:3],
            self._inputs.prefixes[self._block],
            cache,
            cache_position=self._inputs.cache_position,
        )
        self._inputs = self._inputs._replace(hidden_states=hidden_states)
        self._block += 1
        if self._block == len(network.layers):
            last = network.final_layernorm(hidden_states)[:, -1:]
            self.logits, self._inputs = self.model.lm_head(last)[:, -1], None

    def read_at_once(self) -> None:
        """Run the model itself."""
        options = {CACHE_NAME: self.row._cache, "use_cache": True, "logits_to_keep": 1}
        self.logits = self.model(self._ids(), return_dict=True, **options).logits[:, -1]

    def _ids(self) -> Tensor:
        return torch.tensor([self.row.input_ids], device=find_input_device(self.model))


@with_fast_products
def _advance(model: Any, reading: PromptReading) -> None:
    whole = (model, model.transformer, model.transformer.layers)
    if any(map(_is_watched, whole)):
        reading.read_at_once()
    else:
        reading.read_block()


def _is_watched(module: Any) -> bool:
    """Tell whether a module has hooks, or a forward pass put in front of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def read_prompt(model: Any, input_ids: Sequence[int], cache: Any = None) -> tuple[Row, Tensor]:
    """Read a prompt without a pause.

    Args:
        model: a `ChatGLMForConditionalGeneration`, or one of peft around it.
        input_ids: the prompt's.
        cache: an empty cache of one row that can grow, or None for a `ChatGLMCache`.

    Returns:
        The row, and the logits `(1, V)` of the first token of its answer.

    Raises:
        ValueError: for an empty prompt, another cache, or an adapter that stands before prompts.
    """
    reading = PromptReading(model, input_ids, cache)
    while not reading.advance():
        pass
    assert reading.logits is not None
    return reading.row, reading.logits


class RowCaches:
    """The caches of all rows of a step, in the place of one.

    Attributes:
        caches, counts: of each row its cache, and how many tokens it reads.
    """

    is_of_rows = True  # by which files that this one imports know it
    is_compileable = False

    def __init__(self, rows: Sequence[Row]) -> None:
        self.caches = [row._cache for row in rows]
        self.counts = [len(row.input_ids) - row.num_cached for row in rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns of the longest row."""
        return max(cache.get_seq_length(layer_idx) for cache in self.caches)

    def split(self, states: Tensor, dim: int) -> Iterator[tuple[Tensor, Any]]:
        """Return each row's part of what all tokens have, and its cache."""
        return zip(states.split(self.counts, dim=dim), self.caches)


def attend_rows(
    attention: Any,
    mixed: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    prefix_states: Tensor | None,
    caches: RowCaches,
    output_attentions: bool = False,
    cache_position: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Attend row by row, each to its own past.

    Args:
        attention: a `SelfAttention`.
        mixed: the joint projection of all tokens, `(1, S, 3 * H)`.
        position_embeddings: cosines and sines, `(1, 1, P, S, D / P)`.
        prefix_states: a P-Tuning prefix, which is before every row, or None.

    Returns:
        `(1, S, N, D)`, and no weights.
    """
    attended, angles = [], [x.split(caches.counts, dim=3) for x in position_embeddings]
    prefix_length = 0 if prefix_states is None else prefix_states.shape[3]
    for (part, cache), *places in zip(caches.split(mixed, 1), *angles):
        past_length = cache.get_seq_length(attention.layer_idx)
        mask = _hide_later(part, past_length, prefix_length)
        attended.append(attention.mix(part, mask, tuple(places), prefix_states, cache)[0])
    return torch.cat(attended, dim=1), None


def _hide_later(states: Tensor, past_length: int, prefix_length: int) -> Tensor | None:
    """Return what keeps several new tokens of a row from seeing those behind them."""
    count = states.shape[1]
    if count == 1:
        return None
    ones = torch.ones(count, past_length + count, dtype=torch.bool, device=states.device)
    hidden = ones.triu(past_length + 1)[None, None]
    return build_attention_bias(hidden, states.dtype, prefix_length)


@torch.no_grad()
def decode_rows(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Read the pending tokens of all rows.

    Args:
        model: a `ChatGLMForConditionalGeneration`, or one of peft around it.
        rows: of this model, with one or more pending tokens each.

    Returns:
        For each row the logits behind each of its pending tokens, `(pending, V)`.

    Raises:
        ValueError: for a row that has no pending token or no prompt read, is there twice, or is of
            another model.
    """
    model = find_model(model)
    if not rows:
        return []
    _check_rows(model.transformer, rows)
    caches, device = RowCaches(rows), find_input_device(model)
    ids = torch.tensor([[token for row in rows for token in row.pending]], device=device)
    places = [place for row in rows for place in row.find_pending_places()]
    position_ids = torch.tensor([places], device=device).transpose(1, 2)  # (1, P, S)
    options = {"position_ids": position_ids, CACHE_NAME: caches, "use_cache": True}
    logits = model(ids, return_dict=True, **options).logits[0]  # (S, V)
    for row in rows:
        if not row._is_own:
            row._note_tokens()  # whoever holds the cache asks it
    return list(logits.split(caches.counts))


def _check_rows(network: Any, rows: Sequence[Row]) -> None:
    if len({id(row._cache) for row in rows}) < len(rows):
        raise ValueError(f"{len(rows)} rows with fewer caches: a step takes each row once.")
    for number, row in enumerate(rows):
        if row._network is not network:
            raise ValueError(f"Row {number} is of another model: decode it with its own.")
        if not row.num_cached:
            raise ValueError(f"The prompt of row {number} has not been read: use read_prompt.")
        if row.num_cached >= len(row.input_ids):
            raise ValueError(f"Row {number} has no pending token: append one before a step.")


__all__ = ["PromptReading", "Row", "RowCaches", "attend_rows", "decode_rows", "read_prompt"]
