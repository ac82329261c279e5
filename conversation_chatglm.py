"""Talking: the prompt format, and the chat methods.

Owns `build_prompt`, the only prompt format in the project, what counts as a history and what of it
is read where the window is full. Knows nothing of layers, masks or decoding steps: tokens come from
`decoding_chatglm`, or from `generation_chatglm` where something is asked for that only transformers
knows; what is shown of them says `answer_text_chatglm`.
"""

import bisect
import numbers
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from .answer_text_chatglm import HANZI, StopOnText, finish_answer, settle_answer, tidy_answer
from .decoding_chatglm import stream_answer
from .drawing_chatglm import find_foreign_options
from .environment_chatglm import acts_with_adapters, find_input_device
from .generation_chatglm import InvalidScoreLogitsProcessor, check_options

History = list[tuple[str, str]]

ROUND_HEAD, ROUND = "[Round {}]\n", "问：{}\n答：{}"
WORD_START = "\u2581"  # SentencePiece's piece of a lone space

# What becomes of a conversation that does not fit.
OVERFLOW = ("error", "rounds", "summarize")
# The part of the window that earlier rounds may not take from an answer of no given length.
ANSWER_SHARE = 1 / 4
# The part of the window that a summary of earlier rounds may take, and the smallest window for one.
SUMMARY_SHARE, LEAST_SUMMARY_WINDOW = 1 / 8, 128
# How the family is asked for a summary, and what is carried as its question, by language.
SUMMARY_REQUESTS = {
    "zh": ("请用简短的语言总结下面的文字：\n{}", "请用简短的语言总结前面的内容。"),
    "en": ("Sum up the following text briefly:\n{}", "Sum up briefly what was said before."),
}
SENTENCE_END = re.compile(r"[。！？!?\n]|\. ")
BROKEN_SCORES = (
    "Scores of this answer were not finite (NaN or infinity), and a space was said in place of "
    "each such token: it is no answer of the model. {}."
)
DAMAGED = (
    "A weight file may be damaged: compare the folder with its SHA256SUMS (chatglm chat FOLDER "
    "--verify, or sha256sum -c SHA256SUMS)"
)
OVERFLOWN = (
    ", or numbers grow beyond float16: load the model in bfloat16 or float32 (dtype, --dtype)"
)


class ChatOverflowWarning(RuntimeWarning):
    """Says that the model was given less than the whole conversation.

    Attributes:
        left_out: how many of the oldest rounds it was not given.
        summary: what it was given in their place, or "".
    """

    def __init__(self, message: str, left_out: int, summary: str = "") -> None:
        super().__init__(message)
        self.left_out = left_out
        self.summary = summary


class Reading(NamedTuple):
    """What the model is given of a conversation."""

    query: str
    rounds: History
    left_out: int = 0
    summary: str = ""


class ChatCall(NamedTuple):
    """A conversation made ready to be answered."""

    options: dict[str, Any]
    rounds: History
    stops: list[str]
    prompt_length: int
    score_guard: InvalidScoreLogitsProcessor

    @property
    def decoding_options(self) -> dict[str, Any]:
        """The options without the prompt."""
        return {n: x for n, x in self.options.items() if n not in ("input_ids", "attention_mask")}


