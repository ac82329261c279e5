"""Token by token: what transformers' `generate` must know of GLM, what may be drawn, and streaming.

Owns the inputs of every decoding step, the processors that stand between the scores of a step and
the draw, the stream of ids, and which options leave a single answer. Knows nothing of text, prompts
or layers.

Shapes: `B` rows (prompts times beams), `S` new tokens, `T` all tokens so far, `V` vocabulary.
"""

import contextvars
import math
import numbers
import queue
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import LongTensor, Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from .cache_chatglm import ChatGLMCache
from .checkpoint_chatglm import check_token_ids
from .environment_chatglm import (
    CACHE_NAME,
    TESTED_TRANSFORMERS,
    acts_with_adapters,
    choose_cache,
    rename_cache,
)
from .masking_chatglm import (
    accept_hidden_mask,
    align_token_columns,
    build_geometry,
    count_cached_tokens,
    fold_attention_mask,
    move_padding_left,
    reserved_length,
)

INT8_BACKEND = "int8"  # what a cache_config names our own quantized cache by

CAUSAL_ONLY = (
    "{} of transformers reads prompts causally, but ChatGLM's prompt tokens see one another in "
    "both directions: it would answer wrongly. Use generate() on padded batches."
)

# What `generate` hands through to the forward pass as it is.
PASSED_ON = (
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "cache_position",
)

# What `chat` and `stream_chat` do where nothing else is said.
DEFAULTS = {
    "max_length": 2048,
    "num_beams": 1,
    "do_sample": True,
    "top_p": 0.7,
    "temperature": 0.95,
}
OWN_INPUTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids")
# Asked for beside an answer's text, or in place of it.
OTHER_OUTPUTS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
USE_GENERATE = "build the inputs with the tokenizer and call generate()"


FALLBACK_SCORE = 5e4


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Lets a row survive scores that are no numbers: it then says a space.

    A row with a NaN or +inf, or without any finite score, gets 0 everywhere and `FALLBACK_SCORE`
    at `fallback_id`. The original did this to all rows if one was broken, and to rows with a
    -inf, which is how other processors forbid a token.

    Attributes:
        any_replaced: whether any row was ever replaced, a number on the scores' device, or None.
    """

    def __init__(self, fallback_id: int) -> None:
        self.fallback_id = fallback_id
        self.any_replaced: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `(B, V)` with the broken rows replaced."""
        is_broken = ~scores.amax(dim=-1, keepdim=True).isfinite()  # NaN is the largest of all
        if scores.device.type == "cpu" and not is_broken.any():  # asking a GPU would mean waiting
            return scores
        any_broken = is_broken.any()
        if self.any_replaced is not None:
            any_broken = any_broken | self.any_replaced
        self.any_replaced = any_broken
        mended = scores.masked_fill(is_broken, 0.0)
        mended[:, self.fallback_id].masked_fill_(is_broken.squeeze(1), FALLBACK_SCORE)
        return mended

    def has_replaced(self) -> bool:
        """Say whether any row was ever replaced; a GPU is waited for, so ask behind the answer."""
        return self.any_replaced is not None and bool(self.any_replaced)


