"""The configuration of a ChatGLM model: its fields, their defaults and what may not be combined.

Owns the sizes of the model, the ids of the special tokens per vocabulary generation, and which
formats of packed weights there are. Knows nothing of tensors or of text.
"""

from typing import Any, NamedTuple, cast

import transformers
from transformers import PretrainedConfig

from .environment_chatglm import check_dtype_name, check_transformers

# The model's embedding rows of the two released vocabularies, and where their text ids begin:
# the first generation keeps 20000 image tokens in front of them.
TEXT_OFFSETS = {130528: 0, 150528: 20000}

# Ids relative to the text offset, equal in both released vocabularies.
SPECIAL_TOKEN_IDS = {
    "pad_token_id": 3,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
}

FROM_WEIGHTS = "use the config.json that came with the weights"

QUANTIZATION_BITS = (0, 4, 8)
GROUP_SIZES = (32, 64, 128)
# Whether kernels may round the input of a product to 8 bits, with a scale for every few columns.
ACTIVATIONS = ("int8", "exact")

COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "max_sequence_length",
)


check_transformers(transformers.__version__)


class ChatGLMConfig(PretrainedConfig):
    """Sizes, token ids and options of a ChatGLM model.

    Args:
        vocab_size: rows of the embedding; 130528 (current) or 150528 (first release) decide the
            default token ids below.
        hidden_size: width of the residual stream.
        num_layers: number of blocks, also readable as `num_hidden_layers`.
        num_attention_heads: heads per block; `hidden_size / num_attention_heads` is the head size.
        inner_hidden_size: width of the feed-forward layer, usually `4 * hidden_size`.
        layernorm_epsilon: epsilon of every layer norm.
        max_sequence_length: the window, in tokens, that the weights were trained for. `chat`
            keeps to it; `forward` does not enforce it.
        use_cache: whether keys and values are cached while generating.
        bos_token_id, eos_token_id, mask_token_id, gmask_token_id, pad_token_id: ids of `<sop>`,
            `<eop>`, `[MASK]`, `[gMASK]` and `<pad>`; default by `vocab_size`.
        position_encoding_2d: two rotary positions a token (all released weights) or one.
        quantization_bit: 0 for plain weights, 4 or 8 for a quantized checkpoint.
        quantization_group_size: 32, 64 or 128 columns that share a scale; None for a scale per
            row, as in the official checkpoints.
        quantization_embeddings: whether the embedding and the head are quantized too.
        quantization_activations: "int8" if a CPU's kernels may round the input of products with
            packed weights to 8 bits, or "exact".
        pre_seq_len: length of a P-Tuning v2 prefix, or None for a model without one.
        prefix_projection: whether the prefix goes through a two-layer network.
        tie_word_embeddings: whether `lm_head` is the embedding matrix (all released weights).

    Raises:
        ValueError: for sizes and ids that are no numbers or out of range, sizes that do not
            divide, an unknown `quantization_bit`, a dtype that torch does not have, or token ids
            missing beside a `vocab_size` of our own.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    base_model_tp_plan = {
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }

    def __init__(
        self,
        vocab_size: int = 130528,
        hidden_size: int = 4096,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        inner_hidden_size: int = 16384,
        layernorm_epsilon: float = 1e-5,
        max_sequence_length: int = 2048,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        mask_token_id: int | None = None,
        gmask_token_id: int | None = None,
        pad_token_id: int | None = None,
        position_encoding_2d: bool = True,
        quantization_bit: int = 0,
        quantization_group_size: int | None = None,
        quantization_embeddings: bool = False,
        quantization_activations: str = "int8",
        pre_seq_len: int | None = None,
        prefix_projection: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.inner_hidden_size = inner_hidden_size
        self.layernorm_epsilon = layernorm_epsilon
        self.max_sequence_length = max_sequence_length
        self.use_cache = use_cache
        self.position_encoding_2d = position_encoding_2d
        self.quantization_bit = quantization_bit
        self.quantization_group_size = quantization_group_size
        self.quantization_embeddings = quantization_embeddings
        self.quantization_activations = quantization_activations
        self.pre_seq_len: Any = pre_seq_len
        self.prefix_projection = prefix_projection
        token_ids = {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "mask_token_id": mask_token_id,
            "gmask_token_id": gmask_token_id,
            "pad_token_id": pad_token_id,
        }
        self._check_numbers()
        check_dtype_name(kwargs.get("dtype") or kwargs.get("torch_dtype"))
        token_ids = _complete_token_ids(vocab_size, token_ids)
        self.mask_token_id = token_ids.pop("mask_token_id")
        self.gmask_token_id = token_ids.pop("gmask_token_id")
        self._check_sizes()
        # transformers 5 unties by default; the released weights are tied.
        cast(Any, super()).__init__(tie_word_embeddings=tie_word_embeddings, **token_ids, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration as transformers does; a dtype that the caller named is handed on.

        transformers 5.8 keeps it, and `from_pretrained` cannot tell it from the configuration's.
        """
        named = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
        made = super().from_dict(config_dict, **kwargs)
        if isinstance(made, tuple):
            made[1].update(named)
        return made

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_positions(self) -> int:
        """Rows of the position ids: the position, and with 2-D positions the block position."""
        return 2 if self.position_encoding_2d else 1

    def _check_numbers(self) -> None:
        """Refuse sizes that are no sizes, before anything is computed from them."""
        for name in COUNTS:
            _check_number(name, getattr(self, name), 1)
        if self.pre_seq_len is not None:
            remedy = "leave it out (None) for a model without a prefix"
            _check_number("pre_seq_len", self.pre_seq_len, 1, remedy=remedy)
        epsilon: Any = self.layernorm_epsilon
        if not isinstance(epsilon, int | float) or not epsilon > 0:
            raise ValueError(
                f"layernorm_epsilon must be a number above 0, got {epsilon!r}; {FROM_WEIGHTS}."
            )

    def _check_sizes(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        if self.head_dim % (2 * self.num_positions):
            raise ValueError(
                f"hidden_size / num_attention_heads is {self.head_dim}; rotary positions need a "
                f"multiple of {2 * self.num_positions}. Change num_attention_heads."
            )
        if self.quantization_bit not in QUANTIZATION_BITS:
            raise ValueError(
                f"quantization_bit must be one of {QUANTIZATION_BITS}, got {self.quantization_bit}."
            )


def _check_number(
    name: str, value: Any, least: int, limit: int | None = None, remedy: str = FROM_WEIGHTS
) -> None:
    """Refuse what is no whole number, or is not within its limits."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and value >= least and (limit is None or value < limit):
        return
    below = "" if limit is None else f" and below vocab_size ({limit})"
    raise ValueError(
        f"{name} must be a whole number of at least {least}{below}, got {value!r}; {remedy}."
    )


def _complete_token_ids(vocab_size: int, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """Fill in ids that old configurations leave out, from the generation `vocab_size` names."""
    for name, value in token_ids.items():
        # More than one token may end an answer.
        several: list[Any] = (
            value if name == "eos_token_id" and isinstance(value, list) else [value]
        )
        for token_id in several if value is not None else ():
            _check_number(name, token_id, 0, vocab_size)
    missing = [name for name, token_id in token_ids.items() if token_id is None]
    if not missing:
        return token_ids
    if vocab_size not in TEXT_OFFSETS:
        raise ValueError(
            f"vocab_size {vocab_size} is neither of the released vocabularies "
            f"{tuple(TEXT_OFFSETS)}, so {', '.join(missing)} must be given."
        )
    offset = TEXT_OFFSETS[vocab_size]
    return token_ids | {name: offset + SPECIAL_TOKEN_IDS[name] for name in missing}


def check_bits(bits: int) -> None:
    """Raise ValueError for a number of bits that there is no format for."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}; 0 leaves a model as it is.")


