"""Groups of columns, packed embeddings, the way back, and adapters over packed layers."""

import copy
import importlib
import logging
from typing import Any

import pytest
import torch
from chatglm_6b import quantization, quantizer_chatglm
from chatglm_6b.configuration_chatglm import GROUP_SIZES, ChatGLMConfig
from chatglm_6b.environment_chatglm import find_engine
from chatglm_6b.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
)
from chatglm_6b.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_weight,
    quantize_weight,
    unpack_int4,
)
from conftest import TINY
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn

INPUT_IDS = torch.tensor([[7, 8, 9, 301, 304, 11, 12]])
LABELS = torch.tensor([[-100, -100, -100, -100, 304, 11, 12]])

pytestmark = [
    # peft reads and calls what transformers 5.23 deprecates.
    pytest.mark.filterwarnings(
        "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is:FutureWarning"
    ),
    # torch's own tracer makes an object of its Function class, which torch itself deprecates.
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
]
both_bits = pytest.mark.parametrize("bits", [4, 8])
both_kinds = pytest.mark.parametrize("group_size", [None, 32])


def make_model(**options: Any) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**{**TINY, **options})).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(INPUT_IDS.to(model.device)).logits


# Groups


@both_bits
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_group_is_quantized_as_a_row_of_its_own(bits: int, group_size: int) -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, 256) * torch.logspace(-2, 2, 256)
    packed, scale = quantize_weight(weight, bits, group_size=group_size)
    assert scale.shape == (5, 256 // group_size)
    as_rows, row_scales = quantize_weight(weight.view(-1, group_size), bits)
    assert torch.equal(packed.view(as_rows.shape), as_rows)
    assert torch.equal(scale.flatten(), row_scales)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rows = dequantize_weight(as_rows, row_scales, bits, dtype)
        assert torch.equal(dequantize_weight(packed, scale, bits, dtype), rows.view(5, 256))


def test_smaller_groups_lie_nearer_to_the_weights() -> None:
    torch.manual_seed(2)
    weight = torch.randn(16, 512)
    errors = []
    for group_size in (None, 128, 64, 32):
        packed, scale = quantize_weight(weight, 4, group_size=group_size)
        difference = dequantize_weight(packed, scale, 4, torch.float32) - weight
        errors.append(difference.pow(2).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("group_size", "message"),
    [
        (16, r"group_size must be one of \(32, 64, 128\), or None.*got 16"),
        (128, r"mlp\.x has 192 columns, which groups of 128 do not divide: use another"),
    ],
)
def test_groups_that_do_not_fit_are_refused(group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_weight(torch.ones(2, 192), 8, "mlp.x", group_size)


def test_a_group_without_a_finite_scale_names_its_row() -> None:
    weight = torch.ones(3, 64)
    weight[2, 40] = float("nan")
    with pytest.raises(ValueError, match=r"mlp\.x cannot be quantized: row 2 reaches nan"):
        quantize_weight(weight, 4, "mlp.x", 32)


@both_bits
@both_kinds
def test_large_matrices_are_worked_on_by_blocks_of_rows(
    bits: int, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Linear(64, 37)
    whole = QuantizedLinear.from_linear(linear, bits, group_size=group_size)
    results = []
    for block_weights in (quantization.CPU_BLOCK_WEIGHTS, 640, 1):
        monkeypatch.setattr(quantization, "CPU_BLOCK_WEIGHTS", block_weights)
        layer = QuantizedLinear.from_linear(linear, bits, group_size=group_size)
        assert torch.equal(layer.weight, whole.weight)
        assert torch.equal(layer.weight_scale, whole.weight_scale)
        states = torch.linspace(-1, 1, 192).view(3, 64).requires_grad_(True)
        output = layer(states)
        output.pow(2).sum().backward()
        results.append((output.detach(), states.grad))
    torch.testing.assert_close(results[1:], results[:1] * 2)


# The model


@both_bits
@pytest.mark.parametrize("is_empty", [False, True])
def test_groups_and_embeddings_are_written_to_the_config_and_load(
    bits: int, is_empty: bool
) -> None:
    model = make_model().half().quantize(bits, group_size=32, embeddings=True)
    config = model.config
    assert (config.quantization_bit, config.quantization_group_size) == (bits, 32)
    assert config.quantization_embeddings
    assert model.transformer.layers[1].mlp.dense_4h_to_h.weight_scale.shape == (64, 8)
    if is_empty:
        other = make_model().half()
        other.quantize(bits, empty_init=True, group_size=32, embeddings=True)
        assert other.lm_head.weight.eq(0).all()
    else:
        other = ChatGLMForConditionalGeneration(ChatGLMConfig(**config.to_dict())).half().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))
    assert other.lm_head.weight_scale is other.transformer.word_embeddings.weight_scale


@both_bits
@both_kinds
@pytest.mark.usefixtures("without_kernels")
def test_embedding_and_head_compute_with_the_same_dequantized_matrix(
    bits: int, group_size: int | None
) -> None:
    model = make_model().half().quantize(bits, group_size=group_size, embeddings=True)
    embedding, head = model.transformer.word_embeddings, model.lm_head
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        matrix = embedding.unpack(dtype)
        assert matrix.shape == (TINY["vocab_size"], TINY["hidden_size"])
        assert torch.equal(embedding(INPUT_IDS), matrix[INPUT_IDS])
        states = torch.randn(3, TINY["hidden_size"], dtype=dtype)
        assert torch.equal(head(states), nn.functional.linear(states, matrix))
        assert model.dtype == dtype
    assert f"320, 64, bits={bits}" in repr(embedding)


def test_an_untied_head_is_packed_on_its_own() -> None:
    model = make_model(tie_word_embeddings=False).quantize(8, embeddings=True)
    embedding = model.transformer.word_embeddings
    assert not torch.equal(model.lm_head.weight, embedding.weight)
    assert model.lm_head.weight_scale is not embedding.weight_scale


def test_the_embedding_may_follow_later() -> None:
    at_once = make_model().quantize(4, embeddings=True)
    later = make_model().quantize(4).quantize(4, embeddings=True)
    assert torch.equal(logits_of(later), logits_of(at_once))
    assert later.config.quantization_embeddings


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"group_size": 64}, "quantized to 4 bits and .* to 4 bits in groups of 64: load"),
        ({"group_size": 64}, {}, "quantized to 4 bits in groups of 64 and .* to 4 bits: load"),
    ],
)
def test_another_group_size_is_refused(
    first: dict[str, int], second: dict[str, int], message: str
) -> None:
    model = make_model().quantize(4, **first)
    before = logits_of(model)
    with pytest.raises(ValueError, match=message):
        model.quantize(4, **second)
    assert torch.equal(logits_of(model), before)
    assert model.config.quantization_group_size == first.get("group_size")


