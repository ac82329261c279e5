"""What scripts of others rely on: public names, signatures in the original's order, CLI options."""

import argparse
import importlib
import inspect
import json
from typing import Any

import pytest
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, import_from_package

REQUIRED = inspect.Parameter.empty
GENERATOR = "modeling_chatglm.ChatGLMForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": GENERATOR,
    "AutoModelForCausalLM": GENERATOR,
    "AutoModelForSeq2SeqLM": GENERATOR,
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
PUBLIC_NAMES = {
    "answer_text_chatglm": {
        "HANZI",
        "StopOnText",
        "cut_at_stops",
        "finish_answer",
        "has_settled_stop",
        "settle_answer",
        "tidy_answer",
    },
    "cache_chatglm": {
        "ChatGLMCache",
        "KeyValues",
        "QuantizedReservedLayer",
        "ReservedLayer",
        "extend_cache",
        "prepend_prefix",
    },
    "checkpoint_chatglm": {
        "REMEDY",
        "WEIGHT_FILES",
        "Checkpoint",
        "LatePatterns",
        "PendingTensor",
        "StoredTensor",
        "UnreadableWeightsError",
        "check_settings",
        "check_token_ids",
        "forget_pages",
        "is_mapped",
        "list_weight_files",
        "open_shards",
        "read_object",
        "read_weight_map",
        "whole_shape",
        "without_patterns",
    },
    "configuration_chatglm": {"ChatGLMConfig"},
    "conversation_chatglm": {
        "ChatMixin",
        "ChatOverflowWarning",
        "check_history",
    },
    "decoding_chatglm": {"Answer", "RowDecoder", "find_limit", "stream_answer"},
    "drafting_chatglm": {"PromptLookup"},
    "drawing_chatglm": {
        "Draw",
        "build_processors",
        "draw_token",
        "find_foreign_options",
        "is_draw_known",
        "make_cache",
        "settle",
    },
    "environment_chatglm": {
        "CACHE_NAME",
        "CACHE_NAMES",
        "TESTED_TRANSFORMERS",
        "acts_with_adapters",
        "change_load_settings",
        "check_dtype_name",
        "check_transformers",
        "choose_cache",
        "find_engine",
        "find_input_device",
        "find_learned_prompt",
        "find_twin",
        "keep_float_norms",
        "keep_whole",
        "kernels_off",
        "loading_own_dtype",
        "may_use_kernels",
        "read_load_settings",
        "read_quantize_options",
        "refuse_embedded_prompt",
        "refuse_weight_of_integers",
        "rename_cache",
        "renew_ties",
        "returns_with_adapters",
        "translate_load_options",
        "try_first",
        "with_fast_products",
    },
    "generation_chatglm": {
        "GLMGenerationMixin",
        "HighestLogitsWarper",
        "InvalidScoreLogitsProcessor",
        "NucleusLogitsWarper",
        "check_options",
        "replace_warpers",
    },
    "modeling_chatglm": {
        "ChatGLMForConditionalGeneration",
        "ChatGLMForSequenceClassification",
        "ChatGLMModel",
        "ChatGLMPreTrainedModel",
    },
    "quantization": {
        "QuantizedEmbedding",
        "QuantizedLinear",
        "dequantize_weight",
        "quantize_weight",
        "quantized_linear",
    },
    "quantization_cuda": {"CudaKernels", "find_kernels"},
    "quantization_cuda_source": {"MODULES", "SOURCES", "THREADS", "WARPS", "Variant"},
    "quantization_nvrtc": {
        "KernelError",
        "check_driver",
        "choose_architecture",
        "compile_source",
        "list_nvrtc_files",
        "load_driver",
        "load_nvrtc",
    },
    "quantization_torch": {
        "Int4Blocks",
        "ReorderedWeight",
        "find_int4_block_rows",
        "find_int8_product",
    },
    "rotary_chatglm": {"RotaryEmbedding", "apply_rotary"},
    "rows_chatglm": {
        "PromptReading",
        "Row",
        "RowCaches",
        "attend_rows",
        "decode_rows",
        "read_prompt",
    },
    "scoring_chatglm": {
        "AnswerScores",
        "ScoringMixin",
        "check_scores",
        "score_rows",
        "shift_labels",
        "watch_labels",
    },
    "quantizer_chatglm": {
        "ChatGLMQuantizationConfig",
        "ChatGLMQuantizer",
        "QuantizationMixin",
        "QuantizedLoadingMixin",
        "check_checkpoint",
        "note_ties",
        "swap_layers",
    },
}
# The original's parameters in its order, with its defaults. Ours may come behind them.
CHAT_SAMPLING = {
    "do_sample": True,
    "top_p": 0.7,
    "temperature": 0.95,
    "logits_processor": None,
}
ORIGINAL_METHODS: dict[str, dict[str, Any]] = {
    "chat": {
        "tokenizer": REQUIRED,
        "query": REQUIRED,
        "history": None,
        "max_length": 2048,
        "num_beams": 1,
        **CHAT_SAMPLING,
    },
    "stream_chat": {
        "tokenizer": REQUIRED,
        "query": REQUIRED,
        "history": None,
        "max_length": 2048,
        **CHAT_SAMPLING,
    },
    "stream_generate": {
        "input_ids": REQUIRED,
        "generation_config": None,
        "logits_processor": None,
        "stopping_criteria": None,
        "prefix_allowed_tokens_fn": None,
    },
    "quantize": {"bits": REQUIRED, "empty_init": False},
    "process_response": {"response": REQUIRED},
}
OUR_OWN = {
    "chat": {"stop": None, "overflow": "error"},
    "stream_chat": {"stop": None, "overflow": "error", "deltas": False},
    "quantize": {"group_size": None, "embeddings": False, "activations": None},
}
# What the original's forward took.
FORWARD = {
    ChatGLMModel: (
        "input_ids",
        "position_ids",
        "attention_mask",
        "past_key_values",
        "inputs_embeds",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ),
    ChatGLMForConditionalGeneration: (
        "input_ids",
        "position_ids",
        "attention_mask",
        "past_key_values",
        "inputs_embeds",
        "labels",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ),
}
CONFIG_FIELDS = {
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "layernorm_epsilon",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "mask_token_id",
    "gmask_token_id",
    "pad_token_id",
    "max_sequence_length",
    "inner_hidden_size",
    "position_encoding_2d",
    "quantization_bit",
    "pre_seq_len",
    "prefix_projection",
}
TOKENIZER_OPTIONS: dict[str, Any] = {
    "vocab_file": REQUIRED,
    "do_lower_case": False,
    "remove_space": False,
    "bos_token": "<sop>",
    "end_token": "</s>",
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
    "padding_side": "left",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "num_image_tokens": 20000,
}
# Option: what it takes, its default.
FOLDER_OPTIONS: dict[str, tuple[Any, Any]] = {
    "FOLDER": ("FOLDER", None),
    "--model": ("PATH", None),
    "--trust-folder-code": (None, False),
    "--verify": (None, False),
}
CHAT_OPTIONS: dict[str, tuple[Any, Any]] = {
    **FOLDER_OPTIONS,
    "--adapter": ("DIR", None),
    "--any-base": (None, False),
    "--bits": ((4, 8), None),
    "--device": ("D", None),
    "--dtype": ("D", None),
    "--max-length": ("N", None),
    "--max-new-tokens": ("N", None),
    "--overflow": (("rounds", "summarize", "error"), "rounds"),
    "--top-p": ("F", None),
    "--temperature": ("F", None),
    "--greedy": (None, False),
    "--seed": ("N", None),
}
CHECK_OPTIONS: dict[str, tuple[Any, Any]] = {
    "FOLDER": ("FOLDER", None),
    "--deep": (None, False),
    "--json": (None, False),
}
# The words without dashes go by the name of what they take.
QUANTIZE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "SRC": ("SRC", None),
    "DST": ("DST", None),
    "--model": ("SRC", None),
    "--verify": (None, False),
    "--bits": ((4, 8), None),
    "--group-size": ((32, 64, 128), None),
    "--embeddings": (None, False),
    "--lora": ("DIR", None),
    "--any-base": (None, False),
}
ADOPT_OPTIONS: dict[str, tuple[Any, Any]] = {
    "FOLDER": ("FOLDER", None),
    "--dry-run": (None, False),
    "--undo": (None, False),
    "--out": ("DIR", None),
    "--bits": ((4, 8), None),
    "--lora": ("DIR", None),
    "--any-base": (None, False),
    "--safetensors": (None, False),
    "--ptuning": ("DIR", None),
}
EXPORT_OPTIONS: dict[str, tuple[Any, Any]] = {
    "DIR": ("DIR", None),
    "--model": ("FOLDER", None),
    "--check": ("FILE", None),
    "--trust-folder-code": (None, False),
    "--verify": (None, False),
}
MERGE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "SRC": ("SRC", None),
    "DST": ("DST", None),
    "--model": ("SRC", None),
    "--verify": (None, False),
    "--lora": ("DIR", None),
    "--any-base": (None, False),
    "--format": (("safetensors", "bin"), "safetensors"),
    "--dtype": (("float32", "float16", "bfloat16"), None),
}
PUBLISH_OPTIONS: dict[str, tuple[Any, Any]] = {
    "FOLDER": ("FOLDER", None),
    "--repo": ("OWNER/NAME", None),
    "--private": (None, False),
    "--dry-run": (None, False),
    "--message": ("TEXT", None),
}
BENCH_OPTIONS: dict[str, tuple[Any, Any]] = {
    **FOLDER_OPTIONS,
    "--bits": ((4, 8), None),
    "--device": ("D", None),
    "--dtype": ("D", None),
    "--threads": ("N", None),
    "--prompt-length": ("N", 64),
    "--new-tokens": ("N", 32),
    "--batch": ("N", 1),
    "--train": (("full", "lora", "qlora"), None),
    "--length": ("N", 512),
    "--json": (None, False),
}


