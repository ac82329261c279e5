"""How likely given tokens are: labels that may be learned, answers and texts that are scored.

Owns which place foresees a label, the word on labels that this place can see, and the log
probabilities of answers, by their ids and by their texts. Knows nothing of layers; prompts come
from `conversation_chatglm`.

Shapes: `B` rows of a pass, `S` tokens, `K` keys, `N` rows in all.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conversation_chatglm import check_history
from .environment_chatglm import acts_with_adapters, find_input_device, refuse_embedded_prompt
from .masking_chatglm import select_positions

IGNORED_LABEL = -100  # no loss is wanted there; torch's number

OPEN_LABELS = (
    "{} labels stand in what ChatGLM reads in both directions, where each is seen by the token "
    "that has to foresee it: the loss says nothing of how likely they are. Put [gMASK] and <sop> "
    "before a text that is to be scored or learned, give what stands before <sop> the label -100, "
    "or score texts by model.score."
)

# A prompt and its answer.
ScoredRow = tuple[Sequence[int], Sequence[int]]
# Logits of so many tokens are computed at once, unless one row has more: 0.5 GB in float16.
MOST_SCORED_TOKENS = 2048


def shift_labels(labels: Tensor, positions: int | Tensor) -> Tensor:
    """Return what some positions have to foresee, the label behind each.

    Args:
        labels: `(B, S)`.
        positions: as `select_positions` takes them.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return select_positions(shifted, positions).contiguous()


def find_open_labels(labels: Tensor, hidden_mask: Tensor | None) -> Tensor:
    """Return which labels are seen by the token that has to foresee them, `(B, S - 1)` boolean.

    Args:
        labels: `(B, S)`; the first of a row is foreseen by none.
        hidden_mask: `(B, 1, S, K)`, True = hidden, or None if nothing is.
    """
    is_label = labels[:, 1:] != IGNORED_LABEL
    if hidden_mask is None:
        return is_label
    length = labels.shape[1]
    hidden_mask = hidden_mask.expand(-1, -1, length, -1)
    is_hidden = hidden_mask.diagonal(hidden_mask.shape[-1] - length + 1, dim1=2, dim2=3)
    return is_label & ~is_hidden[:, 0]  # (B, 1, S - 1) -> (B, S - 1)


def watch_labels(model: Any, labels: Tensor | None, hidden_mask: Tensor | None) -> None:
    """Warn once of labels that are seen by the token that has to foresee them.

    A GPU would have to be waited for, so there only a model's first labels are looked at.

    Args:
        model: on which it is noted that it was done.
        labels: `(B, S)`, or None.
        hidden_mask: `(B, 1, S, K)`, True = hidden, or None if nothing is.
    """
    is_traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if labels is None or is_traced or torch.compiler.is_compiling():
        return
    if getattr(model, "has_watched_labels", False):
        return
    num_open = int(find_open_labels(labels, hidden_mask).sum())
    model.has_watched_labels = num_open > 0 or labels.device.type != "cpu"
    if num_open:
        warnings.warn(OPEN_LABELS.format(num_open), RuntimeWarning, stacklevel=2)


class AnswerScores(NamedTuple):
    """How likely answers are.

    Attributes:
        log_probs: `(N,)` float64, the natural logarithm of each answer's probability.
        num_tokens: `(N,)` int64, how many tokens it is of.
        num_likeliest: `(N,)` int64, how many of them were the likeliest at their place.
    """

    log_probs: Tensor
    num_tokens: Tensor
    num_likeliest: Tensor

    @property
    def is_greedy(self) -> Tensor:
        """Whether each token of an answer is the likeliest, `(N,)` boolean."""
        return self.num_likeliest == self.num_tokens

    @property
    def perplexity(self) -> Tensor:
        """The perplexity of each answer, `(N,)`."""
        return (-self.log_probs / self.num_tokens).exp()


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[ScoredRow]) -> Tensor:
    """Return how likely the answers of a batch are, by one pass without gradients.

    Rows are padded on the left, so that answers end in the same column and only the last columns
    need logits.

    Args:
        model: with or without wrappers around it, such as peft's.
        rows: of prompt and answer.

    Returns:
        `(B, 3)` float64: the sum of an answer's log probabilities, in nats; its tokens; how many of
        them are the likeliest.

    Raises:
        ValueError: for scores that are no numbers.
    """
    width = 1 + max(len(answer) for _, answer in rows)
    input_ids, attention_mask = _pad_rows(rows, model.config.pad_token_id or 0)
    columns = torch.arange(width - 1)  # of the logits; the last ones foresee nothing
    lengths = torch.tensor([[len(answer)] for _, answer in rows])
    device = find_input_device(model)
    is_scored = columns >= width - 1 - lengths  # (B, width - 1)
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        use_cache=False,
        logits_to_keep=width,
    ).logits[:, :-1][is_scored]
    targets = input_ids[:, 1 - width :][is_scored].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    figures = [-losses, torch.ones_like(losses), logits.argmax(-1) == targets]
    sums = torch.zeros(len(rows), 3, dtype=torch.float64)
    sums.index_add_(0, is_scored.nonzero()[:, 0], torch.stack(figures, dim=1).double().cpu())
    return check_scores(sums, model.dtype)


