"""The text of an answer: what is shown of its tokens while they come, and which texts end it.

Owns the tidying of answers, stop texts, and what later tokens may still change. Knows nothing of
prompts, histories or models.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

TRAINING_TIME_MARK, TRAINING_TIME = "[[训练时间]]", "2023年"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
HANZI = "[\u4e00-\u9fff]"
BROKEN_CHARACTER = "\ufffd"  # what half a character's bytes decode to
# What later tokens may still change at the end of a decoded text: a space, which is dropped before
# "." and "n't" and the like, and an apostrophe, which has just lost the spaces on both sides; and
# again what stands before those (" n ' t" becomes "n't").
UNSETTLED_SPACING = re.compile(r"( ('[vr]?|n'?)?|')+\Z")


class StopOnText(StoppingCriteria):
    """Stops each row once its new text holds one of the given strings, as decoded or as shown.

    Args:
        tokenizer: decodes the new ids.
        stops: the strings.
        prompt_length: columns of the prompt, which are not searched.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.prompt_length = prompt_length
        # Characters, of which the end may not have been settled when it was searched last.
        self.overlap = max(map(len, stops)) + len(TRAINING_TIME_MARK) + 4
        self.searched = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return which rows are done, `(B,)`."""
        rows = input_ids[:, self.prompt_length :].tolist()
        is_done = [self._is_done(row) for row in rows]
        self.searched = len(rows[0])
        return torch.tensor(is_done, device=input_ids.device)

    def _is_done(self, answer_ids: list[int]) -> bool:
        """Search the end of an answer, to which drafts may have added several tokens at once."""
        known = min(self.searched, len(answer_ids))
        start = known
        while start and len(self.tokenizer.decode(answer_ids[start:known]).strip()) < self.overlap:
            start = max(0, start - self.overlap)
        # A text that begins in the middle may look otherwise there than in the whole answer.
        return self._has_stop(answer_ids[start:]) and self._has_stop(answer_ids)

    def _has_stop(self, answer_ids: list[int]) -> bool:
        """Say whether what no later token changes holds one of the strings."""
        return has_settled_stop(self.tokenizer.decode(answer_ids), self.stops)


def tidy_answer(response: str) -> str:
    """Strip an answer, fill in the training time, and widen punctuation beside hanzi."""
    response = response.strip().replace(TRAINING_TIME_MARK, TRAINING_TIME)
    for narrow, wide in FULL_WIDTH.items():
        response = re.sub(f"({HANZI}){re.escape(narrow)}", rf"\g<1>{wide}", response)
        response = re.sub(f"{re.escape(narrow)}({HANZI})", rf"{wide}\g<1>", response)
    return response


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text up to the first of the stop texts."""
    ends = [text.find(stop) for stop in stops]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def finish_answer(decoded: str, stops: Sequence[str]) -> str:
    """Return what is shown of a whole answer: tidied, and cut at the first stop text.

    A stop text counts as it is shown ("\uff0c") and as the model wrote it (","); if both are there,
    the earlier one.

    Args:
        decoded: the tokenizer's text of the answer.
        stops: texts that end it.
    """
    decoded = decoded.rstrip(BROKEN_CHARACTER)  # Half a character at the very end is no text.
    shown = tidy_answer(decoded)
    cuts = []
    if _has_any(shown, stops):
        cuts.append(cut_at_stops(shown, stops).strip())
    if _has_any(decoded, stops):
        cuts.append(tidy_answer(cut_at_stops(decoded, stops)))
    return min(cuts, key=len, default=shown)


def settle_answer(decoded: str, stops: Sequence[str]) -> str:
    """Return the part of an unfinished answer that is shown and that no later token changes.

    Args:
        decoded: the tokenizer's text of the answer so far.
        stops: texts that will end it.
    """
    if has_settled_stop(decoded, stops):
        return finish_answer(decoded, stops)
    shown = _settle_tidying(_drop_beginning(_settle_decoding(decoded), stops))
    return _drop_beginning(shown, stops).rstrip()


def has_settled_stop(decoded: str, stops: Sequence[str]) -> bool:
    """Say whether an unfinished answer holds a stop text that no later token takes away."""
    settled = _settle_decoding(decoded)
    return _has_any(settled, stops) or _has_any(_settle_tidying(settled), stops)


def _settle_decoding(decoded: str) -> str:
    """Hold back half a character, and white space that decoding may drop."""
    return UNSETTLED_SPACING.sub("", decoded.rstrip(BROKEN_CHARACTER))


def _settle_tidying(decoded: str) -> str:
    """Tidy a settled text; hold back half a mark, and punctuation whose width is still open."""
    shown = tidy_answer(decoded)
    shown = shown[:-1] if shown.endswith(tuple(FULL_WIDTH)) else shown
    return _drop_beginning(shown, [TRAINING_TIME_MARK])


def _drop_beginning(text: str, wholes: Sequence[str]) -> str:
    """Drop from the end of a text what may become one of `wholes`."""
    longest = max(map(len, wholes), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(whole.startswith(text[start:]) for whole in wholes):
            return text[:start]
    return text


def _has_any(text: str, stops: Sequence[str]) -> bool:
    """Say whether a text holds one of the stop texts."""
    return any(stop in text for stop in stops)


__all__ = [
    "HANZI",
    "StopOnText",
    "cut_at_stops",
    "finish_answer",
    "has_settled_stop",
    "settle_answer",
    "tidy_answer",
]
