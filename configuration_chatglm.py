"""The configuration of a ChatGLM model: its fields, their defaults and what may not be combined.

Owns the sizes of the model, the ids of the special tokens per vocabulary generation, how positions
beyond the trained ones are reached, and which formats of packed weights there are. Knows nothing of
tensors or of text.
"""

import math
from typing import Any, NamedTuple, cast

import torch
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

WHOLE_BLOCKS = 'device_map="auto", which puts whole blocks on several GPUs'
FROM_WEIGHTS = "use the config.json that came with the weights"

QUANTIZATION_BITS = (0, 4, 8)
GROUP_SIZES = (32, 64, 128)
# Whether kernels may round the input of a product to 8 bits, with a scale for every few columns.
ACTIVATIONS = ("int8", "exact")

# How rotary positions reach beyond what was trained, by the names of transformers.
ROPE_TYPES = ("linear", "dynamic")
ROPE_FIELDS = {"rope_type", "type", "factor", "original_max_position_embeddings", "rope_theta"}
ROTARY_BASE = 10000.0
TRAINED_LENGTH = "original_max_position_embeddings"
RELEASED_LENGTH = 2048  # the window of all released weights

COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "max_sequence_length",
)
# Numbers far beyond any model of the family: torch would be asked for what no machine has.
LARGEST, MOST_LAYERS, MOST_LABELS = 2**24, 2**10, 2**16
SWITCHES = (
    "use_cache",
    "position_encoding_2d",
    "prefix_projection",
    "quantization_embeddings",
    "tie_word_embeddings",
)
# Fields of transformers' own that it takes for texts, or for tables, without a look.
TEXTS = ("dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "problem_type")
TABLES = ("id2label", "label2id")


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
        max_sequence_length: the window, in tokens. `chat` keeps to it; `forward` does not enforce
            it. With a new `rope_scaling` it is what the weights were trained for, and `factor`
            times as much then.
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
        rope_scaling, rope_parameters: two names of one field, None or a dictionary as
            `RopeScaling.of_fields` takes it: how positions reach beyond the trained ones. It is
            kept, and saved, as `rope_parameters`.

    Raises:
        ValueError: for sizes and ids that are no numbers or out of range, sizes that do not
            divide, an unknown `quantization_bit`, a dtype that torch does not have, token ids
            missing beside a `vocab_size` of our own, or a `rope_scaling` that is not ours.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # transformers 5 would warn of it beside the types that we have.
    ignore_keys_at_rope_validation = {TRAINED_LENGTH}
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
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
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
        _check_kinds({**kwargs, **vars(self), "tie_word_embeddings": tie_word_embeddings})
        check_dtype_name(kwargs.get("dtype") or kwargs.get("torch_dtype"))
        token_ids = _complete_token_ids(vocab_size, token_ids)
        self.mask_token_id = token_ids.pop("mask_token_id")
        self.gmask_token_id = token_ids.pop("gmask_token_id")
        self._check_sizes()
        # transformers 5 unties by default; the released weights are tied.
        cast(Any, super()).__init__(tie_word_embeddings=tie_word_embeddings, **token_ids, **kwargs)
        self._check_numbers()  # other names of sizes, as of `attribute_map`, come that way
        self._check_sizes()
        self._take_scaling(_choose_scaling(rope_scaling, rope_parameters))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration as transformers does; a dtype that the caller named is handed on.

        transformers 5.8 keeps it, and `from_pretrained` cannot tell it from the configuration's.
        The caller's `rope_scaling` is for the window that the folder's model was trained for.

        Raises:
            ValueError: as the class does, naming the file where an Auto class tells its place.
        """
        named = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
        later = _pop_window(kwargs)
        try:
            made = super().from_dict(config_dict, **kwargs)
            config = made[0] if isinstance(made, tuple) else made
            for name, value in later.items():
                setattr(config, name, value)
            RopeScaling.of_config(config)
        except Exception as error:  # each release has errors of its own for fields it cannot use
            place = f"{kwargs['name_or_path']}/" if kwargs.get("name_or_path") else ""
            ours = f"transformers cannot use it, {type(error).__name__}: {error}; {FROM_WEIGHTS}"
            told = error if isinstance(error, ValueError) else " ".join(ours.split())
            raise ValueError(f"{place}config.json: {told}") from error
        if isinstance(made, tuple):
            made[1].update(named)
        return made

    def _take_scaling(self, fields: dict[str, Any] | None) -> None:
        """Take a `rope_scaling`; the window is what it reaches, or what it was saved with."""
        window = self.max_sequence_length
        self.rope_scaling = fields
        scaling = RopeScaling.of_config(self)
        if scaling is not None and window > scaling.trained_length:
            self.max_sequence_length = window
            RopeScaling.of_config(self)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_positions(self) -> int:
        """Rows of the position ids: the position, and with 2-D positions the block position."""
        return 2 if self.position_encoding_2d else 1

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """How positions reach beyond the trained ones, in transformers' form; None if not."""
        return self.__dict__.get("rope_parameters")

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        """Take another one, for what was trained, and set the window to what it reaches."""
        known = RopeScaling.of_config(self)
        window = self.max_sequence_length if known is None else known.trained_length
        scaling = RopeScaling.of_fields(value, window)
        if scaling is None:
            self.max_sequence_length = window
            self.__dict__.pop("rope_parameters", None)
            return
        self.max_sequence_length = scaling.reach
        self.rope_parameters = scaling.to_fields()

    def _check_numbers(self) -> None:
        """Refuse sizes that are no sizes, before anything is computed from them."""
        for name in COUNTS:
            limit = MOST_LAYERS if name == "num_layers" else LARGEST
            _check_number(name, getattr(self, name), 1, limit, whose=f"{limit}")
        if self.pre_seq_len is not None:
            remedy = "leave it out (None) for a model without a prefix"
            _check_number("pre_seq_len", self.pre_seq_len, 1, LARGEST, remedy, f"{LARGEST}")
        epsilon: Any = self.layernorm_epsilon
        is_number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool)
        if not is_number or not 0 < epsilon < 1:
            above = "above 0 and below 1" if is_number and epsilon >= 1 else "above 0"
            raise ValueError(
                f"layernorm_epsilon must be a number {above}, got {epsilon!r}; {FROM_WEIGHTS}."
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
        if self.quantization_group_size is not None:
            _check_group_size(self.quantization_group_size)
        check_activations(self.quantization_activations or ACTIVATIONS[0])
        bits: Any = self.quantization_bit
        if bits not in QUANTIZATION_BITS or not isinstance(bits, int):
            known = f"one of {QUANTIZATION_BITS}"
            raise ValueError(f"quantization_bit must be {known}, got {bits!r}; {FROM_WEIGHTS}.")


def _check_kinds(fields: dict[str, Any]) -> None:
    """Refuse switches that are none, and fields of transformers' that it would trip over."""
    kinds = (
        (SWITCHES, bool, "true or false"),
        (TEXTS, (str, torch.dtype), "a text"),
        (TABLES, dict, "a table of names"),
    )
    for names, kind, wanted in kinds:
        for name in names:
            value = fields.get(name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} must be {wanted}, got {value!r:.80}; {FROM_WEIGHTS}.")
    if fields.get("num_labels") is not None:  # each gets a name of transformers'
        _check_number("num_labels", fields["num_labels"], 0, MOST_LABELS, whose=f"{MOST_LABELS}")


def _check_number(
    name: str,
    value: Any,
    least: int,
    limit: int | None = None,
    remedy: str = FROM_WEIGHTS,
    whose: str = "",
) -> None:
    """Refuse what is no whole number, or is not within its limits."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and value >= least and (limit is None or value < limit):
        return
    is_small = bool(whose) and not (is_whole and value >= least)  # the limit is of no interest
    below = "" if limit is None or is_small else f" and below {whose or f'vocab_size ({limit})'}"
    raise ValueError(
        f"{name} must be a whole number of at least {least}{below}, got {value!r:.80}; {remedy}."
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


def check_tensor_parallel(config: ChatGLMConfig, num_processes: int) -> None:
    """Raise ValueError for a model whose blocks `tp_plan` cannot cut into parts.

    Args:
        config: the model's.
        num_processes: among which each layer is to be shared out.
    """
    if config.quantization_bit:
        raise ValueError(
            f"tp_plan cannot share out weights packed in {config.quantization_bit} bits, whose "
            f"scales it does not know: load the unquantized weights, or use {WHOLE_BLOCKS}."
        )
    if config.pre_seq_len is not None:
        raise ValueError(
            f"tp_plan cannot share out the prefix of a P-Tuning model (pre_seq_len "
            f"{config.pre_seq_len}): use {WHOLE_BLOCKS}."
        )
    if config.num_attention_heads % num_processes:
        raise ValueError(
            f"tp_plan cannot share out {config.num_attention_heads} heads among {num_processes} "
            "processes: start as many processes as divide num_attention_heads."
        )


def _check_group_size(group_size: Any) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"group_size must be one of {GROUP_SIZES}, or None for a scale per row; got "
            f"{group_size!r}."
        )


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
    if group_size is not None:
        _check_group_size(group_size)
    if group_size is not None and in_features % group_size:
        raise ValueError(
            f"{name} has {in_features} columns, which groups of {group_size} do not divide: use "
            "another group_size, or None for a scale per row."
        )


def _choose_scaling(
    rope_scaling: dict[str, Any] | None, rope_parameters: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return the one of two that was given; ValueError if both were, and differ."""
    given = [fields for fields in (rope_scaling, rope_parameters) if fields not in (None, {})]
    if given[1:] and rope_scaling != rope_parameters:
        raise ValueError(
            f"rope_scaling {rope_scaling} and rope_parameters {rope_parameters} are two names of "
            "one field; give one."
        )
    return given[0] if given else None


def _pop_window(options: dict[str, Any]) -> dict[str, Any]:
    """Take a caller's `rope_scaling` out of options, with the window that is to follow it."""
    names = ("rope_scaling", "rope_parameters")
    if not any(name in options for name in names):
        return {}
    later = {"rope_scaling": _choose_scaling(*(options.pop(name, None) for name in names))}
    windows = ("max_sequence_length", "max_position_embeddings")
    return later | {name: options.pop(name) for name in windows if name in options}


class RopeScaling(NamedTuple):
    """How rotary positions reach beyond the trained ones (`rotary_chatglm.slow_rotation`).

    Attributes:
        rope_type: "linear" or "dynamic".
        factor: how many times as many positions are to be reached, at least 1.
        trained_length: positions that the weights were trained for.
    """

    rope_type: str
    factor: float
    trained_length: int

    @property
    def reach(self) -> int:
        """Positions that can be reached."""
        return int(self.factor * self.trained_length)

    @classmethod
    def of_config(cls, config: Any) -> "RopeScaling | None":
        """Return what a configuration says, checked against its window; None for no scaling."""
        fields = getattr(config, "rope_scaling", None)
        scaling = cls.of_fields(fields, config.max_sequence_length)
        if scaling is not None:
            scaling.check_window(config.max_sequence_length)
        return scaling

    @classmethod
    def of_fields(cls, fields: Any, window: int) -> "RopeScaling | None":
        """Return what transformers' form of it says, or None for no scaling.

        Args:
            fields: None, or a dictionary of `rope_type` (or `type`), `factor`, and, if it is not
                `window`, `original_max_position_embeddings`. `rope_theta` may only be ours.
            window: positions that the weights were trained for, if `fields` does not say.

        Raises:
            ValueError: for anything else.
        """
        rope_type = _read_rope_type(fields)
        if rope_type is None:
            return None
        factor = fields.get("factor")
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not is_number or not 1 <= factor < math.inf:
            raise ValueError(
                f"rope_scaling needs a factor of at least 1, got {factor!r}: 2.0 for twice the "
                "trained window."
            )
        if TRAINED_LENGTH not in fields and window > RELEASED_LENGTH:
            raise ValueError(
                f"max_sequence_length is {window} beside a rope_scaling without {TRAINED_LENGTH}, "
                f"and the released weights were trained for {RELEASED_LENGTH}: say in "
                f"rope_scaling[{TRAINED_LENGTH!r}] what these were trained for."
            )
        trained_length = fields.get(TRAINED_LENGTH, window)
        remedy = "it is the window that the weights were trained for"
        _check_number(f"rope_scaling[{TRAINED_LENGTH!r}]", trained_length, 1, remedy=remedy)
        return cls(rope_type, float(factor), trained_length)

    def check_window(self, window: Any) -> None:
        """Raise ValueError for a window that is beyond the reach."""
        _check_number("max_sequence_length", window, 1)
        if window > self.reach:
            raise ValueError(
                f"max_sequence_length {window} is beyond {self.reach}, which factor {self.factor} "
                f"reaches from {self.trained_length} trained positions: use a factor of "
                f"{window / self.trained_length:g}."
            )

    def to_fields(self) -> dict[str, Any]:
        """Return it in transformers' form, with nothing left to conclude."""
        fields = {"rope_type": self.rope_type, "factor": self.factor}
        return fields | {TRAINED_LENGTH: self.trained_length, "rope_theta": ROTARY_BASE}


def _read_rope_type(fields: Any) -> str | None:
    """Return the type that a `rope_scaling` names; None if it is none or the default.

    Raises:
        ValueError: for other types, other fields and another base.
    """
    if fields in (None, {}):
        return None
    if not isinstance(fields, dict):
        raise ValueError(
            f'rope_scaling must be None or like {{"rope_type": "dynamic", "factor": 4.0}}, got '
            f"{fields!r}."
        )
    names = [fields[name] for name in ("rope_type", "type") if fields.get(name) is not None]
    rope_type = names[0] if names and names[0] == names[-1] and names[0] in ROPE_TYPES else None
    is_default = names in (["default"], ["default"] * 2) or set(fields) == {"rope_theta"}
    if rope_type is None and not is_default:
        raise ValueError(
            f"rope_scaling has the type {' and '.join(map(repr, names)) or None}, and ChatGLM has "
            f"{' or '.join(map(repr, ROPE_TYPES))}: use "
            '{"rope_type": "dynamic", "factor": 4.0}, which needs no training, or leave it out.'
        )
    used = ROPE_FIELDS - ({"factor", TRAINED_LENGTH} if is_default else set())
    others = sorted(map(str, fields.keys() - used))
    if others:
        raise ValueError(
            f"rope_scaling has fields that the type {rope_type or 'default'!r} does not use: "
            f"{', '.join(others)}; it takes {', '.join(sorted(used))}."
        )
    if fields.get("rope_theta") not in (None, ROTARY_BASE):
        raise ValueError(
            f"rope_scaling has rope_theta {fields['rope_theta']!r}, and ChatGLM's weights turn by "
            f"{ROTARY_BASE}: leave it out."
        )
    return rope_type


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
