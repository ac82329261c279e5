"""torch's own 4-bit product where the model's files are alone, and the weights that it reorders.

While a layer computes with it, its weight lies in torch's order. Whoever looks sees the official
bytes, by whatever way, and there is never a second copy.
"""

import copy
import io
import pickle
import re
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b import checkpoint_chatglm, quantization, quantization_torch
from chatglm_6b.configuration_chatglm import GROUP_SIZES, ChatGLMConfig
from chatglm_6b.environment_chatglm import kernels_off
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.quantization import QuantizedLinear, dequantize_weight
from chatglm_6b.quantization_torch import Int4Blocks, find_int4_block_rows
from conftest import TINY, leave_engine_out
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytestmark = [
    # peft reads and calls what transformers 5.23 deprecates.
    pytest.mark.filterwarnings(
        "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is:FutureWarning"
    ),
]
BLOCK_ROWS = quantization_torch.INT4_BLOCK_ROWS
INPUT_ROWS = quantization_torch.INT4_INPUT_ROWS
INPUT_IDS = torch.tensor([[7, 8, 9, 301, 304, 11, 12]])
LABELS = torch.tensor([[-100, -100, -100, -100, 304, 11, 12]])
both_kinds = pytest.mark.parametrize("group_size", [None, 32])
needs_the_product = pytest.mark.skipif(
    not find_int4_block_rows(), reason="torch has no 4-bit product for this processor"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the model's files without the engine."""
    leave_engine_out(monkeypatch)


def draw_bytes(rows: int, columns: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)


def make_layer(
    group_size: int | None = None, in_features: int = 256, out_features: int = 128
) -> QuantizedLinear:
    linear = nn.Linear(in_features, out_features)
    return QuantizedLinear.from_linear(linear, 4, group_size=group_size).bfloat16().eval()


def read_stored(layer: nn.Module) -> Tensor:
    """Return the parameter as it is, which is empty while its values are blocks."""
    return layer.__dict__["_parameters"]["weight"]


def is_moved(layer: nn.Module) -> bool:
    assert hasattr(read_stored(layer), "int4_blocks") == (read_stored(layer).numel() == 0)
    return read_stored(layer).numel() == 0


def move(layer: QuantizedLinear) -> Tensor:
    """Compute once, after which the weight is in torch's order; return the product."""
    product = layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16))
    assert is_moved(layer)
    return product


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


# The order


