"""The geometry of a GLM input, once: where the context ends, what sees what, and which positions.

Two special tokens say it all. The mask token (`[gMASK]`, or `[MASK]` in a row without one) marks
the blank; the first `<sop>` starts the text that fills it. Everything before `<sop>` is context:
its tokens see one another in both directions and count 0, 1, 2, ... on the first position axis
while the block position is 0. From `<sop>` on, tokens see only back, stay at the blank's position
on the first axis, and count 1, 2, 3, ... on the block axis.

The rules are total: a row without `<sop>` is all context, a row without a mask token fills the
blank at its end, a row of pads is all hidden. Padding may stand anywhere; it never counts.

Owns masks and positions for prompts, batches and decoding steps. Knows nothing of layers or text,
asks a cache only for its length and notes on it which tokens it holds, and does not import
transformers.

Shapes: `B` batch, `S` new tokens, `T` all tokens so far, `K` keys (columns the new tokens may see),
`P` position axes (2, or 1 for models without 2-D positions).
Polarity: a 2-D `attention_mask` is 1 for real tokens; a boolean 4-D one, as the original used it,
is True where attention is *hidden*.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNKNOWN_TOKEN = -1  # a column whose id is not known, such as a prompt given as embeddings


class SpecialIds(NamedTuple):
    """The ids of the tokens that shape an input; `pad` is None if none tells padding."""

    bos: int
    mask: int
    gmask: int
    pad: int | None = None

    @classmethod
    def of_config(cls, config: Any) -> "SpecialIds":
        """Return a model's. As for transformers' `generate`, an end token is no pad."""
        ends = (
            config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        )
        pad = None if config.pad_token_id in ends else config.pad_token_id
        return cls(config.bos_token_id, config.mask_token_id, config.gmask_token_id, pad)


class Geometry(NamedTuple):
    """What a forward pass needs to know about the place of its new tokens.

    `position_ids` is `(B, P, S)`; `attention_mask` is `(B, 1, S, K)`, boolean, True = hidden, or
    None if nothing is.
    """

    position_ids: Tensor
    attention_mask: Tensor | None


class Border(NamedTuple):
    """Where each row of a batch turns from context to answer; all fields are `(B, T)`.

    `ranks` counts real tokens from 0; `is_context` marks real tokens before the first `<sop>`;
    `context_lengths` counts them (the same number in every column).
    """

    ranks: Tensor
    is_context: Tensor
    context_lengths: Tensor


def find_real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return which columns hold real tokens, `(B, T)` boolean.

    Args:
        input_ids: `(B, T)`.
        attention_mask: `(B, T)`, non-zero for real tokens, of any dtype; None if all are real.

    Raises:
        ValueError: if the mask has another shape than the ids.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but the tokens so far have "
            f"{tuple(input_ids.shape)}; pass one column for every token, cached ones included."
        )
    return attention_mask != 0


def infer_attention_mask(
    all_ids: Tensor, num_new: int, past_key_values: Any, special_ids: SpecialIds
) -> Tensor | None:
    """Tell a row's pads on the left by their id: `(B, T)`, True for real tokens; or None, for all.

    Pads behind a row hide nothing from its answer, and a model may write their id itself. Behind a
    cache the first pass decides, so that no step has to wait for a GPU.

    Args:
        all_ids: `(B, T)`, all tokens so far.
        num_new: how many of the T columns are new.
        past_key_values: a cache, which is told of the pads, or None.
        special_ids: with the id of pads, or None for rows that have none.
    """
    if special_ids.pad is None:
        return None
    if num_new < all_ids.shape[1] and not getattr(past_key_values, "has_left_pads", False):
        return None
    is_real = (all_ids != special_ids.pad).cumsum(dim=1) > 0
    may_ask = not (all_ids.is_meta or torch.compiler.is_compiling())
    if past_key_values is not None and may_ask:
        past_key_values.has_left_pads = not bool(is_real[:, 0].all())
    return is_real


def find_border(input_ids: Tensor, is_real: Tensor, special_ids: SpecialIds) -> Border:
    """Find the end of the context in every row: the first real `<sop>`, or the row's end."""
    is_bos = (input_ids == special_ids.bos) & is_real
    is_context = is_real & (is_bos.cumsum(dim=1) == 0)
    ranks = (is_real.long().cumsum(dim=1) - 1).clamp(min=0)
    context_lengths = is_context.sum(dim=1, keepdim=True).expand_as(ranks)
    return Border(ranks, is_context, context_lengths)


