"""The back ends that `bench_kernels` compares: how each packs a matrix, and multiplies with it.

All hold the same matrix, integers of 4 bits times one power of two a row, which every format here
represents exactly (NF4 alone rounds): an error is the kernel's, not the format's. What is not
installed is left out.

Shapes: `O` output features, `I` input features, `M` rows of a product.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks.full_size import load_class
from chatglm.cpu import fast_products

Product = Callable[[Tensor], Tensor]
SCALE = 2.0**-8
LARGEST = 7
GROUP_SIZE = 128
SMALL_GROUP = 32


class Backend(NamedTuple):
    """A way to multiply.

    Attributes:
        name: what tables call it.
        dtype: of the input's rows `(M, I)`, and of the result.
        weight_bytes: of one weight, scales included.
        pack: makes the product of a new copy of int8 integers `(O, I)`.
        package: that it needs, beside torch.
    """

    name: str
    dtype: torch.dtype
    weight_bytes: float
    pack: Callable[[Tensor], Product]
    package: str = "torch"

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None


def draw_integers(rows: int, columns: int) -> Tensor:
    """Return random integers `(O, I)` in [-7, 7]; every group of columns has a 7."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, columns)
    integers = torch.randint(-LARGEST, LARGEST + 1, size, generator=generator, dtype=torch.int8)
    integers[:, ::SMALL_GROUP] = LARGEST
    return integers


def pack_ours(bits: int, group_size: int | None = None) -> Callable[[Tensor], Product]:
    """Return the packing of this repository's layers."""

    def pack(integers: Tensor) -> Product:
        rows, columns = integers.shape
        layer_class = load_class("quantization.QuantizedLinear")
        layer = layer_class(columns, rows, bits, bias=False, group_size=group_size)
        stored = integers
        if bits == 4:
            stored = (integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)  # the official order
        layer.weight.data = stored.clone()
        layer.weight_scale.data.fill_(SCALE)
        return layer.eval()

    return pack


def pack_alone(integers: Tensor) -> Product:
    """Return the same with 4 bits as it is where the model's files are alone, without engine."""
    layer: Any = pack_ours(4)(integers)
    module = sys.modules[type(layer).__module__]
    finders, kernels = module.KERNEL_FINDERS, module.TorchKernels()

    def multiply(rows: Tensor) -> Tensor:
        find_engine, finders["cpu"] = finders["cpu"], lambda device: kernels
        try:
            return layer(rows)
        finally:
            finders["cpu"] = find_engine

    return multiply


def pack_plain(dtype: torch.dtype) -> Callable[[Tensor], Product]:
    """Return the packing of a plain linear layer beside this repository's engine."""

    def pack(integers: Tensor) -> Product:
        weight = integers.to(dtype).mul_(SCALE)

        def multiply(rows: Tensor) -> Tensor:
            with fast_products():
                return nn.functional.linear(rows, weight)

        return multiply

    return pack


def pack_dense(dtype: torch.dtype) -> Callable[[Tensor], Product]:
    """Return the packing of torch's plain linear layer."""

    def pack(integers: Tensor) -> Product:
        weight = integers.to(dtype).mul_(SCALE)
        return lambda rows: nn.functional.linear(rows, weight)

    return pack


