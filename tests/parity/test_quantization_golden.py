"""Packed weights against the original's: matrices bit for bit, state dicts, logits, greedy text.

"late" is the last official code, whose half kernels the golden data emulates on a CPU; "cpu" is the
code of the official int4 checkpoint, which keeps float32 scales there.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.quantization import dequantize_weight, pack_int4, quantize_weight, unpack_int4
from conftest import SHARED, import_from_package
from golden_model import DTYPES, load_arrays, load_config, load_model, load_weights
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = SHARED / "golden"
MATRICES = ("r8x16", "r192x64", "halfties", "edge")
PROMPTS = ("gmask", "mask_mid", "gmask_resp", "long100")
CONTEXT = 10  # tokens of the "gmask" prompt

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden data in {SHARED}")
both_bits = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module")
def matrices() -> dict[str, Tensor]:
    return load_arrays(GOLDEN / "quantization", "matrices")


@pytest.fixture(scope="module")
def golden_logits() -> dict[str, Tensor]:
    return load_arrays(GOLDEN / "quantization", "late_tiny2d_logits")


def read_json(path: str) -> dict[str, Any]:
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


def load_quantized(
    bits: int, dtype: str, activations: str = "exact"
) -> ChatGLMForConditionalGeneration:
    model = load_model(GOLDEN / "model_late", "tiny2d").half()
    return model.quantize(bits, activations=activations).to(DTYPES[dtype])


def test_every_byte_is_packed_as_by_the_original(matrices: dict[str, Tensor]) -> None:
    unpacked = unpack_int4(matrices["unpack_table/bytes"].unsqueeze(1))
    assert torch.equal(unpacked, matrices["unpack_table/values"])
    packed = pack_int4(matrices["pack_table/pairs"])
    assert torch.equal(packed, matrices["pack_table/bytes"].unsqueeze(1))


@both_bits
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_quantized_bit_for_bit(
    name: str, bits: int, matrices: dict[str, Tensor]
) -> None:
    half = matrices[f"{name}/weight_fp16"]
    for weight, case in ((half, f"late{bits}"), (half.float(), f"late{bits}_from_fp32")):
        packed, scale = quantize_weight(weight, bits)
        assert torch.equal(packed, matrices[f"{name}/{case}/weight"]), case
        assert torch.equal(scale, matrices[f"{name}/{case}/scale"]), case
        assert scale.dtype == torch.float16


@both_bits
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_dequantized_bit_for_bit(
    name: str, bits: int, matrices: dict[str, Tensor]
) -> None:
    for case, result, dtype in (
        (f"late{bits}", "dequant_half", torch.float16),
        (f"late{bits}", "dequant_float", torch.float32),
        (f"cpu{bits}_from_fp16", "dequant_float", torch.float32),
        (f"cpu{bits}_from_fp32", "dequant_float", torch.float32),
    ):
        packed, scale = (matrices[f"{name}/{case}/{kind}"] for kind in ("weight", "scale"))
        expected = matrices[f"{name}/{case}/{result}"]
        assert torch.equal(dequantize_weight(packed, scale, bits, dtype), expected), case


@both_bits
def test_state_dict_and_config_are_the_official_ones(bits: int) -> None:
    facts = read_json("quantization/late.json")
    model = load_quantized(bits, "fp16")
    expected = {
        name: description
        for name, description in facts[f"late_quantize{bits}_state_dict"].items()
        if not name.endswith("inv_freq")
    }
    actual = {name: [str(t.dtype), list(t.shape)] for name, t in model.state_dict().items()}
    assert actual == expected
    assert model.config.quantization_bit == facts[f"late_quantize{bits}_config"]["quantization_bit"]


def test_state_dict_equals_the_original_bit_for_bit() -> None:
    actual = load_quantized(4, "fp16").state_dict()
    expected = load_file(GOLDEN / "quantization" / "late_tiny2d_int4.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@both_bits
def test_float32_logits_equal_the_original(bits: int, golden_logits: dict[str, Tensor]) -> None:
    model = load_quantized(bits, "fp32")
    prompts = read_json("model_late/tiny2d.json")["prompts"]
    for prompt in PROMPTS:
        expected = golden_logits[f"late{bits}_fp32/{prompt}/logits"]
        with torch.no_grad():
            difference = model(torch.tensor([prompts[prompt]])).logits - expected
        assert difference.abs().max() <= 1e-5 * expected.abs().max(), prompt


@both_bits
def test_half_logits_are_as_near_to_float32_as_the_original(
    bits: int, golden_logits: dict[str, Tensor]
) -> None:
    model = load_quantized(bits, "fp16")
    prompts = read_json("model_late/tiny2d.json")["prompts"]
    errors: dict[str, list[Tensor]] = {"ours": [], "original": []}
    for prompt in PROMPTS:
        truth = golden_logits[f"late{bits}_fp32/{prompt}/logits"]
        with torch.no_grad():
            ours = model(torch.tensor([prompts[prompt]])).logits.float()
        errors["ours"].append((ours - truth).flatten())
        errors["original"].append(
            (golden_logits[f"late{bits}_fp16/{prompt}/logits"] - truth).flatten()
        )
    rms = {name: torch.cat(parts).pow(2).mean().sqrt() for name, parts in errors.items()}
    assert rms["ours"] <= rms["original"], rms


@both_bits
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rounded_inputs_cost_a_few_hundredths_of_the_logits_and_no_greedy_id(
    bits: int, dtype: str, golden_logits: dict[str, Tensor]
) -> None:
    """Measured: 0.019 to 0.027 of the logits' norm."""
    compiler = import_from_package("chatglm.cpu.compiler")
    assert compiler.find_compiler() is not None, "llvmlite is a dependency"
    model = load_quantized(bits, dtype, "int8")
    prompts = read_json("model_late/tiny2d.json")["prompts"]
    for prompt in PROMPTS:
        expected = golden_logits[f"late{bits}_fp32/{prompt}/logits"]
        with torch.no_grad():
            difference = model(torch.tensor([prompts[prompt]])).logits.float() - expected
        assert 0.005 < difference.norm() / expected.norm() < 0.035, prompt
    assert_same_greedy_ids(model, bits, dtype)


