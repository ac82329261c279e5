"""Owns P-Tuning v2: a prefix of keys and values is learned, the model stays as it is.

    chatglm train ptuning --train_data data.jsonl --output out --bits 4
    chatglm train ptuning --adapter checkpoint-3000 --train_data more.jsonl --output further

Writes two layouts of the same prefix: the official one (`pytorch_model.bin` with the encoder's
weights alone, beside a config.json that says `pre_seq_len`), and peft's in the folder `peft`.
Source: https://arxiv.org/abs/2110.07602.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from chatglm.adapters.bases import check_base, describe_foundations, write_record
from chatglm.cards import copy_licenses, read_own_card, write_card
from chatglm.checkpoints.prefixes import (
    PEFT_FOLDER,
    compute_states,
    format_for_peft,
)
from chatglm.checkpoints.reading import StoredTensor
from chatglm.checkpoints.recognize import PREFIX_TENSORS
from chatglm.training.defaults import STAGE_DEFAULTS
from chatglm.training.describing import describe_training
from chatglm.training.models import find_base, load_policy
from chatglm.training.prefix_start import choose_fields, open_start
from chatglm.training.stage import TrainerStage
from chatglm.training.stage_settings import PtuningSettings
from chatglm.training.stages.sft import build_trainer as build_sft_trainer
from chatglm.training.stages.sft import read_data


def choose_prefix(settings: PtuningSettings) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the sizes of the prefix to train, and the tensors that it begins with, if any.

    Raises:
        ValueError: for a folder without a prefix, or one that does not fit keys or model.
    """
    asked = {
        "pre_seq_len": settings.pre_seq_len or None,
        "prefix_projection": settings.prefix_projection,
    }
    start = open_start(Path(settings.adapter[0]).expanduser()) if settings.adapter else {}
    return choose_fields(asked, start, find_base(settings), "".join(settings.adapter)), start


def load_prefixed(settings: PtuningSettings, compute_dtype: torch.dtype | None) -> Any:
    """Return the model with its prefix in float32, the only thing that is trained.

    Raises:
        ValueError: for a folder without a prefix, or one that does not fit keys or model.
    """
    fields, start = choose_prefix(settings)
    for folder in settings.adapter:
        place = Path(folder).expanduser().resolve()
        note = check_base(place, find_base(settings), any_base=settings.any_base)
        if note and PartialState().is_main_process:
            sys.stderr.write(f"chatglm: {note}\n")
    model = load_policy(replace(settings, adapter=[]), compute_dtype, **fields)
    encoder = model.transformer.prefix_encoder.float()
    if start:
        encoder.load_state_dict({name: tensor.read() for name, tensor in start.items()})
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
        if name.startswith(PREFIX_TENSORS)
    }
    torch.save(weights, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    copy_licenses(find_base(settings), folder)
    own_card = read_own_card(folder)
    card = own_card or describe_training(settings, find_base(settings), weights, "prefix")
    write_card(folder, card)
    bases = describe_foundations(find_base(settings))
    for place in (folder, folder / PEFT_FOLDER):
        place.mkdir(exist_ok=True)
        write_record(place, bases)
    save_for_peft(model, settings, folder / PEFT_FOLDER)


def save_for_peft(model: Any, settings: PtuningSettings, folder: Path) -> None:
    """Write the prefix as adapters of peft's prefix tuning, its network already gone through."""
    folder.mkdir(exist_ok=True)
    states = compute_states(model.transformer.prefix_encoder)
    files = format_for_peft(states, model.config.to_dict(), str(find_base(settings)))
    for name, content in files.items():
        (folder / name).write_bytes(content)


STAGE = TrainerStage(
    "ptuning",
    PtuningSettings,
    TrainingArguments,
    read_data,
    build_sft_trainer,
    defaults=STAGE_DEFAULTS["ptuning"],
    check_start=choose_prefix,
    load_model=load_prefixed,
    write=write_prefix,
)
