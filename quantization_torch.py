"""Products with packed weights that torch itself has for a CPU, where there is no engine.

Owns these products, which torch does not promise, the order in which one of them reads 4-bit
weights, and the moving of a layer's weight into that order and back. The bytes are the same, so no
weight is held twice, and whoever looks sees the official ones. Knows nothing of models, or of how
integers are made.

Shapes: `O` output features, `I` input features, `M` rows of input, `G` groups of a row.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint_chatglm import WEIGHTS_AT_ONCE, forget_pages, is_mapped
from .environment_chatglm import GRAPHS_SEE_ATTRIBUTES

# What torch's product with 8-bit integers reads at once, and where it may begin.
VECTOR_LENGTH = 16
VECTOR_BYTES = 64
# Rows of a block in torch's order of 4-bit integers, with AVX512 and with AVX2; the columns that
# may share a factor there; and the rows of input up to which its product is the fastest.
INT4_BLOCK_ROWS = (64, 32)
INT4_GROUP_SIZES = (256, 128, 64, 32)
INT4_INPUT_ROWS = 48


def find_int8_product(in_features: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return torch's product of bfloat16 `(M, I)` with int8 `(O, I)`; None without one.

    torch's kernel reads whole vectors and checks none of it: rows of other lengths it reads past
    their end, and at odd addresses, as those of weights that a file stands behind, it faults.
    """
    # torch promises no such operation; without it products are torch's plain ones.
    multiply = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
    if multiply is None or in_features % VECTOR_LENGTH:
        return None

    def multiply_aligned(input: Tensor, weight: Tensor) -> Tensor:
        return multiply(_align(input), _align(weight), input.new_ones(weight.shape[0]))

    return multiply_aligned


def _align(tensor: Tensor) -> Tensor:
    """Return a tensor, or a copy if its memory begins at an address that vectors do not."""
    return tensor.clone() if tensor.data_ptr() % VECTOR_BYTES else tensor