@both_bits
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_greedy_ids_equal_the_original(bits: int, dtype: str) -> None:
    assert_same_greedy_ids(load_quantized(bits, dtype), bits, dtype)


def assert_same_greedy_ids(model: ChatGLMForConditionalGeneration, bits: int, dtype: str) -> None:
    """Compare with what the original generates."""
    expected = torch.tensor(
        read_json("quantization/late.json")[f"late_quantize{bits}_greedy_{dtype}"]
    )
    actual = model.generate(
        expected[:, :CONTEXT], max_length=expected.shape[1], do_sample=False, eos_token_id=None
    )
    assert actual.tolist() == expected.tolist()


def load_int4_repository() -> dict[str, Tensor]:
    """Read the state dict of the int4 code on a CPU, whose embedding and head are stored sparse."""
    return load_scattered_weights(GOLDEN / "quantization" / "int4repo_cpu4.scattered.safetensors")


def load_scattered_weights(file: Path) -> dict[str, Tensor]:
    """Read weights of which only some rows of the embedding and the head are stored."""
    state = load_file(file)
    row_ids = state.pop("row_ids")
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        rows = state[name]
        state[name] = rows.new_zeros(150528, rows.shape[1]).index_copy_(0, row_ids, rows)
    return state


def test_float32_scales_of_the_int4_repository_load_and_give_its_greedy_ids() -> None:
    options = {"quantization_bit": 4, "quantization_activations": "exact"}
    config = load_config(GOLDEN / "model_fork", "tiny2d", **options)
    model = ChatGLMForConditionalGeneration(config).eval()
    expected = load_int4_repository()
    load_weights(model, expected)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert model.transformer.layers[0].mlp.dense_h_to_4h.weight_scale.dtype == torch.float32

    assert_greedy_ids(model, "cpu4_greedy")


def assert_greedy_ids(model: ChatGLMForConditionalGeneration, case: str) -> None:
    """Compare with what the int4 code answers; it places <sop> one further than the rest."""
    ids = torch.tensor(read_json("quantization/int4repo.json")[case])
    answer_length = ids.shape[1] - CONTEXT
    positions = [*range(CONTEXT), *[CONTEXT - 2] * answer_length]
    block_positions = [*[0] * (CONTEXT - 1), *range(1, answer_length + 2)]
    with torch.no_grad():
        logits = model(ids, position_ids=torch.tensor([[positions, block_positions]])).logits
    assert logits[0, CONTEXT - 1 : -1].argmax(-1).tolist() == ids[0, CONTEXT:].tolist()


@both_bits
def test_quantized_embeddings_have_the_official_names_and_give_the_original_ids(bits: int) -> None:
    facts = read_json("quantization/int4repo.json")
    config = load_config(GOLDEN / "model_fork", "tiny2d", tie_word_embeddings=True)
    model = ChatGLMForConditionalGeneration(config).eval()
    weights = load_scattered_weights(GOLDEN / "model_fork" / "tiny2d.scattered.safetensors")
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    load_weights(model, weights)
    model.quantize(bits, embeddings=True, activations="exact")

    expected = facts[f"cpu{bits}_emb_state_dict"]
    actual = model.state_dict()
    assert set(actual) == {name for name in expected if not name.endswith("inv_freq")}
    for name, tensor in actual.items():
        dtype = "torch.float16" if name.endswith("weight_scale") else expected[name][0]
        assert [str(tensor.dtype), list(tensor.shape)] == [dtype, expected[name][1]], name
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.lm_head.weight_scale is model.transformer.word_embeddings.weight_scale
    assert model.config.quantization_embeddings
    assert_greedy_ids(model, f"cpu{bits}_emb_greedy")
