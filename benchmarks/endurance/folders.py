"""Owns the small random model folders that campaigns load, damage, quantize and chat with."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from benchmarks.full_size import copy_code
from benchmarks.results import ROOT
from chatglm.checkpoints.checksums import hash_file, write_sums

SIZES = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "inner_hidden_size": 64}
VOCABULARY_FILES = ("ice_text.model", "tokenizer_config.json", "chat_template.jinja")
SHARD_BYTES = 400_000
SPREAD = 2  # of the blocks' weights: with a new model's a token only echoes itself


@functools.cache
def scratch() -> Path:
    """Return a folder that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="chatglm-endurance-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make_model(**fields: Any) -> Any:
    """Return a tiny model of this repository's vocabulary with weights that never change."""
    config = AutoConfig.from_pretrained(ROOT, **SIZES, dtype=torch.float32, **fields)
    model = AutoModel.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2:
            deviation = (2 / sum(parameter.shape)) ** 0.5 * (SPREAD if ".layers." in name else 1)
            parameter.data.normal_(0, deviation, generator=generator)
    return model.eval()


def write_folder(folder: Path, is_official: bool = False, **fields: Any) -> Path:
    """Write a tiny model's folder in several shards, safetensors or the official torch files."""
    model = make_model(**fields)
    if is_official:
        _write_official(folder, model)
    else:
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    copy_code(folder)
    for name in (*VOCABULARY_FILES, "generation_config.json"):
        shutil.copy(ROOT / name, folder)
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | SIZES | fields | {"torch_dtype": "float32"})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def _write_official(folder: Path, model: Any) -> None:
    folder.mkdir(parents=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(weights)}
    for shard in shards:
        torch.save({n: t for n, t in weights.items() if weight_map[n] == shard}, folder / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")


def write_adapter(folder: Path, model: Any) -> Path:
    """Write a LoRA adapter of peft for a tiny model, whose matrices are not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config = LoraConfig(target_modules=["query_key_value", "dense"], **options)
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


@functools.cache
def write_sources() -> dict[str, Path]:
    """Write a folder with safetensors, an official one, both with hashes, and an adapter, once."""
    sources = {kind: scratch() / kind for kind in ("plain", "official", "adapter")}
    for kind in ("plain", "official"):
        folder = write_folder(sources[kind], kind == "official")
        write_sums(folder, {path.name: hash_file(path) for path in sorted(folder.iterdir())})
    model = make_model()
    model.name_or_path = str(sources["plain"])  # which peft takes for the base's place
    write_adapter(sources["adapter"], model)
    return sources
