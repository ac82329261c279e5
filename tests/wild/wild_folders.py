"""Folders as people have them, built small, and a look at them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import build_model
from model_folders import THIN, read_json, stored

from chatglm.checking.inspection import Report, inspect_folder
from chatglm.checking.problems import PROBLEM

INDEX = "pytorch_model.bin.index.json"
PREFIX = "transformer.prefix_encoder."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13\n"
CHATGLM2 = {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "padded_vocab_size": 65024}
CHATGLM2 |= {"ffn_hidden_size": 13696, "kv_channels": 128, "multi_query_attention": True}
STRANGERS: dict[str, tuple[dict[str, Any], str]] = {
    "chatglm2": (CHATGLM2, "a ChatGLM2 or ChatGLM3"),
    "glm-4": (CHATGLM2 | {"padded_vocab_size": 151552}, "a GLM-4"),
    "glm-4-hf": ({"model_type": "glm", "architectures": ["GlmForCausalLM"]}, "of type glm"),
    "glm-10b": ({"model_type": "glm", "architectures": ["GLMModel"]}, "a GLM of before ChatGLM"),
    "visualglm": (
        {"model_type": "chatglm", "vocab_size": 130528, "image_length": 32},
        "a GLM that reads images",
    ),
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "a model of type gpt2"),
    "llama": ({"model_type": "llama"}, "a model of type llama"),
}


def find_codes(folder: Path, is_deep: bool = False) -> list[str]:
    """The codes of what keeps a folder from working."""
    return [p.code for p in inspect_folder(folder, is_deep).problems if p.severity == PROBLEM]


def find_odd_codes(folder: Path) -> set[str]:
    return {p.code for p in inspect_folder(folder).problems if p.severity != PROBLEM}


def tell(report: Report) -> str:
    return "\n".join(map(str, report.problems))


def make_shards(repo: Path, folder: Path, number: int = 2) -> Path:
    """Copy a model folder of ours, its weights in shards of torch."""
    shutil.copytree(repo, folder)
    weights = stored(folder)
    (folder / "model.safetensors").unlink()
    names = list(weights)
    weight_map = {name: f"pytorch_model-{i % number + 1:05d}.bin" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        torch.save({n: weights[n] for n in names if weight_map[n] == shard}, folder / shard)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def make_prefix(folder: Path, length: int = 4, has_network: bool = False) -> Path:
    """A `checkpoint-N` of the official P-Tuning script: the prefix encoder alone."""
    folder.mkdir(parents=True)
    model = build_model(**THIN, pre_seq_len=length, prefix_projection=has_network)
    state = {n: t for n, t in model.state_dict().items() if n.startswith(PREFIX)}
    torch.save(state, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin"):
        (folder / name).write_bytes(b"\0")
    return folder


def change_index(folder: Path, **fields: Any) -> None:
    index = read_json(folder / INDEX)
    (folder / INDEX).write_text(json.dumps(index | fields))
