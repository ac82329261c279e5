"""What a folder is, told by its configuration and the names of its files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatglm.checkpoints.recognize import (
    ADAPTER,
    EMPTY,
    FIRST,
    LATER,
    NO_CONFIG,
    OTHER,
    describe_stranger,
    recognize_fields,
    recognize_folder,
)

# What is typical of the published configurations; most of their fields say nothing here.
LATE = {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "vocab_size": 130528}
LATE |= {"inner_hidden_size": 16384, "position_encoding_2d": True}
CHATGLM2 = {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "padded_vocab_size": 65024}
CHATGLM2 |= {"ffn_hidden_size": 13696, "kv_channels": 128, "multi_query_attention": True}
GLM4 = CHATGLM2 | {"padded_vocab_size": 151552}
FIRST_FAMILY = {
    "current": (LATE, (130528, 0, 0)),
    "first release": (LATE | {"vocab_size": 150528}, (150528, 0, 0)),
    "int4": (LATE | {"quantization_bit": 4}, (130528, 4, 0)),
    "int8, nothing in the prefix": (
        LATE | {"quantization_bit": 8, "pre_seq_len": None},
        (130528, 8, 0),
    ),
    "P-Tuning": (LATE | {"pre_seq_len": 128}, (130528, 0, 128)),
    "no model_type": ({k: v for k, v in LATE.items() if k != "model_type"}, (130528, 0, 0)),
    "no architectures": ({"model_type": "chatglm", "vocab_size": 320}, (320, 0, 0)),
    "classifier": (
        LATE | {"architectures": ["ChatGLMForSequenceClassification"]},
        (130528, 0, 0),
    ),
}
STRANGERS = {
    "ChatGLM2": (CHATGLM2, LATER, "a ChatGLM2 or ChatGLM3"),
    "GLM-4": (GLM4, LATER, "a GLM-4"),
    "VisualGLM": (LATE | {"image_length": 32}, LATER, "a GLM that reads images"),
    "GLM-4 of transformers": ({"model_type": "glm"}, OTHER, "a model of type glm"),
    "gpt2": ({"model_type": "gpt2"}, OTHER, "a model of type gpt2"),
    "nothing": ({}, OTHER, "no model of the first ChatGLM-6B"),
}


@pytest.mark.parametrize("name", FIRST_FAMILY)
def test_the_family(name: str) -> None:
    fields, expected = FIRST_FAMILY[name]
    found = recognize_fields(fields)
    assert (found.kind, found.is_first_family) == (FIRST, True)
    assert (found.vocab_size, found.bits, found.prefix_length) == expected


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers(name: str) -> None:
    fields, kind, called = STRANGERS[name]
    found = recognize_fields(fields)
    assert (found.kind, found.name, found.is_first_family) == (kind, called, False)
    line = describe_stranger("there", found)
    assert line.startswith(f"there is {called}, and not the first ChatGLM-6B: load it with ")
    assert "\n" not in line


def write(folder: Path, name: str, value: Any) -> Path:
    (folder / name).write_text(json.dumps(value))
    return folder


def test_folders_without_a_model(tmp_path: Path) -> None:
    found = recognize_folder(tmp_path)
    assert found.kind == EMPTY
    assert describe_stranger("x", found).startswith("x is an empty folder: download a model ")
    found = recognize_folder(write(tmp_path, "tokenizer_config.json", {}))
    assert found.kind == NO_CONFIG
    assert describe_stranger("x", found).startswith("x is no model folder: it has no config.json:")
    found = recognize_folder(write(tmp_path, "adapter_config.json", {}))
    assert (found.kind, found.base) == (ADAPTER, "")
    write(tmp_path, "adapter_config.json", {"base_model_name_or_path": "../base"})
    found = recognize_folder(tmp_path)
    assert (found.kind, found.base) == (ADAPTER, "../base")
    assert "`chatglm merge ../base NEW --lora x`" in describe_stranger("x", found)
    assert recognize_folder(write(tmp_path, "config.json", LATE)).kind == FIRST


@pytest.mark.parametrize(("text", "problem"), [("{", "is no JSON file"), ("[]", "holds a list")])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {problem}.*; fetch it again"):
        recognize_folder(tmp_path)


def test_nothing_heavy_is_needed() -> None:
    code = "import sys, chatglm.checkpoints.recognize\n"
    code += "print({'torch', 'transformers'} & sys.modules.keys())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