class ChatMixin:
    """Adds ChatGLM's conversation methods to a model that generates."""

    config: Any
    device: Any
    dtype: Any
    generate: Any
    stream_generate: Any

    @staticmethod
    def build_prompt(query: str, history: Sequence[Sequence[str]] | None = None) -> str:
        """Join earlier rounds and a question to the prompt the model was trained on.

        Args:
            query: the question; may not be empty.
            history: `(question, answer)` pairs, oldest first.

        Raises:
            ValueError: for an empty question or a history of another form.
        """
        rounds = check_history(history)
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"The query must be a non-empty text, got {query!r}.")
        if not rounds:
            return query
        past = [ROUND_HEAD.format(i) + ROUND.format(q, a) for i, (q, a) in enumerate(rounds)]
        return "\n".join([*past, ROUND_HEAD.format(len(rounds)) + ROUND.format(query, "")])

    @staticmethod
    def process_response(response: str) -> str:
        """Tidy an answer: strip it, fill in the training time, widen punctuation beside hanzi."""
        return tidy_answer(response)

    @acts_with_adapters
    @torch.no_grad()
    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Sequence[str]] | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        stop: str | Sequence[str] | None = None,
        overflow: str = "error",
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer a question.

        Args:
            tokenizer: of the same generation as the model.
            query: the question. Text that looks like a special token stays text.
            history: earlier `(question, answer)` pairs; not changed.
            max_length: most tokens of prompt and answer together; `max_new_tokens`, if given,
                counts the answer alone and takes its place.
            stop: one or several texts that end the answer and are cut off (also `stop_strings`).
            overflow: what becomes of a conversation that leaves no room for an answer: "error", or
                "rounds": the model reads the newest whole rounds that leave `max_new_tokens`, or
                a quarter of the window, and a `ChatOverflowWarning` says how many were left out; or
                "summarize": the model first condenses what does not fit, round by round or a long
                question piece by piece, and reads that as the first round. It reads each text
                once more for it, and writes an eighth of the window for each window of text.
            do_sample, top_p, temperature: a temperature or a `top_p` of 0 means no sampling.
            kwargs: anything `generate` takes that leaves an answer a text. With
                `prompt_lookup_num_tokens` up to so many tokens are guessed from the text so far and
                read at once where that pays; the answer is the one without. What a
                `generation_config` says holds where an argument has its default. None is the
                default everywhere.

        Returns:
            The answer, and the history with this round appended: all of it, also what the model
            was not given. With "summarize" the summary takes the place of what it condenses.

        Raises:
            ValueError: for an empty query, a malformed history, a tokenizer of another
                generation, options out of their range or that ask for more than one answer's text,
                or a prompt that leaves no room for an answer.
        """
        sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        kwargs |= sampling | {"max_length": max_length, "logits_processor": logits_processor}
        kwargs["num_beams"] = num_beams
        call = self._prepare_chat(tokenizer, query, history, stop, overflow, kwargs)
        answer_ids = _answer(self, call)
        self._warn_of_broken_scores(call)
        decoded = tokenizer.decode(answer_ids)
        response = finish_answer(decoded, call.stops)
        return response, [*call.rounds, (query, response)]

    @acts_with_adapters
    @torch.no_grad()
    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Sequence[str]] | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: LogitsProcessorList | None = None,
        stop: str | Sequence[str] | None = None,
        overflow: str = "error",
        deltas: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """Answer a question bit by bit: yield the answer so far and the history with it.

        What was yielded is never withdrawn: each answer begins with the one before it, and the last
        one is that of `chat`. What later tokens may still change is held back until it is settled:
        half a character, the start of a stop text, punctuation whose width the next character
        decides, white space at the end. Closing the iterator ends the generation.

        Args:
            deltas: yield only what is new, in place of the answer so far; together the parts are
                the answer. The history is the same.

        The other arguments, and the errors, which come at the call: see `chat`.
        """
        sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        kwargs |= sampling | {"max_length": max_length, "logits_processor": logits_processor}
        if kwargs.get("streamer") is not None:
            raise ValueError("stream_chat is a stream itself, got a streamer: give it to chat().")
        call = self._prepare_chat(tokenizer, query, history, stop, overflow, kwargs)
        num_beams = call.options.get("num_beams", 1)
        if num_beams > 1:
            raise ValueError(
                f"stream_chat needs num_beams=1, got {num_beams}: which beam wins is known at the "
                "end only. Use chat()."
            )
        return self._stream_answer(tokenizer, query, call, deltas)

    @acts_with_adapters
    @torch.no_grad()
    def _stream_answer(
        self, tokenizer: Any, query: str, call: ChatCall, deltas: bool
    ) -> Iterator[tuple[str, History]]:
        """Yield what is settled after every token, and the whole answer at the end."""
        decoded, shown, num_yields = "", "", 0
        try:
            for answer_ids in _stream_answer_ids(self, call):
                decoded = tokenizer.decode(answer_ids)
                settled = settle_answer(decoded, call.stops)
                if settled != shown or not deltas:
                    yield settled[len(shown) if deltas else 0 :], [*call.rounds, (query, settled)]
                    shown, num_yields = settled, num_yields + 1
            response = finish_answer(decoded, call.stops)
            if response != shown or not num_yields:
                yield response[len(shown) if deltas else 0 :], [*call.rounds, (query, response)]
        finally:  # also of an answer that its reader breaks off
            self._warn_of_broken_scores(call)

    @acts_with_adapters
    def _prepare_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Sequence[str]] | None,
        stop: str | Sequence[str] | None,
        overflow: str,
        options: dict[str, Any],
    ) -> ChatCall:
        """Check and encode a conversation, and complete the options of `generate`."""
        rounds = check_history(history)
        self._check_tokenizer(tokenizer)
        self.build_prompt(query)
        options = check_options(options, getattr(self, "generation_config", None))
        limit = self._find_limit(options, overflow)
        room = options.get("max_new_tokens") or int(limit * ANSWER_SHARE)
        reading = Reading(query, rounds)
        if overflow != "error":
            reading = fit_conversation(self, tokenizer, reading, limit, room, overflow)
            _warn_of_overflow(reading, Reading(query, rounds), limit, room)
        prompt = self.build_prompt(reading.query, reading.rounds)
        inputs = tokenizer([prompt], return_tensors="pt", split_special_tokens=True)
        prompt_length = inputs["input_ids"].shape[1]
        _check_room(prompt_length, limit, len(reading.rounds))
        stops = _pop_stop_texts(stop, options)
        score_guard = self._complete_options(tokenizer, options)
        if stops:
            own = options.get("stopping_criteria") or []
            added = StopOnText(tokenizer, stops, prompt_length)
            options["stopping_criteria"] = StoppingCriteriaList([*own, added])
        for name in ("input_ids", "attention_mask"):
            options[name] = inputs[name].to(find_input_device(self))
        rounds = reading.rounds if reading.summary else rounds
        return ChatCall(options, rounds, stops, prompt_length, score_guard)

    def _find_limit(self, options: dict[str, Any], overflow: str) -> int:
        """Return how many tokens prompt and answer may have together."""
        if overflow not in OVERFLOW:
            raise ValueError(f"overflow must be one of {', '.join(OVERFLOW)}, got {overflow!r}.")
        window = self.config.max_sequence_length
        if overflow != "error":
            return min(options["max_length"], window)
        # Beyond the window the original goes on.
        return window if options.get("max_new_tokens") is not None else options["max_length"]

    def _complete_options(
        self, tokenizer: Any, options: dict[str, Any]
    ) -> InvalidScoreLogitsProcessor:
        """Settle limits, sampling, processors and end tokens; nothing of the caller's changes.

        Returns the processor that will know whether the scores were finite.
        """
        score_guard = InvalidScoreLogitsProcessor(tokenizer.convert_tokens_to_ids(WORD_START))
        given = options["logits_processor"] or []
        given = [given] if isinstance(given, LogitsProcessor) else given
        processors = [*given, score_guard]
        options["logits_processor"] = LogitsProcessorList(processors)
        if not options["do_sample"]:
            # Settings of sampling would only be warned about.
            options |= {"top_p": 1.0, "temperature": 1.0}
        if options.get("max_new_tokens") is not None:
            del options["max_length"]
        if options.get("eos_token_id") is not None:
            # Whatever else a script stops at, an answer ends where the model says so.
            ends = torch.as_tensor(options["eos_token_id"]).reshape(-1).tolist()
            options["eos_token_id"] = list(dict.fromkeys([*ends, self.config.eos_token_id]))
        return score_guard

    def _warn_of_broken_scores(self, call: ChatCall) -> None:
        """Say where the caller stands if an answer was made of scores that are no numbers."""
        if call.score_guard.has_replaced():
            causes = DAMAGED + (OVERFLOWN if self.dtype == torch.float16 else "")
            # The frames between are those of `chat` and of torch.no_grad.
            warnings.warn(BROKEN_SCORES.format(causes), RuntimeWarning, stacklevel=4)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer whose special tokens are not the model's."""
        if not hasattr(tokenizer, "convert_tokens_to_ids"):
            raise ValueError(
                f"The first argument is the model's tokenizer, got {type(tokenizer).__name__}: "
                "load it with AutoTokenizer from the model's folder."
            )
        wanted = {"[gMASK]": self.config.gmask_token_id, "<sop>": self.config.bos_token_id}
        for token, token_id in wanted.items():
            found = tokenizer.convert_tokens_to_ids(token)
            if found != token_id:
                raise ValueError(
                    f"The tokenizer's {token} is {found}, the model's is {token_id}: they are of "
                    "different generations. Load both from the same folder, with its "
                    "tokenizer_config.json and ice_text.model."
                )