class NucleusLogitsWarper(TopPLogitsWarper):
    """Keeps the tokens that `TopPLogitsWarper` keeps, in a tenth of its time on a CPU.

    torch sorts scores together with their columns: 12 ms for 130528 of them on a core on which
    NumPy sorts the values alone in 0.7. The same sums over them then give the same cut, to the last
    bit, and a comparison finds the columns. The parent class is the slow twin: it breaks ties,
    and serves other devices and number formats.
    """

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Return scores `(B, V)` with `filter_value` for all tokens outside of the nucleus."""
        if scores.device.type != "cpu" or scores.dtype != torch.float32:
            return super().__call__(input_ids, scores)
        return torch.cat([self._cut(row) for row in scores.detach().split(1)])

    def _cut(self, scores: Tensor) -> Tensor:
        """Do so for one row `(1, V)`."""
        ranked = scores.numpy().copy()
        ranked.sort()
        ranked = torch.from_numpy(ranked)
        is_cut = ranked.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
        num_cut = min(int(is_cut.count_nonzero()), ranked.shape[1] - self.min_tokens_to_keep)
        if num_cut <= 0:
            return scores
        last, least = ranked[0, num_cut - 1 : num_cut + 1].tolist()  # cut, kept
        kept = torch.nn.functional.threshold(scores, last, self.filter_value)
        if last == least:
            num_lower = int((ranked < last).count_nonzero())
            columns = (scores[0] == last).nonzero().squeeze(1)[num_cut - num_lower :]
            kept[0, columns] = last
        return kept


class HighestLogitsWarper(TopKLogitsWarper):
    """Keeps the tokens that `TopKLogitsWarper` keeps, in a fifth of its time on a CPU.

    NumPy finds the last score that is kept without ordering those above it. The parent class is the
    slow twin, which serves other devices and number formats.
    """

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """Return scores `(B, V)` with `filter_value` for all but the `top_k` highest, and ties."""
        if scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.amax().isnan():
            return super().__call__(input_ids, scores)
        return torch.cat([self._cut(row) for row in scores.detach().split(1)])

    def _cut(self, scores: Tensor) -> Tensor:
        """Do so for one row `(1, V)`."""
        place = max(scores.shape[1] - self.top_k, 0)
        ranked = scores.numpy().copy()
        ranked.partition(place)
        least = torch.tensor(ranked[0, place])
        if least == -math.inf:
            return scores
        below = torch.nextafter(least, torch.tensor(-math.inf)).item()  # ties with it are kept
        return torch.nn.functional.threshold(scores, below, self.filter_value)


def replace_warpers(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Put our processors into the place of transformers' that they are twins of."""

    def replace(processor: Any) -> Any:
        if type(processor) is TopPLogitsWarper:
            options = (processor.filter_value, processor.min_tokens_to_keep)
            return NucleusLogitsWarper(processor.top_p, *options)
        if type(processor) is TopKLogitsWarper:
            return HighestLogitsWarper(processor.top_k, processor.filter_value)
        return processor

    return LogitsProcessorList(map(replace, processors))


