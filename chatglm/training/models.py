"""Owns how a model folder becomes a model that is trained, and a trained model a folder again.

Adapters, packed base weights and dtypes are settled here. Does not know data or losses.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from chatglm import door
from chatglm.adapters import bases
from chatglm.adapters.acting import put_on
from chatglm.adapters.kinds import SCORER_TASK, TEXT_TASK, read_kind
from chatglm.cards import copy_licenses, read_own_card, write_card
from chatglm.checkpoints.recognize import ADAPTER_FILE, read_object
from chatglm.loading import DTYPES, check_model_folder, default_model_folder
from chatglm.training.adapters import (
    list_fields,
    note_base,
    put_below,
    read_stack,
    record_base,
)
from chatglm.training.describing import describe_training
from chatglm.training.lora import (
    build_config,
    check_base,
    check_found,
    expecting_copies,
    trains_modules,
    wrap_model,
)
from chatglm.training.settings import KeyProblem, Settings

TASK_TYPES = {AutoModelForCausalLM: TEXT_TASK, AutoModelForSequenceClassification: SCORER_TASK}


def find_base(settings: Settings) -> Path:
    """Return the folder of the model to start from, by default that of the first adapter.

    Raises:
        ValueError: if it is not whole, or not to be found.
    """
    if settings.adapter and not settings.model:
        return check_model_folder(bases.find_base(read_kind(settings.adapter[0]).folder))
    return check_model_folder(settings.model or default_model_folder())


def load_tokenizer(settings: Settings) -> Any:
    """Return the tokenizer of the model to start from."""
    return door.load_from(find_base(settings), AutoTokenizer)


def check_adapters(settings: Settings) -> None:
    """Refuse adapters that cannot be trained as the keys say, before rows are read.

    Raises:
        ValueError: for keys that the model's folder or the adapters to go on from contradict.
    """
    if settings.lora_rank:
        check_base(settings, find_base(settings))
    if settings.goes_on:
        folder = read_kind(settings.adapter[-1]).folder
        if (folder / ADAPTER_FILE).is_file():
            check_found(settings, read_object(folder / ADAPTER_FILE), folder)


def load_policy(
    settings: Settings,
    compute_dtype: torch.dtype | None = None,
    is_trained: bool = True,
    **fields: Any,
) -> Any:
    """Return the language model to train, with its adapters.

    Args:
        settings: which model, how packed, with which adapters.
        compute_dtype: bfloat16 or float16 if the training computes in it; None for float32.
        is_trained: False if nothing of it is to be trained.
        fields: of the configuration, other than the folder's.

    Raises:
        ValueError: for settings that do not go together, or a folder that is not whole.
    """
    return _load(settings, AutoModelForCausalLM, compute_dtype, is_trained, **fields)


def load_scorer(settings: Settings, compute_dtype: torch.dtype | None = None) -> Any:
    """Return the model with one score a row, a reward model, to train.

    Raises:
        ValueError: as `load_policy`.
    """
    return _load(settings, AutoModelForSequenceClassification, compute_dtype, True, num_labels=1)


def _load(
    settings: Settings,
    auto_class: Any,
    compute_dtype: torch.dtype | None,
    is_trained: bool,
    **fields: Any,
) -> Any:
    base, task = find_base(settings), TASK_TYPES[auto_class]
    stack = read_stack(settings, base, task, is_trained)
    options: dict[str, Any] = {**fields, **list_fields(stack)}
    is_frozen = not is_trained or settings.uses_lora or "pre_seq_len" in fields
    check_weights(settings, is_frozen)
    options |= list_packing(settings)
    # Beside float32 modules in 16-bit ones no product would be of one type outside of autocast.
    is_narrow = is_frozen and not (is_trained and trains_modules(settings))
    dtype = choose_weights(settings, compute_dtype, is_narrow)
    model = door.load_from(base, auto_class, dtype=dtype, **options)
    if stack is not None and not (is_trained and settings.lora_rank):
        with expecting_copies():
            model = put_on(model, stack, is_trained)
    elif settings.lora_rank:
        model = add_adapters(model if stack is None else put_below(model, stack), settings, task)
    if is_trained and settings.uses_lora:
        note_base(model, settings, base)
    if is_narrow and compute_dtype is not None:
        _widen_trained(model)
    return model


def list_packing(settings: Settings) -> dict[str, Any]:
    """Return the option of `from_pretrained` that packs weights as they are read, if any are."""
    if not settings.bits:
        return {}
    packing = {"bits": settings.bits, "group_size": settings.group_size or None}
    return {"quantization_config": {"quant_method": "chatglm", **packing}}


def _widen_trained(model: nn.Module) -> None:
    """Train in float32 what is trained beside frozen 16-bit weights, which would lose small steps.

    peft does so for adapters, but not for a score head.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def choose_weights(
    settings: Settings, compute_dtype: torch.dtype | None, is_frozen: bool
) -> torch.dtype:
    """Return the dtype of the weights: float32 for what is trained, unless told otherwise.

    Raises:
        KeyProblem: as `check_weights`.
    """
    if not settings.dtype:
        return compute_dtype if compute_dtype is not None and is_frozen else torch.float32
    check_weights(settings, is_frozen)
    return DTYPES[settings.dtype]


