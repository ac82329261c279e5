"""Owns the answer to "what is this folder?", from its configuration and its files' names.

The second and the third generation of ChatGLM and the first GLM-4 call themselves "chatglm" too, so
that `model_type` alone decides nothing. Reads no weights, runs none of a folder's code and imports
neither torch nor transformers.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from chatglm.checkpoints import signatures

FAMILY = "the first ChatGLM-6B"
MODEL_TYPE = "chatglm"
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
VOCABULARY_FILE = "ice_text.model"
SCORER = "ForSequenceClassification"  # the names of classes with scores end so
VALUE_HEAD_FILE = "value_head.safetensors"  # what PPO keeps beside a policy
PREFIX_TENSORS = "transformer.prefix_encoder."

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
PARENT, HUB_CACHE, RUNTIME, MEGATRON = "parent", "hub cache", "other runtime", "megatron"
# Folders that may hold a vocabulary, and no model.
WITHOUT_CONFIG = {NO_CONFIG, PARENT, HUB_CACHE, RUNTIME, MEGATRON}
OLD_GLM_CLASSES = {"GLMModel", "GLMForConditionalGeneration", "GLMForMultipleChoice"}
RUNTIME_KINDS = (signatures.GGUF, signatures.GGML)
RUNTIME_ENDINGS = (".gguf", ".ggml", ".bin")
# What the trainers of Megatron, SAT and DeepSpeed leave: a file with a name of the newest step.
MEGATRON_FILES = ("latest", "latest_checkpointed_iteration.txt", "mp_rank_00_model_states.pt")
MOST_NAMED = 5
# What other quantizers leave beside weights that only they can read.
FOREIGN_CONFIGS = {"quantize_config.json": "AutoGPTQ", "quant_config.json": "AutoAWQ"}
OWN_METHOD = "chatglm"
NO_TEXT = (signatures.POINTER, signatures.EMPTY, signatures.PAGE)
REMEDIES = {
    LATER: "load it with the code that belongs to it (trust_remote_code=True), or name a folder of "
    f"{FAMILY}",
    OTHER: f"load it with transformers alone, or name a folder of {FAMILY}",
    NO_CONFIG: f"put the {CONFIG_FILE} there that came with the weights",
    PARENT: "name one of them",
    HUB_CACHE: "name the folder of a revision in it",
    RUNTIME: "name the folder of the weights that it was made from",
    MEGATRON: "convert it to a folder of transformers with the tools of its trainer first",
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
        is_scorer: whether it gives scores, as a reward model does, and no text.
    """

    kind: str
    name: str
    vocab_size: int = 0
    bits: int = 0
    prefix_length: int = 0
    base: str = ""
    is_scorer: bool = False

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
        fields = read_object(folder / ADAPTER_FILE)
        base = str(fields.get("base_model_name_or_path") or "")
        return Folder(ADAPTER, f"{name_adapter(fields)} of {base or 'an unnamed model'}", base=base)
    return _recognize_contents(folder, sorted(folder.iterdir()))


def name_adapter(fields: Mapping[str, Any]) -> str:
    """Return what people call an adapter of peft, with an article.

    Args:
        fields: its adapter_config.json.
    """
    peft_type = str(fields.get("peft_type") or "")
    by_type = {"": "an adapter", "LORA": "a LoRA adapter", "PREFIX_TUNING": "a prefix of peft's"}
    return by_type.get(peft_type, f"an adapter of peft's kind {peft_type}")


def _recognize_contents(folder: Path, entries: list[Path]) -> Folder:
    """Say what a folder without a configuration of its own is."""
    if not entries:
        return Folder(EMPTY, "an empty folder")
    revisions = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if revisions:
        inside = _name_some(f"snapshots/{path.name}" for path in revisions)
        return Folder(HUB_CACHE, f"the cache of a model of the Hub, with {inside} in it")
    names = {path.name for path in entries}
    if names & set(MEGATRON_FILES) or any(folder.glob("mp_rank_*")):
        return Folder(MEGATRON, "a checkpoint of Megatron, SAT or DeepSpeed")
    for file in (path for path in entries if path.suffix in RUNTIME_ENDINGS and path.is_file()):
        if (kind := signatures.identify_file(file)) in RUNTIME_KINDS:
            return Folder(RUNTIME, f"a folder for another runtime, {file.name} is {kind}")
    models = [path.name for path in entries if _holds_model(path)]
    if models:
        inside = f"but model folders in it, {_name_some(models)}"
        return Folder(PARENT, f"no model folder: it has no {CONFIG_FILE}, {inside}")
    return Folder(NO_CONFIG, f"no model folder: it has no {CONFIG_FILE}")


def _holds_model(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONFIG_FILE, ADAPTER_FILE))


