"""Parameter names and shapes are those of the official checkpoints, and never change."""

import json
import re
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
)
from conftest import PRESETS as FOLDER
from conftest import SHARED

Shapes = dict[str, tuple[int, ...]]

PRESETS = ("chatglm-6b", "chatglm-6b-v0")
SMALL = {"num_layers": 3, "hidden_size": 32, "inner_hidden_size": 48, "num_attention_heads": 4}
UNUSED_BUFFER = re.compile(r"transformer\.layers\.\d+\.attention\.rotary_emb\.inv_freq")

each_preset = pytest.mark.parametrize("preset", PRESETS)


def read_preset(preset: str, name: str = "config.json") -> dict[str, Any]:
    return json.loads((FOLDER / preset / name).read_text(encoding="utf-8"))


def official_shapes(config: dict[str, Any]) -> Shapes:
    """The tensors of an official checkpoint that the code has ever loaded."""
    rows, hidden, inner = (config[k] for k in ("vocab_size", "hidden_size", "inner_hidden_size"))
    block = {
        "input_layernorm": (hidden,),
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    shapes: Shapes = {"transformer.word_embeddings.weight": (rows, hidden)}
    for layer in range(config["num_layers"]):
        for name, shape in block.items():
            shapes[f"transformer.layers.{layer}.{name}.weight"] = shape
            shapes[f"transformer.layers.{layer}.{name}.bias"] = shape[:1]
    for name in ("weight", "bias"):
        shapes[f"transformer.final_layernorm.{name}"] = (hidden,)
    return shapes | {"lm_head.weight": (rows, hidden)}


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build(config: dict[str, Any], device: str = "meta", **overrides: Any) -> Any:
    with torch.device(device):
        return ChatGLMForConditionalGeneration(ChatGLMConfig(**{**config, **overrides}))


@each_preset
def test_a_small_model_has_the_official_names_in_the_official_order(preset: str) -> None:
    config = read_preset(preset) | SMALL
    model = build(config, device="cpu")
    assert list(shapes_of(model).items()) == list(official_shapes(config).items())
    assert [name for name, _ in model.named_parameters()] == list(official_shapes(config))[:-1]
    assert not list(model.named_buffers())


@each_preset
def test_the_full_model_has_all_names_of_the_index_but_the_unused_buffers(preset: str) -> None:
    names = set(read_preset(preset, "pytorch_model.bin.index.json")["weight_map"])
    unused = {name for name in names if UNUSED_BUFFER.fullmatch(name)}
    assert (len(names), len(unused)) == (368, 28)
    config = read_preset(preset)
    assert shapes_of(build(config)) == official_shapes(config)
    assert official_shapes(config).keys() == names - unused


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the golden data beside the repository")
@each_preset
def test_the_full_model_has_the_recorded_shapes(preset: str) -> None:
    facts = json.loads((SHARED / "golden/checkpoint/index_facts.json").read_text())
    config = read_preset(preset)
    recorded = {
        name: tuple(config["vocab_size"] if size == "V" else size for size in shape)
        for name, shape in facts["shapes"].items()
        if name not in facts["inv_freq_names"]
    }
    assert len(recorded) == facts["n_tensors"] - 28
    assert shapes_of(build(config)) == recorded


def test_an_untied_model_has_the_same_names() -> None:
    config = read_preset(PRESETS[0]) | SMALL
    model = build(config, device="cpu", tie_word_embeddings=False)
    assert shapes_of(model) == official_shapes(config)
    assert [name for name, _ in model.named_parameters()] == list(official_shapes(config))


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_adds_the_official_names(projection: bool) -> None:
    """Those of checkpoints that the official P-Tuning v2 scripts write."""
    config = read_preset(PRESETS[0]) | SMALL
    model = build(config, device="cpu", pre_seq_len=7, prefix_projection=projection)
    prefix = "transformer.prefix_encoder"
    states = 2 * SMALL["num_layers"] * SMALL["hidden_size"]
    hidden = SMALL["hidden_size"]
    added: Shapes = {f"{prefix}.embedding.weight": (7, hidden if projection else states)}
    if projection:
        for place, size in {0: hidden, 2: states}.items():
            added[f"{prefix}.trans.{place}.weight"] = (size, hidden)
            added[f"{prefix}.trans.{place}.bias"] = (size,)
    assert shapes_of(model) == official_shapes(config) | added


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_adds_a_scale_to_each_packed_matrix(bits: int) -> None:
    config = read_preset(PRESETS[0]) | SMALL
    shapes = official_shapes(config)
    for name, (rows, *columns) in official_shapes(config).items():
        if re.search(r"\.(query_key_value|dense\w*)\.weight$", name):
            shapes[name] = (rows, columns[0] * bits // 8)
            shapes[f"{name}_scale"] = (rows,)
    model = build(config, quantization_bit=bits)
    assert shapes_of(model) == shapes
    packed = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8}
    assert packed == {name.removesuffix("_scale") for name in shapes if name.endswith("_scale")}


def test_a_classifier_has_a_score_in_the_place_of_the_head() -> None:
    config = read_preset(PRESETS[0]) | SMALL
    model = ChatGLMForSequenceClassification(ChatGLMConfig(**config, num_labels=5))
    expected = official_shapes(config) | {"score.weight": (5, SMALL["hidden_size"])}
    del expected["lm_head.weight"]
    assert shapes_of(model) == expected