def find_mask_positions(
    input_ids: Tensor, is_real: Tensor, border: Border, special_ids: SpecialIds, columns: Tensor
) -> Tensor:
    """Return the position of the blank as the tokens in some columns know it, `(B, S)`.

    It is the rank of the first `[gMASK]`, else of the first `[MASK]`, else of the last context
    token. A token knows nothing of what comes after it, so that a `[gMASK]` the model itself
    writes into an answer moves the blank from there on, with a cache and without.

    Args:
        input_ids, is_real: `(B, T)`.
        columns: `(S,)`, the places of the tokens.
    """
    mask_positions = (border.context_lengths[:, :1] - 1).clamp(min=0)  # (B, 1)
    for token_id in (special_ids.mask, special_ids.gmask):
        found = (input_ids == token_id) & is_real  # (B, T)
        column = found.int().argmax(dim=1, keepdim=True)  # (B, 1), 0 also where none was found
        is_known = found.any(dim=1, keepdim=True) & (column <= columns)  # (B, S)
        mask_positions = torch.where(is_known, border.ranks.gather(1, column), mask_positions)
    return mask_positions.expand(-1, columns.numel())


def build_position_ids(
    input_ids: Tensor,
    is_real: Tensor,
    border: Border,
    special_ids: SpecialIds,
    past_length: int = 0,
    num_positions: int = 2,
) -> Tensor:
    """Build the positions of the new tokens, `(B, P, S)`.

    With one axis, the original keeps counting past `<sop>` in a prompt that has a `[gMASK]`, but
    stays at the blank in decoding steps; both are kept, as both were what such models computed.

    Args:
        input_ids: `(B, T)`, all tokens so far.
        is_real: `(B, T)`.
        border: of the same columns.
        past_length: how many of the T columns are not new; more than 0 in a decoding step.
        num_positions: 2, or 1 for a model without 2-D positions.
    """
    columns = torch.arange(past_length, input_ids.shape[1], device=input_ids.device)  # (S,)
    blanks = find_mask_positions(input_ids, is_real, border, special_ids, columns)
    ranks, context_lengths = (x[:, past_length:] for x in (border.ranks, border.context_lengths))
    is_answer = is_real[:, past_length:] & (ranks >= context_lengths)
    is_held = is_answer
    if num_positions == 1 and past_length == 0:
        has_gmask = ((input_ids == special_ids.gmask) & is_real).any(dim=1, keepdim=True)
        is_held = is_answer & ~has_gmask
    position_ids = torch.where(is_held, blanks, ranks)
    if num_positions == 1:
        return position_ids.unsqueeze(1)
    block_position_ids = (ranks - context_lengths + 1) * is_answer
    return torch.stack((position_ids, block_position_ids), dim=1)


def build_attention_mask(
    is_context: Tensor, is_real: Tensor, past_length: int = 0, key_length: int | None = None
) -> Tensor:
    """Build the mask of the new tokens, `(B, 1, S, K)`, boolean, True = hidden.

    A prompt's context is open to the whole row; everything else is seen only from later columns.
    In a decoding step all that is new looks back only, context or not, as one token a step would.
    The row of a pad is hidden throughout.

    Args:
        is_context, is_real: `(B, T)`.
        past_length: how many of the T columns are not new.
        key_length: K, for caches that reserve more columns than are filled; default T.
    """
    length = is_real.shape[1]
    key_length = length if key_length is None else key_length
    columns = torch.arange(key_length, device=is_real.device)  # (K,)
    queries = torch.arange(past_length, length, device=is_real.device)  # (S,)
    is_visible = columns <= queries.unsqueeze(1)  # (S, K)
    unfilled = (0, key_length - length)
    if past_length == 0:
        is_open = torch.nn.functional.pad(is_context, unfilled)  # (B, K)
        is_visible = is_visible | is_open.unsqueeze(1)  # (B, S, K)
    is_visible = is_visible & torch.nn.functional.pad(is_real, unfilled).unsqueeze(1)
    is_visible = is_visible & is_real[:, past_length:].unsqueeze(2)
    return ~is_visible.unsqueeze(1)  # (B, 1, S, K)


