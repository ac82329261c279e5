"""A12: keywords of the official repositories and of transformers 4, by both doors.

Each is taken for what it meant, or refused in one line that names it. Some were ignored, and some
ended in a TypeError of another library.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_6b.quantization import QuantizedEmbedding, QuantizedLinear
from conftest import build_model, import_from_package
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils.logging import warning_once

IDS = torch.tensor([[7, 8, 9, 11, 12]])
OURS = {"quant_method": "chatglm", "bits": 8}
Load = Callable[..., Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .use_auth_token. argument is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]


@pytest.fixture(params=["hub", "package"])
def trust(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What opens one of the doors; scripts of 2023 trust the folder's code by both."""
    is_package = request.param == "package"
    door = import_from_package("chatglm.door").package_code if is_package else None
    with door() if door is not None else contextlib.nullcontext():
        yield {"trust_remote_code": True}


@pytest.fixture
def load(trust: dict[str, Any], tiny_repo: Path) -> Load:
    def load(auto_class: Any = AutoModel, folder: Path = tiny_repo, **options: Any) -> Any:
        return auto_class.from_pretrained(folder, **trust, **options)

    return load


def describe(model: Any) -> tuple[int, bool]:
    """Return the bits of a model's packed layers, 0 for none, and whether the embedding is one."""
    layer = model.transformer.layers[0].mlp.dense_4h_to_h
    bits = layer.bits if hasattr(layer, "weight_scale") else 0
    assert model.config.quantization_bit == bits
    return bits, hasattr(model.get_input_embeddings(), "weight_scale")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"load_in_8bit": True}, (8, False)),
        ({"load_in_4bit": True}, (4, False)),
        ({"load_in_8bit": True, "load_in_4bit": False}, (8, False)),
        ({"load_in_8bit": False}, (0, False)),
        ({"load_in_8bit": None, "load_in_4bit": None}, (0, False)),
        ({"load_in_8bit": True, "device_map": {"": "cpu"}}, (8, False)),
        ({"load_in_4bit": True, "torch_dtype": torch.float16}, (4, False)),
        ({"load_in_4bit": True, "quantize_embeddings": True}, (4, True)),
        ({"quantization_bit": 4}, (4, False)),
        ({"quantization_bit": 8}, (8, False)),
        ({"quantization_bit": 0}, (0, False)),
        ({"quantization_bit": 4, "quantize_embeddings": True}, (4, True)),
        ({"quantization_bit": 4, "quantization_embeddings": True}, (4, True)),
        ({"quantization_bit": 8, "quantize_embeddings": False}, (8, False)),
        ({"quantize_embeddings": False}, (0, False)),
    ],
    ids=str,
)
def test_formats_are_asked_for_by_keyword(
    options: dict[str, Any], expected: tuple[int, bool], load: Load
) -> None:
    model = load(**options)
    assert describe(model) == expected
    if expected[0]:
        packed = load().quantize(expected[0], embeddings=expected[1])
        with torch.no_grad():
            found, wanted = model.float()(IDS).logits, packed.float()(IDS).logits
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_load_in_8bit_says_whose_bits_they_are(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    warning_once.cache_clear()
    for auto_class in (AutoModel, AutoModelForCausalLM):
        load(auto_class, load_in_8bit=True)
    (line,) = [r.getMessage() for r in caplog.records if "load_in_8bit" in r.getMessage()]
    assert "ChatGLM's own 8 bits, as quantize(8)" in line
    assert "quantization_config=BitsAndBytesConfig(load_in_8bit=True)" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"load_in_8bit": True, "load_in_4bit": True},
            "^load_in_4bit and load_in_8bit ask",
        ),
        (
            {"load_in_8bit": True, "quantization_config": OURS},
            "^load_in_8bit and quantization_c",
        ),
        (
            {"load_in_4bit": True, "quantization_config": BitsAndBytesConfig()},
            "^load_in_4bit and quantization_config ask for two formats .*: pass one",
        ),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "^llm_int8_threshold: options of bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, r"BitsAndBytesConfig\(\.\.\.\)"),
        ({"load_in_8bit_fp32_cpu_offload": True}, "^load_in_8bit_fp32_cpu_offload: options"),
        ({"quantization_bit": 3}, "must be 4 or 8, got 3|must be one of .* got 3"),
        ({"quantize_embeddings": True}, "^quantize_embeddings=True without bits packs nothing"),
        ({"from_tf": True}, "^from_tf=True: ChatGLM's weights are PyTorch's"),
        ({"from_flax": True}, "^from_flax=True: ChatGLM's weights are PyTorch's"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_by_name(
    options: dict[str, Any], words: str, load: Load
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_two_bits_for_one_model_are_refused(load: Load, tiny_repo: Path, tmp_path: Path) -> None:
    words = "is quantized to 4 bits and cannot be quantized to 8 bits"
    with pytest.raises(ValueError, match=words):
        load(load_in_8bit=True, quantization_bit=4)
    load().quantize(4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(folder=tmp_path, load_in_8bit=True)
    assert describe(load(folder=tmp_path, load_in_4bit=True)) == (4, False)


@pytest.mark.parametrize(
    "options",
    [
        {"empty_init": False},
        {"empty_init": True},
        {"revision": "v1.1.0", "empty_init": False, "resume_download": True},
        {"use_auth_token": None},
        {"use_auth_token": False},
        {"use_auth_token": "hf_secret"},
        {"from_tf": False, "from_flax": False},
        {"low_cpu_mem_usage": True, "mirror": "tuna", "proxies": None},
        {"force_download": False, "local_files_only": True, "code_revision": None},
    ],
    ids=str,
)
def test_what_changes_no_weight_is_accepted(options: dict[str, Any], load: Load) -> None:
    """Revisions are of repositories on the Hub: a folder has one."""
    plain = load().state_dict()
    assert all(torch.equal(plain[n], t) for n, t in load(**options).state_dict().items())


def test_a_keyword_that_nobody_had_is_refused_by_name(load: Load) -> None:
    with pytest.raises(TypeError, match="'nonsense'"):
        load(nonsense=3)


@pytest.mark.parametrize("projects", [False, True])
def test_a_prefix_is_asked_for_by_keyword(projects: bool, load: Load) -> None:
    model = load(pre_seq_len=12, prefix_projection=projects)
    encoder = model.transformer.prefix_encoder
    assert encoder.embedding.weight.shape[0] == 12 and hasattr(encoder, "trans") == projects
    assert (model.config.pre_seq_len, model.config.prefix_projection) == (12, projects)
    config = load(AutoConfig, pre_seq_len=12, prefix_projection=projects)
    assert load(config=config).transformer.prefix_encoder.embedding.weight.shape[0] == 12


def test_a_configuration_that_was_given_stays_as_it_was(load: Load) -> None:
    config = load(AutoConfig, quantization_bit=4)
    assert describe(load(config=config, quantize_embeddings=True)) == (4, True)
    assert config.quantization_embeddings is False


def test_the_tokenizer_takes_the_keywords_of_its_time(load: Load) -> None:
    options = {"revision": "main", "use_fast": False, "padding_side": "left"}
    options |= {"resume_download": True, "remove_space": False, "do_lower_case": False}
    assert load(AutoTokenizer, **options)("hi") == load(AutoTokenizer)("hi")


# The methods


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4}, (4, False)),
        ({"bits": 4, "quantize_embeddings": True}, (4, True)),
        ({"bits": 8, "quantize_embeddings": False}, (8, False)),
        ({"bits": 8, "use_quantization_cache": False, "empty_init": False}, (8, False)),
        ({"bits": 4, "quantize_embeddings": True, "use_quantization_cache": True}, (4, True)),
        ({"bits": 4, "kernel_file": "", "parallel_num": 4}, (4, False)),
        ({"bits": 4, "compile_parallel_kernel": False, "source_code": None}, (4, False)),
        ({"bits": 0, "quantize_embeddings": False}, (0, False)),
    ],
    ids=str,
)
def test_quantize_takes_the_official_keywords(
    options: dict[str, Any], expected: tuple[int, bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = build_model().quantize(**options)
    assert describe(model) == expected
    assert type(model.get_input_embeddings()) is QuantizedEmbedding or not expected[1]
    said = " ".join(record.getMessage() for record in caplog.records)
    for name in set(options) - {"bits", "quantize_embeddings", "empty_init"}:
        assert name in said
    assert "quantize_embeddings" not in said


def test_both_names_of_one_option_mean_the_same() -> None:
    ours, official = build_model(), build_model()
    ours.quantize(4, embeddings=True)
    official.quantize(4, quantize_embeddings=True)
    assert describe(ours) == describe(official) == (4, True)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, official(IDS).logits)


@pytest.mark.parametrize("name", ["groupsize", "device", "weight_bit_width", "quantize_embedding"])
def test_quantize_refuses_what_it_does_not_know(name: str) -> None:
    model = build_model()
    with pytest.raises(ValueError, match=rf"quantize\(\) has no option {name}: it takes bits"):
        model.quantize(4, **{name: 32})
    assert describe(model) == (0, False)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half().quantize(4),
        lambda model: model.quantize(4).half(),
        lambda model: model.quantize(4).half().float(),
        lambda model: model.half().quantize(4).to("cpu").eval(),
    ],
    ids=["half first", "half then", "and float", "moved"],
)
def test_the_orders_of_the_official_scripts(change: Callable[[Any], Any]) -> None:
    assert describe(change(build_model())) == (4, False)


