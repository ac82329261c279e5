"""The storage format, the packed layer, and a model that is quantized, cast, saved and loaded."""

import copy
import gc
import json
import logging
import pickle
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chatglm_6b import quantization, quantizer_chatglm
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.quantization import (
    QuantizedLinear,
    TorchKernels,
    dequantize_weight,
    pack_int4,
    quantize_weight,
    quantized_linear,
    unpack_int4,
)
from conftest import ROOT
from torch import Tensor, nn
from transformers import AutoModel

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "bos_token_id": 304,
    "eos_token_id": 305,
    "mask_token_id": 300,
    "gmask_token_id": 301,
    "pad_token_id": 3,
}
PACKED_NAMES = {
    f"transformer.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
}
INPUT_IDS = torch.tensor([[7, 8, 9, 301, 304, 11, 12]])
LABELS = torch.tensor([[-100, -100, -100, -100, 304, 11, 12]])
STEP = 2.0**-24  # the smallest positive half
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
both_bits = pytest.mark.parametrize("bits", [4, 8])


def make_model(**options: Any) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**{**SIZES, **options})).eval()


def make_layer(bits: int, dtype: torch.dtype = torch.float32, **options: Any) -> QuantizedLinear:
    torch.manual_seed(1)
    return QuantizedLinear.from_linear(nn.Linear(24, 10, dtype=dtype, **options), bits)


def unpack(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    return dequantize_weight(layer.weight, layer.weight_scale, layer.bits, dtype)


def read_storage(model: nn.Module) -> dict[str, Tensor]:
    """Copy the integers, and the scales in float64, by name."""
    packed = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "QuantizedLinear":
            packed[f"{name}.weight"] = module.weight.detach().clone()
            packed[f"{name}.weight_scale"] = module.weight_scale.detach().double()
    assert packed
    return packed


def assert_same_storage(model: nn.Module, expected: dict[str, Tensor]) -> None:
    actual = read_storage(model)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# The format


def test_pack_int4_puts_the_even_column_in_the_high_half() -> None:
    packed = pack_int4(torch.tensor([[1, -1, -8, 7]], dtype=torch.int8))
    assert packed.dtype == torch.int8
    assert packed.view(torch.uint8).tolist() == [[0x1F, 0x87]]


def test_every_byte_survives_unpacking_and_packing() -> None:
    every_byte = torch.arange(-128, 128, dtype=torch.int8).view(16, 16)
    integers = unpack_int4(every_byte)
    assert integers.shape == (16, 32)
    assert (integers.min(), integers.max()) == (-8, 7)
    assert torch.equal(pack_int4(integers), every_byte)


@both_bits
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_values_follow_the_formula(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight = (torch.randn(37, 50) * torch.logspace(-3, 3, 37).unsqueeze(1)).to(dtype)
    limit = 2 ** (bits - 1) - 1
    values = weight.double().numpy()
    # numpy divides halves in half, everything else wider, as the original does.
    divisible = values.astype(np.float16 if dtype == torch.float16 else np.float32)
    if dtype == torch.float64:
        divisible = values
    scale = (np.abs(values).max(axis=1).astype(np.float32) / np.float32(limit)).astype(np.float16)
    integers = np.round(divisible / scale[:, None].astype(divisible.dtype))

    packed, weight_scale = quantize_weight(weight, bits)
    assert (packed.dtype, weight_scale.dtype) == (torch.int8, torch.float16)
    assert packed.shape == (37, 50 * bits // 8)
    assert weight_scale.tolist() == scale.tolist()
    stored = unpack_int4(packed) if bits == 4 else packed
    assert stored.tolist() == integers.astype(int).tolist()


@pytest.mark.parametrize(("bits", "steps", "expected"), [(8, 180, 127), (4, 10, 7)])
def test_integers_beyond_the_range_are_clamped(bits: int, steps: int, expected: int) -> None:
    weight = torch.tensor([[steps * STEP, 0.0], [-steps * STEP, 0.0]]).half()
    packed, scale = quantize_weight(weight, bits)
    assert scale.tolist() == [STEP, STEP]  # so the quotient is `steps`, which does not fit
    stored = unpack_int4(packed) if bits == 4 else packed
    assert stored.tolist() == [[expected, 0], [-expected - 1, 0]]


@both_bits
def test_rows_of_scale_zero_become_zeros(bits: int) -> None:
    packed, scale = quantize_weight(torch.tensor([[0.0, 0.0], [STEP, -STEP], [1.0, 0.0]]), bits)
    assert scale[:2].tolist() == [0.0, 0.0]
    assert packed[:2].eq(0).all()
    assert not packed[2].eq(0).all()
    assert dequantize_weight(packed, scale, bits, torch.float32)[:2].eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e7])
def test_weights_without_a_finite_scale_are_refused(value: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"mlp\.x cannot be quantized: row 1 reaches .*8319008"):
        quantize_weight(weight, 8, "mlp.x")


@pytest.mark.parametrize("bits", [1, 2, 3, 16, "4"])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=f"bits must be 4 or 8, got {bits!r}"):
        quantize_weight(torch.ones(2, 2), bits)
    with pytest.raises(ValueError, match=f"bits must be 4 or 8, got {bits!r}"):
        QuantizedLinear(2, 2, bits)


