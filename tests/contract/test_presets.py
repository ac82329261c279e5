"""The presets: what the released 6B weights need, recomputed from the model's shapes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import PRESETS, ROOT, SHARED
from transformers import GenerationConfig

GENERATIONS = ("chatglm-6b", "chatglm-6b-v0")
# The weights were cut into shards when the embedding still had the rows of the first generation.
CUT_VOCAB_SIZE = 150528
SHARD_LIMIT = 2 * 10**9  # bytes
HALF, FULL = 2, 4  # bytes of a float16 and of a float32 element

Tensors = list[tuple[str, int, int]]  # name, elements, bytes of an element


def read(generation: str, name: str) -> dict[str, Any]:
    return json.loads((PRESETS / generation / name).read_text(encoding="utf-8"))


def block_tensors(prefix: str, hidden: int, inner: int, inv_freq: int) -> Tensors:
    """The tensors of one block in the order of the original's modules.

    The official shards hold the layer norms in float32 and all the rest in float16, the buffer of
    rotary frequencies included.
    """
    return [
        (f"{prefix}.input_layernorm.weight", hidden, FULL),
        (f"{prefix}.input_layernorm.bias", hidden, FULL),
        (f"{prefix}.attention.rotary_emb.inv_freq", inv_freq, HALF),
        (f"{prefix}.attention.query_key_value.weight", 3 * hidden * hidden, HALF),
        (f"{prefix}.attention.query_key_value.bias", 3 * hidden, HALF),
        (f"{prefix}.attention.dense.weight", hidden * hidden, HALF),
        (f"{prefix}.attention.dense.bias", hidden, HALF),
        (f"{prefix}.post_attention_layernorm.weight", hidden, FULL),
        (f"{prefix}.post_attention_layernorm.bias", hidden, FULL),
        (f"{prefix}.mlp.dense_h_to_4h.weight", inner * hidden, HALF),
        (f"{prefix}.mlp.dense_h_to_4h.bias", inner, HALF),
        (f"{prefix}.mlp.dense_4h_to_h.weight", hidden * inner, HALF),
        (f"{prefix}.mlp.dense_4h_to_h.bias", hidden, HALF),
    ]


def all_tensors(config: dict[str, Any], vocab_size: int) -> Tensors:
    """Every tensor of a released checkpoint; the tied matrix is stored twice."""
    hidden, inner = config["hidden_size"], config["inner_hidden_size"]
    inv_freq = hidden // config["num_attention_heads"] // 4
    tensors = [("transformer.word_embeddings.weight", vocab_size * hidden, HALF)]
    for layer in range(config["num_layers"]):
        tensors += block_tensors(f"transformer.layers.{layer}", hidden, inner, inv_freq)
    return [
        *tensors,
        ("transformer.final_layernorm.weight", hidden, FULL),
        ("transformer.final_layernorm.bias", hidden, FULL),
        ("lm_head.weight", vocab_size * hidden, HALF),
    ]


def cut_into_shards(tensors: Tensors) -> Iterator[list[str]]:
    """Fill shard after shard, each up to the limit."""
    shard, size = [], 0
    for name, elements, width in tensors:
        if size + elements * width > SHARD_LIMIT:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += elements * width
    yield shard


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_index_follows_from_the_shapes(generation: str) -> None:
    config, index = (
        read(generation, "config.json"),
        read(generation, "pytorch_model.bin.index.json"),
    )
    shards = list(cut_into_shards(all_tensors(config, CUT_VOCAB_SIZE)))
    assert [len(shard) for shard in shards] == [25, 63, 61, 63, 60, 63, 32, 1]
    assert index["weight_map"] == {
        name: f"pytorch_model-{number:05d}-of-00008.bin"
        for number, shard in enumerate(shards, start=1)
        for name in shard
    }
    sizes = [elements * width for _, elements, width in all_tensors(config, config["vocab_size"])]
    assert index["metadata"] == {"total_size": sum(sizes)}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_index_names_the_model_s_own_tensors(generation: str) -> None:
    """The model has every tensor of the index but the rotary frequencies, in the same shape."""
    config = read(generation, "config.json")
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config))
    stored = {
        name: elements
        for name, elements, _ in all_tensors(config, config["vocab_size"])
        if not name.endswith("rotary_emb.inv_freq")
    }
    assert {name: math.prod(t.shape) for name, t in model.state_dict().items()} == stored


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the golden data beside the repository")
def test_the_index_is_the_official_one_with_the_true_size() -> None:
    facts = json.loads((SHARED / "golden/checkpoint/index_facts.json").read_text())
    official = {name: shard for shard, names in facts["per_shard"].items() for name in names}
    for generation in GENERATIONS:
        assert read(generation, "pytorch_model.bin.index.json")["weight_map"] == official
    late, first = (read(g, "pytorch_model.bin.index.json")["metadata"] for g in GENERATIONS)
    assert late["total_size"] == facts["config_true_shapes_late_total_fp16_ln_fp32"]
    assert first["total_size"] == facts["total_size_in_index"]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_configuration_has_the_generation_s_ids(generation: str) -> None:
    """What the file says is what the configuration class fills in for that vocabulary."""
    given = read(generation, "config.json")
    config, filled = ChatGLMConfig(**given), ChatGLMConfig(vocab_size=given["vocab_size"])
    names = [name for name in given if name not in ("architectures", "auto_map", "torch_dtype")]
    assert {name: getattr(filled, name) for name in names} == {name: given[name] for name in names}
    assert (config.dtype, config.architectures) == (
        torch.float16,
        ["ChatGLMForConditionalGeneration"],
    )
    assert given["auto_map"] == json.loads((ROOT / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize(("generation", "end_id"), [("chatglm-6b", 2), ("chatglm-6b-v0", 20002)])
def test_generation_stops_and_samples_as_the_original(generation: str, end_id: int) -> None:
    config = read(generation, "config.json")
    read_back = GenerationConfig.from_pretrained(PRESETS / generation).to_diff_dict()
    del read_back["transformers_version"]
    assert read_back == {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], end_id],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "top_p": 0.7,
        "temperature": 0.95,
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real vocabularies beside the repository")
@pytest.mark.parametrize(
    ("generation", "vocabulary", "golden"),
    [
        ("chatglm-6b", "ice_text.v1.1.model", "late130528_api.json"),
        ("chatglm-6b-v0", "ice_text.v0.model", "fork150528_api.json"),
    ],
)
def test_the_tokenizer_has_the_original_s_ids(
    generation: str, vocabulary: str, golden: str, tmp_path: Path
) -> None:
    (tmp_path / "ice_text.model").symlink_to(SHARED / "tokenizers" / vocabulary)
    (tmp_path / "tokenizer_config.json").symlink_to(PRESETS / generation / "tokenizer_config.json")
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path)
    info = json.loads((SHARED / "golden/tokenizer" / golden).read_text(encoding="utf-8"))["info"]
    assert tokenizer.vocab_size == info["vocab_size"]
    assert tokenizer.padding_side == info["padding_side"]
    assert tokenizer.special_tokens_map == info["special_tokens_map"]
    ids = {name: value for name, value in info["attrs"].items() if isinstance(value, int)}
    assert {name: getattr(tokenizer, name) for name in ids} == ids
    config = read(generation, "config.json")
    for name in ("bos", "mask", "gmask", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == config[f"{name}_token_id"]
    assert tokenizer.eop_token_id == config["eos_token_id"]