def test_construction_takes_empty_init() -> None:
    config = build_model().config
    for kind in (ChatGLMModel, ChatGLMForConditionalGeneration):
        for empty_init in (True, False):
            assert all(p.isfinite().all() for p in kind(config, empty_init=empty_init).parameters())


def test_a_model_with_adapters_is_not_quantized() -> None:
    """Its layers are peft's: what would be packed is another layer than a reader thinks."""
    config = LoraConfig(r=2, target_modules=["query_key_value"])
    wrapped = get_peft_model(build_model(), config)
    words = r"query_key_value has an adapter around it \(peft\.tuners\.lora\.layer\.Linear\)"
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ValueError, match=words) as caught:
            model.quantize(4)
        assert "before adding adapters" in str(caught.value)
        assert "merge_and_unload()" in str(caught.value)
    assert describe(wrapped.merge_and_unload().quantize(4)) == (4, False)
    packed = get_peft_model(build_model().quantize(4), config)
    layer: Any = packed.get_base_model().transformer.layers[0].attention.query_key_value
    assert type(layer.base_layer) is QuantizedLinear


@pytest.mark.parametrize("name", ["return_past_key_values", "nonsense"])
def test_generate_refuses_what_it_does_not_know(name: str) -> None:
    model = build_model()
    for call in (model.generate, lambda *a, **k: list(model.stream_generate(*a, **k))):
        with pytest.raises(ValueError, match=f"'{name}'"):
            call(IDS, max_new_tokens=2, **{name: True})


def test_a_copy_of_a_folder_is_loaded_as_it_is(load: Load, tiny_repo: Path, tmp_path: Path) -> None:
    """The keywords of one load are not those of the next."""
    folder = Path(shutil.copytree(tiny_repo, tmp_path / "copy"))
    assert describe(load(folder=folder, load_in_8bit=True)) == (8, False)
    assert describe(load(folder=folder)) == (0, False)
