"""Model folders and adapters to convert, as users have them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

Weights = dict[str, torch.Tensor]
THIN = {"hidden_size": 16, "num_attention_heads": 2, "inner_hidden_size": 32, "num_layers": 2}
# peft asks transformers 5.23 by an old name.
old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def stored(folder: Path) -> Weights:
    """All tensors of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(read_json(path) | fields), encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def official_weights(**fields: Any) -> Weights:
    """A random model as the official shards hold one: norms wide, a buffer a layer, both ties."""
    weights = {}
    for name, tensor in build_model(**{**THIN, **fields}).state_dict().items():
        weights[name] = tensor.clone() if "layernorm" in name else tensor.half()
        if name.endswith("input_layernorm.weight"):
            buffer = name.replace("input_layernorm.weight", "attention.rotary_emb.inv_freq")
            weights[buffer] = torch.ones(2).half()
    return weights


def write_shards(folder: Path, weights: Weights) -> None:
    """Write three torch shards and their index."""
    weight_map = {name: f"pytorch_model-0000{i % 3 + 1}.bin" for i, name in enumerate(weights)}
    for shard in set(weight_map.values()):
        names = [name for name in weights if weight_map[name] == shard]
        torch.save({name: weights[name] for name in names}, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def make_official(folder: Path, vocab_size: int, **fields: Any) -> Weights:
    """A folder as it was downloaded in 2023: old code, few settings, torch shards."""
    folder.mkdir()
    weights = official_weights(vocab_size=vocab_size, **fields)
    write_shards(folder, weights)
    auto_map = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    config = {"architectures": ["ChatGLMModel"], "auto_map": auto_map, "pad_token_id": 0}
    config |= {"_name_or_path": "away", "vocab_size": vocab_size, **THIN, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_chatglm.py").write_text("import icetk\n")
    (folder / "MODEL_LICENSE").write_text("the model's\n")
    shutil.copy(ROOT / "ice_text.model", folder)
    return weights


def copy_in_half(repo: Path, folder: Path) -> Path:
    """Copy a model folder to change it: half weights in one safetensors file."""
    shutil.copytree(repo, folder)
    weights = {name: tensor.half() for name, tensor in stored(folder).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def replace_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = stored(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_adapter(source: Path, folder: Path, **options: Any) -> None:
    """A random adapter, as peft saves it."""
    from peft import LoraConfig, get_peft_model

    base = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.float16)
    options = {"target_modules": ["query_key_value"], "r": 3, "lora_alpha": 7, **options}
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:  # whole modules, biases
            parameter.data += 0.01
    model.save_pretrained(folder)