class StopOnCancel(StoppingCriteria):
    """Stops all rows once an event is set, from whatever thread."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self.event.is_set(), device=input_ids.device)


class CacheWatch:
    """Notices a decoding step that reads again what the cache should hold.

    Answers would only be slow, and with one position axis other ones: nothing else tells that a
    release of transformers has come to hand the cache over in another way.

    Args:
        prompt_length: tokens that are cached after the first pass, whatever drafts cut off.
    """

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.num_passes = 0

    def note_pass(self, past_length: int) -> None:
        """Warn if a pass behind the first finds fewer tokens in the cache than the prompt has."""
        self.num_passes += 1
        if self.num_passes > 1 and past_length < self.prompt_length:
            warnings.warn(
                f"The cache of keys and values is lost between decoding steps, so that each reads "
                f"all tokens again: transformers {transformers.__version__} and torch "
                f"{torch.__version__} do not fit this ChatGLM code, which was tested with "
                f"transformers up to {TESTED_TRANSFORMERS[-1]}. Install that one, and report this.",
                RuntimeWarning,
                stacklevel=2,
            )


# That of the `generate` that runs in this thread, the innermost if it is given an assistant.
CACHE_WATCH: contextvars.ContextVar[CacheWatch | None] = contextvars.ContextVar("CACHE_WATCH")


class QueueStreamer(BaseStreamer):
    """Hands on what `generate` puts: the prompt `(B, S)`, then new tokens `(B,)`, then the end."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Tensor | BaseException | None] = queue.SimpleQueue()

    def put(self, value: Tensor) -> None:
        self.queue.put(value)

    def end(self) -> None:
        """Do nothing: the thread that runs `generate` marks the end, errors included."""

    def __iter__(self) -> Iterator[Tensor]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class GLMGenerationMixin(GenerationMixin):
    """Teaches transformers' generation GLM's positions and masks, and adds `stream_generate`."""

    config: Any
    transformer: Any

    @acts_with_adapters
    @torch.no_grad()
    def stream_generate(
        self,
        input_ids: Tensor,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Any = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Generate token by token: yield prompt and answer so far, `(B, T)`.

        An end token that finishes the last row is not yielded. `generate` runs in a thread of its
        own; closing the iterator stops it after the token it is at and waits for it.

        Raises:
            ValueError: for several beams or sequences a row, and for a streamer beside this one.
        """
        _check_stream(generation_config, self.generation_config, kwargs)
        cancelled = threading.Event()
        streamer = QueueStreamer()
        criteria = StoppingCriteriaList([*(stopping_criteria or []), StopOnCancel(cancelled)])
        kwargs |= {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "streamer": streamer,
        }
        eos_ids = self._end_ids(generation_config, kwargs.get("eos_token_id"))
        worker = threading.Thread(
            target=self._generate_into, args=(streamer, input_ids, kwargs), daemon=True
        )
        worker.start()
        try:
            yield from _accumulate(streamer, eos_ids)
        finally:
            cancelled.set()
            worker.join()

    @acts_with_adapters
    def _generate_into(
        self, streamer: QueueStreamer, input_ids: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Run `generate` and end the stream with what became of it."""
        try:
            self.generate(input_ids, **kwargs)
            streamer.queue.put(None)
        except BaseException as error:  # the consumer raises it
            streamer.queue.put(error)

    def _end_ids(self, generation_config: Any, eos_token_id: Any) -> Tensor:
        """Return the ids that end a row, `(number,)`."""
        configs = (generation_config, self.generation_config)
        given = (eos_token_id, *(config.eos_token_id for config in configs if config is not None))
        end_ids = next((ids for ids in given if ids is not None), [])
        return torch.as_tensor(end_ids, dtype=torch.long).reshape(-1).cpu()

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, from any input that GLM's geometry allows.

        Besides the usual arguments: `attention_mask` may be the original's boolean 4-D mask
        (True = hidden), and `position_ids` the original's `(B, 2, S)`, used for the prompt and
        continued from its last column. Rows padded on the right are shifted to the right end
        first, so that what is generated follows the prompt; the output shows them so.

        Raises:
            ValueError: for chunked prefill or paged caches, which need a causal prompt, and for
                `inputs_embeds` without a cache.
        """
        _check_options(generation_config or self.generation_config, kwargs)
        rename_cache(kwargs)
        if self.config.num_positions == 1:
            # The original caches whatever it is told, and with one position axis that matters.
            kwargs["use_cache"] = True
        if inputs is None and kwargs.get("input_ids") is not None:
            inputs = kwargs.pop("input_ids")
        hidden_mask = accept_hidden_mask(kwargs.get("attention_mask"))
        if hidden_mask is not None:
            kwargs["attention_mask"] = fold_attention_mask(hidden_mask)
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is not None and position_ids.dim() == self.config.num_positions + 1:
            kwargs["prompt_position_ids"] = position_ids
        elif inputs is not None and kwargs.get(CACHE_NAME) is None:
            inputs = self._align_right(inputs, kwargs)
        token = CACHE_WATCH.set(CacheWatch(_count_prompt_columns(inputs, kwargs)))
        try:
            # The mixin is typed for the finished model only.
            generate = super().generate  # pyright: ignore[reportAttributeAccessIssue]
            return generate(inputs, generation_config, *args, **kwargs)
        finally:
            CACHE_WATCH.reset(token)

    def _align_right(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Shift right-padded rows to the right end, and their mask in `kwargs` with them."""
        attention_mask = kwargs.get("attention_mask")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0 or "inputs_embeds" in kwargs:
            return input_ids
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        if attention_mask.shape != input_ids.shape or bool((attention_mask[:, -1] != 0).all()):
            return input_ids
        input_ids, kwargs["attention_mask"] = move_padding_left(input_ids, attention_mask)
        return input_ids

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Make a cache of ours where transformers would make one that is copied at every step.

        `cache_implementation="quantized"` with `cache_config={"backend": "int8"}` asks for the one
        of 8-bit integers.
        """
        is_open = model_kwargs.get(CACHE_NAME) is None
        backend = (generation_config.cache_config or {}).get("backend")
        is_quantized = generation_config.cache_implementation == "quantized"
        if is_open and is_quantized and backend == INT8_BACKEND:
            if generation_config.use_cache is not False:
                model_kwargs[CACHE_NAME] = ChatGLMCache(bits=8)
            # An assistant is given the same options, and a cache beside them.
            generation_config.cache_implementation = generation_config.cache_config = None
            return
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if is_open and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs[CACHE_NAME] = ChatGLMCache()

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Build what stands between scores and draw, with ours for those of transformers."""
        build = super()._get_logits_processor  # pyright: ignore[reportAttributeAccessIssue]
        return replace_warpers(build(*args, **kwargs))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_position_ids: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next forward pass: new tokens, their positions and mask.

        The cache is among them as `past_key_values` on every release, which is where peft looks
        for it to put its prefixes there.

        Args:
            input_ids: `(B, T)`, all tokens so far; fewer behind a prompt given as embeddings.
            past_key_values, cache: the keys and values of some of them, under either name.
            attention_mask: `(B, T)` or None.
            prompt_position_ids: the caller's own positions of the prompt, `(B, P, S)`.
        """
        past_key_values = choose_cache(past_key_values, cache)
        past_length = count_cached_tokens(past_key_values)
        watch = CACHE_WATCH.get(None)
        if watch is not None and kwargs.get("use_cache"):
            watch.note_pass(past_length)
        if attention_mask is None and past_length == 0 and input_ids.shape[1] > 1:
            attention_mask = torch.ones_like(input_ids)  # `generate` has looked for pads already
        prompt_embeds = inputs_embeds if past_length == 0 else None
        least = past_length + 1 if prompt_embeds is None else prompt_embeds.shape[1]
        are_known = input_ids.shape[1] >= least
        input_ids = align_token_columns(input_ids, least)
        # Strides that grow with T would recompile a compiled step, and one column keeps its own.
        new_ids = input_ids[:, past_length:].clone(memory_format=torch.contiguous_format)
        inputs = {name: kwargs[name] for name in PASSED_ON if name in kwargs} | {
            "input_ids": new_ids if are_known or prompt_embeds is None else None,
            "inputs_embeds": prompt_embeds,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
        }
        if past_key_values is not None:
            # Beam search reorders a cache, and drafts crop it: only these are the tokens it holds.
            past_key_values.noted_tokens = input_ids
            past_key_values.is_noted_ahead = True
        if reserved_length(past_key_values) is not None:
            inputs |= self._locate_for_compiling(input_ids, attention_mask, past_key_values)
        if prompt_position_ids is not None:
            position_ids = continue_position_ids(prompt_position_ids, input_ids.shape[1])
            inputs["position_ids"] = position_ids[..., past_length:].contiguous()
        return inputs

    def _locate_for_compiling(
        self, input_ids: Tensor, attention_mask: Tensor | None, past_key_values: Any
    ) -> dict[str, Tensor]:
        """Return what a step behind a static cache may not work out from ids that grow."""
        return build_geometry(
            input_ids,
            attention_mask,
            self.transformer.special_ids,
            past_length=count_cached_tokens(past_key_values),
            key_length=reserved_length(past_key_values),
            num_positions=self.config.num_positions,
        )._asdict()

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching."""
        raise NotImplementedError(CAUSAL_ONLY.format("Continuous batching"))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching."""
        raise NotImplementedError(CAUSAL_ONLY.format("Continuous batching"))


def continue_position_ids(position_ids: Tensor, length: int) -> Tensor:
    """Extend a prompt's positions `(B, P, S)` to `length` columns as decoding does.

    The position is held; the block position, or with one axis nothing, counts on.
    """
    num_new = length - position_ids.shape[-1]
    if position_ids.dim() == 2:
        position_ids = position_ids.unsqueeze(1)
    steps = torch.arange(1, num_new + 1, device=position_ids.device)
    new = position_ids[..., -1:].expand(-1, -1, max(num_new, 0)).clone()
    if position_ids.shape[1] == 2:
        new[:, 1] += steps
    return torch.cat((position_ids, new), dim=-1)


def _count_prompt_columns(inputs: Tensor | None, options: dict[str, Any]) -> int:
    """Return the length of a prompt of ids or embeddings; 0 if `generate` is to make one up."""
    given = options.get("inputs_embeds") if inputs is None else inputs
    return 0 if given is None else given.shape[1]


def _check_options(generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Raise for options that would cut a prompt into causal pieces, or lose an embedded one."""

    def is_set(name: str, value: Any) -> bool:
        return kwargs.get(name, getattr(generation_config, name, None)) == value

    check_token_ids(kwargs, "generate()")
    for name in ("num_beams", "num_return_sequences"):
        count = kwargs.get(name, getattr(generation_config, name, None))
        if isinstance(count, int) and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count!r}: leave it out for 1.")
    if not is_set("prefill_chunk_size", None):
        raise ValueError(CAUSAL_ONLY.format("Chunked prefill (prefill_chunk_size)"))
    if is_set("cache_implementation", "paged"):
        raise ValueError(CAUSAL_ONLY.format('cache_implementation="paged"'))
    if kwargs.get("inputs_embeds") is not None and is_set("use_cache", False):
        raise ValueError("Prompts given as inputs_embeds need use_cache=True, got False.")


