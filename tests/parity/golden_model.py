"""Loads the original code's outputs and builds our model with the original's weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import ROOT, SHARED
from safetensors.torch import load_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_golden(name: str) -> Path:
    """Return a folder of golden data: the whole in `shared`, or the part that is kept here."""
    whole = SHARED / "golden" / name
    return whole if whole.exists() else ROOT / "tests" / "parity" / "golden" / name


def load_config(folder: Path, name: str, **overrides: Any) -> ChatGLMConfig:
    """Read a golden configuration; its weights have a head of their own."""
    fields = json.loads((folder / f"{name}.config.json").read_text())
    return ChatGLMConfig(**{**fields, "tie_word_embeddings": False, **overrides})


def load_model(folder: Path, name: str, **overrides: Any) -> ChatGLMForConditionalGeneration:
    """Build the golden model in float32."""
    model = ChatGLMForConditionalGeneration(load_config(folder, name, **overrides))
    load_weights(model, load_file(folder / f"{name}.safetensors"))
    return model.float().eval()


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load official names; only the rotary buffers may be left over."""
    result = model.load_state_dict(weights, strict=False)
    assert not result.missing_keys
    assert all(name.endswith("rotary_emb.inv_freq") for name in result.unexpected_keys)


def load_arrays(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Read a golden .npz as tensors."""
    with np.load(folder / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
