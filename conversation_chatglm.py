"""Talking: the prompt format, the chat methods and the tidying of answers.

Owns `build_prompt`, the only prompt format in the project, what counts as a history, where an
answer ends, and what its text looks like. Knows nothing of layers, masks or decoding steps:
tokens come from `generation_chatglm`.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .generation_chatglm import InvalidScoreLogitsProcessor

History = list[tuple[str, str]]

TRAINING_TIME_MARK, TRAINING_TIME = "[[训练时间]]", "2023年"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
HANZI = "[\u4e00-\u9fff]"
WORD_START = "\u2581"  # SentencePiece's piece of a lone space
BROKEN_CHARACTER = "\ufffd"  # what half a character's bytes decode to

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


class StopOnText(StoppingCriteria):
    """Stops each row once its new text holds one of the given strings.

    Args:
        tokenizer: decodes the new ids.
        stops: the strings.
        prompt_length: columns of the prompt, which are not searched.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.prompt_length = prompt_length
        # A character is at most four byte pieces, and specials decode to nothing.
        self.tail = 4 * max(map(len, stops)) + 8
        self.searched = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return which rows are done, `(B,)`."""
        length = input_ids.shape[1]  # drafts bring several new tokens at once
        start = max(self.prompt_length, min(self.searched, length) - self.tail)
        self.searched = length
        texts = [self.tokenizer.decode(row) for row in input_ids[:, start:].tolist()]
        is_done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(is_done, device=input_ids.device)


class ChatCall(NamedTuple):
    """A conversation made ready for `generate`."""

    options: dict[str, Any]
    rounds: History
    stops: list[str]
    prompt_length: int
    score_guard: InvalidScoreLogitsProcessor


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
        past = [f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(rounds)]
        return "".join(past) + f"[Round {len(rounds)}]\n问：{query}\n答："

    @staticmethod
    def process_response(response: str) -> str:
        """Tidy an answer: strip it, fill in the training time, widen punctuation beside hanzi."""
        response = response.strip().replace(TRAINING_TIME_MARK, TRAINING_TIME)
        for narrow, wide in FULL_WIDTH.items():
            response = re.sub(f"({HANZI}){re.escape(narrow)}", rf"\g<1>{wide}", response)
            response = re.sub(f"{re.escape(narrow)}({HANZI})", rf"{wide}\g<1>", response)
        return response

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
            kwargs: anything `generate` takes.

        Returns:
            The answer, and the history with this round appended.

        Raises:
            ValueError: for an empty query, a malformed history, a tokenizer of another
                generation, or a prompt that leaves no room for an answer.
        """
        sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        kwargs |= sampling | {"max_length": max_length, "logits_processor": logits_processor}
        call = self._prepare_chat(tokenizer, query, history, stop, kwargs)
        outputs = self.generate(num_beams=num_beams, **call.options)
        self._warn_of_broken_scores(call)
        response = self._read_answer(tokenizer, outputs[0], call)
        return response, [*call.rounds, (query, response)]

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
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """Answer a question bit by bit: yield the answer so far and the history with it.

        Half a character is held back until it is whole. Closing the iterator ends the
        generation. Arguments and errors: see `chat`.
        """
        sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        kwargs |= sampling | {"max_length": max_length, "logits_processor": logits_processor}
        call = self._prepare_chat(tokenizer, query, history, stop, kwargs)
        try:
            for outputs in self.stream_generate(**call.options):
                response = self._read_answer(tokenizer, outputs[0], call)
                yield response, [*call.rounds, (query, response)]
        finally:  # also of an answer that its reader breaks off
            self._warn_of_broken_scores(call)

    def _prepare_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Sequence[str]] | None,
        stop: str | Sequence[str] | None,
        options: dict[str, Any],
    ) -> ChatCall:
        """Check and encode a conversation, and complete the options of `generate`."""
        rounds = check_history(history)
        self._check_tokenizer(tokenizer)
        prompt = self.build_prompt(query, rounds)
        inputs = tokenizer([prompt], return_tensors="pt", split_special_tokens=True)
        prompt_length = inputs["input_ids"].shape[1]
        self._check_room(prompt_length, options)
        stops = _pop_stop_texts(stop, options)
        score_guard = self._complete_options(tokenizer, options)
        if stops:
            own = options.get("stopping_criteria") or []
            added = StopOnText(tokenizer, stops, prompt_length)
            options["stopping_criteria"] = StoppingCriteriaList([*own, added])
        for name in ("input_ids", "attention_mask"):
            options[name] = inputs[name].to(self.device)
        return ChatCall(options, rounds, stops, prompt_length, score_guard)

    def _read_answer(self, tokenizer: Any, output_ids: Tensor, call: ChatCall) -> str:
        """Return the tidied text of an answer that may still be growing."""
        answer = tokenizer.decode(output_ids[call.prompt_length :].tolist())
        # Half a character at the end may become a whole one; at the very end it is no text.
        answer = cut_at_stops(answer.rstrip(BROKEN_CHARACTER), call.stops)
        return self.process_response(answer)

    def _check_room(self, prompt_length: int, options: dict[str, Any]) -> None:
        """Refuse a prompt that fills the window."""
        has_own_limit = options.get("max_new_tokens") is not None
        limit = self.config.max_sequence_length if has_own_limit else options["max_length"]
        if prompt_length >= limit:
            raise ValueError(
                f"The prompt has {prompt_length} tokens and leaves no room for an answer in the "
                f"limit of {limit}: shorten the query, drop old rounds of the history, or raise "
                "max_length."
            )

    def _complete_options(
        self, tokenizer: Any, options: dict[str, Any]
    ) -> InvalidScoreLogitsProcessor:
        """Settle limits, sampling, processors and end tokens; nothing of the caller's changes.

        Returns the processor that will know whether the scores were finite.
        """
        score_guard = InvalidScoreLogitsProcessor(tokenizer.convert_tokens_to_ids(WORD_START))
        processors = [*(options["logits_processor"] or []), score_guard]
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
        wanted = {"[gMASK]": self.config.gmask_token_id, "<sop>": self.config.bos_token_id}
        for token, token_id in wanted.items():
            found = tokenizer.convert_tokens_to_ids(token)
            if found != token_id:
                raise ValueError(
                    f"The tokenizer's {token} is {found}, the model's is {token_id}: they are of "
                    "different generations. Load both from the same folder, with its "
                    "tokenizer_config.json and ice_text.model."
                )


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


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first of the stop texts."""
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def _pop_stop_texts(stop: str | Sequence[str] | None, options: dict[str, Any]) -> list[str]:
    """Collect `stop` and transformers' `stop_strings`, which leaves the options."""
    texts = []
    for given in (stop, options.pop("stop_strings", None)):
        texts += [given] if isinstance(given, str) else list(given or [])
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"Stop texts must be non-empty texts, got {texts!r}.")
    return texts


__all__ = ["ChatMixin", "StopOnText", "check_history", "cut_at_stops"]
