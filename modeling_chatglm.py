"""The ChatGLM network: modules only, leaves first.

Owns the blocks, the P-Tuning v2 prefix, the heads and their losses. Knows nothing of text. Where a
token stands and what it sees comes from `masking_chatglm`, what turns it from `rotary_chatglm`,
tokens from `generation_chatglm` and `rows_chatglm`, talk and scores from `conversation_chatglm` and
`scoring_chatglm`, packed weights from `quantization` and `quantizer_chatglm`. What is decorated
here has a faster twin on a CPU (`environment_chatglm`); the model is the code below.

Shapes: `B` batch, `S` new tokens, `K` keys (past, new and prefix), `N` heads, `D` head dim,
`H` hidden, `P` position axes, `L` layers, `V` vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, GradientCheckpointingLayer, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Not used here, as others below: transformers copies the files that this one imports alone.
from .answer_text_chatglm import StopOnText  # noqa: F401
from .cache_chatglm import ChatGLMCache, KeyValues, extend_cache, prepend_prefix
from .checkpoint_chatglm import StoredTensor  # noqa: F401
from .configuration_chatglm import ChatGLMConfig, WeightFormat
from .conversation_chatglm import ChatMixin
from .decoding_chatglm import RowDecoder  # noqa: F401
from .drafting_chatglm import PromptLookup  # noqa: F401
from .drawing_chatglm import Draw  # noqa: F401
from .environment_chatglm import (
    CACHE_NAME,
    CACHE_NAMES,
    choose_cache,
    try_first,
    with_fast_products,
)
from .generation_chatglm import GLMGenerationMixin
from .masking_chatglm import (
    SpecialIds,
    build_attention_bias,
    build_document_geometry,
    find_last_columns,
    find_static_columns,
    locate,
    select_positions,
)
from .quantization import is_packed
from .quantization_cuda import find_kernels  # noqa: F401
from .quantization_cuda_source import SOURCES  # noqa: F401
from .quantization_nvrtc import load_nvrtc  # noqa: F401
from .quantization_torch import find_int8_product  # noqa: F401
from .quantizer_chatglm import QuantizationMixin, QuantizedLoadingMixin, note_ties, swap_layers
from .rotary_chatglm import RotaryEmbedding, apply_rotary
from .rows_chatglm import RowCaches, attend_rows
from .scoring_chatglm import ScoringMixin, shift_labels, watch_labels

# Of the released weights; the original code uses this number for a model of any depth.
RESIDUAL_LAYERS = 28
PREFIX_DROPOUT = 0.1


class PrefixTable(nn.Embedding):
    """The rows that make a prefix, which start wider than those of tokens."""


class PrefixEncoder(nn.Module):
    """The states of a P-Tuning v2 prefix, trained keys and values before every layer's own.

    A table, or one behind a two-layer network. Source: https://arxiv.org/abs/2110.07602.
    """

    def __init__(self, config: ChatGLMConfig, pre_seq_len: int) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.head_dim = config.head_dim
        self.prefix_projection = config.prefix_projection
        self.dropout = nn.Dropout(PREFIX_DROPOUT)
        states_size = config.num_layers * config.hidden_size * 2
        if config.prefix_projection:
            self.embedding = PrefixTable(pre_seq_len, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, states_size),
            )
        else:
            self.embedding = PrefixTable(pre_seq_len, states_size)

    def forward(self, batch_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return each layer's keys and values, L times `(2, B, N, pre_seq_len, D)`."""
        states = self.embedding.weight
        states = self.trans(states) if self.prefix_projection else states
        states = states.to(dtype).expand(batch_size, -1, -1)  # (B, pre_seq_len, L * 2 * H)
        states = states.unflatten(-1, (self.num_layers, 2, -1, self.head_dim))
        return self.dropout(states).permute(2, 3, 0, 4, 1, 5).unbind(0)


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as the original does, and return the weights too; the twin of the fused kernels.

    The original divides queries by the layer's number and multiplies the float32 scores by it
    again, which keeps half-precision scores in range.

    Args:
        query: `(B, N, S, D)`. key, value: `(B, N, K, D)`.
        attention_mask: `(B, 1, S, K)`, added to the scores, or None.
        scaling: the factor on the scores, `1 / sqrt(D)`.

    Returns:
        The attended values `(B, S, N, D)` and the weights `(B, N, S, K)`.
    """
    layer_number = module.layer_idx + 1
    scores = torch.matmul(query * (scaling / layer_number), key.transpose(-1, -2))
    scores = scores.float() * layer_number  # (B, N, S, K)
    if attention_mask is not None:
        scores = scores + attention_mask.float()
    attn_weights = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    attn_output = torch.matmul(attn_weights, value)  # (B, N, S, D)
    return attn_output.transpose(1, 2), attn_weights


class SelfAttention(nn.Module):
    """Multi-head attention with one matrix for queries, keys and values.

    Its rows are grouped by head, query, key and value side by side: some of them are whole heads.
    """

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        prefix_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended `(B, S, H)` and, if asked for, the weights `(B, N, S, K)`."""
        places = attention_mask, position_embeddings, prefix_states, past_key_values
        is_of_rows = isinstance(past_key_values, RowCaches)
        mix: Any = attend_rows if is_of_rows else SelfAttention.mix
        attn_output, attn_weights = mix(
            self, self.query_key_value(hidden_states), *places, output_attentions, cache_position
        )
        return self.dense(attn_output.flatten(2)), attn_weights  # (B, S, N, D) -> (B, S, H)

    def mix(
        self,
        mixed: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        prefix_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend between the two products: from `(B, S, 3 * H)` to `(B, S, N, D)`, and weights."""
        heads = mixed.unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        query_states, key_states, value_states = heads.chunk(3, dim=-1)
        query_states = apply_rotary(query_states, *position_embeddings)  # (B, N, S, D)
        past = KeyValues(apply_rotary(key_states, *position_embeddings), value_states)
        del mixed, heads, key_states, value_states  # a cache has them too, and prompts may be long
        past = extend_cache(past_key_values, self.layer_idx, past, cache_position)
        past = prepend_prefix(prefix_states, past, query_states.dtype)
        return attend(self, query_states, past, attention_mask, output_attentions)


@try_first("attend")
def attend(
    module: SelfAttention,
    query_states: Tensor,
    past: KeyValues,
    attention_mask: Tensor | None,
    output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the kernel that the configuration names; only the eager one returns weights.

    Args:
        query_states: `(B, N, S, D)`.
        past: what they attend to, themselves included.
        attention_mask: `(B, 1, S, K)`, added to the scores, or None.

    Returns:
        The attended values `(B, S, N, D)`, and the weights `(B, N, S, K)` or None.
    """
    # Releases from 5.1 on search this source for "ALL_ATTENTION_FUNCTIONS.get_interface(",
    # earlier ones for "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]".
    name = "eager" if output_attentions else module.config._attn_implementation or "eager"
    kernel = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    key, value = past.as_floats(query_states.dtype)
    options = {"scaling": module.scaling, "is_causal": False}
    return kernel(module, query_states, key, value, attention_mask, **options)


class LayerNorm(nn.LayerNorm):
    """A norm that may hold float32 in a half model, as the official shards do."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `(B, S, H)` in the parameters' dtype, and return the input's."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class GLU(nn.Module):
    """The feed-forward layer: widen, tanh GELU, narrow. Not gated, whatever its official name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    @try_first("map_in_parts")
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(B, S, H)` to `(B, S, H)`."""
        intermediate = self.dense_h_to_4h(hidden_states)  # (B, S, 4 * H)
        return self.dense_4h_to_h(nn.functional.gelu(intermediate, approximate="tanh"))


class GLMBlock(GradientCheckpointingLayer):
    """One transformer layer. The residual is taken *after* each norm and scaled (DeepNorm):

    h -- LN1 --+-- attention --(+)-- LN2 --+-- mlp --(+)--> h
               |                |          |          |
               +---- * alpha ---+          +- * alpha +        alpha = sqrt(2 * 28)
    """

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * RESIDUAL_LAYERS)
        norm = {"normalized_shape": config.hidden_size, "eps": config.layernorm_epsilon}
        self.input_layernorm = LayerNorm(**norm)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = LayerNorm(**norm)
        self.mlp = GLU(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        prefix_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new `(B, S, H)` and, if asked for, the attention weights `(B, N, S, K)`."""
        attention_input = self.input_layernorm(hidden_states)
        attn_output, attn_weights = self.attention(
            attention_input,
            attention_mask,
            position_embeddings,
            prefix_states,
            past_key_values,
            **kwargs,
        )
        mlp_input = self.post_attention_layernorm(attention_input * self.alpha + attn_output)
        return mlp_input * self.alpha + self.mlp(mlp_input), attn_weights


class BlockInputs(NamedTuple):
    """What the blocks get beside the cache."""

    hidden_states: Tensor  # (B, S, H), at first the embeddings
    attention_mask: Tensor | None  # (B, 1, S, K), added to the scores
    position_embeddings: tuple[Tensor, Tensor]  # cosines and sines, (B, 1, P, S, D / P)
    prefixes: Sequence[Tensor | None]  # one a block, (2, B, N, pre_seq_len, D)
    cache_position: Tensor | None  # (S,), of a static cache


class BlockStack(nn.ModuleList):
    """The blocks, one after another."""

    @try_first("decode_step")
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        prefixes: Sequence[Tensor | None],
        past_key_values: Cache | None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
        """Return the last output, the blocks' inputs if asked for, and their attention weights.

        A cache that is passed to a block by name is dropped in training by some releases.
        """
        all_inputs, all_attentions = (), ()
        for layer, prefix_states in zip(self, prefixes):
            if output_hidden_states:
                all_inputs += (hidden_states,)
            hidden_states, attn_weights = layer(
                hidden_states,
                attention_mask,
                position_embeddings,
                prefix_states,
                past_key_values,
                **kwargs,
            )
            all_attentions += (attn_weights,)
        return hidden_states, all_inputs, all_attentions


class ChatGLMPreTrainedModel(QuantizationMixin, QuantizedLoadingMixin, PreTrainedModel):
    """What transformers needs to know to load, place, split and initialize the network."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_sdpa = True

    def get_input_embeddings(self) -> Any:
        return self.base_model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.word_embeddings = value

    def locate_documents(self, input_ids: Tensor, document_ids: Tensor) -> tuple[Tensor, Any]:
        """Return `position_ids` `(B, P, S)` and `attention_mask` `(B, 1, S, S)` of shared rows.

        Args:
            input_ids: `(B, S)`.
            document_ids: `(B, S)`, which document of its row a token is of; -1 for pads.
        """
        ids: Any = self.base_model.special_ids
        return build_document_geometry(input_ids, document_ids, ids, self.config.num_positions)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize for training from nothing.

        The normed, scaled residual stays at the unigram plateau with the usual N(0, 0.02); Xavier
        everywhere learns (docs/mini.md).
        """
        if isinstance(module, PrefixTable):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding) and not is_packed(module):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        bias = getattr(module, "bias", None)
        if type(module) in (nn.Linear, LayerNorm) and bias is not None:
            nn.init.zeros_(bias)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The stack of blocks between token ids and the last hidden states.

    `forward` takes:
        input_ids: `(B, S)`, the new tokens.
        attention_mask: `(B, T)`, 1 for real tokens, over past and new ones; or the original's
            boolean `(B, 1, S, K)`, True = hidden; or None to tell pads by their id.
        position_ids: the original's `(B, P, S)`. By default they follow from the ids; 1-D ranges,
            as generic trainers pass them, are ignored.
        past_key_values, or cache: the keys and values of the T - S tokens before; extended in
            place.
        inputs_embeds: `(B, S, H)` in place of the embedded ids. Beside `input_ids` the ids still
            say where the tokens stand; without, and without `position_ids`, all is context.
        use_cache, output_attentions, output_hidden_states, return_dict: as in transformers.
    It returns the last hidden states `(B, S, H)`, the cache, and if asked for: L + 1 hidden states
    (the embeddings, then each block's output, the last one after the final norm) and L attention
    weights `(B, N, S, K)`. It raises ValueError if neither ids nor embeddings are given, or if the
    mask does not fit them.
    """

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True) -> None:
        super().__init__(config)
        self.pre_seq_len = config.pre_seq_len
        self.special_ids = SpecialIds.of_config(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = BlockStack(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        if self.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config, self.pre_seq_len)
        if config.quantization_bit:
            swap_layers(self, WeightFormat.of_config(config), empty_init=True)
        self.freeze_around_prefix()
        self.post_init()

    def freeze_around_prefix(self) -> None:
        """Leave only the prefix trainable in a P-Tuning model; change nothing in another."""
        if self.pre_seq_len is not None:
            self.requires_grad_(False)
            self.prefix_encoder.requires_grad_(True)

    @with_fast_products
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the blocks over new tokens; arguments and errors are in the class's description."""
        config = self.config
        output_attentions = _default(output_attentions, config.output_attentions)
        output_hidden_states = _default(output_hidden_states, config.output_hidden_states)
        past_key_values = choose_cache(past_key_values, cache)
        use_cache = self._wants_cache(use_cache, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = ChatGLMCache()
        inputs = self.prepare(
            input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, **kwargs
        )
        hidden_states, all_hidden_states, all_attentions = self.layers(
            inputs.hidden_states,
            inputs.attention_mask,
            inputs.position_embeddings,
            inputs.prefixes,
            past_key_values,
            output_hidden_states,
            output_attentions=output_attentions,
            cache_position=inputs.cache_position,
        )
        hidden_states = self.final_layernorm(hidden_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=all_attentions if output_attentions else None,
            **{CACHE_NAME: past_key_values if use_cache else None},
        )
        return output if _default(return_dict, config.return_dict) else output.to_tuple()

    def prepare(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> "BlockInputs":
        """Work out what the blocks get; arguments as of `forward`."""
        embeddings = self._embed(input_ids, inputs_embeds)
        position_ids, hidden_mask = locate(
            input_ids,
            embeddings,
            attention_mask,
            position_ids,
            past_key_values,
            self.special_ids,
            self.config.num_positions,
        )
        watch_labels(self, kwargs.get("labels"), hidden_mask)
        return BlockInputs(
            embeddings,
            build_attention_bias(hidden_mask, embeddings.dtype, self.pre_seq_len or 0),
            self.rotary_emb(position_ids, embeddings.dtype, past_key_values),
            self._build_prefixes(embeddings),
            find_static_columns(past_key_values, embeddings, kwargs.get("cache_position")),
        )

    def _wants_cache(self, use_cache: bool | None, past_key_values: Cache | None) -> bool:
        """Say whether to cache; blocks that are run again for their gradients cannot.

        Raises:
            ValueError: if such blocks are given a cache.
        """
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return _default(use_cache, self.config.use_cache)
        if past_key_values is not None:
            raise ValueError(
                f"A {type(past_key_values).__name__} was passed, and gradient checkpointing would "
                "fill it twice: pass no cache, or call gradient_checkpointing_disable()."
            )
        return False

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return what the blocks start from, `(B, S, H)`."""
        if inputs_embeds is not None:
            return inputs_embeds
        if input_ids is None:
            raise ValueError("Pass input_ids or inputs_embeds; both are None.")
        return self.word_embeddings(input_ids)

    def _build_prefixes(self, inputs_embeds: Tensor) -> Sequence[Tensor | None]:
        """Return every layer's P-Tuning prefix, `(2, B, N, pre_seq_len, D)`, or Nones."""
        if self.pre_seq_len is None:
            return [None] * len(self.layers)
        return self.prefix_encoder(inputs_embeds.shape[0], inputs_embeds.dtype)


def _default(value: bool | None, default: Any) -> bool:
    return default if value is None else value


class ChatGLMForConditionalGeneration(
    ChatGLMPreTrainedModel, ChatMixin, ScoringMixin, GLMGenerationMixin
):
    """ChatGLM with its language model head: the class that chats."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig, empty_init: bool = True) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.quantization_bit:
            swap_layers(self, WeightFormat.of_config(config), empty_init=True)
        note_ties(self)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @with_fast_products
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Predict the next token of every place.

        Args:
            labels: `(B, S)`, the ids themselves (they are shifted here), -100 where no loss is
                wanted.
            logits_to_keep: compute only the last so many logits (0: all), those of a tensor of
                columns, or those of a boolean mask `(B, S)`; the loss is that of these places.
                Other arguments: see `ChatGLMModel`.

        Returns:
            The loss in float32 if labels are given, and logits `(B, S, V)`, or `(places, V)` of a
            mask's places, row by row.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=choose_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            labels=labels,  # for a word on those that are seen
            cache_position=kwargs.pop("cache_position", None),
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            kwargs.setdefault("shift_labels", shift_labels(labels, logits_to_keep))
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **_states_of(outputs))
        return output if _default(return_dict, self.config.return_dict) else output.to_tuple()


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """ChatGLM with a linear score of each row's last real token: classifier or reward model."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 2
        self.transformer = ChatGLMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Score rows.

        Args:
            attention_mask: `(B, S)`; without one, pads are told by their id.
            labels: `(B,)` classes, `(B,)` or `(B, num_labels)` targets of a regression.
                Other arguments: see `ChatGLMModel`.

        Returns:
            The loss if labels are given, and logits `(B, num_labels)`.
        """
        if attention_mask is None and input_ids is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        outputs = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        scores = self.score(outputs.last_hidden_state)  # (B, S, num_labels)
        rows = torch.arange(scores.shape[0], device=scores.device)
        logits = scores[rows, find_last_columns(attention_mask, scores)]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, logits=logits, pooled_logits=logits, config=self.config
            )
        output = SequenceClassifierOutputWithPast(loss=loss, logits=logits, **_states_of(outputs))
        return output if _default(return_dict, self.config.return_dict) else output.to_tuple()


def _states_of(outputs: BaseModelOutputWithPast) -> dict[str, Any]:
    """Return what a head passes on of its base model's output."""
    return {name: getattr(outputs, name) for name in (CACHE_NAME, "hidden_states", "attentions")}


__all__ = [
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
]