def _answer(model: Any, call: ChatCall) -> list[int]:
    """Return the ids of an answer, with its end."""
    options = call.decoding_options
    if find_foreign_options(model, options):
        return model.generate(**call.options)[0][call.prompt_length :].tolist()
    answer_ids: list[int] = []
    for answer in stream_answer(model, call.options["input_ids"][0].tolist(), options):
        answer_ids = answer.answer_ids
    return answer_ids


def _stream_answer_ids(model: Any, call: ChatCall) -> Iterator[list[int]]:
    """Yield the ids of an answer so far after every step, without what ends it."""
    options = call.decoding_options
    if find_foreign_options(model, options):
        for outputs in model.stream_generate(**call.options):
            yield outputs[0][call.prompt_length :].tolist()
        return
    for answer in stream_answer(model, call.options["input_ids"][0].tolist(), options):
        has_end = answer.finish_reason == "stop"
        answer_ids = answer.answer_ids[: -1 if has_end else None]
        if answer_ids:
            yield answer_ids


def check_history(history: Sequence[Sequence[str]] | None) -> History:
    """Return a copy of a history as `(question, answer)` pairs.

    Raises:
        ValueError: if it is no sequence of pairs of texts; names the first bad round.
    """
    if history is None:
        return []
    if isinstance(history, (str, dict)) or not isinstance(history, Sequence):
        raise ValueError(
            f"history must be a list of (question, answer) pairs, got {type(history).__name__}."
        )
    for i, pair in enumerate(history):
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"history[{i}] must be a (question, answer) pair, got {pair!r}.")
    return [(question, answer) for question, answer in history]


