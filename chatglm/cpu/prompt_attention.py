"""Attention of many tokens on a CPU: row by row of a batch, each on its own columns.

Owns the choice between the kernel of few tokens (`attention`), that of many (`prompt_kernels`) and
torch, and which columns a row attends to: those that a mask hides from all of its tokens are
left out before anything is summed. So a row's result is the same bits alone and in a padded batch.

Shapes: `B` rows, `N` heads, `S` new tokens, `K` keys, `D` head dim.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chatglm.cpu.amx import ask_for_tiles
from chatglm.cpu.attention import MOST_TOKENS, are_ready, fits_mask
from chatglm.cpu.attention import attend as attend_few
from chatglm.cpu.compiler import find_compiler, find_kernel
from chatglm.cpu.products import TYPE_NAMES
from chatglm.cpu.prompt_kernels import PROMPT_ATTENTION, TILE_QUERIES, PromptShape
from chatglm.cpu.runtime import Kernel, count_threads


class Part(NamedTuple):
    """Tokens of a row that are computed together.

    Attributes:
        tokens: their numbers, `(S,)`; None for all.
        columns: the numbers of the keys that any of them sees, `(K,)`; None for all.
        mask: `(K - masked, S or more)`, added to their scores from one key on.
        masked: that key; behind the last one if all of them see all.
    """

    tokens: Tensor | None
    columns: Tensor | None
    mask: Tensor | None
    masked: int


class Seen(NamedTuple):
    """What a mask says, kept for the layers that ask again with the same one."""

    mask: weakref.ref[Tensor]
    version: int
    rows: list[list[Part]]


# Attends with query, key and value to write output, each `(N, S or K, D)`; by what a mask says, and
# with scores that are scaled.
Attention = Callable[[dict[str, Tensor], Part, float], None]

_last_seen: Seen | None = None


def attend(
    module: Any, query: Tensor, past: Any, attention_mask: Tensor | None, output_attentions: bool
) -> tuple[Tensor, None] | None:
    """Attend with a kernel, or return None if these operands are not for one.

    Arguments and result are those of `attention.attend`, for any number of tokens. A prompt is
    always for the kernel of many tokens, however short: pads may make it longer in a batch.
    """
    is_prompt = query.shape[2] == past.key.shape[2]
    if query.shape[2] <= MOST_TOKENS and not is_prompt:
        return attend_few(module, query, past, attention_mask, output_attentions)
    if output_attentions or module.config._attn_implementation != "sdpa":
        return None
    batch, _, tokens, _ = query.shape
    if tokens > past.key.shape[2] or not are_ready(query, past):
        return None
    if not fits_mask(attention_mask, batch, tokens, past.key.shape[2]):
        return None
    key, value = past.as_floats(query.dtype)
    attention_of_part = _choose_attention(query, key)
    if attention_of_part is None:
        return None
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for row, parts in enumerate(_see(attention_mask, batch, tokens)):
        for part in parts:
            states = query[row], key[row], value[row]
            target = output[row].transpose(0, 1)
            _attend_part(attention_of_part, part, states, module.scaling, target)
    return output, None


def _choose_attention(query: Tensor, key: Tensor) -> Attention | None:
    """Return what attends with such tokens and keys; None if nothing here does."""
    compiler, head_dim = find_compiler(), query.shape[-1]
    kinds = TYPE_NAMES.get(key.dtype), TYPE_NAMES[query.dtype]
    if compiler is None or kinds[0] is None or head_dim % compiler.processor.lanes:
        return None
    is_able = "+amx-bf16" in compiler.processor.features.split(",")
    is_half = kinds[0] != "f32" and head_dim % 32 == 0
    has_tiles = is_half and is_able and ask_for_tiles()
    if kinds[0] == "bf16" and not has_tiles:
        return _attend_plainly
    shape = PromptShape(head_dim, kinds[0], kinds[1], has_tiles)
    kernel = find_kernel(PROMPT_ATTENTION, shape)
    return None if kernel is None else functools.partial(_run, kernel, shape)


def _see(mask: Tensor | None, batch: int, tokens: int) -> list[list[Part]]:
    """Return the parts of each row of a batch, found once for all layers of a pass."""
    global _last_seen
    if mask is None:
        return [[Part(None, None, None, -1)]] * batch
    last, version = _last_seen, -1 if mask.is_inference() else mask._version
    if last is None or last.mask() is not mask or last.version != version:
        mask_rows = mask.detach().expand(-1, 1, tokens, -1)[:, 0].unbind()
        last = Seen(weakref.ref(mask), version, [_list_parts(row) for row in mask_rows])
        _last_seen = last
    return last.rows * (batch // len(last.rows))


def _list_parts(mask: Tensor) -> list[Part]:
    """Part a row's tokens by its mask `(S, K)`: those that see themselves, and all pads.

    What pads see is nobody's, but the original computes it, and some look at it.
    """
    is_seen = mask > torch.finfo(mask.dtype).min
    is_real = is_seen.diagonal(mask.shape[1] - mask.shape[0])
    if bool(is_real.all()):
        return [_describe_part(mask, None, is_seen.any(dim=0))]
    tokens, pads = is_real.nonzero()[:, 0], (~is_real).nonzero()[:, 0]
    parts = [_describe_part(mask[pads], pads, torch.ones_like(is_seen[0]))]
    if len(tokens):
        parts.append(_describe_part(mask[tokens], tokens, is_seen[tokens].any(dim=0)))
    return parts


def _describe_part(mask: Tensor, tokens: Tensor | None, is_column: Tensor) -> Part:
    columns = None
    if not bool(is_column.all()):
        columns = is_column.nonzero()[:, 0]
        mask = mask[:, columns]
    is_masked = (mask != 0).any(dim=0)
    masked = int(is_masked.int().argmax()) if bool(is_masked.any()) else mask.shape[1]
    # A block of the kernel reads whole vectors of tokens.
    room = -(-mask.shape[0] // TILE_QUERIES) * TILE_QUERIES
    turned = mask.new_zeros(mask.shape[1] - masked, room, dtype=torch.float32)
    turned[:, : mask.shape[0]] = mask[:, masked:].T
    return Part(tokens, columns, turned, masked)


def _is_run(numbers: Tensor) -> bool:
    return int(numbers[-1]) - int(numbers[0]) + 1 == len(numbers)


def _take(states: Tensor, numbers: Tensor | None) -> Tensor:
    """Return some tokens of `(N, S, D)`: in place if they are a run, else a copy of them."""
    if numbers is None:
        return states
    if not _is_run(numbers):
        return states[:, numbers]
    return states[:, int(numbers[0]) : int(numbers[-1]) + 1]


def _attend_part(
    attention_of_part: Attention,
    part: Part,
    states: tuple[Tensor, Tensor, Tensor],
    scaling: float,
    output: Tensor,
) -> None:
    """Attend with some tokens of a row, and write their part of `(N, S, D)`."""
    query, key, value = states
    target = _take(output, part.tokens)
    operands = {
        "query": _take(query if query.stride(-1) == 1 else query.contiguous(), part.tokens),
        "key": _take(key, part.columns),
        "value": _take(value, part.columns),
        "output": target,
    }
    attention_of_part(operands, part, scaling)
    if part.tokens is not None and not _is_run(part.tokens):
        output[:, part.tokens] = target


def _run(
    kernel: Kernel,
    shape: PromptShape,
    operands: dict[str, Tensor],
    part: Part,
    scaling: float,
) -> None:
    """Run the kernel for tokens of a row and the keys that they see."""
    heads, tokens, _ = operands["query"].shape
    keys, parts = operands["key"].shape[1], -(-tokens // shape.queries)
    values = {name: tensor.data_ptr() for name, tensor in operands.items()}
    for name, tensor in operands.items():
        values[f"{name}_head"] = tensor.stride(0) * tensor.element_size()
    for name in ("query", "output"):
        values[f"{name}_token"] = operands[name].stride(1) * operands[name].element_size()
    if part.mask is not None:
        values |= {"mask": part.mask.data_ptr(), "mask_key": part.mask.stride(0) * 4}
    factor = torch.tensor([scaling], dtype=torch.float32, device="cpu")
    call = kernel.prepare(
        count_threads(heads * parts, heads * operands["key"][0].nbytes),
        blocks=heads * parts,
        parts=parts,
        tokens=tokens,
        keys=keys,
        masked=keys if part.mask is None else part.masked,
        scaling=factor.data_ptr(),
    )
    call.run(**values)


def _attend_plainly(operands: dict[str, Tensor], part: Part, scaling: float) -> None:
    """Attend by torch, whose products of bfloat16 are faster than float32 sums of ours."""
    query, key, value = (operands[name][None] for name in ("query", "key", "value"))
    mask = None
    if part.mask is not None:
        mask = query.new_zeros(query.shape[2], key.shape[2])
        mask[:, part.masked :] = part.mask[:, : query.shape[2]].T
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )
    operands["output"].copy_(found[0])


__all__ = ["attend"]
