"""Decoding on a CPU: which steps of a model run as one program, and what the program does.

Owns the stages of a block, in their order, and the check that a model is as it was when its program
was made. Knows nothing of what a stage computes inside. Its twin is the model's own modules, which
do whatever it does not take: training, hooks, adapters, prefixes, many tokens, other caches.

The numbers between the stages are float32 whatever the model's dtype is.

Shapes: `B` rows of a batch, `S` new tokens of each, `H` hidden, `N` heads, `K` keys, `D` head dim,
`P` axes.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chatglm.cpu.attention import (
    PLACE_FIELDS,
    ROW_FIELDS,
    STEP,
    STEP_ATTENTION,
    HeadShape,
    fits_mask,
)
from chatglm.cpu.compiler import find_compiler, find_kernel
from chatglm.cpu.elementwise import BIAS, GELU, NORM, Width
from chatglm.cpu.float_linear import EXACT_TOKENS, ExactProduct, TileProduct
from chatglm.cpu.linear import RoundedProduct, plan_product
from chatglm.cpu.products import TYPE_NAMES, Sizes, Weights, are_matrices, is_plain, wants_graph
from chatglm.cpu.runtime import Call
from chatglm.cpu.step_graph import StepGraph, can_run

GELU_PART = 1024  # numbers that a thread takes at a time
PROGRAMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, "StepProgram"]] = (
    weakref.WeakKeyDictionary()
)


class StepShape(NamedTuple):
    """What a program is made for.

    Attributes:
        tokens: of all rows together.
        axes: P.
        kind: "f32", "f16" or "bf16", of parameters and cache.
        has_mask: whether there is a mask.
        threads: torch's.
        caches: the kinds of the rows' caches, "i8" for integers with scales; each has a stage.
    """

    tokens: int
    axes: int
    kind: str
    has_mask: bool
    threads: int
    caches: tuple[str, ...]


def decode_step(
    stack: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    prefixes: Sequence[Tensor | None],
    past_key_values: Any,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, tuple[()], tuple[()]] | None:
    """Run all blocks for a few new tokens; None where the modules have to do it.

    Args:
        stack: the blocks, a `ModuleList`.
        hidden_states: the embedded tokens, `(B, S, H)`.
        attention_mask: `(B, 1, S, K)`, added to the scores, or None.
        position_embeddings: cosines and sines, `(B, 1, P, S, D / P)`.
        prefixes: one a block; there must be none.
        past_key_values: a cache, whose layers are extended.
        output_hidden_states, output_attentions: whether somebody looks at what is between.

    Returns:
        What comes out of the last block, `(B, S, H)`, and nothing of what is between.
    """
    # Nothing in it is for `FastProducts`, which would be asked at thousands of calls of torch.
    with torch._C.DisableTorchFunction():
        return _decode_step(
            stack,
            hidden_states,
            attention_mask,
            position_embeddings,
            any(x is not None for x in prefixes) or output_hidden_states or output_attentions,
            past_key_values,
        )


def _decode_step(
    stack: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    is_looked_at: bool,
    past_key_values: Any,
) -> tuple[Tensor, tuple[()], tuple[()]] | None:
    """Do what `decode_step` says, unless somebody looks at what is between."""
    if is_looked_at or not _attends_by_sdpa(stack):
        return None
    kind = TYPE_NAMES.get(hidden_states.dtype)
    rows = list_rows(past_key_values, len(stack), hidden_states)
    if kind is None or rows is None or sum(row.count for row in rows) > EXACT_TOKENS:
        return None
    if wants_graph(hidden_states, stack[0].input_layernorm.weight) or not can_run():
        return None
    batch, _, axes, tokens, _ = position_embeddings[0].shape
    has_mask, threads = attention_mask is not None, torch.get_num_threads()
    caches = tuple(sorted({name_cache(row, kind) for row in rows}))
    shape = StepShape(batch * tokens, axes, kind, has_mask, threads, caches)
    program = _find_program(stack, shape)
    if program is None or not program.takes(hidden_states, rows):
        return None
    if not fits_mask(attention_mask, batch, tokens, rows[0].past + tokens):
        return None
    angles_shape = (*hidden_states.shape[:1], 1, axes, tokens, program.head_dim // axes)
    if any(angles.shape != angles_shape for angles in position_embeddings):
        return None
    last = program.run(hidden_states, position_embeddings, attention_mask, rows)
    return last, (), ()


def is_for_programs(stack: Any, dtype: torch.dtype) -> bool:
    """Tell whether steps of a stack of blocks run as programs, as far as the model decides.

    Adapters and hooks in the blocks keep them from it, and what the processor lacks.

    Args:
        stack: the blocks, a `ModuleList` on a CPU.
        dtype: of hidden states and caches.
    """
    if not _attends_by_sdpa(stack) or dtype not in TYPE_NAMES or not can_run():
        return False
    return Parts(stack).are_usable(TYPE_NAMES[dtype])


def _attends_by_sdpa(stack: Any) -> bool:
    """Tell whether there are blocks, and torch's own attention is asked for, which programs do."""
    return len(stack) > 0 and stack[0].attention.config._attn_implementation == "sdpa"


