"""Owns the way from a stage's keys to peft's configuration of adapters, and what is refused of it.

Adapters start as nothing: with new ones the model says what it said without, which references of
preference stages rely on, and the base stays as it is, so that they load onto any copy of it. Does
not know how a model is loaded or saved.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from chatglm.adapters.kinds import read_kind
from chatglm.checkpoints.recognize import ADAPTER_FILE, CONFIG_FILE, read_object
from chatglm.training.layers import LAYERS, TABLES, expand_modules, expand_targets, split_names
from chatglm.training.settings import LORA_TARGET, KeyProblem, Settings

SCORE_HEAD = "score"
SWITCHES = ("use_dora", "use_rslora")
# peft's remark on a head that is the embedding. Under adapters each has its own copy (training.md).
TIED_REMARK = "Model has .tie_word_embeddings=True. and a tied layer is part of the adapter"


def build_config(model: nn.Module, settings: Settings, task_type: str) -> Any:
    """Return peft's configuration of new adapters.

    Args:
        model: that they are for.
        settings: with the keys of adapters.
        task_type: "CAUSAL_LM" or "SEQ_CLS", whose score head is trained whole.

    Raises:
        KeyProblem: for layers that the model does not have, or has packed.
    """
    from peft import LoraConfig

    targets = expand_targets(settings.lora_targets)
    modules = expand_modules(settings.modules_to_save, targets, settings.bits)
    _check_model(model, {"lora_targets": targets, "modules_to_save": modules})
    if task_type == "SEQ_CLS":
        modules.append(SCORE_HEAD)
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        bias=settings.lora_bias,  # type: ignore[arg-type]
        task_type=task_type,
        modules_to_save=modules or None,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        init_lora_weights="gaussian" if settings.init_lora_weights == "gaussian" else True,
    )


def wrap_model(model: nn.Module, config: Any) -> Any:
    """Return the model with new adapters, and all else frozen."""
    from peft import get_peft_model

    with expecting_copies():
        return get_peft_model(model, config)  # type: ignore[arg-type]


@contextmanager
def expecting_copies() -> Iterator[None]:
    """Leave out peft's remark on a head and an embedding that each get a copy of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TIED_REMARK)
        yield


def trains_modules(settings: Settings) -> bool:
    """Whether modules of the model are trained whole beside adapters, the score head left out."""
    if not settings.goes_on:
        return bool(settings.modules_to_save)
    file = read_kind(Path(settings.adapter[-1])).folder / ADAPTER_FILE
    found = read_object(file).get("modules_to_save") if file.is_file() else ()
    return bool(set(found or ()) - {SCORE_HEAD})


def _check_model(model: nn.Module, keys: Mapping[str, list[str]]) -> None:
    """Refuse names that the model itself does not have, as a block behind its last one."""
    found = [f".{place}" for place, _ in model.named_modules()]
    for key, names in keys.items():
        for name in names:
            if not any(place.endswith(f".{name}") for place in found):
                raise KeyProblem(f"{key} names {name}, and the model has no such module")


def check_base(settings: Settings, folder: Path) -> None:
    """Refuse a model whose packed weights are needed as numbers, before it is loaded.

    Args:
        settings: with the keys of adapters.
        folder: of the model.

    Raises:
        KeyProblem: naming the key and the remedy.
    """
    config = read_object(folder / CONFIG_FILE)
    packed: list[str] = [*LAYERS] if config.get("quantization_bit") else []
    packed += [*TABLES] if config.get("quantization_embeddings") else []
    names = [name.rpartition(".")[2] for name in split_names(settings.modules_to_save)]
    needed = {"modules_to_save": [name for name in names if name in packed]}
    needed["use_dora"] = packed[:1] if settings.use_dora else []
    for key, found in needed.items():
        if found:
            raise KeyProblem(
                f"{key} needs the weights of {found[0]} as numbers, and {folder} has them packed: "
                "name the unpacked model with bits 0, or leave the key out"
            )


def check_found(settings: Settings, fields: Mapping[str, Any], folder: Path) -> None:
    """Refuse keys that say otherwise than the adapters of a folder, which keep what they have.

    Args:
        settings: of the stage.
        fields: of the folder's adapter_config.json.
        folder: of the adapters.

    Raises:
        KeyProblem: naming the key and both values.
    """
    asked: dict[str, Any] = {"lora_rank": settings.lora_rank, "lora_alpha": settings.lora_alpha}
    asked |= {key: getattr(settings, key) for key in SWITCHES}
    asked["modules_to_save"] = set(expand_modules(settings.modules_to_save, (), 0))
    targets = set(expand_targets(settings.lora_targets))
    asked["lora_targets"] = targets - {LORA_TARGET} and targets
    for key, value in asked.items():
        name = {"lora_rank": "r", "lora_targets": "target_modules"}.get(key, key)
        has = fields.get(name)
        if isinstance(value, set):
            has = set([has] if isinstance(has, str) else has or ()) - {SCORE_HEAD}
        if value and value != has:
            raise KeyProblem(
                f"{key} is {_show(value)}, and the adapters of {folder} have {_show(has)}: leave "
                f"{key} out to go on with them, or leave adapter out to begin new ones"
            )


def _show(value: Any) -> str:
    return ", ".join(sorted(value)) or "none" if isinstance(value, set) else str(value)


__all__ = [
    "build_config",
    "check_base",
    "check_found",
    "expecting_copies",
    "trains_modules",
    "wrap_model",
]
