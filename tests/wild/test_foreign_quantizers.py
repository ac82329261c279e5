"""Tools that swap plain layers for their own: whether they find ours, and whether theirs compute.

They look for `torch.nn.Linear` itself. A layer that they pass over is quantized by nobody, while
the configuration says that it is; one of theirs that a program of the engine ran would be too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.environment_chatglm import find_engine, kernels_off
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import build_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

IDS = torch.tensor([[5, 197, 86, 97, 5, 197, 11, 301, 304]])
BLOCK = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LORA = LoraConfig(r=2, target_modules=["query_key_value", "dense_h_to_4h"])
# How a layer is called, what loads it, and how far logits may be off, as a part of their norm:
# measured 0.018 and 0.09.
BYTES = ("Linear8bitLt", {"load_in_8bit": True}, 0.04)
NF4 = ("Linear4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.15)
foreign_formats = pytest.mark.parametrize(
    ("kind", "options", "limit"), [BYTES, NF4], ids=["int8", "nf4"]
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* deprecated"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of floats. Do not change it."""
    path = tmp_path_factory.mktemp("foreign") / "model"
    build_model().save_pretrained(path)
    return path


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Note of every pass through the blocks whether a program of the engine ran it."""
    ran: list[bool] = []
    engine = find_engine()
    if engine is not None:
        decode = engine.decode_step

        def note(*args: Any, **kwargs: Any) -> Any:
            result = decode(*args, **kwargs)
            ran.append(result is not None)
            return result

        monkeypatch.setattr(engine, "decode_step", note)
    yield ran


def list_block_layers(model: Any) -> list[nn.Module]:
    blocks = model.transformer.layers
    return [block.get_submodule(name) for block in blocks for name in BLOCK]


def compute(model: Any) -> Tensor:
    """Return the logits of a prompt and of two single steps behind it, `(1, S + 2, V)`."""
    with torch.no_grad():
        output = model(IDS, use_cache=True)
        logits = [output.logits]
        cache = output.get("past_key_values", output.get("cache"))
        for token in (11, 86):
            logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
    return torch.cat(logits, dim=1).float()


def assert_near(found: Tensor, exact: Tensor, limit: float) -> None:
    """Off by a rounding, which is neither nothing nor much."""
    assert 1e-4 < (found - exact).norm() / exact.norm() < limit


def load_foreign(folder: Path, options: dict[str, Any]) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return ChatGLMForConditionalGeneration.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**options),
        device_map={"": "cpu"},
        dtype=torch.float32,
    ).eval()


def assert_left_alone(model: Any, steps: list[bool]) -> None:
    """The engine runs no step of a model's layers, though it does of the same plain ones."""
    found = compute(model)
    assert not any(steps)
    with kernels_off():
        torch.testing.assert_close(found, compute(model), rtol=1e-3, atol=1e-3)
    steps.clear()
    compute(build_model())
    assert steps == ([] if find_engine() is None else [False, True, True])


def test_plain_layers_are_torch_s_own() -> None:
    model = build_model()
    assert {type(layer) for layer in (*list_block_layers(model), model.lm_head)} == {nn.Linear}


def test_torch_s_dynamic_quantization_swaps_every_layer(steps: list[bool]) -> None:
    model = build_model()
    exact = compute(model)
    swapped = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    layers: list[Any] = [*list_block_layers(swapped), swapped.lm_head]
    assert {type(layer) for layer in layers} == {torch.ao.nn.quantized.dynamic.Linear}
    assert {layer.weight().dtype for layer in layers} == {torch.qint8}
    steps.clear()
    assert_near(compute(swapped), exact, 0.05)
    assert_left_alone(swapped, steps)


@foreign_formats
def test_bitsandbytes_quantizes_while_loading(
    kind: str, options: dict[str, Any], limit: float, folder: Path, steps: list[bool]
) -> None:
    model = load_foreign(folder, options)
    layers: list[Any] = list_block_layers(model)
    assert {type(layer).__name__ for layer in layers} == {kind}
    assert {layer.weight.dtype for layer in layers} <= {torch.int8, torch.uint8}
    assert getattr(model, f"is_loaded_in_{kind[6]}bit")  # and so it is
    plain = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    exact = compute(plain)
    steps.clear()
    assert_near(compute(model), exact, limit)
    assert_left_alone(model, steps)


@foreign_formats
def test_what_bitsandbytes_has_quantized_is_not_packed_again(
    kind: str, options: dict[str, Any], limit: float, folder: Path
) -> None:
    model = load_foreign(folder, options)
    words = f"query_key_value is a {kind}, .* load unquantized weights"
    for bits in (4, 8):
        with pytest.raises(ValueError, match=words):
            model.quantize(bits)
    assert {type(layer).__name__ for layer in list_block_layers(model)} == {kind}


def test_peft_finds_plain_layers() -> None:
    layers: list[Any] = list_block_layers(get_peft_model(build_model(), LORA).base_model.model)
    wrapped = [layer for layer in layers if type(layer) is LoraLinear]
    assert len(wrapped) == 2 * 3 and {type(x.base_layer) for x in wrapped} == {nn.Linear}


@foreign_formats
def test_peft_finds_the_layers_of_bitsandbytes(
    kind: str, options: dict[str, Any], limit: float, folder: Path
) -> None:
    model = load_foreign(folder, options)
    exact = compute(model)
    wrapped = get_peft_model(model, LORA).eval()
    layers: list[Any] = list_block_layers(wrapped.base_model.model)
    found = {type(layer).__module__ for layer in layers if hasattr(layer, "base_layer")}
    assert found == {"peft.tuners.lora.bnb"}
    torch.testing.assert_close(compute(wrapped), exact, rtol=1e-3, atol=1e-3)  # B is 0 at first
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert (compute(wrapped) - exact).norm() > 0.01 * exact.norm()
