"""Owns how the options of a question are ranked: by their letters, or by their whole texts.

The letters are compared behind `[gMASK] <sop>`, where an answer begins; with this tokenizer a piece
for a space may stand there first. Does not know files or marks.
"""

from collections.abc import Sequence
from typing import NamedTuple

from chatglm.evaluating.multiple_choice import LETTERS, PromptTemplate, Question, Subject
from chatglm.evaluating.scoring import BatchedModel
from chatglm.training.data.rendering import Example, Renderer


class LetterIds(NamedTuple):
    """The tokens of the letters A, B, C ... as an answer.

    Attributes:
        lead: tokens in front of every letter, such as the piece of a space.
        ids: the token of each letter.
    """

    lead: list[int]
    ids: list[int]


def encode_letters(renderer: Renderer, count: int) -> LetterIds:
    """Return the tokens of the first letters.

    Raises:
        ValueError: if they are not one token each, behind what they have in common.
    """
    rows = [renderer.encode_text(letter) for letter in LETTERS[:count]]
    ids = [row[-1] for row in rows]
    if any(row[:-1] != rows[0][:-1] for row in rows) or len(set(ids)) < count:
        raise ValueError(
            f"the vocabulary has no token of its own for each of {', '.join(LETTERS[:count])} "
            f"(they are {rows}): set answer_by to text"
        )
    return LetterIds(rows[0][:-1], ids)


class Prompt(NamedTuple):
    """A question as the model gets it.

    Attributes:
        ids: of the prompt.
        shots: how many answered questions are in it.
        options: the ids of each option's text.
    """

    ids: list[int]
    shots: int
    options: list[list[int]]


class ChoiceRanker:
    """Ranks the options of questions by how likely a model finds them, and picks the first.

    Args:
        renderer: of the model.
        model: that answers.
        answer_by: "letter": the likeliest of the letters of the listed options; "text": the
            likeliest of their texts as a whole answer, the end token included; "text_mean": the
            same by the mean over the tokens.
        language: of the words around a question; "" for that of the questions.
    """

    def __init__(
        self, renderer: Renderer, model: BatchedModel, answer_by: str = "letter", language: str = ""
    ) -> None:
        self.renderer, self.model = renderer, model
        self.answer_by, self.language = answer_by, language

    def answer(self, subject: Subject) -> tuple[list[str], float]:
        """Answer a subject's questions.

        Returns:
            The picked letter of each question, "" where it is too long and was to be left out, and
            how many shots they had on average: those that did not fit were left out.

        Raises:
            ValueError: for a vocabulary without letters, a question that is too long, or scores
                that are no numbers.
        """
        template = PromptTemplate(subject, self.language, lists_options=self.answer_by == "letter")
        encoded = [self.encode(question, template) for question in subject.questions]
        prompts = [prompt for prompt in encoded if prompt is not None]
        if not prompts:
            return [""] * len(encoded), 0.0
        pick = self._pick_letters if self.answer_by == "letter" else self._pick_texts
        best = iter(pick(prompts))
        picked = ["" if prompt is None else LETTERS[next(best)] for prompt in encoded]
        return picked, sum(prompt.shots for prompt in prompts) / len(prompts)

    def encode(self, question: Question, template: PromptTemplate) -> Prompt | None:
        """Return a question's prompt, with as many shots as fit before the longest answer.

        None if the question alone is too long and such rows are to be skipped.

        Raises:
            RowProblem: if it is and they are not.
        """
        options = [self.renderer.encode_text(text) for text in question.options]
        room = 1 + max(map(len, options))
        for shots in range(len(template.subject.shots), 0, -1):
            record = template.build_record(question, shots)
            prompt_ids = self.renderer.encode_prompt(*record.frame())
            if len(prompt_ids) + room <= self.renderer.max_length:
                return Prompt(prompt_ids, shots, options)
        prompt_ids = self.renderer.render_prompt(template.build_record(question, 0), room)
        return None if prompt_ids is None else Prompt(prompt_ids, 0, options)

    def _pick_letters(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the number of the likeliest letter behind each prompt, of as many as it has."""
        counts = [len(prompt.options) for prompt in prompts]
        letters = encode_letters(self.renderer, max(counts))
        scores = self.model.score_next([p.ids + letters.lead for p in prompts], letters.ids)
        return [int(row[:count].argmax()) for row, count in zip(scores, counts)]

    def _pick_texts(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the number of the likeliest text behind each prompt."""
        end = [self.renderer.end_id]
        rows = [Example(p.ids, option + end) for p in prompts for option in p.options]
        lengths = [len(row.input_ids) for row in rows]
        losses, tokens, _ = self.model.measure_answers(rows, lengths).unbind(dim=1)
        losses = losses / tokens if self.answer_by == "text_mean" else losses
        parts = losses.split([len(prompt.options) for prompt in prompts])
        return [int(part.argmin()) for part in parts]


__all__ = ["ChoiceRanker", "encode_letters"]