def build_geometry(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    special_ids: SpecialIds,
    past_length: int = 0,
    key_length: int | None = None,
    num_positions: int = 2,
) -> Geometry:
    """Build positions and mask of the new tokens of a prompt or of a decoding step.

    Args:
        input_ids: `(B, T)`, all tokens so far, cached ones included.
        attention_mask: `(B, T)`, non-zero for real tokens, or None.
        special_ids: the ids that shape the input.
        past_length: how many of the T columns are cached; 0 for a prompt.
        key_length: number of columns of the mask, at least T; default T.
        num_positions: 2, or 1 for a model without 2-D positions.

    Raises:
        ValueError: if the mask does not fit the ids.
    """
    is_real = find_real_tokens(input_ids, attention_mask)
    border = find_border(input_ids, is_real, special_ids)
    return Geometry(
        build_position_ids(input_ids, is_real, border, special_ids, past_length, num_positions),
        build_attention_mask(border.is_context, is_real, past_length, key_length),
    )


def build_document_geometry(
    input_ids: Tensor, document_ids: Tensor, special_ids: SpecialIds, num_positions: int = 2
) -> Geometry:
    """Build positions and mask of rows that hold several documents, none of which sees another.

    Every document is what it would be in a row of its own, the others being its padding.

    Args:
        input_ids: `(B, S)`.
        document_ids: `(B, S)`, 0, 1, 2, ... for the documents of a row, -1 for pads.
        special_ids, num_positions: as in `build_geometry`.
    """
    position_ids = input_ids.new_zeros(input_ids.shape[0], num_positions, input_ids.shape[1])
    hidden_mask = torch.ones_like(input_ids, dtype=torch.bool)[:, None, :, None]
    for document in range(int(document_ids.max()) + 1):
        is_own = document_ids == document
        border = find_border(input_ids, is_own, special_ids)
        own_ids = build_position_ids(input_ids, is_own, border, special_ids, 0, num_positions)
        position_ids = torch.where(is_own.unsqueeze(1), own_ids, position_ids)
        hidden_mask = hidden_mask & build_attention_mask(border.is_context, is_own)  # (B, 1, S, S)
    return Geometry(position_ids, hidden_mask)


def find_last_columns(attention_mask: Tensor | None, scores: Tensor) -> Tensor:
    """Return the column of each row's last real token, `(B,)`; the last column if all are pads.

    Args:
        attention_mask: `(B, S)`, or None if there are no pads.
        scores: `(B, S, ...)`, of the rows.
    """
    length = scores.shape[1]
    if attention_mask is None:
        return torch.full(scores.shape[:1], length - 1, device=scores.device)
    is_real = attention_mask.to(scores.device) != 0
    return length - 1 - is_real.flip(1).int().argmax(dim=1)


def select_positions(states: Tensor, positions: int | Tensor) -> Tensor:
    """Return some positions of `(B, S, ...)`.

    Args:
        states: of which some are wanted.
        positions: the last so many columns (0: all), a tensor of columns, or a boolean mask
            `(B, S)`, whose positions come row by row, `(positions, ...)`.
    """
    if isinstance(positions, int):
        return states[:, slice(-positions, None)]
    return states[positions] if positions.dim() == 2 else states[:, positions]


def locate(
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    special_ids: SpecialIds,
    num_positions: int,
) -> tuple[Tensor, Tensor | None]:
    """Return the positions `(B, P, S)` and the mask (True = hidden) of new tokens.

    What a caller gives in GLM's own shape is used; the rest follows from the ids, pads included.

    Args:
        input_ids: `(B, S)`, or None if only embeddings are known.
        inputs_embeds: `(B, S, H)`.
        attention_mask: as `accept_hidden_mask` takes it, or `(B, T)`.
        position_ids: `(B, P, S)`; ranges of fewer dimensions, as trainers and peft hand them over,
            say nothing with two axes. None to work them out.
        past_key_values: a cache, which is told of the tokens, or None.
        special_ids, num_positions: as for `build_geometry`.
    """
    if position_ids is not None and getattr(past_key_values, "is_of_rows", False):
        return position_ids, None  # each row knows its places, and hides nothing but what follows
    position_ids = _accept_position_ids(position_ids, num_positions)
    hidden_mask = accept_hidden_mask(attention_mask)
    is_static = reserved_length(past_key_values) is not None
    if input_ids is None:
        input_ids = _imagine_ids(inputs_embeds, position_ids, past_key_values, special_ids)
    if position_ids is not None and hidden_mask is not None:
        if not is_static:  # a compiled step may not touch what grows
            note_tokens(past_key_values, input_ids)
        return position_ids, hidden_mask
    if hidden_mask is not None:
        attention_mask = fold_attention_mask(hidden_mask).expand(input_ids.shape[0], -1)
    geometry = locate_new_tokens(
        input_ids, attention_mask, past_key_values, special_ids, num_positions
    )
    if hidden_mask is None:
        hidden_mask = geometry.attention_mask
    return geometry.position_ids if position_ids is None else position_ids, hidden_mask