def test_odd_columns_fit_eight_bits_only() -> None:
    with pytest.raises(ValueError, match=r"5 columns, and 4 bits need an even number.*use 8 bits"):
        quantize_weight(torch.ones(2, 5), 4)
    assert quantize_weight(torch.ones(2, 5), 8)[0].shape == (2, 5)


@both_bits
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_values_are_the_exact_products_rounded_once(
    bits: int, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    layer = make_layer(bits)
    scale = layer.weight_scale.to(scale_dtype)
    integers = unpack_int4(layer.weight) if bits == 4 else layer.weight
    exact = integers.double() * scale.double().unsqueeze(1)
    actual = dequantize_weight(layer.weight, scale, bits, dtype)
    assert torch.equal(actual, exact.to(dtype))


# The layer


@both_bits
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
def test_layer_multiplies_by_its_dequantized_weight(
    bits: int, bias: bool, shape: tuple[int, ...]
) -> None:
    layer = make_layer(bits, bias=bias)
    layer.activations = "exact"
    states = torch.randn(shape)
    expected = nn.functional.linear(states, unpack(layer, torch.float32), layer.bias)
    torch.testing.assert_close(layer(states), expected)
    assert f"in_features=24, out_features=10, bias={bias}, bits={bits}" in repr(layer)


@both_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("without_kernels")
def test_layer_keeps_the_dtype_of_its_input(bits: int, dtype: torch.dtype) -> None:
    layer = make_layer(bits).to(dtype)
    states = torch.randn(5, 24, dtype=dtype)
    expected = nn.functional.linear(states, unpack(layer, dtype)) + layer.bias
    assert layer(states).dtype == dtype
    assert torch.equal(layer(states), expected)


@both_bits
def test_gradients_equal_those_of_the_dequantized_layer(bits: int) -> None:
    layer = make_layer(bits)
    layer.bias.requires_grad_(True)
    plain = nn.Linear(24, 10)
    plain.weight.data, plain.bias.data = unpack(layer, torch.float32), layer.bias.detach()
    gradients = []
    for module in (layer, plain):
        states = torch.linspace(-1, 1, 6 * 24).view(2, 3, 24).requires_grad_(True)
        module(states).pow(2).sum().backward()
        gradients.append((states.grad, module.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert layer.weight.grad is None
    assert layer.weight_scale.grad is None


def test_backward_keeps_no_dequantized_matrix() -> None:
    layer = make_layer(4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        layer(torch.randn(3, 24, requires_grad=True)).sum()
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in saved} == {
        (torch.int8, (10, 12)),
        (torch.float16, (10,)),
    }


def test_autocast_gives_the_dtype_and_gradient_of_a_linear_layer() -> None:
    layer = make_layer(8)
    states = torch.randn(3, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = quantized_linear(states, layer.weight, layer.weight_scale, 8)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    expected = unpack(layer, torch.bfloat16).sum(0).float()
    torch.testing.assert_close(states.grad, expected.expand(3, -1), rtol=0.01, atol=0.01)


# torch's own tracer makes an object of its Function class, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@both_bits
def test_layer_compiles_as_one_graph(bits: int) -> None:
    layer = make_layer(bits)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (layer, compiled):
        states = torch.linspace(-1, 1, 72).view(3, 24).requires_grad_(True)
        output = function(states)
        output.pow(2).sum().backward()
        gradients.append((output.detach(), states.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_new_layer_holds_zeros_in_the_given_dtype() -> None:
    for dtype, scale_dtype in (
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ):
        layer = QuantizedLinear(4, 2, 4, dtype=dtype)
        assert (layer.bias.dtype, layer.weight_scale.dtype) == (dtype, scale_dtype)
        assert layer(torch.ones(1, 4, dtype=dtype)).tolist() == [[0.0, 0.0]]


@both_bits
def test_float32_scales_load_exactly_into_a_float32_layer(bits: int) -> None:
    source = make_layer(bits)
    state = source.state_dict()
    state["weight_scale"] = state["weight_scale"].float() * (1 + 2.0**-20)  # no half any more
    target = QuantizedLinear(24, 10, bits)
    target.load_state_dict(state)
    assert torch.equal(target.weight_scale, state["weight_scale"])
    assert torch.equal(target.weight, source.weight)


def test_four_bit_integers_do_not_load_as_eight() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        QuantizedLinear(24, 10, 8).load_state_dict(make_layer(4).state_dict())


# The model


@both_bits
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_quantize_packs_the_blocks_and_nothing_else(bits: int, dtype: torch.dtype) -> None:
    model = make_model(pre_seq_len=3, prefix_projection=True).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.quantize(bits) is model
    assert model.config.quantization_bit == bits
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed == PACKED_NAMES
    after = model.state_dict()
    assert after.keys() == before.keys() | {f"{name}.weight_scale" for name in packed}
    for name, tensor in before.items():
        owner, _, kind = name.rpartition(".")
        if owner in packed and kind == "weight":
            integers, scale = quantize_weight(tensor, bits)
            assert torch.equal(after[name], integers)
            assert torch.equal(after[f"{owner}.weight_scale"], scale)
        else:
            assert after[name].dtype == dtype
            assert torch.equal(after[name], tensor), name
    layers = [model.get_submodule(name) for name in packed]
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    assert not any(layer.training for layer in layers)
    assert model(INPUT_IDS).logits.isfinite().all()


def test_zero_bits_change_nothing() -> None:
    model = make_model()
    assert model.quantize(0) is model
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert model.config.quantization_bit == 0


def test_the_same_bits_again_are_logged_and_others_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model().quantize(8)
    storage = read_storage(model)
    with caplog.at_level(logging.INFO, quantizer_chatglm.__name__):
        assert model.quantize(8) is model
    assert [record.message for record in caplog.records] == [
        "The model is already quantized to 8 bits."
    ]
    with pytest.raises(
        ValueError, match="quantized to 8 bits and cannot be quantized to 4 bits: load"
    ):
        model.quantize(4)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 5"):
        model.quantize(5)
    assert_same_storage(model, storage)
    assert model.config.quantization_bit == 8


class Adapter(nn.Module):
    """A wrapper round a linear layer, as LoRA makes them."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def wrap_last_layer(model: ChatGLMForConditionalGeneration) -> None:
    mlp = model.transformer.layers[1].mlp
    mlp.dense_4h_to_h = Adapter(mlp.dense_4h_to_h)


def empty_last_layer(model: ChatGLMForConditionalGeneration) -> None:
    model.transformer.layers[1].mlp.dense_4h_to_h.to("meta")


def break_last_layer(model: ChatGLMForConditionalGeneration) -> None:
    with torch.no_grad():
        model.transformer.layers[1].mlp.dense_4h_to_h.weight[3, 1] = float("nan")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (break_last_layer, {}, r"1\.mlp\.dense_4h_to_h cannot be quantized: row 3 reaches nan"),
        (None, {"inner_hidden_size": 49}, r"0\.mlp\.dense_4h_to_h has 49 columns.*use 8 bits"),
        (wrap_last_layer, {}, r"dense_4h_to_h has an adapter around it .*merge them first"),
        (empty_last_layer, {}, r"layers\.1\.mlp\.dense_4h_to_h has no values.*load the weights"),
    ],
)
def test_a_model_that_cannot_be_packed_is_left_whole(
    change: Any, options: dict[str, int], message: str
) -> None:
    model = make_model(**options)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=message):
        model.quantize(4)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert model.config.quantization_bit == 0


def test_options_of_the_original_are_ignored_aloud(caplog: pytest.LogCaptureFixture) -> None:
    make_model().quantize(8, use_quantization_cache=True)
    assert [record.message for record in caplog.records] == [
        "quantize() ignores use_quantization_cache."
    ]


def test_each_float_matrix_is_released_before_the_next_is_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    matrices = [weakref.ref(model.get_submodule(name).weight) for name in PACKED_NAMES]
    alive: list[int] = []

    def quantize_and_count(*args: Any) -> tuple[Tensor, Tensor]:
        alive.append(sum(matrix() is not None for matrix in matrices))
        return quantize_weight(*args)

    monkeypatch.setattr(quantization, "quantize_weight", quantize_and_count)
    gc.disable()
    try:
        model.quantize(4)
    finally:
        gc.enable()
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1]
    assert not any(matrix() is not None for matrix in matrices)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantized_config_builds_empty_storage(device: str) -> None:
    expected = make_model().half().quantize(4)
    with torch.device(device):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(**SIZES, quantization_bit=4)).half()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert all(layer.weight.device.type == device for layer in layers)
    state = expected.state_dict()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in state.items()
    }
    if device == "cpu":
        assert all(layer.weight.eq(0).all() for layer in layers)
    model.load_state_dict(state, assign=device == "meta")
    assert_same_storage(model, read_storage(expected))
    assert torch.equal(model.eval()(INPUT_IDS).logits, expected(INPUT_IDS).logits)


@both_bits
def test_casts_and_copies_keep_the_stored_values(bits: int) -> None:
    model = make_model().half().quantize(bits)
    storage = read_storage(model)
    for cast in ("bfloat16", "float", "double", "bfloat16", "half"):
        getattr(model, cast)()
        assert_same_storage(model, storage)
        assert model(INPUT_IDS).logits.isfinite().all()
    assert {module.weight_scale.dtype for module in model.modules() if hasattr(module, "bits")} == {
        torch.float16
    }
    logits = model(INPUT_IDS).logits
    for other in (
        model.to(torch.bfloat16).to(torch.float16).cpu(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert_same_storage(other, storage)
        assert torch.equal(other(INPUT_IDS).logits, logits)


@both_bits
def test_half_before_or_after_quantizing(bits: int) -> None:
    model = make_model().half().float()  # every weight is a half, whatever its dtype
    before = copy.deepcopy(model).half().quantize(bits)
    after = model.quantize(bits).half()
    assert {name: tensor.dtype for name, tensor in before.state_dict().items()} == {
        name: tensor.dtype for name, tensor in after.state_dict().items()
    }
    stored_after = read_storage(after)
    for name, stored in read_storage(before).items():
        if name.endswith("weight_scale"):
            assert torch.equal(stored_after[name], stored)
        else:
            # Half division can round a quotient to a tie, which then steps the other way.
            assert (stored_after[name] != stored).float().mean() < 0.02


def test_gradient_flows_through_a_quantized_model_into_its_prefix() -> None:
    model = make_model(pre_seq_len=3).quantize(4).train()
    model(INPUT_IDS, labels=LABELS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "transformer.prefix_encoder.embedding.weight" in trained
    assert model.transformer.prefix_encoder.embedding.weight.grad.abs().sum() > 0
    assert not any(name.rpartition(".")[0] in PACKED_NAMES for name in trained)


# Saving and loading


def forget_remote_code() -> None:
    """Drop the model files that transformers imported from another folder's cache."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with this model's code and a tiny configuration, without weights."""
    forget_remote_code()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(str(tmp_path / "hf"))
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **SIZES}))
    yield folder
    forget_remote_code()


def write_official_shards(folder: Path, state: dict[str, Tensor]) -> None:
    """Save as the official checkpoints are saved, rotary buffers included."""
    state = dict(state)
    for layer in range(2):
        state[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    weight_map = {}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name].clone() for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_bit": 4}))


def load(folder: Path, **options: Any) -> Any:
    model, report = AutoModel.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


def assert_loaded(model: Any, expected: nn.Module) -> None:
    assert_same_storage(model, read_storage(expected))
    for module in model.modules():
        if type(module).__name__ == "QuantizedLinear":
            assert not any(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        logits = copy.deepcopy(expected).to(model.dtype)(INPUT_IDS).logits
        assert torch.equal(model(INPUT_IDS).logits, logits)


@both_bits
def test_a_quantized_model_is_saved_and_loaded(bits: int, repository: Path) -> None:
    expected = make_model().half().quantize(bits)
    torch.save(make_model().half().state_dict(), repository / "pytorch_model.bin")
    model = load(repository, dtype=torch.float16).quantize(bits)
    saved = repository.parent / "saved"
    model.save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["quantization_bit"] == bits
    for options in (
        {"dtype": "auto"},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "device_map": {"": "cpu"}},
    ):
        reloaded = load(saved, **options)
        wanted = options["dtype"]
        assert reloaded.dtype == (torch.float16 if wanted == "auto" else wanted)
        assert_loaded(reloaded, expected)
        assert reloaded.quantize(bits) is reloaded
        with pytest.raises(ValueError, match=f"cannot be quantized to {12 - bits}"):
            reloaded.quantize(12 - bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_official_shards_load(dtype: torch.dtype, repository: Path) -> None:
    expected = make_model().half().quantize(4)
    write_official_shards(repository, expected.state_dict())
    model = load(repository, dtype=dtype)
    assert_loaded(model, expected)
    assert_loaded(model.float(), expected)
    assert_loaded(model.half(), expected)


# torch's own product with integers, which checks neither


@both_bits
@pytest.mark.parametrize("width", [8, 24, 40, 48, 64])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_torch_s_product_is_right_or_left_to_plain_torch(bits: int, width: int, rows: int) -> None:
    """At widths that are not whole vectors it gives wrong numbers, or reads what is not there."""
    linear = QuantizedLinear.from_linear(nn.Linear(width, 12, bias=False), bits)
    given = (linear.weight, linear.weight_scale, bits, "int8")
    states = torch.randn(rows, width, dtype=torch.bfloat16)
    product = TorchKernels().multiply(states, *given)
    assert (product is not None) == (width % 16 == 0 and rows > 0)
    if product is not None:
        expected = states.float() @ linear.unpack(torch.float32).T
        torch.testing.assert_close(product.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shift", [1, 4, 8, 32])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_torch_s_product_takes_memory_that_begins_anywhere(shift: int, rows: int) -> None:
    """As weights do that lie in a file; torch's kernel ends the process there."""
    linear = QuantizedLinear.from_linear(nn.Linear(64, 12, bias=False), 8)
    states = torch.randn(rows, 64, dtype=torch.bfloat16)
    expected = TorchKernels().multiply(states, linear.weight, linear.weight_scale, 8, "int8")
    weight, moved = (move_memory(x, shift) for x in (linear.weight, states))
    assert weight.data_ptr() % 64 == shift and moved.data_ptr() % 64 == shift * 2 % 64
    product = TorchKernels().multiply(moved, weight, linear.weight_scale, 8, "int8")
    assert product is not None and torch.equal(product, expected)


def move_memory(tensor: Tensor, shift: int) -> Tensor:
    """Return a copy whose memory begins so many elements behind a vector's address."""
    room = torch.empty(tensor.numel() + shift + 64, dtype=tensor.dtype)
    start = -room.data_ptr() % 64 // tensor.itemsize + shift
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
