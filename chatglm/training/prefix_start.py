"""Owns what a P-Tuning begins from: a new prefix, or one that was trained before.

Which sizes a prefix has is told by the one to go on from, and a key that says otherwise is refused
before the model is loaded. Does not know how prefixes are stored (`checkpoints.prefixes`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatglm.checkpoints.prefixes import (
    describe_fields,
    is_peft_prefix,
    open_prefix,
)
from chatglm.checkpoints.reading import StoredTensor
from chatglm.checkpoints.recognize import ADAPTER_FILE, CONFIG_FILE, read_object
from chatglm.training.settings import KeyProblem

NEW_LENGTH = 128


def open_start(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the prefix encoder to go on from, by their names in it, none read yet.

    peft's folders hold what a network gave and no network: they go on as a prefix without one.

    Raises:
        ValueError: for a folder without a prefix.
    """
    if not is_peft_prefix(folder) and (folder / ADAPTER_FILE).is_file():
        kind = read_object(folder / ADAPTER_FILE).get("peft_type")
        raise KeyProblem(
            f"adapter {folder} holds {kind} and no prefix: train it further with the stage sft, or "
            "name the folder of a P-Tuning prefix"
        )
    return open_prefix(folder)


def choose_fields(
    asked: Mapping[str, Any], start: Mapping[str, StoredTensor], base: Path, source: str
) -> dict[str, Any]:
    """Return the sizes of the prefix to train.

    Args:
        asked: `pre_seq_len` and `prefix_projection`, None where nothing was said.
        start: the tensors to go on from; none for a new prefix.
        base: folder of the model, which may have a prefix of its own.
        source: what the tensors are called in an error.

    Raises:
        KeyProblem: if the prefix to go on from has other sizes than those asked for, or is one of
            another model.
    """
    config = read_object(base / CONFIG_FILE)
    if start:
        _check_model(start, config, source)
        found = describe_fields(start)
    elif config.get("pre_seq_len"):
        source = f"the model {base}"
        found = {"pre_seq_len": config["pre_seq_len"]}
        found["prefix_projection"] = bool(config.get("prefix_projection"))
    else:
        length, projects = asked["pre_seq_len"], asked["prefix_projection"]
        return {"pre_seq_len": length or NEW_LENGTH, "prefix_projection": bool(projects)}
    for key, value in found.items():
        if asked[key] not in (None, value):
            raise KeyProblem(
                f"{key} is {asked[key]}, and the prefix of {source} has {value}: leave {key} out "
                "to go on with that prefix, or name another one"
            )
    return found


def _check_model(start: Mapping[str, StoredTensor], config: Mapping[str, Any], source: str) -> None:
    """Refuse the prefix of a model with other layers or another hidden size."""
    hidden = config["hidden_size"]
    states = 2 * config["num_layers"] * hidden
    given, inner = start["embedding.weight"].shape[1], hidden
    if "trans.2.weight" in start:
        given, inner = start["trans.2.weight"].shape
    if given != states or inner != hidden:
        raise KeyProblem(
            f"the prefix of {source} gives {given} numbers a column, and the model takes "
            f"{states} (2 x {config['num_layers']} layers x {hidden}): it is one of another model"
        )


__all__ = ["choose_fields", "open_start"]