class StepRow(NamedTuple):
    """A row of a step.

    Attributes:
        layers: of its cache, one a block.
        line: which row of that cache it is.
        count: how many tokens it reads.
        past: columns that are cached.
        is_causal: whether its tokens see only back; else a mask says what they see.
    """

    layers: list[Any]
    line: int
    count: int
    past: int
    is_causal: bool


def name_cache(row: StepRow, kind: str) -> str:
    """Return the kind of a row's cache in a model of some kind."""
    return "i8" if type(row.layers[0]).__name__ == "QuantizedReservedLayer" else kind


def list_rows(cache: Any, count: int, hidden_states: Tensor) -> list[StepRow] | None:
    """Return the rows of a step, of one cache or of many; None if they are not for a program."""
    batch, tokens, _ = hidden_states.shape
    if type(cache).__name__ != "RowCaches":
        layers = list_reserved_layers(cache, count)
        if layers is None:
            return None
        past = layers[0].get_seq_length()
        return [StepRow(layers, line, tokens, past, False) for line in range(batch)]
    found = [list_reserved_layers(one, count) for one in cache.caches]
    rows = [
        StepRow(layers, 0, tokens, layers[0].get_seq_length(), True)
        for layers, tokens in zip(found, cache.counts)
        if layers is not None
    ]
    return rows if len(rows) == len(found) else None


def list_reserved_layers(cache: Any, count: int) -> list[Any] | None:
    """Return the first layers of a cache if all of them can be extended in place, or None.

    Each copy of the model's files has a class of its own: the name tells.
    """
    layers = getattr(cache, "layers", ())[:count]
    names = {type(layer).__name__ for layer in layers}
    are_alike = names in ({"ReservedLayer"}, {"QuantizedReservedLayer"})
    are_reserved = are_alike and all(layer.get_seq_length() > 0 for layer in layers)
    return list(layers) if are_reserved and len(layers) == count else None


def list_columns(layer: Any) -> tuple[Tensor, ...]:
    """Return what a layer keeps: keys and values, `(B, N, K, D)`, or integers, and their scales."""
    if type(layer).__name__ == "ReservedLayer":
        return layer.keys, layer.values
    return layer.key_integers, layer.value_integers, layer.key_scales, layer.value_scales


def _find_program(layers: Any, shape: StepShape) -> "StepProgram | None":
    """Return the program of a stack of blocks, made anew if anything in them was replaced."""
    programs = PROGRAMS.setdefault(layers, {})
    program = programs.get(shape)
    if program is not None and program.parts.are_unchanged():
        return program
    programs.pop(shape, None)
    parts = Parts(layers)
    if not parts.are_usable(shape.kind):
        return None
    programs[shape] = StepProgram(parts, shape)
    return programs[shape]


class Parts:
    """The modules and parameters of a stack of blocks, as they were when this was made."""

    def __init__(self, layers: Any) -> None:
        self.layers: list[Any] = list(layers)
        self._children = [
            (parent._modules, name, child)
            for parent in (layers, *self._blocks())
            for name, child in parent._modules.items()
        ]
        self._modules = [*self._blocks(), *(child for _, _, child in self._children)]
        self._parameters = [
            (module._parameters, name) for module in self._modules for name in module._parameters
        ]
        self._pointers, self._kinds = self._point(), self._name_kinds()

    def _blocks(self) -> Iterator[Any]:
        for layer in self.layers:
            yield from (layer, layer.attention, layer.mlp)

    def _point(self) -> list[int]:
        return [
            0 if (parameter := parameters[name]) is None else parameter.data_ptr()
            for parameters, name in self._parameters
        ]

    def _name_kinds(self) -> list[Any]:
        return [(type(module), module.__dict__.get("activations")) for module in self._modules]

    def are_unchanged(self) -> bool:
        """Tell whether the same modules hold the same memory, and nobody wants to look in."""
        return (
            all(modules.get(name) is child for modules, name, child in self._children)
            and not any(_is_watched(module) for module in self._modules)
            and self._point() == self._pointers
            and self._name_kinds() == self._kinds
        )

    def are_usable(self, kind: str) -> bool:
        """Tell whether a program can stand for the modules."""
        if any(_is_watched(module) for module in self._modules):
            return False
        linear = [module for layer in self.layers for module in _list_linears(layer)]
        if not all(is_packed(module) or type(module) is nn.Linear for module in linear):
            return False
        norms = [n for x in self.layers for n in (x.input_layernorm, x.post_attention_layernorm)]
        if not all(type(norm).__name__ == "LayerNorm" for norm in norms):  # peft may be around it
            return False
        tensors = [p for module in (*linear, *norms) for p in module._parameters.values()]
        if any(tensor is None for tensor in tensors) or not are_matrices(*tensors):
            return False
        biases = [module.bias for module in linear]
        if any(n.weight.dtype not in TYPE_NAMES or n.bias.dtype != n.weight.dtype for n in norms):
            return False
        is_even = all(x.shape[0] % STEP == 0 for x in [n.weight for n in norms] + biases)
        return is_even and all(TYPE_NAMES.get(bias.dtype) == kind for bias in biases)


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer is the model's packed one, of whichever copy of its files."""
    return type(module).__name__ == "QuantizedLinear"


