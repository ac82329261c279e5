"""Answers token by token: the loop over rows, and what ends each of them.

Owns the draw of a row's next tokens, the end of an answer, and a decoder in which answers join and
leave at any step, each with options of its own. Where a token comes from does not depend on who
else is decoded. Knows nothing of text; what stands between scores and draw comes from
`drawing_chatglm`, guesses at what follows from `drafting_chatglm`.

Shapes: `S` pending tokens of a row, `T` all tokens so far, `V` vocabulary.
"""

import numbers
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .drafting_chatglm import PromptLookup
from .drawing_chatglm import (
    Draw,
    build_processors,
    draw_token,
    find_foreign_options,
    make_cache,
    settle,
)
from .environment_chatglm import find_input_device
from .rows_chatglm import PromptReading, Row, decode_rows


class Answer:
    """A row that is being answered: how its tokens are drawn, and what ends it.

    Attributes:
        row: prompt and answer so far.
        answer_ids: the answer alone, with the token that ended it.
        finish_reason: None while it goes on; then "stop" (an end token), "criteria" (one of
            `stopping_criteria`), "length", "time" or "error".
        error: what a processor or a criterion raised, or None.
        group: what it shares with the other answers to one prompt.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Sequence[int],
        options: dict[str, Any],
        generator: torch.Generator | None = None,
        group: Any = None,
    ) -> None:
        settings = settle(model, options)
        device = find_input_device(model)
        self.reading: PromptReading | None = PromptReading(model, input_ids, make_cache(settings))
        self.row: Row = self.reading.row
        self.generator = generator
        self.group = object() if group is None else group
        self.do_sample = bool(settings["do_sample"])
        self.limit = find_limit(settings, len(input_ids))
        ends = settings["eos_token_id"]
        end_ids = None if ends is None else torch.as_tensor(ends, device=device).reshape(-1)
        self.end_ids = frozenset() if end_ids is None else frozenset(end_ids.tolist())
        self.processors = build_processors(
            Draw(settings, len(input_ids), self.limit, end_ids, device)
        )
        self.criteria = list(settings["stopping_criteria"] or [])
        max_time = settings["max_time"]
        self.deadline = None if max_time is None else time.time() + max_time
        self.lookup = _make_lookup(settings)
        self.drafts: list[int] = []
        self.num_taken = 0  # of them, that were right
        # Room behind the ids: what processors and criteria are given is never copied.
        self.ids = torch.tensor([[*input_ids]], device=device)
        self.num_ids = len(input_ids)
        self.finish_reason: str | None = None
        self.error: Exception | None = None

    @property
    def answer_ids(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.row.input_ids[self.row.prompt_length :]

    def guess(self) -> None:
        """Put drafts behind the token that the next step reads."""
        if self.lookup is not None:
            room = self.limit - self.num_ids - 1  # the step gives one token more
            self.drafts = self.lookup.propose(self.row.input_ids, room)
            self.row.append(*self.drafts)

    def take(self, logits: Tensor) -> None:
        """Draw what follows, and the token behind each draft as long as drafts are what was drawn.

        Every draw is the one that a step of its own would have made, so that drafts change no
        answer, not even one that is drawn at random.

        Args:
            logits: `(S, V)`, behind the pending tokens.
        """
        drafts, self.num_taken = self.drafts, 0
        base = len(self.row.input_ids) - len(drafts)
        try:
            token = self._draw_behind(drafts, logits)
        except Exception as error:  # whoever asked for the processor is told; other rows go on
            self.error, self.finish_reason = error, "error"
            self.row.crop(base + self.num_taken)
        else:
            self.row.crop(base + self.num_taken)
            self.row.append(token)

    def learn(self, seconds: float) -> None:
        """Note how long a step took that was this answer's alone, with its draws."""
        if self.lookup is not None:
            self.lookup.learn(len(self.drafts), self.num_taken, seconds)
        self.drafts = []

    def _draw_behind(self, drafts: list[int], logits: Tensor) -> int:
        """Count the drafts that are drawn, and return the first token that is none of them."""
        *firsts, last = logits.split(1)
        for scores, draft in zip(firsts, drafts):
            token = self._draw(scores)
            if token != draft or self.finish_reason:
                return token
            self.num_taken += 1
        return self._draw(last)

    def _draw(self, logits: Tensor) -> int:
        """Return the next token for its scores `(1, V)`, and note whether it is the last."""
        # As in `generate`: processors may write into what they are given.
        scores = logits.to(self.ids.device, torch.float32, copy=True)
        known = self.ids[:, : self.num_ids]
        for processor in self.processors:
            scores = processor(known, scores)
        if self.do_sample:
            token = draw_token(scores.softmax(dim=-1), self.generator)
        else:
            token = int(scores.argmax(dim=-1))
        self._note(token)
        return token

    def _note(self, token: int) -> None:
        """Add a token to the ids, and find out whether the answer ends with it."""
        if self.num_ids == self.ids.shape[1]:
            self.ids = torch.cat((self.ids, torch.empty_like(self.ids)), dim=1)
        self.ids[0, self.num_ids] = token
        self.num_ids += 1
        known = self.ids[:, : self.num_ids]
        # All of them are asked at every token, also those that only look on.
        are_met = [bool(torch.as_tensor(met(known, None)).all()) for met in self.criteria]
        is_late = self.deadline is not None and time.time() > self.deadline
        reasons = {
            "stop": token in self.end_ids,
            "criteria": any(are_met),
            "length": self.num_ids >= self.limit,
            "time": is_late,
        }
        self.finish_reason = next((reason for reason, is_met in reasons.items() if is_met), None)