def _pop_stop_texts(stop: str | Sequence[str] | None, options: dict[str, Any]) -> list[str]:
    """Collect `stop` and transformers' `stop_strings`, which leaves the options."""
    texts = []
    for given in (stop, options.pop("stop_strings", None)):
        is_one = isinstance(given, (str, numbers.Number))
        texts += [given] if is_one else list(given or [])
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"Stop texts must be non-empty texts, got {texts!r}.")
    return texts


def count_prompt_tokens(tokenizer: Any, text: str) -> int:
    """Return how many tokens the model reads for a prompt."""
    return len(tokenizer(text, split_special_tokens=True)["input_ids"])


def keep_newest_rounds(tokenizer: Any, query: str, rounds: History, room: int) -> History:
    """Return the newest whole rounds that fit a prompt of at most `room` tokens.

    Every round is tokenized once, from the newest to the first that does not fit. Line breaks are
    tokens of their own, so that the parts of a prompt have as many tokens as the whole.
    """
    line_break = count_prompt_tokens(tokenizer, "\n")

    def count_inside(text: str) -> int:  # where no text begins, which takes a token, or ends
        return count_prompt_tokens(tokenizer, "\n" + text) - line_break

    length = count_prompt_tokens(tokenizer, ROUND_HEAD.format(0))
    length += count_inside(ROUND.format(query, ""))
    for i, (question, answer) in enumerate(reversed(rounds)):
        length += count_inside(ROUND.format(question, answer) + "\n")
        length += count_inside(ROUND_HEAD.format(i + 1))
        if length > room:
            return rounds[len(rounds) - i :]
    return rounds


def fit_conversation(
    model: Any, tokenizer: Any, whole: Reading, limit: int, room: int, overflow: str
) -> Reading:
    """Return what the model is to be given of a conversation.

    Args:
        limit, room: tokens of prompt and answer together, and those of the answer.
        overflow: "rounds" or "summarize".
    """
    query, rounds, *_ = whole
    kept = keep_newest_rounds(tokenizer, query, rounds, limit - room)
    is_whole = len(kept) == len(rounds) and count_prompt_tokens(tokenizer, query) < limit
    if overflow == "summarize" and not is_whole:
        return condense_conversation(model, tokenizer, whole, limit, room)
    return Reading(query, kept, len(rounds) - len(kept))