def parameters(function: Any) -> dict[str, Any]:
    """Names and defaults in their order, without `self` and without what is collected."""
    collected = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.name != "self" and p.kind not in collected}


def takes_more_keywords(function: Any) -> bool:
    found = inspect.signature(function).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found)


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names(module: str) -> None:
    loaded = importlib.import_module(f"chatglm_6b.{module}")
    assert set(loaded.__all__) == PUBLIC_NAMES[module]
    assert all(hasattr(loaded, name) for name in PUBLIC_NAMES[module])


def test_the_auto_classes_lead_to_classes_that_exist() -> None:
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == AUTO_MAP
    tokenizer = json.loads((ROOT / "tokenizer_config.json").read_text(encoding="utf-8"))
    slow, fast = tokenizer["auto_map"]["AutoTokenizer"]
    assert fast is None
    for target in {*AUTO_MAP.values(), slow}:
        module, name = target.split(".")
        assert inspect.isclass(getattr(importlib.import_module(f"chatglm_6b.{module}"), name))


@pytest.mark.parametrize("name", ORIGINAL_METHODS)
def test_methods_have_the_original_signature(name: str) -> None:
    method = getattr(ChatGLMForConditionalGeneration, name)
    expected = ORIGINAL_METHODS[name] | OUR_OWN.get(name, {})
    assert list(parameters(method).items()) == list(expected.items())
    assert takes_more_keywords(method) == (name != "process_response")