def add_adapters(model: nn.Module, settings: Settings, task_type: str) -> Any:
    """Return the model with new LoRA adapters, and all else frozen.

    Raises:
        ValueError: for layers that the model does not have.
    """
    return wrap_model(model, build_config(model, settings, task_type))


class PromptFormat(NamedTuple):
    """What rows are rendered by, which a folder says without its weights.

    Attributes:
        build_prompt: the model's.
        config: its configuration: window and special tokens.
    """

    build_prompt: Any
    config: Any


def read_format(settings: Settings) -> PromptFormat:
    """Return what the rows of a model are rendered by; nothing of its weights is read.

    Raises:
        ValueError: if its folder is not whole.
    """
    folder = find_base(settings)
    return PromptFormat(find_prompt_format(settings), door.load_from(folder, AutoConfig))


def find_prompt_format(settings: Settings) -> Any:
    """Return the model's `build_prompt`, which models without a language head do not have."""
    return door.find_class(find_base(settings), AutoModelForCausalLM.__name__).build_prompt


def check_weights(settings: Settings, is_frozen: bool) -> None:
    """Refuse formats of weights that are to be trained and cannot.

    Args:
        settings: say which format.
        is_frozen: whether the weights stay as they are, and something beside them is trained.

    Raises:
        KeyProblem: for packed weights, and for float16: steps smaller than their last digit are
            lost, and a scaled loss cannot be scaled back on them.
    """
    if settings.bits and not is_frozen:
        raise KeyProblem(
            f"bits={settings.bits} packs the weights, which cannot be trained then: set "
            "lora_rank, or bits to 0"
        )
    if settings.dtype == "float16" and not is_frozen:
        raise KeyProblem("dtype float16 cannot be trained in: use fp16: true on float32 weights")


def keeps_weights(settings: Settings) -> bool:
    """Whether a training leaves the weights as they are: adapters or a prefix are trained."""
    return settings.uses_lora or hasattr(settings, "pre_seq_len")


def find_core(model: Any) -> Any:
    """Return the model itself, out of the wrappers of adapters and of distributed training."""
    while hasattr(model, "module") and not hasattr(model, "config"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_tokenizer(settings: Settings, folder: Path) -> None:
    """Put the vocabulary and its code into a folder, as the base model has them."""
    load_tokenizer(settings).save_pretrained(folder)


def save_trained(
    model: Any, settings: Settings, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a model so that it can be loaded again: its adapters, or all of it with its code.

    A folder of adapters names its base under `base_model_name_or_path`.

    Args:
        model: what was trained.
        settings: of the stage.
        folder: to write to.
        weights: its whole state, if the model itself was cut into parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own_card = read_own_card(folder)  # peft writes over it
    name_as_before(model)
    whole = {} if weights is None else {"state_dict": share_ties(model, weights)}
    model.save_pretrained(folder, **whole)
    record_base(model, folder)
    if not hasattr(model, "peft_config"):
        save_tokenizer(settings, folder)
        _complete(find_base(settings), folder)
    copy_licenses(find_base(settings), folder)
    write_card(folder, own_card or _describe(model, settings, weights or model.state_dict()))


def _describe(model: Any, settings: Settings, state: dict[str, Tensor]) -> str:
    """Return the card of a trained model, or of its adapters."""
    is_adapter = hasattr(model, "peft_config")
    marks = (".lora_", ".modules_to_save.")
    written = {n: w for n, w in state.items() if not is_adapter or any(m in n for m in marks)}
    kind = "adapter" if is_adapter else "model"
    return describe_training(settings, find_base(settings), written, kind)


def enable_checkpointing(core: Any) -> None:
    """Have the blocks of a model computed again for their gradients, instead of kept.

    transformers has another name for it since 5.23, and will drop this one.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(core, name) for name in names if hasattr(core, name))
    enable({"use_reentrant": False})  # the other way needs inputs with gradients


def name_as_before(model: Any) -> None:
    """Take back FSDP2's name of a model's class, under which its code would not be found."""
    from torch.distributed.fsdp import FSDPModule

    for module in (model, find_core(model)):
        wrapped = type(module)
        if issubclass(wrapped, FSDPModule):
            original = next(c for c in wrapped.__mro__[1:] if c is not FSDPModule)
            wrapped.__name__, wrapped.__module__ = original.__name__, original.__module__


def share_ties(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gathered weights in which tied ones are one tensor again, which is saved once."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return {name: weights[names.get(name, name)] for name in weights}


def _complete(base: Path, folder: Path) -> None:
    """Copy what a model folder has beside weights, code and vocabulary."""
    for name in ("generation_config.json", "chat_template.jinja"):
        if (base / name).is_file() and not (folder / name).exists():
            shutil.copy(base / name, folder)


__all__ = ["find_base", "find_core", "load_policy", "load_scorer", "load_tokenizer", "save_trained"]
