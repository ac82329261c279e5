"""Folders of 2023, small: official ones of both generations, packed ones, forks, P-Tuning outputs.

Their weights are those that the original code was run with for the golden data, or random ones.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHARED, build_model
from model_folders import THIN, Weights, change_json, read_json, write_shards
from safetensors.torch import load_file
from test_model_golden import scatter

GOLDEN = SHARED / "golden"
FIRST, LATE = 150528, 130528
needs_shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden data in {SHARED}")
VOCABULARIES = {LATE: "ice_text.v1.1.model", FIRST: "ice_text.v0.model"}
CHATS = {LATE: "late130528", FIRST: "fork150528"}
# Every file of code fails when it is imported, and leads to the next.
DEAD = 'from .{0} import x\nraise RuntimeError("the folder\'s code ran")\n'
DEAD_FILES = {
    "configuration_chatglm.py": 'raise RuntimeError("the folder\'s code ran")\n',
    "modeling_chatglm.py": DEAD.format("configuration_chatglm"),
    "quantization.py": "import cpm_kernels\n",
    "tokenization_chatglm.py": "import icetk\n",
}
OLD_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
}
OLD_TOKENIZER = {
    "name_or_path": "THUDM/chatglm-6b",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
# What the first official configuration said, which is wrong for its own weights.
FIRST_IDS = {"bos_token_id": 150004, "eos_token_id": 20002, "pad_token_id": 0}
LATE_IDS = {"bos_token_id": 130004, "eos_token_id": 130005, "pad_token_id": 3}


def write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def make_folder(
    folder: Path, weights: Weights, vocabulary: Path, config: dict[str, Any], shards: bool = True
) -> Path:
    """Write a folder as it was downloaded, with code that must never run."""
    folder.mkdir(parents=True)
    if shards:
        write_shards(folder, weights)
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    told = {"_name_or_path": "THUDM/chatglm-6b", "architectures": ["ChatGLMModel"]}
    told |= {"auto_map": OLD_MAP, "model_type": "chatglm", "torch_dtype": "float16"}
    write_json(folder / "config.json", {**told, **config})
    write_json(folder / "tokenizer_config.json", OLD_TOKENIZER)
    for name, text in DEAD_FILES.items():
        (folder / name).write_text(text)
    (folder / "MODEL_LICENSE").write_text("the model's\n")
    (folder / "LICENSE").write_text("the code's\n")
    shutil.copy(vocabulary, folder / "ice_text.model")
    return folder


def find_vocabulary(vocab_size: int) -> Path:
    name = VOCABULARIES.get(vocab_size)
    if name is None:
        return ROOT / "ice_text.model"
    if not (SHARED / "tokenizers" / name).is_file():
        pytest.skip(f"needs {name} in {SHARED / 'tokenizers'}")
    return SHARED / "tokenizers" / name


def make_chatting(folder: Path, vocab_size: int) -> Path:
    """A folder with the weights of the golden conversations and the vocabulary of their rows."""
    name, place = CHATS[vocab_size], GOLDEN / "chat_e2e"
    weights = scatter(load_file(place / f"{name}.scattered.safetensors"), vocab_size)
    config = read_json(place / f"{name}.config.json") | {"torch_dtype": "float32"}
    config = {key: config[key] for key in config if key not in ("auto_map", "architectures")}
    config["tie_word_embeddings"] = False
    if vocab_size == FIRST:
        config |= FIRST_IDS
    return make_folder(folder, weights, find_vocabulary(vocab_size), config)


def make_golden(folder: Path, name: str) -> Path:
    """A folder with the weights of a golden network of 320 rows."""
    place = GOLDEN / "model_late"
    config = read_json(place / f"{name}.config.json")
    config |= {"torch_dtype": "float32", "tie_word_embeddings": False}
    config.pop("architectures")
    weights = load_file(place / f"{name}.safetensors")
    return make_folder(folder, weights, find_vocabulary(320), config)


def make_golden_packed(folder: Path) -> Path:
    """The golden network as the original code packed it to 4 bits, in one archive as `-int4`."""
    place = GOLDEN / "quantization"
    config = read_json(GOLDEN / "model_late" / "tiny2d.config.json")
    config |= {"torch_dtype": "float16", "tie_word_embeddings": False, "quantization_bit": 4}
    config["quantization_activations"] = "exact"
    config.pop("architectures")
    weights = load_file(place / "late_tiny2d_int4.safetensors")
    return make_folder(folder, weights, find_vocabulary(320), config, shards=False)


def make_small(folder: Path, shards: bool = True, **fields: Any) -> Path:
    """An old folder with the vocabulary of this repository, and random weights."""
    config = read_json(ROOT / "config.json") | THIN | fields
    for name in ("architectures", "auto_map", "model_type"):
        config.pop(name)
    model = build_model(**{k: v for k, v in config.items() if k != "torch_dtype"}).half()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return make_folder(folder, weights, ROOT / "ice_text.model", config, shards)


def make_packed(folder: Path, bits: int, embeddings: bool) -> Path:
    """A folder as `-int4`, `-int4-qe` and `-int8` were published: one archive, kernels beside."""
    config = read_json(ROOT / "config.json") | THIN
    for name in ("architectures", "auto_map", "model_type"):
        config.pop(name)
    model = build_model(**{k: v for k, v in config.items() if k != "torch_dtype"}).half()
    model.quantize(bits, embeddings=embeddings)
    config |= {"quantization_bit": bits, "quantization_embeddings": embeddings}
    make_folder(folder, model.state_dict(), ROOT / "ice_text.model", config, shards=False)
    (folder / "quantization_kernels.c").write_text("int main;\n")
    return folder


def snapshot(folder: Path) -> dict[str, tuple[str, int, int]]:
    """The hash, mode and time of every file of a folder, by its path in it."""
    return {
        file.relative_to(folder).as_posix(): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mode,
            file.stat().st_mtime_ns,
        )
        for file in folder.rglob("*")
        if file.is_file()
    }


def list_folders(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir()}


Maker = Callable[[Path], Path]
# Every kind that needs nothing but this repository.
SMALL_KINDS: dict[str, Maker] = {
    "official": make_small,
    "int4": lambda folder: make_packed(folder, 4, False),
    "int4-qe": lambda folder: make_packed(folder, 4, True),
    "int8": lambda folder: make_packed(folder, 8, False),
    "one file": lambda folder: make_small(folder, shards=False),
    "P-Tuning, whole": lambda folder: make_small(folder, pre_seq_len=4, prefix_projection=False),
    "P-Tuning, projected": lambda folder: make_small(folder, pre_seq_len=4, prefix_projection=True),
}

__all__ = [
    "FIRST",
    "GOLDEN",
    "LATE",
    "SMALL_KINDS",
    "change_json",
    "list_folders",
    "make_chatting",
    "make_golden",
    "make_golden_packed",
    "make_small",
    "needs_shared",
    "snapshot",
]