def _check_stream(generation_config: Any, model_defaults: Any, kwargs: dict[str, Any]) -> None:
    """Raise for what a stream of one growing answer a row cannot be."""
    if kwargs.get("streamer") is not None:
        raise ValueError(
            "stream_generate is a stream itself, got a streamer: give it to generate()."
        )
    for name in ("num_beams", "num_return_sequences"):
        configs = (generation_config, model_defaults)
        given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        value = next((value for value in given if value is not None), 1)
        if value != 1:
            raise ValueError(f"stream_generate needs {name}=1, got {value}: use generate().")


def _accumulate(streamer: QueueStreamer, eos_ids: Tensor) -> Iterator[Tensor]:
    """Yield the growing ids `(B, T)`, but not the end token that finishes the last row."""
    pieces = iter(streamer)
    input_ids = next(pieces)
    is_finished = torch.zeros(input_ids.shape[0], dtype=torch.bool)
    for piece in pieces:  # (B,), or (B, S) from drafts
        for tokens in piece.view(input_ids.shape[0], -1, 1).unbind(1):
            is_finished |= torch.isin(tokens, eos_ids).squeeze(1)
            if is_finished.all():
                continue
            input_ids = torch.cat((input_ids, tokens), dim=1)
            yield input_ids


def check_options(options: dict[str, Any], model_defaults: Any = None) -> dict[str, Any]:
    """Settle the options of `generate` for one answer of text; the given ones stay as they are.

    Args:
        options: as `chat` or `stream_chat` was given them; those of `DEFAULTS` that are missing
            are not added.
        model_defaults: the model's own `generation_config`, or None.

    Raises:
        ValueError: for values out of their range, and for what is not the text of one answer.
    """
    options = _read_generation_config(options)
    for name, default in DEFAULTS.items():
        if name in options and options[name] is None:
            options[name] = default
    check_token_ids(options, "the call")
    _refuse_other_outputs(options)
    _check_ranges(options)
    if options["temperature"] == 0 or options["top_p"] == 0:
        options["do_sample"] = False
    # What the model's folder says of plain `generate`, and what is one text here nevertheless.
    single = {"num_return_sequences": 1, "return_dict_in_generate": False, "num_beams": 1}
    for name, value in single.items():
        if name not in options and getattr(model_defaults, name, None) not in (None, value):
            options[name] = value
    return options