def _name_some(names: Iterable[str]) -> str:
    """Return names in a row, and of many the first ones."""
    listed = list(names)
    more = len(listed) - MOST_NAMED
    return ", ".join(listed[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def recognize_fields(fields: Mapping[str, Any], place: str = CONFIG_FILE) -> Folder:
    """Say what the model of a configuration is.

    Args:
        fields: what its config.json holds.
        place: what an error calls the file.

    Raises:
        ValueError: if a field that tells it is no number.
    """
    model_type, classes = _read_type(fields, place), _read_classes(fields, place)
    is_named_so = model_type == MODEL_TYPE or any(name.startswith("ChatGLM") for name in classes)
    if model_type not in ("", MODEL_TYPE) or not is_named_so:
        return Folder(OTHER, _name_other(model_type, classes))
    if IMAGE_FIELDS & fields.keys():
        return Folder(LATER, "a GLM that reads images")
    if LATER_FIELDS & fields.keys():
        is_glm4 = _read_count(fields, "padded_vocab_size", place) >= GLM4_ROWS
        return Folder(LATER, "a GLM-4" if is_glm4 else "a ChatGLM2 or ChatGLM3")
    vocab_size, bits, prefix_length = (_read_count(fields, name, place) for name in COUNTS)
    is_scorer = any(name.endswith(SCORER) for name in classes)
    return Folder(FIRST, FAMILY, vocab_size, bits, prefix_length, is_scorer=is_scorer)


def _read_type(fields: Mapping[str, Any], place: str) -> str:
    value = fields.get("model_type") or ""
    if not isinstance(value, str):
        _refuse_field(place, "model_type", value, "no text")
    return value


def _read_classes(fields: Mapping[str, Any], place: str) -> list[str]:
    value: Any = fields.get("architectures") or []
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        _refuse_field(place, "architectures", value, "no list of names")
    return list(value)


def _name_other(model_type: str, classes: list[str]) -> str:
    """Return what a model of another family is called."""
    if model_type == "glm" and OLD_GLM_CLASSES & set(classes):
        return "a GLM of before ChatGLM, as GLM-10B is (model type glm)"
    return f"a model of type {model_type}" if model_type else f"no model of {FAMILY}"


def _read_count(fields: Mapping[str, Any], name: str, place: str) -> int:
    value = fields.get(name) or 0
    if not isinstance(value, int) or isinstance(fields.get(name), bool):
        _refuse_field(place, name, value, "no whole number")
    return value


def _refuse_field(place: str, name: str, value: Any, is_what: str) -> NoReturn:
    raise ValueError(f"{place} has {name}={value!r:.80}, which is {is_what}; fetch it again")


def refuse_foreign_format(
    folder: Path, fields: Mapping[str, Any], known: Collection[str] = (OWN_METHOD,)
) -> None:
    """Raise ValueError if another tool has quantized the weights, which it alone can read.

    Args:
        folder: of a model.
        fields: its config.json.
        known: the methods, as a quantization_config names them, that are not refused.
    """
    tools = [tool for name, tool in FOREIGN_CONFIGS.items() if (folder / name).is_file()]
    settings: Any = fields.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if settings and method not in known:
        tools.insert(0, str(method or "another tool"))
    if tools:
        raise ValueError(
            f"{folder} is quantized already, by {tools[0]}: name the folder with the float weights "
            "that it was made from"
        )


def describe_stranger(place: str | Path, found: Folder) -> str:
    """Return the one line about something that is not of the family: what it is, what to do."""
    if found.kind == ADAPTER:
        base = found.base or "MODEL"
        return (
            f"{place} is {found.name} and no model: name the model's own folder, in the terminal "
            f"`chatglm chat {base} --adapter {place}`, or `chatglm merge {base} NEW --lora "
            f"{place}` and name NEW"
        )
    no_model = found.kind in WITHOUT_CONFIG or found.kind == EMPTY
    beside = "" if no_model else f", and not {FAMILY}"
    return f"{place} is {found.name}{beside}: {REMEDIES[found.kind]}"


def read_object(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds.

    Raises:
        ValueError: if it is no JSON object in UTF-8, or has two values for one name.
    """
    text = _read_text(file)
    pairs, refuse = partial(_join_pairs, file), partial(_refuse_constant, file)
    try:
        fields: Any = json.loads(text, object_pairs_hook=pairs, parse_constant=refuse)
    except RefusedJsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON file: {error}; {_choose_remedy(text)}") from error
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise ValueError(f"{file} holds a {kind}, and not fields by name; fetch it again")
    return fields


def _read_text(file: Path) -> str:
    if (kind := signatures.identify_file(file)) in NO_TEXT:
        raise ValueError(f"{file} is {kind} and no JSON file: {signatures.choose_remedy(kind)}")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no JSON file in UTF-8: {error}; save it as UTF-8") from error


class RefusedJsonError(ValueError):
    """A JSON file that could be read, and understood in more than one way."""


def _choose_remedy(text: str) -> str:
    is_marked = text.startswith("\ufeff")
    return "save it as UTF-8 without a byte order mark" if is_marked else "fetch it again"


def _join_pairs(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields and fields[name] != value:
            raise RefusedJsonError(
                f"{file} has {name} twice, {fields[name]!r:.40} and {value!r:.40}; remove the "
                "wrong one"
            )
        fields[name] = value
    return fields


def _refuse_constant(file: Path, name: str) -> NoReturn:
    raise RefusedJsonError(f"{file} has the value {name}, which is no number; fetch it again")


__all__ = [
    "ADAPTER",
    "ADAPTER_WEIGHTS",
    "EMPTY",
    "FIRST",
    "HUB_CACHE",
    "LATER",
    "MEGATRON",
    "NO_CONFIG",
    "OTHER",
    "PARENT",
    "PREFIX_TENSORS",
    "RUNTIME",
    "SCORER",
    "VALUE_HEAD_FILE",
    "WITHOUT_CONFIG",
    "Folder",
    "describe_stranger",
    "name_adapter",
    "read_object",
    "recognize_fields",
    "recognize_folder",
    "refuse_foreign_format",
]
