"""How the next token of an answer is drawn: the settings, and the processors that they ask for.

Owns what each option of `generate` means where an answer is decoded as a row, in the order in which
transformers applies them, and which options only `generate` knows. Knows nothing of rows, text or
layers. The processors are transformers' public classes, and our twins of two of them; the same
calls on the same scores draw the same tokens for a seed as `generate` does.

Shapes: `T` all tokens so far, `V` vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TypicalLogitsWarper,
)

from .cache_chatglm import ChatGLMCache
from .generation_chatglm import (
    INT8_BACKEND,
    GLMGenerationMixin,
    HighestLogitsWarper,
    NucleusLogitsWarper,
)

# What rows know, with the value that it has where neither the caller nor the model says one.
NEUTRAL: dict[str, Any] = {
    "max_length": None,
    "max_new_tokens": None,
    "max_time": None,
    "eos_token_id": None,
    "do_sample": False,
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "logits_processor": None,
    "stopping_criteria": None,
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": None,
    "sequence_bias": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": None,
    "prefix_allowed_tokens_fn": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "renormalize_logits": False,
}
# What else may be said, if it says no more than this.
OFF: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1,
}
# What is nothing to one row alone: how others are filled up, and what a file tells of itself.
NO_MATTER = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
# What transformers makes one of itself for; a caller's own takes its place there.
OWN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)


MOST = 0.3  # of the vocabulary that may be drawn; with 0.4 of it torch is as fast


class Draw(NamedTuple):
    """What processors are made from.

    Attributes:
        settings: of the answer, by the names of `NEUTRAL`.
        prompt_length: tokens of the prompt.
        limit: most tokens of prompt and answer together.
        end_ids: what ends the answer, `(number,)`, or None.
        device: of the scores.
    """

    settings: dict[str, Any]
    prompt_length: int
    limit: int
    end_ids: Tensor | None
    device: Any


class Rule(NamedTuple):
    """One option and its processor: whether a value asks for it, and how it is made."""

    name: str
    is_asked: Callable[[Any, Draw], bool]
    build: Callable[[Any, Draw], Any]


def _is_given(value: Any, draw: Draw) -> bool:
    return value is not None


def _is_true(value: Any, draw: Draw) -> bool:
    return value is True


def _is_count(value: Any, draw: Draw) -> bool:
    return value is not None and value > 0


def _is_count_of_ends(value: Any, draw: Draw) -> bool:
    return _is_count(value, draw) and draw.end_ids is not None


def _is_scale(value: Any, draw: Draw) -> bool:
    return value is not None and value != 1.0


def _is_share(value: Any, draw: Draw) -> bool:
    return value is not None and value < 1.0


def _is_cutoff(value: Any, draw: Draw) -> bool:
    return value is not None and 0.0 < value < 1.0


# In transformers' order. What the caller brings follows the first, what samples follows that.
PROCESSORS = (
    Rule("sequence_bias", _is_given, lambda x, d: SequenceBiasLogitsProcessor(sequence_bias=x)),
    Rule("repetition_penalty", _is_scale, lambda x, d: RepetitionPenaltyLogitsProcessor(x)),
    Rule("no_repeat_ngram_size", _is_count, lambda x, d: NoRepeatNGramLogitsProcessor(x)),
    Rule("bad_words_ids", _is_given, lambda x, d: NoBadWordsLogitsProcessor(x, d.end_ids)),
    Rule(
        "min_length",
        _is_count_of_ends,
        lambda x, d: MinLengthLogitsProcessor(x, d.end_ids, device=d.device),
    ),
    Rule(
        "min_new_tokens",
        _is_count_of_ends,
        lambda x, d: MinNewTokensLengthLogitsProcessor(
            d.prompt_length, x, d.end_ids, device=d.device
        ),
    ),
    Rule(
        "prefix_allowed_tokens_fn",
        _is_given,
        lambda x, d: PrefixConstrainedLogitsProcessor(x, num_beams=1),
    ),
    Rule(
        "forced_eos_token_id",
        _is_given,
        lambda x, d: ForcedEOSTokenLogitsProcessor(d.limit, x, device=d.device),
    ),
    Rule("remove_invalid_values", _is_true, lambda x, d: InfNanRemoveLogitsProcessor()),
    Rule(
        "exponential_decay_length_penalty",
        _is_given,
        lambda x, d: ExponentialDecayLengthPenalty(x, d.end_ids, d.prompt_length),
    ),
    Rule(
        "suppress_tokens",
        _is_given,
        lambda x, d: SuppressTokensLogitsProcessor(x, device=d.device),
    ),
    Rule(
        "begin_suppress_tokens",
        _is_given,
        lambda x, d: SuppressTokensAtBeginLogitsProcessor(x, d.prompt_length, device=d.device),
    ),
)
WARPERS = (
    Rule("temperature", _is_scale, lambda x, d: TemperatureLogitsWarper(x)),
    Rule("top_k", lambda x, d: x is not None and x != 0, lambda x, d: HighestLogitsWarper(top_k=x)),
    Rule("top_p", _is_share, lambda x, d: NucleusLogitsWarper(top_p=x)),
    Rule("min_p", _is_given, lambda x, d: MinPLogitsWarper(min_p=x)),
    Rule("typical_p", _is_share, lambda x, d: TypicalLogitsWarper(mass=x)),
    Rule("epsilon_cutoff", _is_cutoff, lambda x, d: EpsilonLogitsWarper(epsilon=x)),
    Rule("eta_cutoff", _is_cutoff, lambda x, d: EtaLogitsWarper(epsilon=x, device=d.device)),
)


def find_foreign_options(model: Any, options: dict[str, Any]) -> list[str]:
    """Return what is asked for that only `generate` knows, by name; nothing if rows will do.

    It is a list of what is known that decides: an option that a later transformers brings is
    handed on to it, and does not get lost here.

    Args:
        model: that is to answer.
        options: of the call, without the prompt; those of the model's `generation_config` count
            where the call says nothing.
    """
    known = vars(GenerationConfig())
    asked = _read_model_defaults(model) | options
    foreign = [n for n, value in asked.items() if n not in NEUTRAL and not _is_off(n, value, known)]
    settings = NEUTRAL | {n: value for n, value in asked.items() if n in NEUTRAL}
    foreign += _find_foreign_values(settings)
    # Set on the model's own configuration, which transformers 5 refuses and 4 takes over.
    own = {name: getattr(model.config, name, None) for name in NEUTRAL if name in known}
    apart = ("eos_token_id", "use_cache")  # what a configuration has beside those of generating
    foreign += [
        f"config.{name}"
        for name, value in own.items()
        if name not in apart and value not in (None, NEUTRAL[name], known[name])
    ]
    return foreign + _find_foreign_model(model)


def _is_off(name: str, value: Any, known: dict[str, Any]) -> bool:
    """Say whether an option that rows do not know says nothing."""
    if name in NO_MATTER or name.startswith("_") or value is None:
        return True
    if isinstance(value, Tensor):
        return False
    if name in OFF:
        return value == OFF[name]
    return name in known and (value is False or value == known[name])


def _find_foreign_values(settings: dict[str, Any]) -> list[str]:
    """Return which options that are known ask for something that is not."""
    foreign = []
    if settings["use_cache"] is False:
        foreign.append("use_cache")
    cache_config = settings["cache_config"] or {}
    is_int8 = isinstance(cache_config, dict) and cache_config.get("backend") == INT8_BACKEND
    if settings["cache_implementation"] not in (None, *["quantized"] * is_int8):
        foreign.append("cache_implementation")
    if settings["min_new_tokens"] is not None and settings["min_length"]:
        foreign.append("min_length")  # there is a line in the log on which of them holds
    criteria = settings["stopping_criteria"] or ()
    if any(type(criterion) in OWN_CRITERIA for criterion in criteria):
        foreign.append("stopping_criteria")
    return foreign


def _find_foreign_model(model: Any) -> list[str]:
    """Return "generate" if the model's is not ours, or if processes must go in step."""
    is_ours = getattr(type(model), "generate", None) is GLMGenerationMixin.generate
    is_ours = is_ours and "generate" not in vars(model)
    distributed = torch.distributed
    is_shared = distributed.is_available() and distributed.is_initialized()
    return [] if is_ours and not (is_shared and distributed.get_world_size() > 1) else ["generate"]


