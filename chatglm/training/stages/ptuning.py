"""Owns P-Tuning v2: a prefix of keys and values is learned, the model stays as it is.

    chatglm train ptuning --train_data data.jsonl --output out --bits 4

Writes two layouts of the same prefix: the official one (`pytorch_model.bin` with the encoder's
weights alone, beside a config.json that says `pre_seq_len`), and peft's in the folder `peft`.
Source: https://arxiv.org/abs/2110.07602.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainingArguments

from chatglm.cards import copy_licenses, read_own_card, write_card
from chatglm.training.describing import describe_training
from chatglm.training.models import find_base, load_policy
from chatglm.training.settings import KeyProblem, require
from chatglm.training.stage import TrainerStage
from chatglm.training.stages.sft import SftSettings
from chatglm.training.stages.sft import build_trainer as build_sft_trainer

# The official script starts from this rate.
LEARNING_RATE = 2e-2
PREFIX_NAME = "transformer.prefix_encoder."
PEFT_FOLDER = "peft"


@dataclass
class PtuningSettings(SftSettings):
    """What P-Tuning can be told beside what supervised fine-tuning can.

    Attributes:
        pre_seq_len: columns of the prefix.
        prefix_projection: learn it through a two-layer network, which is thrown away afterwards.
    """

    pre_seq_len: int = 128
    prefix_projection: bool = False

    def check(self) -> None:
        """Refuse values that a prefix cannot have, and adapters beside it."""
        super().check()
        require(self.pre_seq_len > 0, "pre_seq_len", self.pre_seq_len, "1 or more")
        if self.uses_lora:
            raise KeyProblem("lora_rank and adapter do not go with a prefix: use the stage sft")


def load_prefixed(settings: PtuningSettings, compute_dtype: torch.dtype | None) -> Any:
    """Return the model with a new prefix in float32, the only thing that is trained."""
    fields = {name: getattr(settings, name) for name in ("pre_seq_len", "prefix_projection")}
    model = load_policy(settings, compute_dtype, **fields)
    model.transformer.prefix_encoder.float()
    return model


def write_prefix(trainer: Any, settings: PtuningSettings) -> None:
    """Write the trained prefix, from one process."""
    if trainer.is_world_process_zero():
        save_prefix(trainer.accelerator.unwrap_model(trainer.model), settings)


def save_prefix(model: Any, settings: PtuningSettings) -> None:
    """Write the prefix in the official layout and in peft's.

    The official one: load the base with the same `pre_seq_len`, then the file's tensors, without
    their first words `transformer.prefix_encoder.`, into `model.transformer.prefix_encoder`.
    """
    folder = Path(settings.output)
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(PREFIX_NAME)
    }
    torch.save(weights, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    copy_licenses(find_base(settings), folder)
    own_card = read_own_card(folder)
    card = own_card or describe_training(settings, find_base(settings), weights, "prefix")
    write_card(folder, card)
    save_for_peft(model, settings, folder / PEFT_FOLDER)


def save_for_peft(model: Any, settings: PtuningSettings, folder: Path) -> None:
    """Write the prefix as adapters of peft's prefix tuning, its network already gone through."""
    folder.mkdir(exist_ok=True)
    save_file({"prompt_embeddings": compute_states(model)}, folder / "adapter_model.safetensors")
    config = model.config
    fields = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(find_base(settings)),
        "inference_mode": True,
        "num_virtual_tokens": settings.pre_seq_len,
        "token_dim": config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "encoder_hidden_size": config.hidden_size,
        "prefix_projection": settings.prefix_projection,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")


@torch.no_grad()
def compute_states(model: Any) -> Tensor:
    """Return the prefix's keys and values, `(pre_seq_len, L * 2 * H)`, without dropout."""
    encoder = model.transformer.prefix_encoder
    states = encoder.embedding.weight
    return (encoder.trans(states) if encoder.prefix_projection else states).float().cpu()


STAGE = TrainerStage(
    "ptuning",
    PtuningSettings,
    TrainingArguments,
    build_sft_trainer,
    defaults={"learning_rate": LEARNING_RATE},
    load_model=load_prefixed,
    write=write_prefix,
)
