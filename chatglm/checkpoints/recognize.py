"""Owns the answer to "what is this folder?", from its configuration and its files' names.

The second and the third generation of ChatGLM and the first GLM-4 call themselves "chatglm" too, so
that `model_type` alone decides nothing. Reads no weights, runs none of a folder's code and imports
neither torch nor transformers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FAMILY = "the first ChatGLM-6B"
MODEL_TYPE = "chatglm"
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
VOCABULARY_FILE = "ice_text.model"

# Fields that only the later networks have, and the rows from which on one of them is a GLM-4.
LATER_FIELDS = {"padded_vocab_size", "ffn_hidden_size", "kv_channels", "multi_query_attention"}
GLM4_ROWS = 100_000
COUNTS = ("vocab_size", "quantization_bit", "pre_seq_len")
IMAGE_FIELDS = {"image_length", "vision_config"}

FIRST, LATER, OTHER, ADAPTER, NO_CONFIG, EMPTY = (
    "first",
    "later",
    "other",
    "adapter",
    "no config",
    "empty",
)
REMEDIES = {
    LATER: "load it with the code that belongs to it (trust_remote_code=True), or name a folder of "
    f"{FAMILY}",
    OTHER: f"load it with transformers alone, or name a folder of {FAMILY}",
    NO_CONFIG: f"put the {CONFIG_FILE} there that came with the weights",
    EMPTY: "download a model into it, or name another folder",
}


class Folder(NamedTuple):
    """What a folder is.

    Attributes:
        kind: one of the constants above.
        name: what people call it, with an article.
        vocab_size: rows of the embedding, 0 if the configuration does not say.
        bits: of quantized weights, 0 for plain ones.
        prefix_length: of a P-Tuning prefix, 0 for none.
        base: of an adapter, as it names the model that it belongs to.
    """

    kind: str
    name: str
    vocab_size: int = 0
    bits: int = 0
    prefix_length: int = 0
    base: str = ""

    @property
    def is_first_family(self) -> bool:
        """Whether the installed model files are the code for it."""
        return self.kind == FIRST


def recognize_folder(folder: Path) -> Folder:
    """Say what a folder on this machine is.

    Args:
        folder: any folder.

    Raises:
        ValueError: if its configuration is no JSON object; the message names the file.
    """
    if (folder / CONFIG_FILE).is_file():
        return recognize_fields(read_object(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    if (folder / ADAPTER_FILE).is_file():
        base = str(read_object(folder / ADAPTER_FILE).get("base_model_name_or_path") or "")
        return Folder(ADAPTER, f"an adapter of {base or 'an unnamed model'}", base=base)
    if any(folder.iterdir()):
        return Folder(NO_CONFIG, f"no model folder: it has no {CONFIG_FILE}")
    return Folder(EMPTY, "an empty folder")


def recognize_fields(fields: Mapping[str, Any], place: str = CONFIG_FILE) -> Folder:
    """Say what the model of a configuration is.

    Args:
        fields: what its config.json holds.
        place: what an error calls the file.

    Raises:
        ValueError: if a field that tells it is no number.
    """
    model_type = str(fields.get("model_type") or "")
    classes = [str(name) for name in fields.get("architectures") or ()]
    is_named_so = model_type == MODEL_TYPE or any(name.startswith("ChatGLM") for name in classes)
    if model_type not in ("", MODEL_TYPE) or not is_named_so:
        named = f"a model of type {model_type}" if model_type else f"no model of {FAMILY}"
        return Folder(OTHER, named)
    if IMAGE_FIELDS & fields.keys():
        return Folder(LATER, "a GLM that reads images")
    if LATER_FIELDS & fields.keys():
        is_glm4 = _read_count(fields, "padded_vocab_size", place) >= GLM4_ROWS
        return Folder(LATER, "a GLM-4" if is_glm4 else "a ChatGLM2 or ChatGLM3")
    vocab_size, bits, prefix_length = (_read_count(fields, name, place) for name in COUNTS)
    return Folder(FIRST, FAMILY, vocab_size, bits, prefix_length)


def _read_count(fields: Mapping[str, Any], name: str, place: str) -> int:
    value = fields.get(name) or 0
    if not isinstance(value, int):
        raise ValueError(f"{place} has {name}={value!r}, which is no whole number; fetch it again")
    return value


def describe_stranger(place: str | Path, found: Folder) -> str:
    """Return the one line about something that is not of the family: what it is, what to do."""
    if found.kind == ADAPTER:
        remedy = f"name the model's own folder, or `chatglm merge {found.base or 'MODEL'} NEW "
        return f"{place} is {found.name} and no model: {remedy}--lora {place}` and name NEW"
    beside = "" if found.kind in (NO_CONFIG, EMPTY) else f", and not {FAMILY}"
    return f"{place} is {found.name}{beside}: {REMEDIES[found.kind]}"


def read_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}; fetch it again") from error
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise ValueError(f"{file} holds a {kind}, and not fields by name; fetch it again")
    return fields


__all__ = [
    "ADAPTER",
    "EMPTY",
    "FIRST",
    "LATER",
    "NO_CONFIG",
    "OTHER",
    "Folder",
    "describe_stranger",
    "read_object",
    "recognize_fields",
    "recognize_folder",
]