def _read_generation_config(options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the options in which those of a `generation_config` stand by themselves."""
    options = dict(options)
    config = options.pop("generation_config", None)
    if config is None:
        return options
    if not isinstance(config, GenerationConfig):
        raise ValueError(
            f"generation_config must be a GenerationConfig of transformers, got {config!r}: pass "
            "the options of a dictionary by name."
        )
    for name, default in vars(GenerationConfig()).items():
        value = getattr(config, name)
        # Releases before 5 have a default where nothing was said. Of the settings of sampling it
        # is taken at its word, but no answer is meant to have the 20 tokens of the length.
        unsaid = None if name in DEFAULTS and name != "max_length" else default
        is_open = options.get(name) in (None, DEFAULTS.get(name))
        if is_open and value != unsaid and not name.startswith(("_", "transformers")):
            options[name] = value
    return options


def _refuse_other_outputs(options: dict[str, Any]) -> None:
    """Raise for options that ask for something else than one text, or replace the prompt."""
    for name in OWN_INPUTS:
        if options.get(name) is not None:
            raise ValueError(
                f"{name} is made of the query and the history here: leave it out, or "
                f"{USE_GENERATE}."
            )
    for name in OTHER_OUTPUTS:
        if options.get(name):
            raise ValueError(
                f"{name} must be False, got {options[name]!r}: the answer here is a text. For more "
                f"{USE_GENERATE}."
            )
    if options.get("num_return_sequences") not in (None, 1):
        raise ValueError(
            f"num_return_sequences must be 1, got {options['num_return_sequences']!r}: the answer "
            f"here is one text. Ask several times, or {USE_GENERATE}."
        )


def _check_ranges(options: dict[str, Any]) -> None:
    """Raise for a length, a number of beams or a setting of sampling that means nothing."""
    for name, least in {"max_length": 1, "max_new_tokens": 1, "num_beams": 1, "top_k": 0}.items():
        value: Any = options.get(name)
        is_count = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if value is not None and not (is_count and int(value) >= least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    for name, most in {"temperature": math.inf, "top_p": 1}.items():
        value: Any = options.get(name)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_number and 0 <= float(value) <= most and value != math.inf):
            limit = "at least 0 (0: no sampling)" if most == math.inf else "from 0 to 1"
            raise ValueError(f"{name} must be a number of {limit}, got {value!r}.")
    if not isinstance(options["do_sample"], (bool, int)) or options["do_sample"] not in (0, 1):
        raise ValueError(f"do_sample must be True or False, got {options['do_sample']!r}.")


__all__ = [
    "GLMGenerationMixin",
    "HighestLogitsWarper",
    "InvalidScoreLogitsProcessor",
    "NucleusLogitsWarper",
    "check_options",
    "replace_warpers",
]