def test_the_same_format_again_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model().quantize(8, group_size=32, embeddings=True)
    with caplog.at_level(logging.INFO, quantizer_chatglm.__name__):
        assert model.quantize(8, group_size=32) is model
    assert [record.message for record in caplog.records] == [
        "The model is already quantized to 8 bits in groups of 32."
    ]
    assert model.config.quantization_embeddings


def test_a_classifier_packs_its_blocks_and_not_its_score() -> None:
    torch.manual_seed(0)
    model = ChatGLMForSequenceClassification(ChatGLMConfig(**TINY, num_labels=3)).eval()
    model.quantize(8, embeddings=True)
    assert isinstance(model.transformer.word_embeddings, QuantizedEmbedding)
    assert type(model.score) is nn.Linear
    assert logits_of(model).shape == (1, 3)


@both_kinds
def test_packed_models_survive_casts_copies_and_compilation(group_size: int | None) -> None:
    model = make_model().half()
    model.quantize(4, group_size=group_size, embeddings=True, activations="exact")
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.float().to(torch.bfloat16).half()
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in stored.items()
    }
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    copied = copy.deepcopy(model)
    assert torch.equal(logits_of(copied), logits_of(model))
    assert copied.lm_head.weight is copied.transformer.word_embeddings.weight
    model.float()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled), logits_of(model))


# How products treat their input


def treatments(model: Any) -> set[str]:
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    assert layers
    return {layer.activations for layer in layers}