def _read_model_defaults(model: Any) -> dict[str, Any]:
    """Return what the model's `generation_config` says."""
    config = getattr(model, "generation_config", None)
    return {} if config is None else {n: x for n, x in vars(config).items() if x is not None}


def settle(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an answer: the call's, then the model's, then `NEUTRAL`.

    A None of the call turns an option off, as it does in `generate`.
    """
    defaults = _read_model_defaults(model)
    is_default = defaults.get("max_length") == GenerationConfig().max_length  # 20 before 5
    if options.get("max_new_tokens") is not None or is_default:
        defaults.pop("max_length", None)
    asked = NEUTRAL | defaults | options
    return {name: asked[name] for name in NEUTRAL}


def make_cache(settings: dict[str, Any]) -> ChatGLMCache:
    """Return the empty cache that is asked for: of the model's numbers or of 8-bit integers."""
    return ChatGLMCache(bits=8) if settings["cache_implementation"] else ChatGLMCache()


def build_processors(draw: Draw) -> LogitsProcessorList:
    """Return what stands between the scores of a row and its draw, in transformers' order."""
    processors = _build(PROCESSORS, draw)
    given = list(draw.settings["logits_processor"] or [])
    own = {type(processor): processor for processor in reversed(given)}  # the first of a type
    processors = [own.get(type(processor), processor) for processor in processors]
    for processor in given:
        if not any(processor is other for other in processors):
            processors.append(processor)
    if draw.settings["do_sample"]:
        processors += _build(WARPERS, draw)
    if draw.settings["renormalize_logits"] is True:
        processors.append(LogitNormalization())
    return LogitsProcessorList(processors)


def draw_token(shares: Tensor, generator: torch.Generator | None = None) -> int:
    """Return what `torch.multinomial` draws for shares `(1, V)`, in a third of its time on a CPU.

    torch draws an exponential time for each token, divides, and takes the token that comes first.
    Times are needed of tokens alone that may be drawn at all; the uniform numbers that all of them
    are made from leave the generator where torch would. Where many may be drawn torch is faster.
    """
    is_ours = shares.device.type == "cpu" and int(shares.count_nonzero()) < MOST * shares.numel()
    if not is_ours or not is_draw_known():
        return int(torch.multinomial(shares, num_samples=1, generator=generator))
    return _draw_first(shares, generator)


def _draw_first(shares: Tensor, generator: torch.Generator | None) -> int:
    """Draw as `torch.multinomial` is known to."""
    tokens = shares[0].nonzero().squeeze(1)
    chances = shares[0, tokens]
    if not (chances.numel() and chances.isfinite().all()):  # it has an error for them
        return int(torch.multinomial(shares, num_samples=1, generator=generator))
    numbers = torch.empty(shares.shape, dtype=torch.float64).uniform_(generator=generator)
    times = numbers[0, tokens].neg().log1p().neg().float()
    return int(tokens[(chances / times).argmax()])


@functools.cache
def is_draw_known() -> bool:
    """Say whether this torch draws as it is imitated here, by some draws of both."""
    ours, torchs, source = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    for size in (7, 100, 3001):
        shares = torch.randn(1, size, generator=source).softmax(dim=-1)
        shares[:, :: size // 3] = 0.0
        drawn = _draw_first(shares, ours)
        if drawn != int(torch.multinomial(shares, num_samples=1, generator=torchs)):
            return False
    return torch.equal(ours.get_state(), torchs.get_state())


def _build(rules: tuple[Rule, ...], draw: Draw) -> list[Any]:
    """Return the processors that the settings ask for."""
    asked = [(rule, draw.settings[rule.name]) for rule in rules]
    return [rule.build(value, draw) for rule, value in asked if rule.is_asked(value, draw)]


__all__ = [
    "Draw",
    "build_processors",
    "draw_token",
    "find_foreign_options",
    "is_draw_known",
    "make_cache",
    "settle",
]
