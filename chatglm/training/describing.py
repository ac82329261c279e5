"""Owns what the model card says of a folder that a stage of the training has written.

Does not know the form of a card (`chatglm.cards`), nor how a stage trains.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from chatglm.cards import Card, format_card, read_base, strip_place
from chatglm.training.keys.library import find_default
from chatglm.training.settings import SETTINGS_FILE, Settings, name_stage, read_config

SCORING = "reward"  # the stage whose models give a score and no text
SUMMARIES = {
    "pretrain": "trained further on plain text",
    "sft": "fine-tuned on questions and answers",
    "ptuning": "with a prefix of P-Tuning v2",
    SCORING: "made into a reward model, which gives a question and its answer one score",
    "ppo": "trained by PPO to be rewarded",
    "dpo": "trained by DPO on pairs of answers",
    "grpo": "trained by GRPO to be rewarded",
}
# What says where things are or what is printed, and nothing of the result.
UNTOLD = {"model", "output", "resume", "sample_prompts", "sample_steps"}
# Of the library's arguments those that decide a result; others may hold addresses and tokens.
TOLD_ARGUMENTS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "seed",
    "bf16",
    "fp16",
    "beta",
    "loss_type",
    "num_generations",
)
MODEL = """\
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = {auto_class}.from_pretrained(".", {options}).eval()"""
ADDITION = """\
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base}", {options})
model = PeftModel.from_pretrained(base, "{place}").eval()"""


class Shape(NamedTuple):
    """What kind of folder a stage has written.

    Attributes:
        title: of the card, with the places {base}, {stage} and {method}.
        loading: the code, with its places.
        library: that loads it.
        place: where in the folder that library finds it.
        tags: more than every ChatGLM has.
    """

    title: str
    loading: str
    library: str
    place: str
    tags: tuple[str, ...]


SHAPES = {
    "model": Shape("{base}, {stage}", MODEL, "transformers", ".", ("custom_code",)),
    "adapter": Shape("{method} adapter for {base}, {stage}", ADDITION, "peft", ".", ("lora",)),
    "prefix": Shape("P-Tuning v2 prefix for {base}", ADDITION, "peft", "./peft", ("p-tuning",)),
}


def describe_training(
    settings: Settings, source: Path, weights: Mapping[str, Tensor], kind: str
) -> str:
    """Return the card of a trained folder.

    Args:
        settings: of the stage.
        source: folder of the model that was started from.
        weights: the tensors that were written.
        kind: one of `SHAPES`.
    """
    base, stage, shape = read_base(source), name_stage(settings), SHAPES[kind]
    method = "DoRA" if settings.use_dora else "LoRA"
    is_part = "" if kind == "model" else "What was trained of "
    return format_card(
        Card(
            title=shape.title.format(base=base.name, stage=stage, method=method),
            summary=f"{is_part}{base.name}, {SUMMARIES.get(stage, 'trained further')}.",
            base=base,
            precision=describe_precision(settings, weights, kind),
            making={"command": f"`chatglm train {stage}`", **list_settings(settings)},
            loading=write_loading(settings, base.name, shape),
            library=shape.library,
            task="text-classification" if stage == SCORING else "text-generation",
            tags=(*shape.tags, *(["dora"] if settings.use_dora else []), stage),
        )
    )


def describe_precision(
    settings: Settings, weights: Mapping[str, Tensor], kind: str
) -> dict[str, str]:
    """Return the rows about number formats."""
    dtypes = Counter[str]()
    for tensor in weights.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    rows = {"weights" if kind == "model" else kind: dtypes.most_common(1)[0][0]}
    if settings.bits:
        columns = f"every {settings.group_size} columns" if settings.group_size else "every row"
        rows["base model while training"] = f"{settings.bits} bits, with a scale for {columns}"
    return rows


def list_settings(settings: Settings) -> dict[str, str]:
    """Return what a stage was told that differs from the defaults, without the places of files."""
    rows: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name not in UNTOLD and value != find_default(field):
            rows[field.name] = strip_place(value)
    file = Path(settings.output) / SETTINGS_FILE
    arguments = read_config(file) if settings.output and file.is_file() else {}
    told = {name: arguments[name] for name in TOLD_ARGUMENTS if arguments.get(name) is not None}
    return rows | {name: strip_place(value) for name, value in told.items()}


def write_loading(settings: Settings, base: str, shape: Shape) -> str:
    """Return the Python that loads the folder, at the base's precision if that was packed."""
    is_score = name_stage(settings) == SCORING
    options = ["trust_remote_code=True"]
    if is_score:
        options.append("num_labels=1")
    if settings.bits:
        packing = {"quant_method": "chatglm", "bits": settings.bits}
        packing |= {"group_size": settings.group_size} if settings.group_size else {}
        options.append(f"quantization_config={packing}")
    auto_class = "AutoModelForSequenceClassification" if is_score else "AutoModelForCausalLM"
    return shape.loading.format(
        auto_class=auto_class, base=base, options=", ".join(options), place=shape.place
    )


__all__ = ["describe_training"]
