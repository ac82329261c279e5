"""Owns what `adapter` means in a training: what is stood on, what goes on, what is new.

    adapter: [sft]                  sft goes on being trained
    adapter: [sft], lora_rank: 8    sft is merged into the frozen base, a new one is trained on top
    adapter: [sft, ppo]             sft is merged into the frozen base, ppo goes on being trained

None is left out: what comes before what is trained is part of the base, also for a reference. Does
not know how adapters act (`chatglm.adapters`), nor how new ones are made (`models`).
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from chatglm.adapters.acting import holds_integers, prefix_fields, put_on
from chatglm.adapters.bases import Foundation, describe_foundations, write_record
from chatglm.adapters.kinds import Stack, announce, stack_adapters
from chatglm.training.settings import KeyProblem, Settings

RECORD = "trained_on"  # the attribute of a trained model with what its adapters stand on


def read_stack(settings: Settings, base: Path, task: str, is_trained: bool) -> Stack | None:
    """Return the adapters of the settings, having said what is to be said; None without any.

    Args:
        settings: of the stage.
        base: the model's folder.
        task: as peft names it.
        is_trained: whether anything is trained.

    Raises:
        ValueError: for adapters that are not for the base, do not go together, or cannot be
            trained so.
    """
    if not settings.adapter:
        return None
    stack = stack_adapters(settings.adapter, base, settings.any_base, task)
    if is_trained and stack.prefix is not None:
        raise KeyProblem(
            f"adapter {stack.prefix} is a prefix, which is trained by the stage ptuning alone: "
            "name LoRA adapters, or leave the key out"
        )
    if PartialState().is_main_process:
        announce(stack._replace(notes=(*stack.notes, *_tell_below(settings, stack, is_trained))))
    return stack


def _tell_below(settings: Settings, stack: Stack, is_trained: bool) -> list[str]:
    """Return what becomes of the adapters that are not trained, if any are not."""
    below = find_below(settings)
    if not is_trained or not below:
        return []
    trained = f"a new one of rank {settings.lora_rank}"
    if settings.goes_on:
        trained = str(stack.folders[-1])
    return [f"{', '.join(below)}: merged into the frozen base, and {trained} is trained on top"]


def find_below(settings: Settings) -> list[str]:
    """Return the adapters that are part of the base of what is trained."""
    return settings.adapter[:-1] if settings.goes_on else list(settings.adapter)


def list_fields(stack: Stack | None) -> dict[str, Any]:
    """Return what the configuration must say for the adapters."""
    return prefix_fields(stack) if stack else {}


def put_below(model: Any, stack: Stack) -> Any:
    """Return a model with all adapters in its weights, on which a new one is trained.

    Raises:
        ValueError: if its weights are packed, or an adapter has no place in weights.
    """
    if holds_integers(model):
        folders = " ".join(map(str, stack.folders))
        raise KeyProblem(
            f"adapter {folders} would have to be merged into packed weights, below the new one of "
            f"lora_rank: merge first, chatglm merge {stack.base} NEW --lora {folders}, and name "
            "NEW as model; or leave lora_rank out to go on with it"
        )
    merged = put_on(model, stack)
    if hasattr(merged, "peft_config"):
        raise KeyProblem(
            f"{stack.folders[-1]} is {stack.kinds[-1].name}, on top of which nothing is trained: "
            "leave lora_rank out to go on with it"
        )
    return merged


def note_base(model: Any, settings: Settings, base: Path) -> Any:
    """Return a model with adapters that knows what they stand on, to be written beside them."""
    folders = [Path(path).expanduser().resolve() for path in find_below(settings)]
    setattr(model, RECORD, describe_foundations(base, folders))
    return model


def record_base(model: Any, folder: Path) -> None:
    """Write beside adapters what they stand on; nothing for a whole model."""
    bases: list[Foundation] | None = getattr(model, RECORD, None)
    if bases is not None:
        write_record(folder, bases)


__all__ = ["find_below", "list_fields", "note_base", "put_below", "read_stack", "record_base"]