def _make_lookup(settings: dict[str, Any]) -> PromptLookup | None:
    """Return what guesses at the next tokens, if that is asked for."""
    names = ("prompt_lookup_num_tokens", "max_matching_ngram_size")
    for name in names:
        value = settings[name]
        is_count = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if value is not None and not (is_count and int(value) > 0):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    most, longest = (settings[name] for name in names)
    return None if most is None else PromptLookup(most, longest)


def find_limit(settings: dict[str, Any], prompt_length: int) -> int:
    """Return how many tokens prompt and answer may have together.

    Raises:
        ValueError: if nothing says so, or if the prompt leaves no room.
    """
    num_new, limit = settings["max_new_tokens"], settings["max_length"]
    if num_new is None and limit is None:
        raise ValueError("Nothing limits the answer: give max_new_tokens or max_length.")
    limit = limit if num_new is None else prompt_length + num_new
    if prompt_length >= limit:
        raise ValueError(
            f"The prompt has {prompt_length} tokens and the limit of prompt and answer is {limit}: "
            "raise max_length, or give max_new_tokens."
        )
    return limit


class RowDecoder:
    """Decodes answers side by side; each is what it would be alone.

    Attributes:
        answers: those that are not finished, oldest first.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.answers: list[Answer] = []

    def add(
        self,
        input_ids: Sequence[int],
        generator: torch.Generator | None = None,
        group: Any = None,
        **options: Any,
    ) -> Answer:
        """Begin an answer, whose prompt the next steps read.

        Args:
            input_ids: of the prompt, with its border.
            generator: that its tokens are drawn with, for a seed of its own; None is torch's.
            group: the same object for answers to the same prompt, which is read once for those
                that wait for it together; None for an answer by itself.
            options: those of `generate` that `drawing_chatglm.NEUTRAL` lists, a limit among them.

        Raises:
            ValueError: for an option that only `generate` knows, and for no room.
        """
        foreign = find_foreign_options(self.model, options)
        if foreign:
            raise ValueError(
                f"Rows are not decoded with {', '.join(sorted(foreign))}: leave it out, or call "
                "generate()."
            )
        answer = Answer(self.model, input_ids, options, generator, group)
        self.answers.append(answer)
        return answer

    def remove(self, answer: Answer) -> None:
        """Let an answer go before its end; nothing is done if it has left already."""
        self.answers = [other for other in self.answers if other is not answer]

    @torch.no_grad()
    def read(self) -> None:
        """Read all prompts that wait, where nobody waits for a token of the other answers."""
        for answer in self.answers:
            while answer.reading is not None:
                self._read(answer)

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Read a piece of the first prompt that waits, and give every other answer its next tokens.

        Returns:
            The answers that ended, which have left. Look at their `error`.
        """
        unread = next((answer for answer in self.answers if answer.reading is not None), None)
        ready = [a for a in self.answers if a.reading is None and not a.finish_reason]
        if unread is not None:
            self._read(unread)
        if ready:
            self._decode(ready)
        finished = [answer for answer in self.answers if answer.finish_reason]
        self.answers = [answer for answer in self.answers if not answer.finish_reason]
        return finished

    def _read(self, answer: Answer) -> None:
        """Read the next piece of a prompt, and behind its end draw the first tokens."""
        reading = answer.reading
        assert reading is not None
        if not reading.advance():
            return
        assert reading.logits is not None
        others = [other for other in self.answers if _waits_with(other, answer)]
        for other in others:  # before a token is drawn, which would be one of the row
            other.row.share_prompt(answer.row)
        for one in (answer, *others):
            one.reading = None
            one.take(reading.logits)

    def _decode(self, answers: list[Answer]) -> None:
        """Run one step of the rows, with drafts where one is alone.

        Drafts of one row would slow the others down, which do not gain by them.
        """
        is_alone = len(answers) == len(self.answers) == 1
        if is_alone:
            answers[0].guess()
        began = time.perf_counter()
        logits = decode_rows(self.model, [answer.row for answer in answers])
        for answer, scores in zip(answers, logits):
            answer.take(scores)
        if is_alone:
            answers[0].learn(time.perf_counter() - began)


def _waits_with(other: Answer, answer: Answer) -> bool:
    """Tell whether another answer waits for the prompt that was just read for one."""
    return other is not answer and other.group is answer.group and other.reading is not None


@torch.no_grad()
def stream_answer(
    model: Any, input_ids: Sequence[int], options: dict[str, Any]
) -> Iterator[Answer]:
    """Decode one answer: yield it, as far as it is, after every step.

    Args:
        options: of `generate`, all of which rows must know (`find_foreign_options`).
    """
    decoder = RowDecoder(model)
    answer = decoder.add(input_ids, **options)
    while decoder.answers:
        decoder.step()
        if answer.error is not None:
            raise answer.error
        if answer.reading is None:
            yield answer


__all__ = ["Answer", "RowDecoder", "find_limit", "stream_answer"]