def check_activations(activations: str) -> str:
    """Return a treatment of products' inputs; ValueError if there is none of this name."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, got {activations!r}.")
    return activations


def check_columns(
    in_features: int, bits: int, group_size: int | None = None, name: str = "weight"
) -> None:
    """Raise ValueError if a matrix of so many columns cannot be stored so.

    Args:
        in_features: columns of the matrix.
        bits: 4 or 8.
        group_size: 32, 64 or 128 columns that share a scale; None for whole rows.
        name: what the error calls the matrix.
    """
    check_bits(bits)
    if bits == 4 and in_features % 2:
        raise ValueError(
            f"{name} has {in_features} columns, and 4 bits need an even number of them, two to a "
            "byte: use 8 bits."
        )
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(
            f"group_size must be one of {GROUP_SIZES}, or None for a scale per row; got "
            f"{group_size!r}."
        )
    if group_size is not None and in_features % group_size:
        raise ValueError(
            f"{name} has {in_features} columns, which groups of {group_size} do not divide: use "
            "another group_size, or None for a scale per row."
        )


class WeightFormat(NamedTuple):
    """What `quantize` takes: the format of the packed weights.

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale; None for whole rows, the official format.
        embeddings: whether the embedding and the head are packed too.
        activations: "int8" if a CPU's kernels may round the input of products, or "exact".
    """

    bits: int
    group_size: int | None = None
    embeddings: bool = False
    activations: str = ACTIVATIONS[0]

    def __str__(self) -> str:
        group = "" if self.group_size is None else f" in groups of {self.group_size}"
        return f"{self.bits} bits{group}"

    @classmethod
    def of_config(cls, config: Any) -> "WeightFormat":
        """Return the format that a model's configuration names; 0 bits for plain weights."""
        return cls(
            config.quantization_bit,
            config.quantization_group_size,
            config.quantization_embeddings,
            check_activations(config.quantization_activations),
        )


__all__ = ["ChatGLMConfig"]