def _accept_position_ids(position_ids: Tensor | None, num_positions: int) -> Tensor | None:
    if position_ids is None or position_ids.dim() == 3:
        return position_ids
    return None if num_positions == 2 else position_ids.unsqueeze(1)


def _imagine_ids(
    inputs_embeds: Tensor,
    position_ids: Tensor | None,
    past_key_values: Any,
    special_ids: SpecialIds,
) -> Tensor:
    """Stand in for ids that are not known, `(B, S)`, with `<sop>` where the answer begins.

    Those at the end are known if `generate` has noted them ahead on a cache that is empty still:
    then peft has put virtual tokens in front of their embeddings.
    """
    imagined = inputs_embeds.new_full(inputs_embeds.shape[:2], UNKNOWN_TOKEN, dtype=torch.long)
    if position_ids is not None and position_ids.shape[1] == 2:
        imagined = imagined.masked_fill(position_ids[:, 1] == 1, special_ids.bos)
    is_noted = getattr(past_key_values, "is_noted_ahead", False)
    if not is_noted or count_cached_columns(past_key_values):
        return imagined
    noted = past_key_values.noted_tokens
    noted = align_token_columns(noted, imagined.shape[1])[:, -imagined.shape[1] :].to(imagined)
    return torch.where(noted == UNKNOWN_TOKEN, imagined, noted)


def locate_new_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any,
    special_ids: SpecialIds,
    num_positions: int = 2,
) -> Geometry:
    """Build the geometry of new ids behind a cache, and note on the cache which ids it then holds.

    Cached columns that nothing was noted about are virtual tokens (peft's prefix tuning): open to
    all, and without a position. A single token from which nothing is hidden gets no mask.

    Args:
        input_ids: `(B, S)`, the new tokens.
        attention_mask: `(B, T)` over all tokens, or None to infer it; virtual ones may be left out.
        past_key_values: a cache of transformers, or None.
        special_ids, num_positions: as for `build_geometry`.

    Raises:
        ValueError: if mask or batch do not fit the tokens so far.
    """
    all_ids, num_virtual = note_tokens(past_key_values, input_ids)
    if all_ids.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"The cache holds {all_ids.shape[0]} rows but the new tokens have "
            f"{input_ids.shape[0]}; pass as many rows, or position_ids and attention_mask of your "
            "own."
        )
    if attention_mask is not None and attention_mask.shape[1] > all_ids.shape[1]:
        attention_mask = attention_mask[:, num_virtual:]
    if attention_mask is None:
        attention_mask = infer_attention_mask(
            all_ids, input_ids.shape[1], past_key_values, special_ids
        )
    key_length = reserved_length(past_key_values)
    # What is traced with one token is run with any number of them.
    is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    is_open = attention_mask is None and key_length is None and not is_traced
    is_masked = not is_open or input_ids.shape[1] > 1
    if key_length is None and _is_quick_step(input_ids, all_ids):
        geometry = _build_step_geometry(all_ids, attention_mask, special_ids, num_positions)
    else:
        geometry = build_geometry(
            all_ids,
            attention_mask,
            special_ids,
            past_length=all_ids.shape[1] - input_ids.shape[1],
            key_length=None if key_length is None else key_length - num_virtual,
            num_positions=num_positions,
        )
    if geometry.attention_mask is None or not is_masked:
        return Geometry(geometry.position_ids, None)
    hidden_mask = torch.nn.functional.pad(geometry.attention_mask, (num_virtual, 0), value=False)
    return Geometry(geometry.position_ids, hidden_mask)


