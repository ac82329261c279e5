"""Owns the names of the model's layers as they stand in keys: lists, commas, "all".

Imports nothing, so that names are checked before a model is loaded. Does not know what adapters do.
"""

from collections.abc import Sequence

# The linear layers of a block; `all` is these, and neither the head nor a score head.
LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
TABLES = ("word_embeddings", "lm_head")
NORMS = ("input_layernorm", "post_attention_layernorm", "final_layernorm")
# LLaMA-Factory's, ms-swift's and peft's names of the same.
ALL_NAMES = ("all", "all-linear", "all_linear")
HEADS = ("lm_head", "score")


def split_names(names: Sequence[str]) -> list[str]:
    """Return the names of a list whose items may hold several with commas, each once."""
    parts = [part.strip() for name in names for part in name.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def expand_targets(names: Sequence[str]) -> list[str]:
    """Return the names of the layers that get adapters.

    Args:
        names: of layers, each perhaps behind those of the modules it is in, or "all".

    Raises:
        ValueError: for none at all, or a layer that there is not, naming those that there are.
    """
    wanted = split_names(names)
    if not wanted:
        raise ValueError(f"lora_targets names no layer: take all, or some of {', '.join(LAYERS)}")
    if any(name in ALL_NAMES for name in wanted):
        return list(LAYERS)
    for name in wanted:
        if name.rpartition(".")[2] in HEADS:
            raise ValueError(
                f"lora_targets cannot have {name}, whose weights are read without an adapter: "
                f"modules_to_save trains it whole; take all, or some of {', '.join(LAYERS)}"
            )
        if name.rpartition(".")[2] not in LAYERS:
            raise ValueError(
                f"lora_targets names {name}, which is no linear layer of a block: take all, or "
                f"some of {', '.join(LAYERS)}"
            )
    return wanted


def expand_modules(names: Sequence[str], targets: Sequence[str], bits: int) -> list[str]:
    """Return the names of the modules that are trained whole beside adapters.

    Args:
        names: of modules, each perhaps behind those of the modules it is in.
        targets: the layers that get adapters.
        bits: of packed weights, which cannot be trained; 0 if there are none.

    Raises:
        ValueError: for a module that there is not, one with adapters, or one that is packed.
    """
    wanted = split_names(names)
    known = (*TABLES, *NORMS, *LAYERS)
    for name in wanted:
        last = name.rpartition(".")[2]
        if last not in known:
            raise ValueError(
                f"modules_to_save names {name}, which is no module that can be trained whole: take "
                f"some of {', '.join(known)}"
            )
        if last in (target.rpartition(".")[2] for target in targets):
            raise ValueError(
                f"{name} is in modules_to_save and in lora_targets: train it whole or by adapters, "
                "and take it out of one of the two"
            )
        if bits and last in LAYERS:
            raise ValueError(
                f"modules_to_save cannot have {name}, whose weights are packed to {bits} bits: set "
                "bits to 0, or leave it out"
            )
    return wanted


__all__ = ["LAYERS", "NORMS", "TABLES", "expand_modules", "expand_targets", "split_names"]
