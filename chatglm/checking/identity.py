"""Owns the facts of a folder that `chatglm check` tells: what it is, of whom, in which precision.

Each is read where it is written; where two places tell the same fact, both are told. Does not know
what is a fault.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import AutoTokenizer

from chatglm import door
from chatglm.cards import CARD_FILE, OFFICIAL_NAME, read_head
from chatglm.checking.problems import PROBLEM, Problem, gather
from chatglm.checking.tensors import count_dtypes, open_all
from chatglm.checkpoints.prefixes import is_prefix
from chatglm.checkpoints.reading import StoredTensor, list_weight_files
from chatglm.checkpoints.recognize import (
    ADAPTER_FILE,
    CONFIG_FILE,
    VALUE_HEAD_FILE,
    VOCABULARY_FILE,
    read_object,
)

Facts = dict[str, Any]
GENERATIONS = {130528: "current (v1.1.0)", 150528: "first release"}
OWN_GENERATION = "a vocabulary of its own"
ROWS = "word_embeddings.weight"
# What forks leave of their names in a configuration, a card, or the name of the folder.
FORKS = ("sunzeyeah", "fb700", "fitness", "ClueAI", "ChatYuan", "Belle", "VisualGLM", "Med-ChatGLM")
STAGES = ("pretrain", "sft", "ptuning", "reward", "ppo", "dpo", "grpo")
PREFIX_BESIDE = "checkpoint-*"


class Vocabulary(NamedTuple):
    """What a folder's tokenizer says, as the installed code reads it.

    Attributes:
        size: number of ids.
        ids: of the tokens that a configuration names too.
    """

    size: int
    ids: dict[str, int]


def describe_model(
    folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Facts:
    """Return the facts of a model of the family.

    Args:
        folder: of the model.
        fields: its config.json.
        tensors: of its weight files.
    """
    rows = fields.get("vocab_size")
    embeddings = [stored.shape for name, stored in tensors.items() if name.endswith(ROWS)]
    facts: Facts = {
        "generation": GENERATIONS.get(rows, OWN_GENERATION) if isinstance(rows, int) else None,
        "rows": {"configuration": rows, "embedding": embeddings[0][0] if embeddings else None},
        "sizes": {name: fields.get(name) for name in ("num_layers", "hidden_size")},
        "origin": name_origin(folder, fields),
        "stage": name_stage(folder, fields),
    }
    facts |= describe_weights(tensors) | describe_format(fields, tensors)
    facts["prefixes"] = [str(place) for place in find_prefixes(folder)]
    facts["adapters"] = [path.parent.name for path in sorted(folder.glob(f"*/{ADAPTER_FILE}"))]
    return facts


def describe_weights(tensors: Mapping[str, StoredTensor]) -> Facts:
    """Return the facts of weight files."""
    files = sorted({stored.file for stored in tensors.values() if stored.file})
    return {
        "weights": {
            "files": [file.name for file in files],
            "tensors": len(tensors),
            "bytes": sum(stored.tensor.nbytes for stored in tensors.values()),
            "dtypes": count_dtypes(tensors),
        }
    }


def describe_format(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Facts:
    """Return how the weights are packed, by the configuration, and whether they are."""
    bits = fields.get("quantization_bit") or 0
    is_packed = any(not stored.dtype.is_floating_point for stored in tensors.values())
    group_size = fields.get("quantization_group_size")
    has_packed_embeddings = any(name.endswith(f"{ROWS}_scale") for name in tensors)
    return {
        "format": {
            "bits": bits,
            "is_packed": is_packed,
            "group_size": group_size,
            "embeddings": has_packed_embeddings,
            "is_official": bool(is_packed and not group_size),
            "by": _name_quantizer(fields),
        }
    }


def _name_quantizer(fields: Mapping[str, Any]) -> str | None:
    settings: Any = fields.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    return str(cast(Facts, settings).get("quant_method"))


def name_origin(folder: Path, fields: Mapping[str, Any]) -> str | None:
    """Return whose model it is, as far as the folder says so: the official one, or a fork."""
    head = read_head(folder / CARD_FILE)
    told = [fields.get("_name_or_path"), head.get("base_model"), folder.name]
    names = [name for name in told if isinstance(name, str)]
    forks = [fork for fork in FORKS for name in names if fork.lower() in name.lower()]
    if forks:
        return next(name for name in names if forks[0].lower() in name.lower())
    return next((name for name in names if OFFICIAL_NAME.fullmatch(name)), None)


def name_stage(folder: Path, fields: Mapping[str, Any]) -> str | None:
    """Return the stage of `chatglm train` that wrote a folder, or None."""
    tags: Any = read_head(folder / CARD_FILE).get("tags")
    told = [stage for stage in STAGES if isinstance(tags, list) and stage in tags]
    if (folder / VALUE_HEAD_FILE).is_file():
        return "ppo"
    return told[0] if told else None


def find_prefixes(folder: Path) -> Iterator[Path]:
    """Yield the folders with a P-Tuning prefix beneath a model folder and beside it."""
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    beside = sorted(path for path in folder.parent.glob(PREFIX_BESIDE) if path != folder)
    for place in [*inside, *beside]:
        try:
            names = list_weight_files(place)
        except (ValueError, OSError):
            continue
        if len(names) == 1 and is_prefix(open_all(place, names)[0]):
            yield place


def describe_prefix(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Facts:
    """Return the facts of a P-Tuning prefix."""
    columns = next((stored.shape[0] for stored in tensors.values() if len(stored.shape) > 1), None)
    has_network = any(".trans." in name for name in tensors)
    return {
        "prefix": {
            "length": columns,
            "has_network": has_network,
            "configuration": fields.get("pre_seq_len"),
        },
        **describe_weights(tensors),
    }


def describe_adapter(folder: Path, tensors: Mapping[str, StoredTensor]) -> Facts:
    """Return the facts of an adapter of peft."""
    fields = read_object(folder / ADAPTER_FILE)
    named = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha")
    kept = {name: fields[name] for name in (*named, "num_virtual_tokens") if name in fields}
    targets = sorted(map(str, fields.get("target_modules") or ()))
    return {"adapter": {**kept, "target_modules": targets}, **describe_weights(tensors)}


def read_vocabulary(folder: Path) -> tuple[Vocabulary | None, list[Problem]]:
    """Return what a folder's tokenizer says, or why there is none."""
    loaded: list[Any] = []
    problems = gather(
        "broken-vocabulary",
        VOCABULARY_FILE,
        lambda: loaded.append(door.load_from(folder, AutoTokenizer)),
    )
    if problems:
        return None, problems
    (tokenizer,) = loaded
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "gmask_token_id")}
    return Vocabulary(tokenizer.vocab_size, ids | {"eos_token_id": tokenizer.eop_token_id}), []


def compare_vocabulary(vocabulary: Vocabulary, config: Any) -> list[Problem]:
    """Return where the vocabulary and the completed configuration of a folder are of two models.

    Args:
        vocabulary: as the tokenizer has it.
        config: as the door loads it.
    """
    faults: list[str] = []
    if vocabulary.size > config.vocab_size:
        faults.append(f"{vocabulary.size} ids for the {config.vocab_size} rows of {CONFIG_FILE}")
    for name, token_id in vocabulary.ids.items():
        named = getattr(config, name)
        if token_id not in (named if isinstance(named, list) else [named]):
            faults.append(f"{name} {token_id}, and {CONFIG_FILE} {named}")
    if not faults:
        return []
    what = f"{VOCABULARY_FILE} gives {'; '.join(faults)}"
    remedy = "take vocabulary and configuration of one model"
    return [Problem("vocabulary-of-another", PROBLEM, VOCABULARY_FILE, what, remedy)]


__all__ = [
    "compare_vocabulary",
    "describe_adapter",
    "describe_model",
    "describe_prefix",
    "read_vocabulary",
]