@pytest.mark.parametrize("block_rows", BLOCK_ROWS)
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("in_features", [32, 96, 256, 16384])
def test_the_stored_bytes_come_back(block_rows: int, blocks: int, in_features: int) -> None:
    weight = draw_bytes(blocks * block_rows, in_features // 2)
    ordered = Int4Blocks.of_packed(weight, torch.ones(weight.shape[0]), block_rows)
    assert ordered is not None and ordered.integers.nbytes == weight.nbytes
    assert torch.equal(ordered.restore(), weight)
    assert not torch.equal(ordered.integers.view(weight.shape), weight.view(torch.uint8))


def test_each_column_of_a_byte_has_its_place() -> None:
    """Byte k of a block's column has row k in the low half, and in the high one row k + R / 2."""
    integers = (torch.arange(128 * 32) * 7 % 16 - 8).to(torch.int8).view(128, 32)
    ordered = Int4Blocks.of_packed(quantization.pack_int4(integers), torch.ones(128), 64)
    assert ordered is not None
    low, high = (ordered.integers & 15).char() - 8, (ordered.integers >> 4).char() - 8
    rows = integers.view(2, 2, 32, 32).transpose(2, 3)  # blocks, halves, columns, rows
    assert torch.equal(low, rows[:, 0]) and torch.equal(high, rows[:, 1])


@needs_the_product
@pytest.mark.parametrize("in_features", [32, 96, 512])
def test_the_order_is_the_one_that_torch_makes(in_features: int) -> None:
    weight = draw_bytes(192, in_features // 2)
    ordered = Int4Blocks.of_packed(weight, torch.ones(192), find_int4_block_rows())
    assert ordered is not None
    larger = quantization.unpack_int4(weight).int() + 8
    made = torch.ops.aten._convert_weight_to_int4pack_for_cpu(larger, 1)
    assert torch.equal(ordered.integers.view(made.shape), made)


@pytest.mark.parametrize(("rows", "in_features"), [(63, 64), (96, 64), (16, 64), (64, 48)])
def test_sizes_without_whole_blocks_are_left_alone(rows: int, in_features: int) -> None:
    assert Int4Blocks.of_packed(draw_bytes(rows, in_features // 2), torch.ones(rows), 64) is None


def test_an_order_that_we_do_not_know_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors with neither AVX2 nor AVX512: the product of known integers is wrong."""
    monkeypatch.setattr(quantization_torch, "INT4_BLOCK_ROWS", (16, 128))
    find_int4_block_rows.cache_clear()
    layer, states = make_layer(), torch.randn(2, 256, dtype=torch.bfloat16)
    product = layer(states)
    find_int4_block_rows.cache_clear()
    assert not is_moved(layer)
    exact = states.double() @ layer.unpack(torch.float64).T + layer.bias.double()
    assert relative_error(product, exact) < 2**-7


# The product


@needs_the_product
@pytest.mark.parametrize("rows", [1, 2, 8, INPUT_ROWS, INPUT_ROWS + 1, 130])
@pytest.mark.parametrize("group_size", [None, *GROUP_SIZES])
@pytest.mark.parametrize("sizes", [(64, 256), (320, 1536)])
def test_products_are_as_exact_as_bfloat16(
    rows: int, group_size: int | None, sizes: tuple[int, int]
) -> None:
    """Each keeps 8 bits: results, and with groups the scales and the unpacked matrix too.

    Of 300 draws of the smallest product 2 % lose more than 2**-8 to result and scales together.
    """
    torch.manual_seed(0)
    layer = make_layer(group_size, sizes[1], sizes[0])
    exact_layer = copy.deepcopy(layer).double()
    states = torch.randn(rows, sizes[1], dtype=torch.bfloat16)
    with torch.no_grad():
        product = layer(states)
        exact = exact_layer(states.double())
    assert is_moved(layer) and product.dtype == torch.bfloat16
    assert relative_error(product, exact) < 1.5 * 2**-8
    torch.testing.assert_close(product.double(), exact, rtol=2**-7, atol=2**-6)


@needs_the_product
@pytest.mark.parametrize("shape", [(256,), (3, 5, 256), (2, 60, 256)])
def test_inputs_have_any_shape_and_any_strides(shape: tuple[int, ...]) -> None:
    layer = make_layer()
    wide = torch.randn(*shape[:-1], 512, dtype=torch.bfloat16)
    states = wide[..., ::2]
    rows = torch.stack([layer(row) for row in states.reshape(-1, 256)])
    assert is_moved(layer)
    assert layer(states).shape == (*shape[:-1], 128)
    torch.testing.assert_close(layer(states).view(-1, 128), rows, rtol=2**-6, atol=2**-6)


@needs_the_product
@both_kinds
def test_new_scales_are_used(group_size: int | None) -> None:
    layer = make_layer(group_size)
    before = move(layer) - layer.bias
    with torch.no_grad():
        layer.weight_scale.mul_(2)
    torch.testing.assert_close(move(layer) - layer.bias, before * 2, rtol=2**-5, atol=2**-5)


@needs_the_product
@both_kinds
def test_gradients_are_those_of_before(group_size: int | None) -> None:
    layer = make_layer(group_size)
    states = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(states).square().sum(), states)
    assert not is_moved(layer)
    move(layer)
    (found,) = torch.autograd.grad(layer(states).square().sum(), states)
    assert torch.equal(found, expected) and not is_moved(layer)


# Who looks sees the official bytes


def save_and_load(layer: QuantizedLinear) -> Tensor:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False).weight


def load_other(layer: QuantizedLinear) -> Tensor:
    """Load what another layer holds, and then what this one held."""
    held = {name: value.clone() for name, value in layer.state_dict().items()}
    move(layer)
    layer.load_state_dict(make_layer(layer.group_size).state_dict())
    assert not torch.equal(layer.weight, held["weight"])
    move(layer)
    layer.load_state_dict(held)
    move(layer)
    return layer.weight


WAYS: dict[str, Callable[[QuantizedLinear], Tensor]] = {
    "weight": lambda layer: layer.weight,
    "getattr": lambda layer: getattr(layer, "weight"),  # noqa: B009
    "get_parameter": lambda layer: layer.get_parameter("weight"),
    "_parameters": lambda layer: layer._parameters["weight"],
    "parameters": lambda layer: next(layer.parameters()),
    "named_parameters": lambda layer: dict(nn.Sequential(layer).named_parameters())["0.weight"],
    "state_dict": lambda layer: nn.Sequential(layer).state_dict()["0.weight"],
    "keep_vars": lambda layer: layer.state_dict(keep_vars=True)["weight"],
    "load_state_dict": load_other,
    "copy": lambda layer: copy.copy(layer).weight,
    "deepcopy": lambda layer: read_stored(copy.deepcopy(layer)),
    "pickle": lambda layer: read_stored(pickle.loads(pickle.dumps(layer))),
    "save": save_and_load,
    "half": lambda layer: read_stored(layer.half()),
    "float": lambda layer: read_stored(layer.float()),
    "cpu": lambda layer: read_stored(layer.cpu()),
    "share_memory": lambda layer: read_stored(layer.share_memory()),
}


@needs_the_product
@both_kinds
@pytest.mark.parametrize("way", WAYS)
def test_the_official_bytes_are_seen(way: str, group_size: int | None) -> None:
    layer = make_layer(group_size)
    names = list(dict(layer.named_parameters()))
    expected = layer.weight.clone()
    first = move(layer)
    found = WAYS[way](layer)
    assert torch.equal(found, expected) and found.dtype == torch.int8
    assert type(found) in (Tensor, nn.Parameter) and not found.requires_grad
    del found
    assert list(dict(layer.named_parameters())) == names
    if way not in ("half", "float", "share_memory"):
        assert torch.equal(move(layer), first)


@needs_the_product
def test_a_weight_keeps_its_object_and_what_is_noted_on_it() -> None:
    layer = make_layer()
    layer.weight.note = "kept"  # pyright: ignore[reportAttributeAccessIssue]
    before = id(layer.weight)
    move(layer)
    assert id(layer.weight) == before and vars(layer.weight) == {"note": "kept"}


@needs_the_product
@both_kinds
def test_plain_layers_have_the_same_values(group_size: int | None) -> None:
    layer = make_layer(group_size)
    expected = layer.to_linear(torch.float32).weight
    move(layer)
    assert torch.equal(layer.to_linear(torch.float32).weight, expected)


@needs_the_product
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_inference_mode_changes_nothing(made: bool, looked: bool, computed: bool) -> None:
    with torch.inference_mode(made):
        layer = QuantizedLinear(256, 128, 4, dtype=torch.bfloat16).eval()
        layer.weight.copy_(draw_bytes(128, 128))
    expected = layer.weight.clone()
    for mode in (computed, not computed):
        with torch.inference_mode(mode):
            move(layer)
        with torch.inference_mode(looked):
            assert torch.equal(layer.weight, expected)
    assert layer.weight.is_inference() == made


@needs_the_product
@pytest.mark.parametrize("moved_first", [False, True])
def test_a_compiled_layer_computes_the_same(moved_first: bool) -> None:
    layer, states = make_layer(), torch.randn(3, 256, dtype=torch.bfloat16)
    expected = copy.deepcopy(layer)(states)
    if moved_first:
        move(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(states), expected, rtol=2**-6, atol=2**-6)
            move(layer)


@needs_the_product
def test_threads_compute_and_look_at_once() -> None:
    layer, states = make_layer(), torch.randn(2, 256, dtype=torch.bfloat16)
    expected, product = layer.weight.clone(), layer(states)
    wrong: list[str] = []

    def compute() -> None:
        for _ in range(200):
            if not torch.equal(layer(states), product):
                wrong.append("product")

    def look() -> None:
        for _ in range(200):
            if not torch.equal(layer.weight, expected):
                wrong.append("weight")

    threads = [threading.Thread(target=task) for task in (compute, look, compute, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Nothing is held twice


@needs_the_product
@both_kinds
def test_the_stored_bytes_are_released(group_size: int | None) -> None:
    layer = make_layer(group_size)
    memory = layer.weight.detach().numpy().copy()
    layer.weight.data = torch.from_numpy(memory)
    watch, nbytes = weakref.ref(memory), memory.nbytes
    del memory
    assert watch() is not None
    move(layer)
    assert watch() is None
    blocks: Any = read_stored(layer)
    assert blocks.int4_blocks.integers.nbytes == nbytes
    ordered = weakref.ref(blocks.int4_blocks.integers)
    del blocks
    assert layer.weight.nbytes == nbytes and ordered() is None


def read_resident(tensor: Tensor) -> int:
    """Return how many bytes of the mapping that a tensor lies in are in memory."""
    address, is_inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in area.groups())
            is_inside = start <= address < end
        elif is_inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{address:x} is nowhere")


@needs_the_product
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_written", [False, True])
def test_pages_of_a_file_are_given_back_unless_written(is_written: bool, tmp_path: Path) -> None:
    layer = make_layer(in_features=16384)
    save_file({"weight": layer.weight.detach()}, tmp_path / "one.safetensors")
    loaded = load_file(tmp_path / "one.safetensors")["weight"]
    layer.weight = nn.Parameter(loaded, requires_grad=False)
    if is_written:
        with torch.no_grad():
            layer.weight.bitwise_not_()
    assert checkpoint_chatglm.is_mapped(loaded)
    expected = loaded.clone()
    assert read_resident(loaded) >= loaded.nbytes
    move(layer)
    assert (read_resident(loaded) >= loaded.nbytes) == is_written
    assert torch.equal(loaded, expected) and torch.equal(layer.weight, expected)


@needs_the_product
def test_layers_of_a_shape_share_what_changes_nothing() -> None:
    layers = [make_layer(), make_layer()]
    for layer in layers:
        move(layer)
    first, second = (read_stored(layer).int4_blocks.factors for layer in layers)  # pyright: ignore
    assert first is second


@needs_the_product
@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_what_others_hold_is_not_moved(name: str) -> None:
    layer, states = make_layer(), torch.ones(1, 256, dtype=torch.bfloat16)
    held = getattr(layer, name)
    layer(states)
    assert not is_moved(layer)
    del held
    layer(states)
    assert is_moved(layer)


def test_a_tied_head_stays_tied() -> None:
    model = make_model(tie_word_embeddings=True, vocab_size=320).quantize(4, embeddings=True)
    head: Any = model.bfloat16().eval().lm_head
    with torch.no_grad():
        model(INPUT_IDS)
    assert not is_moved(head) and head.weight is model.get_input_embeddings().weight


IMPOSSIBLE: dict[str, Callable[[QuantizedLinear], tuple[QuantizedLinear, Tensor]]] = {
    "float32": lambda layer: (layer.float(), torch.ones(1, 256)),
    "half": lambda layer: (layer.half(), torch.ones(1, 256).half()),
    "training": lambda layer: (layer.train(), torch.ones(1, 256).bfloat16()),
    "nothing": lambda layer: (layer, torch.ones(0, 256).bfloat16()),
    "rows": lambda layer: (make_layer(out_features=72), torch.ones(1, 256).bfloat16()),
    "columns": lambda layer: (make_layer(in_features=80), torch.ones(1, 80).bfloat16()),
    "shared": lambda layer: (layer.share_memory(), torch.ones(1, 256).bfloat16()),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_other_products_are_computed_as_before(case: str) -> None:
    layer, states = IMPOSSIBLE[case](make_layer())
    product = layer(states)
    assert not is_moved(layer) and product.shape == (len(states), layer.out_features)
    bias = 0 if layer.bias is None else layer.bias.double()
    exact = states.double() @ layer.unpack(torch.float64).T + bias
    torch.testing.assert_close(product.double(), exact, rtol=2**-6, atol=2**-6)


@needs_the_product
def test_exact_products_and_switched_off_kernels_unpack() -> None:
    layer, states = make_layer(), torch.randn(2, 256, dtype=torch.bfloat16)
    matrix = dequantize_weight(layer.weight, layer.weight_scale, 4, torch.bfloat16)
    expected = nn.functional.linear(states, matrix) + layer.bias
    move(layer)
    with kernels_off():
        assert torch.equal(layer(states), expected)
    move(layer)
    layer.activations = "exact"
    assert torch.equal(layer(states), expected)


@needs_the_product
def test_inputs_of_another_width_are_refused_as_before() -> None:
    layer = make_layer()
    move(layer)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        layer(torch.ones(1, 128, dtype=torch.bfloat16))


# The whole model


def make_model(**changes: Any) -> Any:
    sizes = {"hidden_size": 64, "inner_hidden_size": 128, "num_layers": 2}
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**{**TINY, **sizes, **changes}))
    return model.eval()


def list_moved(model: nn.Module) -> list[bool]:
    return [is_moved(layer) for layer in model.modules() if isinstance(layer, QuantizedLinear)]


@needs_the_product
@both_kinds
def test_a_model_is_saved_with_the_official_bytes(group_size: int | None, tmp_path: Path) -> None:
    model = make_model().quantize(4, group_size=group_size).bfloat16()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.generate(INPUT_IDS, max_new_tokens=3, do_sample=False)
    assert len(list_moved(model)) == 8 and all(list_moved(model))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)
    assert all(list_moved(loaded))


@needs_the_product
@pytest.mark.parametrize("sample", [False, True])
def test_no_weight_is_moved_back_while_a_model_answers(
    sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back and forth for every token would take as long as unpacking."""
    calls = []
    restore = Int4Blocks.restore
    monkeypatch.setattr(Int4Blocks, "restore", lambda self: calls.append(1) or restore(self))
    model = make_model().quantize(4).bfloat16()
    for _ in range(2):
        model.generate(INPUT_IDS, max_new_tokens=4, do_sample=sample)
    assert len(list(model.stream_generate(INPUT_IDS, max_new_tokens=4))) > 1
    assert all(list_moved(model)) and not calls
    model.state_dict()
    assert len(calls) == 8


@needs_the_product
@both_kinds
def test_a_model_generates_as_the_unpacked_one(group_size: int | None) -> None:
    model = make_model().quantize(4, group_size=group_size).bfloat16()
    plain = copy.deepcopy(model).dequantize().float()
    with torch.no_grad():
        logits = model(INPUT_IDS).logits
        expected = plain(INPUT_IDS).logits
    assert all(list_moved(model)) and relative_error(logits, expected.double()) < 2**-5
    unpacked = model.dequantize()
    for name, value in unpacked.float().state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=2**-8, atol=0)


@needs_the_product
def test_adapters_are_trained_around_moved_weights_and_merged() -> None:
    peft = pytest.importorskip("peft")
    model = make_model().quantize(4).bfloat16()
    with torch.no_grad():
        model(INPUT_IDS)
    assert all(list_moved(model))
    expected = copy.deepcopy(model)
    names = ["query_key_value", "dense"]
    config = peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    output = adapted(INPUT_IDS, labels=LABELS, use_cache=False)
    output.loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_A" in n]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)
    adapted.eval()
    with torch.no_grad():
        logits = adapted(INPUT_IDS).logits
        assert any(list_moved(adapted))
        base = adapted.unload()
        assert torch.equal(base(INPUT_IDS).logits, expected(INPUT_IDS).logits)
    assert not torch.equal(logits, base(INPUT_IDS).logits)