def _is_watched(module: nn.Module) -> bool:
    """Tell whether a module has hooks, or a forward pass put in front of its own."""
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(has_hooks) or "forward" in module.__dict__


def _list_linears(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.attention, layer.mlp
    return attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h


class StepProgram:
    """The program of a stack of blocks for one shape of step.

    Args:
        parts: of the blocks.
        shape: of the step.
    """

    def __init__(self, parts: Parts, shape: StepShape) -> None:
        self.parts, self.shape = parts, shape
        first = parts.layers[0]
        self.head_dim = first.attention.head_dim
        self.heads = first.attention.dense.in_features // self.head_dim
        self._kept: list[Tensor] = []
        self._calls: list[Call] = []
        self._attentions: list[tuple[str, int]] = []  # of which caches, and where they stand
        self._lay_out_buffers(first)
        for layer in parts.layers:
            self._add_block(layer)
        self._add_norm(parts.layers[-1].input_layernorm, self._residual)
        self._scores = torch.empty(0, dtype=torch.float32, device="cpu")
        self._lock = threading.Lock()  # there is one set of buffers
        self._program = StepGraph(self._calls, shape.threads, self._kept)

    def _lay_out_buffers(self, layer: Any) -> None:
        """Make room for what the stages hand on."""
        tokens, hidden = self.shape.tokens, layer.attention.dense.out_features
        inner = layer.mlp.dense_h_to_4h.out_features
        self.embedded = self._make_room(tokens, hidden)
        self.stream = self._make_room(tokens, hidden)
        self.normed = [self._make_room(tokens, hidden) for _ in range(2)]
        self.mixed = self._make_room(tokens, 3 * hidden)
        self.attended = self._make_room(tokens, hidden)
        self.update = self._make_room(tokens, hidden)
        self.inner = self._make_room(tokens, inner)
        self.angles = self._make_room(2, tokens, self.head_dim)
        self.alphas = self._keep_numbers(1.0, layer.alpha)
        self.scaling = self._keep_numbers(layer.attention.scaling)
        # What the first norm adds up: the embedding, and nothing.
        zeros = self._make_room(tokens, hidden)
        no_bias = self._keep(torch.zeros_like(layer.attention.dense.bias))
        self._residual = (self.embedded, self.alphas.data_ptr(), zeros, no_bias)
        self._tokens, self._hidden = tokens, hidden

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor

    def _make_room(self, *shape: int) -> Tensor:
        """Return float32 numbers in memory, whatever torch's defaults are."""
        return self._keep(torch.zeros(shape, dtype=torch.float32, device="cpu"))

    def _keep_numbers(self, *numbers: float) -> Tensor:
        return self._keep(torch.tensor(numbers, dtype=torch.float32, device="cpu"))

    def _add(self, source: Any, parameter: Any, **values: int) -> None:
        kernel = find_kernel(source, parameter)
        assert kernel is not None, "can_run has compiled a kernel"
        self._calls.append(kernel.prepare(1, **values))  # the program has the threads

    def _add_block(self, layer: Any) -> None:
        attention, mlp = layer.attention, layer.mlp
        alpha = self.alphas.data_ptr() + 4
        normed = self.normed[0]
        self._add_norm(layer.input_layernorm, self._residual)
        self._add_product(attention.query_key_value, normed, self.mixed)
        self._add_bias(attention.query_key_value, self.mixed)
        self._add_attention()
        self._add_product(attention.dense, self.attended, self.update)
        self.normed.reverse()
        residual = (normed, alpha, self.update, attention.dense.bias)
        self._add_norm(layer.post_attention_layernorm, residual)
        self._add_product(mlp.dense_h_to_4h, self.normed[0], self.inner)
        self._add_gelu(mlp.dense_h_to_4h)
        self._add_product(mlp.dense_4h_to_h, self.inner, self.update)
        self._residual = (self.normed[0], alpha, self.update, mlp.dense_4h_to_h.bias)
        self.normed.reverse()

    def _add_norm(self, norm: Any, residual: tuple[Tensor, int, Tensor, Tensor]) -> None:
        stream, alpha, update, bias = residual
        epsilon = self._keep_numbers(norm.eps)
        self._add(
            NORM,
            Width(TYPE_NAMES[bias.dtype], TYPE_NAMES[norm.weight.dtype]),
            tokens=self._tokens,
            columns=self._hidden,
            residual=stream.data_ptr(),
            alpha=alpha,
            update=update.data_ptr(),
            bias=bias.data_ptr(),
            stream=self.stream.data_ptr(),
            epsilon=epsilon.data_ptr(),
            weight=norm.weight.data_ptr(),
            shift=norm.bias.data_ptr(),
            output=self.normed[0].data_ptr(),
        )

    def _add_product(self, layer: Any, input: Tensor, output: Tensor) -> None:
        scale = getattr(layer, "weight_scale", None)
        product = plan_product(*_describe(layer, self._tokens, self.shape.threads))
        pointers = {"weight": layer.weight.data_ptr(), "output": output.data_ptr()}
        pointers["scale"] = 0 if scale is None else scale.data_ptr()
        if isinstance(product, RoundedProduct):
            rounded = self._keep(torch.zeros(product.shape, dtype=torch.uint8, device="cpu"))
            place = rounded.data_ptr()
            self._calls.append(product.rounding.bind(input=input.data_ptr(), rounded=place))
            self._calls.append(product.call.bind(rounded=place, **pointers))
        elif isinstance(product, TileProduct):
            split = self._keep(torch.zeros(product.split_bytes, dtype=torch.uint8, device="cpu"))
            place = split.data_ptr()
            self._calls.append(product.split.bind(input=input.data_ptr(), split=place))
            self._calls.append(product.call.bind(split=place, **pointers))
        else:
            assert isinstance(product, ExactProduct), "few tokens always have a kernel"
            self._calls.append(product.call.bind(input=input.data_ptr(), **pointers))

    def _add_bias(self, layer: Any, output: Tensor) -> None:
        values = {"tokens": self._tokens, "columns": layer.out_features}
        values |= {"bias": layer.bias.data_ptr(), "output": output.data_ptr()}
        self._add(BIAS, Width(self.shape.kind), **values)

    def _add_gelu(self, layer: Any) -> None:
        parts = -(-layer.out_features // GELU_PART)
        values = {"blocks": parts * self._tokens, "parts": parts, "columns": layer.out_features}
        values |= {"bias": layer.bias.data_ptr(), "output": self.inner.data_ptr()}
        self._add(GELU, Width(self.shape.kind), **values)

    def _add_attention(self) -> None:
        shape = self.shape
        values = {"heads": self.heads, "tokens": shape.tokens, "mixed": self.mixed.data_ptr()}
        values |= {"cos": self.angles[0].data_ptr(), "sin": self.angles[1].data_ptr()}
        values |= {"scaling": self.scaling.data_ptr(), "output": self.attended.data_ptr()}
        for kind in shape.caches:
            heads = HeadShape(self.head_dim, kind, shape.has_mask, shape.axes)
            self._attentions.append((kind, len(self._calls)))
            self._add(STEP_ATTENTION, heads, **values)

    def takes(self, hidden_states: Tensor, rows: Sequence[StepRow]) -> bool:
        """Tell whether caches fit: plain memory of the model's own type and shapes, or integers.

        Every layer has the same number of columns then.
        """
        lines = 1 if rows[0].is_causal else len(rows)  # of each cache
        return hidden_states.shape[2] == self._hidden and all(
            self._takes_layer(layer, hidden_states.dtype, (lines, self.heads, row.past))
            for row in rows
            if row.line == 0
            for layer in row.layers
        )

    def _takes_layer(self, layer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        columns = list_columns(layer)
        first = (dtype if len(columns) == 2 else torch.int8, (*shape, self.head_dim))
        expected = [first, first, (torch.float32, shape), (torch.float32, shape)]
        found = [(states.dtype, tuple(states.shape)) for states in columns]
        return found == expected[: len(found)] and all(map(is_plain, columns))

    def run(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        rows: Sequence[StepRow],
    ) -> Tensor:
        """Do a step; arguments and result as in `decode_step`."""
        with self._lock:
            return self._run(hidden_states, position_embeddings, attention_mask, rows)

    def _run(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        rows: Sequence[StepRow],
    ) -> Tensor:
        self.embedded.copy_(hidden_states.view(self._tokens, -1))
        for place, angles in zip(self.angles, position_embeddings):  # (B, 1, P, S, D / P)
            place.copy_(angles.squeeze(1).transpose(1, 2).reshape(place.shape))
        mask = None
        if attention_mask is not None:
            sizes = (len(rows), 1, rows[0].count, rows[0].past + rows[0].count)
            mask = attention_mask.expand(sizes).float().contiguous()
        padded = -(-max(row.past + row.count for row in rows) // STEP) * STEP
        self._reserve_scores(padded)
        tables = self._write_tables(rows, mask, padded)
        self._program.run()
        del tables  # until here the kernels read there
        return self.stream.view(hidden_states.shape).to(hidden_states.dtype, copy=True)

    def _write_tables(
        self, rows: Sequence[StepRow], mask: Tensor | None, padded: int
    ) -> list[Tensor]:
        """Tell the attentions where the rows of their caches' kind are; return what they read."""
        lines = torch.tensor(_describe_rows(rows, mask), dtype=torch.int64, device="cpu")
        places = torch.tensor(_extend_rows(rows), dtype=torch.int64, device="cpu")
        kinds, kept = [name_cache(row, self.shape.kind) for row in rows], []
        for kind in self.shape.caches:
            chosen = [number for number, name in enumerate(kinds) if name == kind]
            table, layers = lines[chosen], places[:, chosen]
            shared = {"rows": table.data_ptr(), "blocks": len(chosen) * self.heads}
            shared |= {"scores": self._scores.data_ptr(), "scores_bytes": 4 * padded}
            stages = [stage for name, stage in self._attentions if name == kind]
            for stage, layer in zip(stages, layers):
                self._program.change(stage, places=layer.data_ptr(), **shared)
            kept += [table, layers]
        return kept

    def _reserve_scores(self, padded: int) -> None:
        needed = self.heads * self._tokens * padded
        if self._scores.numel() < needed:
            self._scores = self._scores.new_empty(needed + needed // 8)


def _describe_rows(rows: Sequence[StepRow], mask: Tensor | None) -> list[tuple[int, ...]]:
    """Return the table of `ROW_FIELDS`."""
    lines, first = [], 0
    for number, row in enumerate(rows):
        seen = row.past + (1 if row.is_causal else row.count)
        place = 0 if mask is None else mask[number].data_ptr()
        lines.append((first, row.count, row.past, seen, int(row.is_causal), place))
        first += row.count
    assert all(len(line) == len(ROW_FIELDS) for line in lines)
    return lines


def _extend_rows(rows: Sequence[StepRow]) -> list[list[tuple[int, ...]]]:
    """Make room in all caches, and return for every layer its table of `PLACE_FIELDS`."""
    tables: list[list[tuple[int, ...]]] = [[] for _ in rows[0].layers]
    for row in rows:
        for table, layer in zip(tables, row.layers):
            if row.line == 0:
                layer.extend(row.count)
            line: list[int] = []
            for x in list_columns(layer):
                line += [x.data_ptr() + row.line * x.stride(0) * x.itemsize]
                line += [x.stride(1) * x.itemsize]
            table.append((*line, *[0] * (len(PLACE_FIELDS) - len(line))))
    assert all(len(table[0]) == len(PLACE_FIELDS) for table in tables)
    return tables


def _describe(layer: Any, tokens: int, threads: int) -> tuple[Sizes, str]:
    """Return what the product of a linear layer is chosen by, and how it treats its input."""
    compiler = find_compiler()
    assert compiler is not None, "can_run has asked it"
    row_bytes = layer.weight.stride(0) * layer.weight.element_size()
    if not is_packed(layer):
        weights = Weights(compiler.processor, TYPE_NAMES[layer.weight.dtype])
        sizes = (tokens, layer.out_features, layer.in_features, row_bytes, threads)
        return Sizes(weights, *sizes), "exact"
    scale = layer.weight_scale
    groups = None if scale.dim() == 1 else scale.shape[1]
    weights = Weights(compiler.processor, f"i{layer.bits}", TYPE_NAMES[scale.dtype], groups)
    sizes = (tokens, layer.out_features, layer.in_features, row_bytes, threads)
    return Sizes(weights, *sizes), layer.activations


__all__ = ["decode_step", "is_for_programs"]
