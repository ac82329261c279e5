"""Owns rollouts: prompts are answered by sampling, and what a model says about the answers.

Prompts are token ids from end to end: nothing is decoded and encoded again. Does not know rewards,
advantages or updates.

Shapes: `B` rows, `P` prompt columns, `A` answer columns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chatglm.answering import answer_prompts, only_options
from chatglm.data.dialects import read_prompts
from chatglm.data.files import open_records
from chatglm.data.records import Record
from chatglm.training.data.batches import Examples, pad_rows
from chatglm.training.data.rendering import Renderer
from chatglm.training.ppo.rewards import Sampled
from chatglm.training.ppo.value_head import ActorCritic, Answers, PolicyOutput
from chatglm.training.settings import Settings


class Prompt(NamedTuple):
    """A question to be answered.

    Attributes:
        ids: `[gMASK] <sop>` at the end.
        text: as the model reads it, without special tokens.
        reference: what the data answers; "" where it does not.
    """

    ids: list[int]
    text: str
    reference: str


class Prompts:
    """The questions of some files, rendered when they are asked for.

    Args:
        paths: JSONL files, or folders of them.
        settings: say what their columns are and what happens to bad and long rows.
        renderer: renders them.
        answer_room: tokens that an answer may take.

    Raises:
        ValueError: for files or rows that cannot be used.
    """

    def __init__(
        self, paths: Sequence[str], settings: Settings, renderer: Renderer, answer_room: int
    ) -> None:
        records = open_records(paths, read_prompts, settings)
        self.renderer, self.answer_room = renderer, answer_room
        self.rows = Examples(records, self._render)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        record = self.rows.records[self.rows.kept[index]]
        text = self.renderer.build_prompt(*record.frame())
        return Prompt(self.rows[index], text, record.answer)

    def _render(self, record: Record) -> list[int] | None:
        return self.renderer.render_prompt(record, self.answer_room)


class Sampler:
    """Draws answers from a policy.

    The defaults draw from exactly the distribution whose ratios PPO clips. A `top_p` below 1 draws
    from another one, while probabilities remain those of the whole vocabulary: ratios and KL are
    then off by what was cut. A `temperature` is taken into account in both.

    Args:
        core: the language model itself.
        max_new_tokens: most tokens of an answer, `<eop>` included.
        temperature: of the draw.
        top_p: share of the probability that is drawn from.
        batch_size: rows at once; 0 for all.
    """

    def __init__(
        self,
        core: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 0,
    ) -> None:
        self.core, self.max_new_tokens, self.batch_size = core, max_new_tokens, batch_size
        self.pad_id: int = core.config.pad_token_id
        self.end_id: int = core.config.eos_token_id
        self.options: dict[str, Any] = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
            # With a NaN replaced here, `evaluate_answers` can say in words that there was one.
            "remove_invalid_values": True,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": self.end_id,
            "pad_token_id": self.pad_id,
        }

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> Answers:
        """Return an answer to each prompt, on the model's device.

        Args:
            prompts: their ids.
            seeds: one an answer, which then depends on nothing else; None draws them.
        """
        options = self.options
        with only_options(self.core, options):
            answers = answer_prompts(self.core, prompts, options, seeds, self.batch_size)
        return build_answers(prompts, answers, self.pad_id, self.core.device)


def build_answers(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str,
) -> Answers:
    """Return prompts and answers as tensors on a device."""
    prompt_ids, prompt_mask = pad_rows(prompts, pad_id, side="left")
    answer_ids, answer_mask = pad_rows(answers, pad_id)
    parts = (prompt_ids, prompt_mask.bool(), answer_ids, answer_mask.bool())
    return Answers(*(part.to(device) for part in parts))


def list_answers(answers: Answers) -> list[list[int]]:
    """Return the ids of each answer, without pads."""
    return [ids[mask].tolist() for ids, mask in zip(answers.answer_ids, answers.answer_mask)]


def find_ended(answers: Answers, end_id: int) -> Tensor:
    """Return which answers have their end token, `(B,)` boolean; the others were cut off."""
    return ((answers.answer_ids == end_id) & answers.answer_mask).any(1)


def describe_answers(prompts: Sequence[Prompt], answers: Answers, tokenizer: Any) -> Sampled:
    """Return answers as rewards want them: ids and texts."""
    ids = list_answers(answers)
    return Sampled(
        [prompt.ids for prompt in prompts],
        ids,
        [prompt.text for prompt in prompts],
        [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        [prompt.reference for prompt in prompts],
    )


def describe_references(prompts: Sequence[Prompt], renderer: Renderer, room: int) -> Sampled:
    """Return the data's own answers as rewards want them.

    Args:
        prompts: the questions.
        renderer: makes ids of answers.
        room: most tokens of one, its end included; longer ones are cut.

    Raises:
        ValueError: if a question has no answer.
    """
    texts = [prompt.reference for prompt in prompts]
    if "" in texts:
        question = prompts[texts.index("")].text
        raise ValueError(
            f"subtract_reference needs rows with answers, and {question!r:.80} has none: add it, "
            "or leave the key out"
        )
    ids = [[*renderer.encode_text(text)[: room - 1], renderer.end_id] for text in texts]
    return Sampled([p.ids for p in prompts], ids, [p.text for p in prompts], texts, texts)


@torch.no_grad()
def evaluate_answers(
    model: ActorCritic,
    answers: Answers,
    batch_size: int,
    temperature: float = 1.0,
    needs_entropy: bool = False,
) -> PolicyOutput:
    """Look at answers, some rows at once, with nothing kept for gradients; zeros for pads.

    Args:
        model: the policy with its value head.
        answers: `(B, A)`.
        batch_size: rows at once.
        temperature: that they were drawn at.
        needs_entropy: whether the entropy is wanted too; it is 0 otherwise.
    """
    shape = answers.answer_mask.shape
    parts = [torch.zeros(shape, device=answers.answer_mask.device) for _ in PolicyOutput._fields]
    everything = torch.arange(shape[0], device=answers.answer_mask.device)
    for rows in answers.split(everything, batch_size):
        picked = answers.pick(rows)
        for whole, part in zip(parts, model(*picked, temperature, needs_entropy)):
            part = part.float().masked_fill(~picked.answer_mask, 0)
            whole[rows, : part.shape[1]] = part
    return PolicyOutput(*parts)


__all__ = [
    "Prompt",
    "Prompts",
    "Sampler",
    "build_answers",
    "describe_answers",
    "describe_references",
    "evaluate_answers",
    "find_ended",
]