def _is_quick_step(new_ids: Tensor, all_ids: Tensor) -> bool:
    """Tell whether plain numbers may be worked out: of one token a row behind others, on a CPU.

    A GPU would have to be waited for, and a compiler would take the numbers for constants.
    """
    is_step = new_ids.shape[1] == 1 < all_ids.shape[1]
    return is_step and all_ids.device.type == "cpu" and not torch.compiler.is_compiling()


def _build_step_geometry(
    input_ids: Tensor, attention_mask: Tensor | None, special_ids: SpecialIds, num_positions: int
) -> Geometry:
    """Do what `build_geometry` does for the last column, with few calls instead of sixty tensors.

    Args:
        input_ids: `(B, T)`, all tokens so far.
        attention_mask: `(B, T)`, non-zero for real tokens, or None.
    """
    is_real = find_real_tokens(input_ids, attention_mask)
    if not is_real[:, -1].all():
        length = input_ids.shape[1]
        return build_geometry(
            input_ids, attention_mask, special_ids, length - 1, num_positions=num_positions
        )
    rows = list(input_ids.numpy())
    hidden_mask = None
    if not is_real.all():
        rows = [row[real] for row, real in zip(rows, is_real.numpy())]
        hidden_mask = ~is_real[:, None, None]  # (B, 1, 1, T)
    places = [_place_last_token(row, special_ids)[:num_positions] for row in rows]
    return Geometry(input_ids.new_tensor(places).unsqueeze(2), hidden_mask)


def _place_last_token(tokens: Any, special_ids: SpecialIds) -> tuple[int, int]:
    """Return position and block position of the last of a row's real tokens, an array of ids."""

    def find(token_id: int) -> int | None:
        column = int((tokens == token_id).argmax())
        return column if tokens[column] == token_id else None

    columns = {token_id: find(token_id) for token_id in special_ids[:3]}
    return _place_token(len(tokens) - 1, columns, special_ids)


def _place_token(
    rank: int, columns: Mapping[int, int | None], special_ids: SpecialIds
) -> tuple[int, int]:
    """Return position and block position of a token that was read behind others.

    Args:
        rank: how many tokens are before it.
        columns: where the first `<sop>`, `[gMASK]` and `[MASK]` up to it stand.
    """
    context_length = columns.get(special_ids.bos)
    if context_length is None:
        return rank, 0
    blank = columns.get(special_ids.gmask)
    blank = columns.get(special_ids.mask) if blank is None else blank
    blank = max(context_length - 1, 0) if blank is None else blank
    return blank, rank - context_length + 1


class RowPlaces:
    """Where the tokens of one row stand, worked out token by token with plain integers.

    The rules are those of a decoding step: what is behind the prompt. Pads are left out of a row.
    """

    def __init__(self, special_ids: SpecialIds, num_positions: int = 2) -> None:
        self._special_ids, self._num_positions = special_ids, num_positions
        self._columns: dict[int, int] = {}  # of the first of each special token

    def note(self, token_ids: Sequence[int], start: int) -> None:
        """Note which tokens stand in the columns from `start` on."""
        for column, token_id in enumerate(token_ids, start):
            if token_id in self._special_ids[:3]:
                self._columns.setdefault(token_id, column)

    def forget(self, length: int) -> None:
        """Forget the tokens behind so many."""
        self._columns = {x: column for x, column in self._columns.items() if column < length}

    def find(self, column: int) -> tuple[int, ...]:
        """Return position and block position of the token in a column; one of them with one axis.

        A token knows nothing of those behind it.
        """
        known = {x: place for x, place in self._columns.items() if place <= column}
        return _place_token(column, known, self._special_ids)[: self._num_positions]


def note_tokens(past_key_values: Any, input_ids: Tensor) -> tuple[Tensor, int]:
    """Note on a cache that new ids `(B, S)` join it, unless it holds another number of rows.

    Returns:
        The ids of all tokens so far, `(B, T)`, and the number of virtual ones cached before them.
    """
    if past_key_values is None:
        return input_ids, 0
    if count_cached_columns(past_key_values) == 0 or not hasattr(past_key_values, "noted_tokens"):
        past_key_values.noted_tokens = input_ids[:, :0]
        past_key_values.num_virtual_tokens = count_cached_columns(past_key_values)
        past_key_values.has_left_pads = False
    past_key_values.is_noted_ahead = False
    if past_key_values.noted_tokens.shape[0] == input_ids.shape[0]:
        # A cropped cache holds fewer than were noted.
        noted = past_key_values.noted_tokens[:, : count_cached_tokens(past_key_values)]
        past_key_values.noted_tokens = torch.cat((noted.to(input_ids), input_ids), dim=1)
    return past_key_values.noted_tokens, getattr(past_key_values, "num_virtual_tokens", 0)


