"""Owns what a folder of the family lacks, and fills it in, in memory.

The presets are the home of the facts: a folder's generation, which the rows of its embedding tell,
decides the classes and the ids, and gives everything else that the folder does not say itself. Does
not know where the fields go, and changes no file.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from chatglm import model
from chatglm.checkpoints.recognize import CONFIG_FILE, read_object

PRESETS = Path(__file__).resolve().parent.parent / "presets"
CURRENT = PRESETS / "chatglm-6b"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
ID_SUFFIX = "_token_id"
DTYPE_FIELDS = ("dtype", "torch_dtype")
# Which class reads the vocabulary is settled before its options are.
CLASS_OPTIONS = ("auto_map", "tokenizer_class")
GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def find_auto_map() -> dict[str, str]:
    """Return the class of each of transformers' Auto classes, as `file.Class`."""
    return dict(_read(CURRENT / CONFIG_FILE)["auto_map"])


def list_settings() -> dict[int, Path]:
    """Return the folders with the settings of a generation, by the rows of its embedding.

    They are the presets and, in a clone, the repository's own small model.
    """
    candidates = [model.FOLDER, *sorted(PRESETS.iterdir())]
    found = [folder for folder in candidates if (folder / CONFIG_FILE).is_file()]
    return {_read(folder / CONFIG_FILE)["vocab_size"]: folder for folder in found}


def complete_fields(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with all fields that the installed classes need.

    A known generation decides the classes and the ids: old configurations have them wrong, or not
    at all. What this project wrote, as its `auto_map` tells, and a vocabulary of someone's own
    keep their ids; the configuration's class refuses the latter if one is missing.

    Args:
        own: what the folder's config.json holds.
    """
    auto_map = find_auto_map()
    current = deepcopy(_read(CURRENT / CONFIG_FILE))
    preset = _find_preset(own.get("vocab_size"), CONFIG_FILE)
    decided: dict[str, Any] = {"auto_map": auto_map, "model_type": current["model_type"]}
    classes = {reference.partition(".")[2] for reference in auto_map.values()}
    if not classes & set(own.get("architectures") or ()):
        decided["architectures"] = current["architectures"]
    if own.get("auto_map") != auto_map:
        decided |= {name: preset[name] for name in preset if name.endswith(ID_SUFFIX)}
    if any(own.get(name) for name in DTYPE_FIELDS):
        preset = {name: preset[name] for name in preset if name not in DTYPE_FIELDS}
    return {**preset, **own, **decided}


def complete_generation(vocab_size: int, ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation defaults of a model whose folder has none.

    Args:
        vocab_size: rows of its embedding.
        ids: the ids of its configuration, for a vocabulary of someone's own.
    """
    preset = _find_preset(vocab_size, GENERATION_FILE)
    if preset:
        return preset
    sampling = _read(CURRENT / GENERATION_FILE)
    shared = {name: sampling[name] for name in sampling if not name.endswith(ID_SUFFIX)}
    return {**shared, **ids}


def complete_generation_fields(own: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation defaults of a folder, those of its generation where it has none.

    Args:
        own: what its generation_config.json holds; nothing if there is none.
        fields: its configuration, completed.
    """
    ids = {name: fields.get(name) for name in GENERATION_IDS}
    wanted = complete_generation(fields["vocab_size"], ids)
    if not own or own.get("_from_model_config"):  # no one chose any of it
        return wanted
    return {**own, **{name: wanted[name] for name in ids if own.get(name) is None}}


def complete_tokenizer_fields(vocab_size: int | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a folder's tokenizer, with the class that reads its vocabulary.

    Args:
        vocab_size, own: as of `complete_tokenizer`.
    """
    current = _read(CURRENT / TOKENIZER_FILE)
    classes = {name: deepcopy(current[name]) for name in CLASS_OPTIONS}
    return {**complete_tokenizer(vocab_size, own), **own, **classes}


def complete_tokenizer(vocab_size: int | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a generation's tokenizer that a folder does not say itself.

    Args:
        vocab_size: rows of the embedding; None if the folder has no configuration.
        own: what its tokenizer_config.json holds; nothing if there is none.
    """
    preset = _find_preset(vocab_size, TOKENIZER_FILE)
    return {k: v for k, v in preset.items() if k not in own and k not in CLASS_OPTIONS}


def read_template() -> str:
    """Return the chat template, which is the same for the whole family."""
    return (model.FOLDER / TEMPLATE_FILE).read_text(encoding="utf-8")


def _find_preset(vocab_size: int | None, name: str) -> dict[str, Any]:
    """Return a file of the generation with so many rows, and nothing for an unknown one."""
    folder = list_settings().get(vocab_size or 0)
    return deepcopy(_read(folder / name)) if folder else {}


@cache
def _read(file: Path) -> dict[str, Any]:
    return read_object(file)


__all__ = [
    "complete_fields",
    "complete_generation",
    "complete_generation_fields",
    "complete_tokenizer",
    "complete_tokenizer_fields",
    "find_auto_map",
    "list_settings",
    "read_template",
]