def test_the_treatment_of_inputs_is_chosen_and_can_be_changed() -> None:
    model = make_model().quantize(4, embeddings=True)
    assert (model.config.quantization_activations, treatments(model)) == ("int8", {"int8"})
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = logits_of(model)
    assert model.quantize(4, activations="exact") is model
    assert (model.config.quantization_activations, treatments(model)) == ("exact", {"exact"})
    exact = logits_of(model)
    difference = (rounded - exact).norm()
    assert difference < 0.05 * exact.norm()
    assert (difference > 0) == (find_engine() is not None)  # plain torch rounds no float32
    model.quantize(4)  # keeps what it has
    assert treatments(model) == {"exact"}
    model.quantize(4, activations="int8")
    assert torch.equal(logits_of(model), rounded)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_the_treatment_of_inputs_is_written_to_the_config() -> None:
    model = make_model().quantize(8, activations="exact")
    other = ChatGLMForConditionalGeneration(ChatGLMConfig(**model.config.to_dict())).eval()
    assert treatments(other) == {"exact"}
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))
    assert make_model(quantization_activations="exact").quantize(4).config.to_dict()[
        "quantization_activations"
    ] == ("exact")


def test_an_unknown_treatment_of_inputs_is_refused() -> None:
    message = r"activations must be one of \('int8', 'exact'\), got 'int4'"
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model.quantize(4, activations="int4")
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    with pytest.raises(ValueError, match=message):
        make_model(quantization_bit=4, quantization_activations="int4")


# The way back


@both_bits
@both_kinds
@pytest.mark.usefixtures("without_kernels")
def test_dequantized_models_compute_the_same(bits: int, group_size: int | None) -> None:
    model = make_model().half().quantize(bits, group_size=group_size, embeddings=True)
    expected = logits_of(model)
    names = set(make_model().state_dict())
    assert model.dequantize() is model
    assert set(model.state_dict()) == names
    assert (model.config.quantization_bit, model.config.quantization_group_size) == (0, None)
    assert not model.config.quantization_embeddings
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(logits_of(model), expected)
    assert all(parameter.requires_grad for parameter in model.transformer.layers[0].parameters())
    model.quantize(8)


def test_dequantizing_to_another_dtype_keeps_the_rest() -> None:
    model = make_model().half().quantize(4).dequantize(torch.float32)
    layer = model.transformer.layers[0].attention.dense
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.float32, torch.float32)
    assert model.transformer.layers[0].input_layernorm.weight.dtype == torch.float16


# Adapters


def add_lora(model: Any, **options: Any) -> Any:
    peft = importlib.import_module("peft")
    torch.manual_seed(3)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config)


def lora_gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model(input_ids=INPUT_IDS, labels=LABELS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == TINY["num_layers"] * 4 * 2
    assert all("lora_" in name for name in gradients)
    return gradients


@both_bits
@both_kinds
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_lora_gradients_equal_those_over_the_dequantized_model(
    bits: int, group_size: int | None, is_checkpointed: bool
) -> None:
    packed = make_model().quantize(bits, group_size=group_size, activations="exact")
    plain = copy.deepcopy(packed).dequantize()
    gradients = []
    for model in (packed, plain):
        adapted = add_lora(model)
        if is_checkpointed:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        gradients.append(lora_gradients(adapted))
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        error = (gradients[0][name] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max(), name


MERGES = {
    "merge_adapter": lambda adapted: adapted.merge_adapter(),
    "merge_adapter_safe": lambda adapted: adapted.merge_adapter(safe_merge=True),
    "merge_and_unload": lambda adapted: adapted.merge_and_unload(),
    "merge_and_unload_safe": lambda adapted: adapted.merge_and_unload(safe_merge=True),
}
# Of those that are not LoRA, IA3 and OFT merge into integers without an error of torch's.
TUNERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(target_modules=["dense"], init_lora_weights=False),
    "adalora": lambda: AdaLoraConfig(target_modules=["dense"], total_step=9),
    "ia3": lambda: IA3Config(
        target_modules=["dense"], feedforward_modules=[], init_ia3_weights=False
    ),
    "oft": lambda: OFTConfig(target_modules=["dense"], oft_block_size=8),
    "vera": lambda: VeraConfig(target_modules=["dense"], r=2, init_weights=False),
}


@both_bits
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("tuner", TUNERS)
def test_no_adapter_is_merged_into_integers(bits: int, merge: str, tuner: str) -> None:
    packed = make_model().quantize(bits, activations="exact")
    adapted: Any = get_peft_model(packed, TUNERS[tuner]()).eval()
    expected = logits_of(adapted)
    stored = copy.deepcopy(adapted.state_dict())
    layer = rf"QuantizedLinear\(in_features=64, .*bits={bits}\)"
    with pytest.raises(ValueError, match=rf"weight of {layer}.*dequantize\(\), .*chatglm merge"):
        MERGES[merge](adapted)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapted.state_dict().items())
    assert torch.equal(logits_of(adapted), expected)  # the adapter is as active as before