def count_cached_columns(past_key_values: Any) -> int:
    """Return how many columns a cache holds."""
    return 0 if past_key_values is None else int(past_key_values.get_seq_length())


def count_cached_tokens(past_key_values: Any) -> int:
    """Return how many tokens a cache holds, which virtual ones are not."""
    num_virtual = getattr(past_key_values, "num_virtual_tokens", 0)
    return max(count_cached_columns(past_key_values) - num_virtual, 0)


def reserved_length(past_key_values: Any) -> int | None:
    """Return the columns a static cache reserves; None for caches that grow, and for no cache."""
    if past_key_values is None or not past_key_values.is_compileable:
        return None
    return past_key_values.layers[0].max_cache_len


def find_static_columns(
    past_key_values: Any, embeddings: Tensor, given: Tensor | None = None
) -> Tensor | None:
    """Return the columns `(S,)` that `(B, S, H)` take in a static cache; None for other caches.

    Those that are given are believed.
    """
    if given is not None or reserved_length(past_key_values) is None:
        return given
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    # The length may be a tensor; as a number it would break a compiled step.
    return columns + past_key_values.get_seq_length()


def accept_hidden_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Return a mask per query, `(B, 1, S, K)` with True = hidden; None if the mask is 2-D.

    Raises:
        ValueError: for integers, which could mean either polarity.
    """
    if attention_mask is None or attention_mask.dim() == 2:
        return None
    if attention_mask.dim() == 3:
        attention_mask = attention_mask.unsqueeze(1)
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if not attention_mask.is_floating_point():
        raise ValueError(
            f"A {attention_mask.dim()}-D attention_mask must be boolean (True = hidden) or float "
            f"(added to the scores), got {attention_mask.dtype}; or pass (batch, length) of 0 and "
            "1, where 1 is a real token."
        )
    return attention_mask < 0


def build_attention_bias(
    hidden_mask: Tensor | None, dtype: torch.dtype, prefix_length: int = 0
) -> Tensor | None:
    """Turn a mask into what is added to the scores.

    The lowest number instead of -inf lets a row of pads attend evenly, as in the original, where
    -inf would make it NaN; float32's would be -inf after a cast by autocast.

    Args:
        hidden_mask: `(B, 1, S, K)`, True = hidden; None hides nothing.
        dtype: of the scores, unless autocast has another.
        prefix_length: columns of a P-Tuning prefix before the others, open to every token.
    """
    if hidden_mask is None:
        return None
    if torch.is_autocast_enabled(hidden_mask.device.type):
        dtype = torch.get_autocast_dtype(hidden_mask.device.type)
    if prefix_length:
        hidden_mask = torch.nn.functional.pad(hidden_mask, (prefix_length, 0), value=False)
    bias = torch.zeros_like(hidden_mask, dtype=dtype)
    return bias.masked_fill(hidden_mask, torch.finfo(dtype).min)


def align_token_columns(input_ids: Tensor, length: int) -> Tensor:
    """Left-fill ids `(B, S)` with unknown tokens to `length` columns, `(B, length)`."""
    missing = max(length - input_ids.shape[1], 0)
    return torch.nn.functional.pad(input_ids, (missing, 0), value=UNKNOWN_TOKEN)


def fold_attention_mask(attention_mask: Tensor) -> Tensor:
    """Fold a boolean 4-D mask (True = hidden) to `(B, K)`: 1 for columns that some token sees."""
    return (~attention_mask).any(dim=2).any(dim=1).long()


def move_padding_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Shift every row's real tokens to its right end, keeping their order.

    Generation appends to the right, so pads standing there would come between prompt and answer.

    Args:
        input_ids, attention_mask: `(B, T)`.
    """
    is_real = attention_mask != 0
    order = is_real.int().argsort(dim=1, stable=True)  # (B, T), pads first
    return input_ids.gather(1, order), attention_mask.gather(1, order)