@pytest.mark.parametrize("model_class", FORWARD, ids=lambda model_class: model_class.__name__)
def test_forward_takes_all_the_original_took_by_name(model_class: Any) -> None:
    found = parameters(model_class.forward)
    assert {name: found.get(name, REQUIRED) for name in FORWARD[model_class]} == dict.fromkeys(
        FORWARD[model_class]
    )
    assert next(iter(found)) == "input_ids"
    assert takes_more_keywords(model_class.forward)


def test_configuration_and_tokenizer_take_the_original_options() -> None:
    assert parameters(ChatGLMConfig.__init__).keys() >= CONFIG_FIELDS
    found = parameters(ChatGLMTokenizer.__init__)
    assert {name: found.get(name) for name in TOKENIZER_OPTIONS} == TOKENIZER_OPTIONS
    assert next(iter(found)) == "vocab_file"


def test_the_modules_that_scripts_reach_into() -> None:
    """Names from the official fine-tuning and multi-device scripts."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "inner_hidden_size": 16, "num_layers": 1}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**sizes, pre_seq_len=2))
    assert model.get_input_embeddings() is model.transformer.word_embeddings
    assert model.get_output_embeddings() is model.lm_head
    names = {name for name, _ in model.transformer.named_children()}
    assert names >= {"word_embeddings", "layers", "final_layernorm", "prefix_encoder"}
    assert model.base_model is model.transformer
    assert list(model._no_split_modules) == ["GLMBlock"]
    assert type(model.transformer.layers[0]).__name__ == "GLMBlock"


def test_the_loader_s_signature() -> None:
    expected = {"path": REQUIRED, "bits": None, "device": None, "dtype": None}
    expected |= {"verify": False, "adapters": None}
    load_model = import_from_package("chatglm.loading").load_model
    assert list(parameters(load_model).items()) == list(expected.items())


def test_the_commands_are_frozen() -> None:
    commands = import_from_package("chatglm.cli").COMMANDS
    assert set(commands) == {
        "adopt",
        "bench",
        "chat",
        "check",
        "data",
        "export-tokenizer",
        "merge",
        "publish",
        "quantize",
        "train",
    }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("adopting.command", ADOPT_OPTIONS),
        ("benching.command", BENCH_OPTIONS),
        ("serving.chat", CHAT_OPTIONS),
        ("checking.command", CHECK_OPTIONS),
        ("exporting.command", EXPORT_OPTIONS),
        ("converting.merge", MERGE_OPTIONS),
        ("publishing.publish", PUBLISH_OPTIONS),
        ("converting.quantize", QUANTIZE_OPTIONS),
    ],
    ids=["adopt", "bench", "chat", "check", "export-tokenizer", "merge", "publish", "quantize"],
)
def test_the_options_of_the_commands_are_frozen(
    module: str, expected: dict[str, tuple[Any, Any]]
) -> None:
    parser = import_from_package(f"chatglm.{module}").make_parser()
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    assert {
        option: (action.choices or action.metavar, action.default)
        for action in actions
        for option in action.option_strings or [action.metavar]
    } == expected
    assert all(action.help for action in actions)
