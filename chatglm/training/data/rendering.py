"""Owns the way from a record to token ids and labels, for training, rollouts and evaluation alike.

The prompt is the model's own `build_prompt` and the ids are its tokenizer's, exactly as in `chat`;
what is added here is what happens to rows that are longer than the window. Does not know files,
batches or models beyond that.
"""

from typing import Any, NamedTuple

from chatglm.data.records import SYSTEM_END, Record, Rounds, RowProblem

IGNORED_LABEL = -100
# An answer leaves its prompt as many tokens at least, the markers of the prompt among them.
SHORTEST_PROMPT = 8
# `[gMASK] <sop>` stand at the end of every prompt.
MARKERS = 2


class Example(NamedTuple):
    """A record in tokens.

    Attributes:
        prompt_ids: of the prompt, `[gMASK] <sop>` at its end.
        answer_ids: of the answer, `<eop>` at its end.
    """

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def input_ids(self) -> list[int]:
        """The whole row."""
        return self.prompt_ids + self.answer_ids

    @property
    def labels(self) -> list[int]:
        """The row's labels: the answer, its end token included, and nothing else."""
        return [IGNORED_LABEL] * len(self.prompt_ids) + self.answer_ids


class Renderer:
    """Turns records into ids.

    Args:
        model: whose prompt format and special tokens they have.
        tokenizer: the model's.
        max_length: tokens of a prompt and its answer; 0 is the model's window.
        long_rows: "error", "cut" or "skip" for rows that are longer.
        limits: the official scripts' `max_source_length` and `max_target_length`, 0 for none; they
            cut prompts and answers of `render` before `max_length` is looked at.

    Raises:
        ValueError: if `max_length` is longer than the window or too short for any row.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int = 0,
        long_rows: str = "error",
        limits: tuple[int, int] = (0, 0),
    ) -> None:
        window = model.config.max_sequence_length
        if max_length and not SHORTEST_PROMPT < max_length <= window:
            raise ValueError(
                f"max_length must be from {SHORTEST_PROMPT + 1} to {window}, the model's window, "
                f"got {max_length}"
            )
        self.build_prompt = model.build_prompt
        self.tokenizer = tokenizer
        self.max_length = max_length or window
        self.long_rows = long_rows
        self.limits = limits
        self.end_id: int = model.config.eos_token_id
        self.pad_id: int = model.config.pad_token_id

    def render(self, record: Record) -> Example | None:
        """Return a record with its answer as ids; None if it is too long and is to be skipped.

        Raises:
            RowProblem: if it is too long and is not to be, or holds a pad.
        """
        source, target = self.limits
        answer_ids = self.encode_text(record.answer)
        answer_ids = answer_ids[: target - 2] if target else answer_ids
        return self._fit(record, [*answer_ids, self.end_id], source)

    def render_pair(self, record: Record) -> tuple[Example, Example] | None:
        """Return a record with its better and with its worse answer, behind the same prompt.

        Raises:
            RowProblem: as `render`, or if both answers are the same tokens.
        """
        chosen = [*self.encode_text(record.answer), self.end_id]
        rejected = [*self.encode_text(record.rejected), self.end_id]
        longer = self._fit(record, max(chosen, rejected, key=len))
        if longer is None:
            return None
        room = self.max_length - len(longer.prompt_ids)
        cut = (self._cut_answer(ids, room) for ids in (chosen, rejected))
        better, worse = (Example(longer.prompt_ids, ids) for ids in cut)
        if better == worse:
            raise RowProblem(
                f"{record.source}: chosen and rejected are the same {len(worse.answer_ids)} tokens "
                f"(of {len(chosen)} and {len(rejected)}); take the row out, or raise max_length"
            )
        return better, worse

    def render_prompt(self, record: Record, answer_room: int) -> list[int] | None:
        """Return the ids of a prompt that leaves room for an answer; None if it is to be skipped.

        Args:
            record: of which the answer does not matter.
            answer_room: tokens to leave.

        Raises:
            RowProblem: as `render`.
        """
        example = self._fit(record, [self.end_id] * max(1, answer_room))
        return None if example is None else example.prompt_ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of an answer's text, without special tokens."""
        return self.tokenizer(text, split_special_tokens=True, add_special_tokens=False)[
            "input_ids"
        ]

    def encode_prompt(self, query: str, history: Rounds) -> list[int]:
        """Return the ids of a prompt exactly as `chat` makes them."""
        prompt = self.build_prompt(query, history)
        return self.tokenizer(prompt, split_special_tokens=True)["input_ids"]

    def _fit(self, record: Record, answer_ids: list[int], limit: int = 0) -> Example | None:
        """Bring a row into the window in the way that was asked for, its prompt's end cut first."""
        prompt_ids = self.encode_prompt(*record.frame())
        if limit:
            prompt_ids = [*prompt_ids[:-MARKERS][: limit - 1], *prompt_ids[-MARKERS:]]
        if self.pad_id in prompt_ids or self.pad_id in answer_ids:
            raise RowProblem(
                f"{record.source}: the row holds the pad token (id {self.pad_id}), which would be "
                "taken for padding; take it out"
            )
        length = len(prompt_ids) + len(answer_ids)
        if length <= self.max_length:
            return Example(prompt_ids, answer_ids)
        if self.long_rows == "skip":
            return None
        if self.long_rows == "error":
            raise RowProblem(
                f"{record.source}: the row has {length} tokens and max_length is "
                f"{self.max_length}; raise max_length, or set long_rows to cut or skip"
            )
        head = self._encode_head(record)
        answer_ids = self._cut_answer(answer_ids, self.max_length - len(head) - SHORTEST_PROMPT)
        room = self.max_length - len(answer_ids)
        return Example(self._cut_prompt(record, room, head), answer_ids)

    def _encode_head(self, record: Record) -> list[int]:
        """Return the ids of the system text, which are the first of a prompt without a history."""
        head = self.encode_text(record.system + SYSTEM_END) if record.system else []
        if self.max_length - len(head) <= SHORTEST_PROMPT:
            raise RowProblem(
                f"{record.source}: the system text has {len(head)} tokens, which leave no room for "
                f"question and answer in max_length {self.max_length}; shorten it, or raise "
                "max_length"
            )
        return head

    def _cut_answer(self, answer_ids: list[int], room: int) -> list[int]:
        """Cut an answer's end, never its end token."""
        return answer_ids if len(answer_ids) <= room else [*answer_ids[: room - 1], self.end_id]

    def _cut_prompt(self, record: Record, room: int, head: list[int]) -> list[int]:
        """Forget the oldest rounds, and of what is still too long the question's beginning.

        The system text is never cut: it stays in front of the first question that is left.
        """
        prompt_ids: list[int] = []
        for start in range(len(record.history) + 1):
            prompt_ids = self.encode_prompt(*record.frame(start))
            if len(prompt_ids) <= room:
                return prompt_ids
        return head + prompt_ids[len(head) - room :]


__all__ = ["IGNORED_LABEL", "Example", "Renderer"]
