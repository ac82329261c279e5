"""Owns how adapters come to act: merged into a model's weights, beside them, or as its prefix.

Into weights that are floats LoRA is merged, each adapter in its turn, as `chatglm merge` does.
Beside packed weights it stays, and several of them add up. A prefix, in whichever layout it is
stored, becomes the model's own, so that it acts wherever the model answers. All other kinds are
left to peft. Does not know which adapters go together (`kinds`).
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from chatglm.adapters.bases import find_adapter_weights
from chatglm.adapters.kinds import LORA, Stack
from chatglm.checkpoints.prefixes import (
    PREFIX_TENSORS,
    describe_fields,
    open_prefix,
)
from chatglm.checkpoints.reading import open_shards
from chatglm.checkpoints.recognize import ADAPTER_FILE, CONFIG_FILE, read_object

FACTOR_NAMES = (".lora_A.", ".lora_B.")
OLD_NAME = ".*gradient_checkpointing.* is deprecated"
MOST_LETTERS = 300  # of an error of a library's


def prefix_fields(stack: Stack) -> dict[str, Any]:
    """Return what the configuration must say for a stack's prefix; nothing without one.

    Raises:
        ValueError: if the folder holds no prefix, or the base has one of its own.
    """
    if stack.prefix is None:
        return {}
    own = read_object(stack.base / CONFIG_FILE).get("pre_seq_len")
    if own:
        raise ValueError(
            f"{stack.base} has a prefix of its own, of {own} columns, and {stack.prefix} is another"
            ": name the model without one"
        )
    return describe_fields(open_prefix(stack.prefix))


def put_on(model: Any, stack: Stack, is_trainable: bool = False) -> Any:
    """Return a model with adapters that act in all that it does.

    Args:
        model: loaded with `prefix_fields`.
        stack: the adapters.
        is_trainable: whether the last one goes on being trained; those before it never do.

    Raises:
        ValueError: if they do not fit the model, or cannot act on it together.
    """
    if stack.prefix is not None:
        return fill_prefix(model, stack.prefix)
    last = len(stack.kinds) - 1
    if holds_integers(model):
        check_packed(stack, is_trainable)
        return _put_beside(model, stack, is_trainable)
    for number, kind in enumerate(stack.kinds):
        model = _attach(model, kind.folder, is_trainable and number == last)
        if kind.kind == LORA and not (is_trainable and number == last):
            model = model.merge_and_unload()
    return model


def check_prefix(config: Any, folder: Path) -> None:
    """Refuse a prefix for a model of other sizes.

    Args:
        config: of the model.
        folder: of the prefix, in either layout.

    Raises:
        ValueError: naming both sizes.
    """
    stored = open_prefix(folder)
    width = config.num_layers * 2 * config.hidden_size
    name = "trans.2.weight" if "trans.2.weight" in stored else "embedding.weight"
    found = stored[name].shape[0 if name.startswith("trans") else 1]
    if found != width:
        raise ValueError(
            f"{folder} has a prefix of {found} columns, and the model takes {width}: it is a "
            "prefix of another model"
        )


def fill_prefix(model: Any, folder: Path) -> Any:
    """Put a stored prefix into a model's encoder, in float32 as it was trained.

    Raises:
        ValueError: if it is one for a model of other sizes.
    """
    encoder, stored = model.transformer.prefix_encoder, open_prefix(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if found != shapes:
        raise ValueError(
            f"{folder} has a prefix of {found}, and this model takes {shapes}: it is a prefix of "
            "another model"
        )
    encoder.float().load_state_dict({name: tensor.read() for name, tensor in stored.items()})
    return model


def holds_integers(model: Any) -> bool:
    """Whether weights of a model are packed, into which nothing can be merged."""
    return any(not p.dtype.is_floating_point for p in model.parameters())


def check_packed(stack: Stack, is_trainable: bool = False) -> None:
    """Refuse what only merging could do, for a model with packed weights.

    Raises:
        ValueError: naming the adapter and the remedy.
    """
    if len(stack.kinds) == 1:
        return
    folders = " ".join(map(str, stack.folders[:-1] if is_trainable else stack.folders))
    remedy = f"merge first, chatglm merge {stack.base} NEW --lora {folders}, and pack NEW"
    if is_trainable:
        raise ValueError(
            f"{stack.folders[0]} would have to be merged into packed weights, below what is "
            f"trained: {remedy}"
        )
    for folder in stack.folders:
        fields = read_object(folder / ADAPTER_FILE)
        if fields.get("modules_to_save") or fields.get("bias", "none") != "none":
            raise ValueError(
                f"{folder} has biases or whole modules in the place of the model's, and beside "
                f"packed weights several adapters can only be added up: {remedy}"
            )


def _put_beside(model: Any, stack: Stack, is_trainable: bool) -> Any:
    """Leave adapters beside packed weights, all of them acting."""
    first, *others = stack.folders
    model = _attach(model, first, is_trainable)
    if others:
        names = ["default", *(str(number) for number, _ in enumerate(others, 1))]
        for name, folder in zip(names[1:], others):
            check_shapes(model.get_base_model(), folder)
            _explain_failure(folder, lambda n=name, f=folder: model.load_adapter(str(f), n))
        model.base_model.set_adapter(names)
        model.requires_grad_(False)
    return model


def _attach(model: Any, folder: Path, is_trainable: bool = False) -> Any:
    from peft import PeftModel

    check_shapes(model, folder)
    load: Any = cast(Any, PeftModel).from_pretrained
    return _explain_failure(folder, lambda: load(model, str(folder), is_trainable=is_trainable))


def _explain_failure(folder: Path, load: Callable[[], Any]) -> Any:
    """Return what is loaded; an error of peft's in a line that says of which adapter."""
    try:
        with warnings.catch_warnings():
            # peft asks transformers 5.23 by a name that is a newer one's old one.
            warnings.filterwarnings("ignore", OLD_NAME, FutureWarning)
            return load()
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        told = " ".join(str(error).split())[:MOST_LETTERS]
        raise ValueError(f"{folder} cannot be put onto this model by peft: {told}") from error


def check_shapes(model: Any, folder: Path) -> None:
    """Refuse a LoRA adapter whose factors are of other sizes than the model's matrices.

    Args:
        model: with or without values.
        folder: of an adapter of peft; only factors of linear layers are looked at.

    Raises:
        ValueError: naming the first one.
    """
    file = find_adapter_weights(folder)
    sizes = _read_sizes(model)
    for key, stored in open_shards([file]).items():
        factor = next((part for part in FACTOR_NAMES if part in key), None)
        if factor is None or not key.endswith(".weight") or len(stored.shape) != 2:
            continue
        layer = key.removeprefix("base_model.model.").partition(factor)[0]
        axis = 1 if factor == FACTOR_NAMES[0] else 0
        found = stored.shape[axis]
        wanted = sizes.get(layer)
        if wanted is None:
            raise ValueError(f"{file} is for {layer}, which the model does not have: {_ANOTHER}")
        if found != wanted[1 - axis]:
            raise ValueError(
                f"{file} has {found} columns for {layer}, and the model has {wanted[1 - axis]}: "
                f"{_ANOTHER}"
            )


_ANOTHER = "it is an adapter of another model"


def _read_sizes(model: Any) -> Mapping[str, tuple[int, int]]:
    """Return inputs and outputs of the linear layers of a model, by name."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }


__all__ = [
    "PREFIX_TENSORS",
    "check_packed",
    "check_prefix",
    "check_shapes",
    "fill_prefix",
    "holds_integers",
    "prefix_fields",
    "put_on",
]