@both_bits
def test_lora_merges_into_a_dequantized_copy(bits: int) -> None:
    adapted = add_lora(make_model().quantize(bits, activations="exact")).eval()
    expected = logits_of(adapted)
    merged = copy.deepcopy(adapted)
    merged.get_base_model().dequantize()
    merged = merged.merge_and_unload()
    assert type(merged.transformer.layers[0].attention.dense) is nn.Linear
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, QuantizedLinear) for module in adapted.modules())


@both_bits
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda options: "_".join(map(str, *options.items())),
)
def test_an_adapter_that_is_made_from_the_weight_is_refused(
    bits: int, options: dict[str, Any]
) -> None:
    """DoRA's magnitudes would be norms of integers, which in 8 bits have the right shape."""
    packed = make_model().quantize(bits)
    config = LoraConfig(target_modules=["dense"], **options)
    with pytest.raises(ValueError, match=r"weight of QuantizedLinear.*dequantize\(\)"):
        get_peft_model(packed, config)
    plain = get_peft_model(make_model().quantize(bits).dequantize(), config)
    assert logits_of(plain.merge_and_unload()).isfinite().all()


@both_bits
def test_what_peft_does_beside_merging_works_on_packed_layers(bits: int) -> None:
    packed = make_model().quantize(bits, activations="exact").eval()
    alone = logits_of(packed)
    adapted = add_lora(packed).eval()
    plain = copy.deepcopy(adapted)  # "svd" of peft 0.17 gives another adapter than what it is of
    plain.get_base_model().dequantize()
    for model in (adapted, plain):
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for kind in ("svd", "linear", "cat"):
        for model in (adapted, plain):
            model.add_weighted_adapter(
                ["default", "other"], [1.0, 0.0], kind, combination_type=kind
            )
            model.set_adapter(kind)
        torch.testing.assert_close(logits_of(adapted), logits_of(plain), rtol=1e-3, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), alone)
    assert torch.equal(logits_of(adapted.unload()), alone)


def test_a_packed_layer_is_not_initialized_anew() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(8, 4), 8)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight, before)
    assert unpack_int4(layer.weight).shape == (4, 16)


@both_bits
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.usefixtures("without_kernels")
def test_p_tuning_over_packed_weights_as_its_script_does_it(
    bits: int, is_checkpointed: bool
) -> None:
    """The script quantizes, makes the model half and the prefix float32, and trains the prefix."""
    packed = make_model(pre_seq_len=5, prefix_projection=True).quantize(bits)
    plain = copy.deepcopy(packed).dequantize()
    gradients = []
    for model in (packed, plain):
        model.half()
        model.transformer.prefix_encoder.float()
        model.train()
        if is_checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        torch.manual_seed(4)  # the prefix has dropout
        model(INPUT_IDS, labels=LABELS).loss.backward()
        named = model.transformer.prefix_encoder.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named})
    for name, expected in gradients[1].items():
        assert expected.dtype == torch.float32 and expected.abs().max() > 0
        error = (gradients[0][name] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max(), name
    trained = {name for name, p in packed.named_parameters() if p.grad is not None}
    assert all(name.startswith("transformer.prefix_encoder.") for name in trained)