def condense_conversation(
    model: Any, tokenizer: Any, whole: Reading, limit: int, room: int
) -> Reading:
    """Make a conversation fit by a summary of its older part, which stands as the first round.

    The newest rounds that fill half of the prompt stay, so that the next summary is some rounds
    away. Of a question that does not fit itself the end stays.

    Args:
        limit, room: tokens of prompt and answer together, and those of the answer.

    Raises:
        ValueError: for a limit in which no text could be condensed.
    """
    if limit < LEAST_SUMMARY_WINDOW:
        raise ValueError(
            f"overflow='summarize' needs a limit of at least {LEAST_SUMMARY_WINDOW} tokens, got "
            f"{limit}: raise max_length, or leave rounds out with overflow='rounds'."
        )
    query, rounds, *_ = whole
    frame = ROUND_HEAD.format(0) + ROUND.format(SUMMARY_REQUESTS["en"][1], "")
    carried = 2 * count_prompt_tokens(tokenizer, frame) + int(limit * SUMMARY_SHARE)
    part = limit - min(room, int(limit * ANSWER_SHARE)) - carried
    start = _find_end_that_fits(query, lambda text: count_prompt_tokens(tokenizer, text) <= part)
    kept = keep_newest_rounds(tokenizer, query, rounds, (limit - room) // 2)
    kept = kept or keep_newest_rounds(tokenizer, query, rounds, part)[-1:]
    left_out = len(rounds) - len(kept)
    text = "\n".join([*(ROUND.format(*pair) for pair in rounds[:left_out]), query[:start]]).strip()
    summary = condense(model, tokenizer, text, limit)
    first = [(SUMMARY_REQUESTS[_find_language(text)][1], summary)] if summary else []
    return Reading(query[start:], [*first, *kept], left_out, summary)


def condense(model: Any, tokenizer: Any, text: str, limit: int) -> str:
    """Return a summary of a text of any length, read piece by piece, in the text's language.

    Args:
        limit: most tokens of a request and its summary, of which an eighth is the summary's.
    """
    request = SUMMARY_REQUESTS[_find_language(text)][0]
    num_new = int(limit * SUMMARY_SHARE)
    summary, begun = "", ""

    def fits_request(piece: str) -> bool:
        return count_prompt_tokens(tokenizer, request.format(begun + piece)) <= limit - num_new

    while text:
        end = _find_beginning_that_fits(text[: 8 * limit], fits_request)
        asked = request.format(begun + text[:end])
        summary = model.chat(tokenizer, asked, do_sample=False, max_new_tokens=num_new)[0]
        begun, text = summary + "\n" * bool(summary), text[end:]
    end = _find_beginning_that_fits(summary, lambda s: count_prompt_tokens(tokenizer, s) <= num_new)
    return summary[:end]


def _find_beginning_that_fits(text: str, fits: Callable[[str], bool]) -> int:
    """Return where the part of a text that fits ends: behind a sentence if half of it is there."""
    if fits(text):
        return len(text)
    end = max(1, bisect.bisect(range(1, len(text)), False, key=lambda n: not fits(text[:n])))
    ends = [match.end() for match in SENTENCE_END.finditer(text, end // 2, end)]
    return ends[-1] if ends else end


def _find_end_that_fits(text: str, fits: Callable[[str], bool]) -> int:
    """Return where the last part of a text that fits begins: a sentence if half of it is left."""
    if fits(text):
        return 0
    size = max(1, bisect.bisect(range(1, len(text)), False, key=lambda n: not fits(text[-n:])))
    start = len(text) - size
    end = SENTENCE_END.search(text, start, start + size // 2)
    return start if end is None or not text[end.end() :].strip() else end.end()


def _find_language(text: str) -> str:
    """Return the language to sum a text up in: Chinese if it has more hanzi than Latin words."""
    return "zh" if len(re.findall(HANZI, text)) > len(re.findall("[A-Za-z]+", text)) else "en"


def _check_room(prompt_length: int, limit: int, num_rounds: int) -> None:
    """Refuse a prompt that fills the window."""
    if prompt_length < limit:
        return
    remedy = "drop old rounds of the history (overflow='rounds')" if num_rounds else "ask for less"
    raise ValueError(
        f"The prompt has {prompt_length} tokens and leaves no room for an answer in the limit of "
        f"{limit}: shorten the query by {prompt_length - limit + 1} or more, {remedy}, or raise "
        "max_length."
    )


def _warn_of_overflow(reading: Reading, whole: Reading, limit: int, room: int) -> None:
    """Tell the caller what the model will not know of, or only in short."""
    parts = [f"oldest {reading.left_out} of {len(whole.rounds)} rounds"] * bool(reading.left_out)
    parts += ["beginning of the question"] * (reading.query != whole.query)
    if parts:
        fate = f", condensed to {reading.summary!r}" if reading.summary else ""
        message = (
            f"Left out: the {' and the '.join(parts)}{fate}. The window has {limit} tokens, {room} "
            "of them for the answer."
        )
        warning = ChatOverflowWarning(message, reading.left_out, reading.summary)
        # The frames between are those of `_prepare_chat`, `chat` and torch.no_grad.
        warnings.warn(warning, stacklevel=5)


__all__ = ["ChatMixin", "ChatOverflowWarning", "check_history"]