def _pad_rows(rows: Sequence[ScoredRow], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return rows padded on the left, and the mask of what is theirs, each `(B, S)`."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for number, (prompt, answer) in enumerate(rows):
        start = length - len(prompt) - len(answer)
        input_ids[number, start:] = torch.tensor([*prompt, *answer])
        attention_mask[number, start:] = 1
    return input_ids, attention_mask


def check_scores(figures: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a model's scores.

    Raises:
        ValueError: if one is no number.
    """
    if not bool(figures.isfinite().all()):
        raise ValueError(
            f"the model's scores are no numbers in {dtype}: set dtype to float32 or bfloat16"
        )
    return figures


def _batch_rows(rows: Sequence[ScoredRow], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of rows of like length, the longest first, as many as fit a pass."""
    batch: list[int] = []
    width = 0
    for number in sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i]))):
        width = max(width, len(rows[number][1]) + 1)
        is_full = len(batch) == batch_size or (len(batch) + 1) * width > MOST_SCORED_TOKENS
        if batch and is_full:
            yield batch
            batch, width = [], len(rows[number][1]) + 1
        batch.append(number)
    if batch:
        yield batch


class ScoringMixin:
    """Adds the scoring of answers and texts to a model."""

    build_prompt: Any
    config: Any
    _check_tokenizer: Any

    @acts_with_adapters
    def score(
        self,
        tokenizer: Any,
        prompt: str | Sequence[str],
        answers: str | Sequence[str],
        history: Sequence[Sequence[str]] | None = None,
        end_token: bool = True,
        batch_size: int = 8,
    ) -> AnswerScores:
        """Return how likely answers are behind a question, computed for several at once.

        Args:
            tokenizer: of the same generation as the model.
            prompt: the question as `chat` takes it, or one for each answer. Behind the prompt "" a
                text is scored alone, each of its tokens by those before it.
            answers: a text or several. Text that looks like a special token stays text.
            history: earlier `(question, answer)` pairs, which stand before every question.
            end_token: whether the token that ends an answer counts as its last one.
            batch_size: most rows of a pass; how many there are changes no figure.

        Returns:
            For each answer the sum of its log probabilities, its number of tokens, and how many of
            these were the likeliest.

        Raises:
            ValueError: for an empty answer, other numbers of prompts and answers, a row longer than
                the window, a malformed history, or a tokenizer of another generation.
        """
        self._check_tokenizer(tokenizer)
        prompts, answers = _pair_texts(prompt, answers)
        rounds = check_history(history)
        texts = [p if p == "" and not rounds else self.build_prompt(p, rounds) for p in prompts]
        if not answers:
            return self.score_ids([], batch_size)
        prompt_ids = tokenizer(texts, split_special_tokens=True)["input_ids"]
        answer_ids = _encode_answers(tokenizer, answers)
        end = [self.config.eos_token_id] if end_token else []
        rows = [(before, [*ids, *end]) for before, ids in zip(prompt_ids, answer_ids)]
        return self.score_ids(rows, batch_size)

    @acts_with_adapters
    def score_ids(self, rows: Sequence[ScoredRow], batch_size: int = 8) -> AnswerScores:
        """Return how likely answers are behind their prompts, each row as if it were alone.

        Args:
            rows: ids of a prompt, `<sop>` at its end, and of its answer, read from left to right.
            batch_size: most rows of a pass.

        Raises:
            ValueError: for a prompt without `<sop>`, an answer without tokens, a row longer than
                the window, scores that are no numbers, or an adapter of peft that is learned as
                embeddings before the prompt.
        """
        refuse_embedded_prompt(self)
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
        for number, (prompt, answer) in enumerate(rows):
            self._check_scored_row(number, prompt, answer)
        figures = torch.zeros(len(rows), 3, dtype=torch.float64)
        for batch in _batch_rows(rows, batch_size):
            figures[batch] = score_rows(self, [rows[i] for i in batch])
        return AnswerScores(figures[:, 0], figures[:, 1].long(), figures[:, 2].long())

    def _check_scored_row(self, number: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Refuse a row whose figures would be wrong."""
        window, length = self.config.max_sequence_length, len(prompt) + len(answer)
        if not len(answer):
            raise ValueError(f"Answer {number} has no tokens, and at least one is to be scored.")
        if self.config.bos_token_id not in prompt:
            raise ValueError(
                f"Prompt {number} has no <sop> (id {self.config.bos_token_id}), so that its answer "
                "would be read in both directions: encode it with the tokenizer's special tokens."
            )
        if length > window:
            raise ValueError(
                f"Row {number} has {length} tokens, {len(answer)} of them the answer's, and the "
                f"model's window is {window}: shorten the prompt, or score the answer in parts."
            )


def _pair_texts(prompt: Any, answers: Any) -> tuple[list[str], list[str]]:
    """Return as many prompts as there are answers."""
    for name, given in (("prompt", prompt), ("answers", answers)):
        if not isinstance(given, (str, list, tuple)):
            raise ValueError(f"{name} must be a text or a list of texts, got {given!r}.")
    answers = [answers] if isinstance(answers, str) else list(answers)
    prompts = [prompt] * len(answers) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(answers):
        raise ValueError(
            f"There are {len(prompts)} prompts and {len(answers)} answers: pass one prompt for all "
            "answers, or one for each."
        )
    return prompts, answers


def _encode_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Return the ids of answers, without special tokens."""
    for number, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise ValueError(f"answers[{number}] must be a text, got {answer!r}.")
    options = {"add_special_tokens": False, "split_special_tokens": True}
    rows = tokenizer(answers, **options)["input_ids"]
    for number, ids in enumerate(rows):
        if not ids:
            raise ValueError(
                f"answers[{number}] must be a non-empty text, got {answers[number]!r}."
            )
    return rows


__all__ = [
    "AnswerScores",
    "ScoringMixin",
    "check_scores",
    "score_rows",
    "shift_labels",
    "watch_labels",
]