class Int4Blocks(NamedTuple):
    """A 4-bit matrix in the order in which torch's own product reads it: the same bytes, moved.

    As it is stored, a byte has two columns of one row, the even one in the high half. Here it has
    one column of two rows that are half a block of `R` rows apart, the upper one in the low half,
    and every integer is larger by 8.

    Attributes:
        integers: uint8 `(O / R, I, R / 2)`.
        factors: bfloat16 `(I / g, O, 2)`: what each run of `g` columns is multiplied by and what is
            added to it. With a scale per row these are 1 and 0.
        row_scale: `(O,)`, which the product is multiplied by then; else None.
    """

    integers: Tensor
    factors: Tensor
    row_scale: Tensor | None

    @classmethod
    def of_packed(
        cls, weight: Tensor, weight_scale: Tensor, block_rows: int
    ) -> "Int4Blocks | None":
        """Bring stored integers into torch's order; None for sizes that it has no blocks for.

        Args:
            weight: int8 `(O, I / 2)`.
            weight_scale: `(O,)`, or `(O, G)`, which are rounded to bfloat16.
            block_rows: `R`.
        """
        rows, in_features = weight.shape[0], 2 * weight.shape[1]
        if rows % block_rows or in_features % INT4_GROUP_SIZES[-1]:
            return None
        integers = _order_int4(weight, block_rows)
        _forget_read_pages(weight)
        if weight_scale.dim() == 1:
            group_size = next(size for size in INT4_GROUP_SIZES if in_features % size == 0)
            factors = make_unit_factors(in_features // group_size, rows)
            return cls(integers, factors, weight_scale)
        scales = weight_scale.T.to(torch.bfloat16)  # (G, O)
        return cls(integers, torch.stack((scales, torch.zeros_like(scales)), dim=-1), None)

    def restore(self) -> Tensor:
        """Return the integers as they were stored, int8 `(O, I / 2)`."""
        num_blocks, in_features, half = self.integers.shape
        stored = self.integers.new_empty(num_blocks, 2, half, in_features // 2)
        step = max(1, WEIGHTS_AT_ONCE // (2 * half * in_features))
        for ordered, rows in zip(self.integers.split(step), stored.split(step)):
            even, odd = ordered.unflatten(1, (-1, 2)).unbind(2)  # (n, I / 2, R / 2) each
            lower, upper = _exchange_halves(odd, even)
            rows[:, 0], rows[:, 1] = upper.transpose(1, 2), lower.transpose(1, 2)
        return stored.bitwise_xor_(0x88).view(torch.int8).view(2 * half * num_blocks, -1)

    def multiply(self, input: Tensor) -> Tensor:
        """Return `input @ W.T`, bfloat16 `(..., I)` to `(..., O)`."""
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        is_short = rows.shape[0] <= INT4_INPUT_ROWS
        product = self.multiply_few(rows) if is_short else self._multiply_many(rows)
        if self.row_scale is not None:
            product = (product * self.row_scale).to(input.dtype)
        return product.view(*input.shape[:-1], -1)

    def multiply_few(self, rows: Tensor) -> Tensor:
        """Return torch's product, `(M, I)` to `(M, O)`, without the scales of rows."""
        weight = self.integers.view(self.factors.shape[1], -1)  # (O, I / 2)
        group_size = rows.shape[1] // self.factors.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, group_size, self.factors)

    def _multiply_many(self, rows: Tensor) -> Tensor:
        """Return the same by unpacking some blocks at a time; bfloat16 holds the integers."""
        _, in_features, half = self.integers.shape
        step = max(1, WEIGHTS_AT_ONCE // (2 * half * in_features))
        factors = self.factors.split(2 * half * step, dim=1)
        parts = []
        for integers, factor in zip(self.integers.split(step), factors):
            halves = torch.stack((integers & 15, integers >> 4), dim=2)  # (n, I, 2, R / 2)
            matrix = halves.transpose(0, 1).reshape(in_features, -1).to(rows.dtype).sub_(8)
            if self.row_scale is None:
                groups = matrix.view(factor.shape[0], -1, matrix.shape[1])  # (I / g, g, n * R)
                groups.mul_(factor[..., 0].unsqueeze(1))
            parts.append(rows @ matrix)
        return torch.cat(parts, dim=-1)


def _order_int4(weight: Tensor, block_rows: int) -> Tensor:
    """Return the integers of `Int4Blocks`, uint8 `(O / R, I, R / 2)`, of int8 `(O, I / 2)`."""
    rows, columns = weight.shape
    half = block_rows // 2
    ordered = weight.new_empty(rows // block_rows, columns, 2, half, dtype=torch.uint8)
    step = max(1, WEIGHTS_AT_ONCE // (2 * columns * block_rows))
    for stored, blocks in zip(weight.split(step * block_rows), ordered.split(step)):
        larger = stored.view(torch.uint8) ^ 0x88  # by 8, both halves
        upper, lower = larger.view(-1, 2, half, columns).unbind(1)
        for parity, exchanged in enumerate(_exchange_halves(upper, lower)):
            blocks[:, :, parity] = exchanged.transpose(1, 2)
    return ordered.flatten(1, 2)  # (O / R, I / 2, 2, R / 2) -> (O / R, I, R / 2)


def _exchange_halves(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes of the two high halves, and of the two low ones; the first one's go low."""
    return (first >> 4) | (second & 0xF0), (first & 15) | (second << 4)


@functools.cache
def make_unit_factors(groups: int, rows: int) -> Tensor:
    """Return factors that change nothing, `(groups, rows, 2)`; all layers of a shape share them."""
    with torch.inference_mode(False):
        return torch.tensor([1, 0], dtype=torch.bfloat16).repeat(groups, rows, 1)


@functools.cache
def find_int4_block_rows() -> int:
    """Return the rows of a block of torch's 4-bit product on this processor, or 0 without one.

    torch promises neither the product nor its order: a product of known integers has to be right.
    Before `GRAPHS_SEE_ATTRIBUTES` there is none that graphs could use.
    """
    has_product = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    if not has_product or not GRAPHS_SEE_ATTRIBUTES:
        return 0
    rows, in_features = 2 * max(INT4_BLOCK_ROWS), INT4_GROUP_SIZES[-1]
    integers = torch.arange(rows * in_features).mul_(37).remainder_(251).remainder_(16).sub_(8)
    even, odd = integers.to(torch.int8).view(rows, -1, 2).unbind(-1)
    weight, unit = (even << 4) | (odd & 15), torch.eye(in_features, dtype=torch.bfloat16)
    expected = integers.view(rows, -1).T.to(unit.dtype)
    for block_rows in INT4_BLOCK_ROWS:
        blocks = Int4Blocks.of_packed(weight, torch.ones(rows), block_rows)
        if blocks is not None and torch.equal(blocks.multiply_few(unit), expected):
            return block_rows
    return 0


def _forget_read_pages(tensor: Tensor) -> None:
    """Give the pages of a tensor back that lies in a file, unless somebody has written there."""
    if tensor.is_inference() or getattr(tensor, "_version", None) != 0:
        return
    if tensor.is_contiguous() and is_mapped(tensor):
        forget_pages(tensor)


# The order of a layer's weight

# A weight is moved to torch's order and back by one thread at a time.
ORDERING = threading.RLock()


def _count_references(parameters: dict[str, Any], name: str) -> int:
    return sys.getrefcount(parameters.get(name))


# The references to a parameter that only its layer's dictionary holds.
ALONE = _count_references({"weight": nn.Parameter(torch.empty(0))}, "weight")


def _are_alone(parameters: dict[str, Any]) -> bool:
    """Tell whether weight and scales are plain memory of a CPU that only their layer holds."""
    names = ("weight", "weight_scale")
    if any(_count_references(parameters, name) > ALONE for name in names):
        return False
    values = [parameters.get(name) for name in names]
    return all(type(x) is nn.Parameter and x.is_cpu and not x.is_shared() for x in values)


def _get_values(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values; those made in inference mode could not be viewed outside."""
    return parameter.clone() if parameter.is_inference() else parameter.detach()


def _set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values; one made in inference mode stays so."""
    with torch.inference_mode(is_inference := parameter.is_inference()):
        parameter.data = values.clone() if is_inference else values


class ReorderedWeight(nn.Module):
    """A layer with `weight` and `weight_scale`, which torch's 4-bit product may have in its order.

    While products take `Int4Blocks`, the parameter `weight` has these in the place of values:
    whoever looks at the layer's parameters, by whatever way, has them moved back first.
    """

    _parameters: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Watch who looks; where nothing is moved, graphs would ask the property for itself."""
        super().__init_subclass__(**kwargs)
        if GRAPHS_SEE_ATTRIBUTES:
            cls._parameters = property(cls._show_parameters, cls._set_parameters)

    def take_blocks(self) -> Int4Blocks | None:
        """Return the weight in torch's order, which it has from now on; None to leave it as it is.

        One that anybody else holds stays, such as a tied embedding: it would be there twice.
        """
        block_rows, parameters = find_int4_block_rows(), self.__dict__["_parameters"]
        with ORDERING, torch.inference_mode(False):
            blocks = getattr(parameters.get("weight"), "int4_blocks", None)
            if blocks is not None or not block_rows or not _are_alone(parameters):
                return blocks
            weight, weight_scale = (_get_values(parameters[n]) for n in ("weight", "weight_scale"))
            blocks = Int4Blocks.of_packed(weight, weight_scale, block_rows)
            if blocks is None or not _are_alone(parameters):  # which took a while
                return None
            _set_values(parameters["weight"], weight.new_empty(0))
            parameters["weight"].int4_blocks = blocks
            return blocks

    def _give_blocks_back(self) -> None:
        weight = self.__dict__.get("_parameters", {}).get("weight")
        with ORDERING, torch.inference_mode(False):
            blocks = getattr(weight, "int4_blocks", None)
            if blocks is not None:
                _set_values(weight, blocks.restore())
                del weight.int4_blocks

    def _show_parameters(self) -> dict[str, Any]:
        # Within a graph only dtypes and devices are asked of all parameters (`model.device`).
        if not torch.compiler.is_compiling():
            self._give_blocks_back()
        return self.__dict__["_parameters"]

    def _set_parameters(self, parameters: dict[str, Any]) -> None:
        self.__dict__["_parameters"] = parameters

    def __getattr__(self, name: str) -> Any:
        """Find a parameter, which `nn.Module` looks for without the property."""
        if torch.compiler.is_compiling():  # which knows no locks: it moves the weight in the graph
            found = super().__getattr__(name)
            blocks = getattr(found, "int4_blocks", None) if name == "weight" else None
            return found if blocks is None else blocks.restore()
        with ORDERING:  # until the caller holds it, which nobody moves then
            if name in ("weight", "weight_scale"):
                self._give_blocks_back()
            return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parameters": self._parameters}


__all__ = ["Int4Blocks", "ReorderedWeight", "find_int4_block_rows", "find_int8_product"]
