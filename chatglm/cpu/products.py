"""What every product on a CPU is: its operands, its sizes, and the way to a kernel and back.

Owns what a kernel is chosen by, which tensors a kernel can read, and the split of a long input.
Knows no kernel: who asks for a product brings the function that chooses one.

Shapes: `T` tokens (all rows of the input), `O` output features, `I` input features, `G` groups of a
row.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from chatglm.cpu.rounding import HALF, Layout
from chatglm.cpu.runtime import count_threads
from chatglm.cpu.writer import Processor

BLOCK_BYTES = 2**16  # of weights that a thread takes at a time
PART_TOKENS = 512  # of a long prompt at once, whose float32 sums would be the most that is held
TYPE_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Weights(NamedTuple):
    """How a matrix of weights is stored.

    Attributes:
        processor: the CPU that reads it.
        kind: "i4", "i8", "f32", "f16" or "bf16".
        scale_type: "f32" or "f16".
        groups: G, or None for a scale per row.
    """

    processor: Processor
    kind: str
    scale_type: str = "f32"
    groups: int | None = None


class Sizes(NamedTuple):
    """What a product's kernel and its way of working are chosen by.

    Attributes:
        weights: how they are stored.
        tokens, rows, columns, row_bytes: T, O, I and the bytes of a weight row.
        threads: torch's.
    """

    weights: Weights
    tokens: int
    rows: int
    columns: int
    row_bytes: int
    threads: int

    @property
    def group_size(self) -> int | None:
        """Columns that share a weight scale."""
        groups = self.weights.groups
        return None if groups is None else self.columns // groups

    def lay_out(self) -> Layout:
        """Return a layout for the rounded input."""
        pieces = 2 if (self.group_size or HALF) % HALF == 0 else 4
        return Layout(self.weights.processor, int(self.weights.kind[1:]), pieces)

    def count_threads(self, blocks: int) -> int:
        """Return the threads for so many blocks of the weights."""
        return count_threads(blocks, self.rows * self.row_bytes)


class Product(Protocol):
    """A product that is ready to be computed again and again."""

    def run(self, input: Tensor, weight: int, scale: int, output: Tensor | None = None) -> Tensor:
        """Multiply float32 `(T, I)` with the weights that stand somewhere.

        Args:
            input: `(T, I)`, contiguous.
            weight, scale: addresses.
            output: what an earlier run returned, to be written again; None makes it anew.

        Returns:
            float32, whose first T rows and O columns are the product; the rest is padding.
        """
        ...


Planner = Callable[[Sizes], Product | None]


def multiply(
    input: Tensor, weights: Weights, weight: Tensor, scale: int, plan: Planner
) -> Tensor | None:
    """Look up how a product is computed, and compute it."""
    if type(input) is not Tensor or input.dtype not in TYPE_NAMES or input.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu"):  # which has its own idea of the output's dtype
        return None
    rows = input.detach().reshape(-1, input.shape[-1])
    features, row_bytes = weight.shape[0], weight.stride(0) * weight.element_size()
    sizes = Sizes(
        weights, rows.shape[0], features, rows.shape[1], row_bytes, torch.get_num_threads()
    )
    if sizes.tokens > PART_TOKENS:
        output = _multiply_parts(rows, sizes, weight.data_ptr(), scale, plan)
    else:
        product = plan(sizes)
        if product is None:
            return None
        output = product.run(rows.float().contiguous(), weight.data_ptr(), scale)
        if output.shape != (sizes.tokens, features):
            output = output[: sizes.tokens, :features].contiguous()
        output = output.to(input.dtype)
    return None if output is None else output.view(*input.shape[:-1], features)


def _multiply_parts(
    rows: Tensor, sizes: Sizes, weight: int, scale: int, plan: Planner
) -> Tensor | None:
    """Multiply a long prompt part by part, in memory that all but the last one share."""
    output = rows.new_empty(sizes.tokens, sizes.rows)
    sums: Tensor | None = None
    for part, place in zip(rows.split(PART_TOKENS), output.split(PART_TOKENS)):
        product = plan(sizes._replace(tokens=len(part)))
        if product is None:
            return None
        if len(part) < PART_TOKENS:
            sums = None
        sums = product.run(part.float().contiguous(), weight, scale, sums)
        place.copy_(sums[: len(part), : sizes.rows])
    return output


def are_matrices(*tensors: Tensor) -> bool:
    """Tell whether tensors are memory that a kernel can read, row after row."""
    return all(is_plain(tensor) and tensor.is_contiguous() for tensor in tensors)


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is memory that a kernel can read."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def wants_graph(*tensors: Tensor) -> bool:
    """Tell whether torch has to see the operations, to differentiate, compile or cast them."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