def pack_int4pack(integers: Tensor) -> Product:
    """Pack for torch's own 4-bit product, which takes bfloat16."""
    rows, columns = integers.shape
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int() + 8, 2)
    scales = torch.zeros(columns // GROUP_SIZE, rows, 2, dtype=torch.bfloat16)  # scale, zero
    scales[..., 0] = SCALE
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda inputs: multiply(inputs, packed, GROUP_SIZE, scales)


def pack_dynamic(engine: str) -> Callable[[Tensor], Product]:
    """Return the packing of torch's dynamically quantized linear layer, int8, in one engine."""

    def pack(integers: Tensor) -> Product:
        scales = torch.full((integers.shape[0],), SCALE)
        zeros = torch.zeros(integers.shape[0], dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch will take it away one day
            quantized = cast(Any, torch)._make_per_channel_quantized_tensor(
                integers, scales, zeros, 0
            )
            torch.backends.quantized.engine = engine
            packed = torch.ops.quantized.linear_prepack(quantized, None)
        return lambda rows: torch.ops.quantized.linear_dynamic(rows, packed, False)

    return pack


def pack_onnxruntime(integers: Tensor) -> Product:
    """Pack for ONNX Runtime's 4-bit product, int8 within."""
    helper: Any = importlib.import_module("onnx.helper")
    kinds: Any = importlib.import_module("onnx").TensorProto
    runtime: Any = importlib.import_module("onnxruntime")
    rows, columns = integers.shape
    unsigned = (integers + 8).view(torch.uint8)
    packed = (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)).numpy()
    groups = columns // SMALL_GROUP
    scales = torch.full((rows * groups,), SCALE).numpy()
    weights = [
        helper.make_tensor("W", kinds.UINT8, (rows, groups, SMALL_GROUP // 2), packed, raw=True),
        helper.make_tensor("S", kinds.FLOAT, scales.shape, scales, raw=True),
    ]
    sizes = {"K": columns, "N": rows, "bits": 4, "block_size": SMALL_GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["X", "W", "S"], ["Y"], domain="com.microsoft", **sizes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("X", kinds.FLOAT, ("M", columns))],
        [helper.make_tensor_value_info("Y", kinds.FLOAT, ("M", rows))],
        weights,
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda inputs: torch.from_numpy(session.run(None, {"X": inputs.numpy()})[0])


def pack_openvino(integers: Tensor) -> Product:
    """Pack for OpenVINO's compressed 4-bit product, int8 within."""
    openvino: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    numpy: Any = importlib.import_module("numpy")
    rows, columns = integers.shape
    groups = columns // GROUP_SIZE
    unsigned = (integers + 8).view(torch.uint8)
    packed = (unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)).numpy()
    size = [rows, groups, GROUP_SIZE]
    tensor = openvino.Tensor(packed, openvino.Shape(size), openvino.Type.u4)
    weight = ops.convert(ops.constant(tensor), numpy.float16)
    eights = numpy.full(1, 0x88, numpy.uint8)
    zero = openvino.Tensor(eights, openvino.Shape([1, 1, 1]), openvino.Type.u4)
    centred = ops.subtract(weight, ops.convert(ops.constant(zero), numpy.float16))
    scales = ops.constant(numpy.full((rows, groups, 1), SCALE, numpy.float16))
    matrix = ops.reshape(ops.multiply(centred, scales), [rows, columns], special_zero=False)
    inputs = ops.parameter([-1, columns], numpy.float32)
    product = ops.matmul(inputs, ops.convert(matrix, numpy.float32), False, True)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE,
    }
    model = openvino.Model([product], [inputs])
    compiled = openvino.Core().compile_model(model, "CPU", settings)

    # The compiled model reads these two, and does not keep them alive.
    def multiply(given: Tensor, *, _kept: tuple[Any, Any] = (packed, eights)) -> Tensor:
        return torch.from_numpy(compiled(given.numpy())[0])

    return multiply


def pack_bitsandbytes(integers: Tensor) -> Product:
    """Pack for bitsandbytes' NF4, which rounds these integers to its own levels."""
    package: Any = importlib.import_module("bitsandbytes.nn")
    rows, columns = integers.shape
    layer = package.Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    weight = integers.to(torch.bfloat16).mul_(SCALE)
    layer.weight = package.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


BACKENDS: Sequence[Backend] = (
    Backend("ours INT4", torch.float32, 0.5, pack_ours(4)),
    Backend("ours INT4 g32", torch.float32, 0.5 + 2 / 32, pack_ours(4, 32)),
    Backend("ours INT4 bfloat16", torch.bfloat16, 0.5, pack_ours(4)),
    Backend("ours INT4 files alone", torch.bfloat16, 0.5, pack_alone),
    Backend("ours INT8", torch.float32, 1, pack_ours(8)),
    Backend("ours float32", torch.float32, 4, pack_plain(torch.float32)),
    Backend("ours bfloat16", torch.bfloat16, 2, pack_plain(torch.bfloat16)),
    Backend("ours float16", torch.float16, 2, pack_plain(torch.float16)),
    Backend("torch float32", torch.float32, 4, pack_dense(torch.float32)),
    Backend("torch bfloat16", torch.bfloat16, 2, pack_dense(torch.bfloat16)),
    Backend("torch float16", torch.float16, 2, pack_dense(torch.float16)),
    Backend("torch int4pack g128", torch.bfloat16, 0.5 + 4 / 128, pack_int4pack),
    Backend("torch fbgemm int8", torch.float32, 1, pack_dynamic("fbgemm")),
    Backend("torch onednn int8", torch.float32, 1, pack_dynamic("onednn")),
    Backend("onnxruntime g32", torch.float32, 0.5 + 4 / 32, pack_onnxruntime, "onnxruntime"),
    Backend("openvino g128", torch.float32, 0.5 + 2 / 128, pack_openvino, "openvino"),
    Backend("bitsandbytes nf4", torch.bfloat16, 0.5 + 4 / 64, pack_bitsandbytes, "bitsandbytes"),
)


def multiply_exactly(integers: Tensor, inputs: Tensor, outputs: int) -> Tensor:
    """Return the first outputs of the exact product, `(M, outputs)`, in float64."""
    return inputs.double() @ integers[:outputs].double().mul_(SCALE).T


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the length of the difference over that of the exact product."""
    return float((found.double() - exact).norm() / exact.norm())
