"""Owns answers to many prompts at once, for roll-outs and evaluations: ids to ids, two ways.

    prompts ──> rows that join as others end, on a CPU whose engine runs their steps as one program
            └─> padded batches of `generate`, elsewhere and where answers are short

As a row an answer is what it is alone, bit for bit. In a batch, pads move its scores by roundings.
Either way an answer that is drawn at random has a seed of its own: who asks, how many are answered
at once and in which order change nothing. Only options that `generate` alone knows, as beams, draw
with torch's own generator.

Knows nothing of text, rewards or files.

Shapes: `B` rows of a batch, `S` columns, `V` vocabulary.
"""

import contextlib
import functools
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from chatglm.model_modules import import_model_module
from chatglm.training.data.batches import pad_rows

logger = logging.getLogger(__name__)
ALONE = "generate"  # how it is called that a model's `generate` is needed, whatever is asked of it
# Prompts are read one by one for rows, each in about the time of a step: shorter answers, whose
# lengths can differ little, do not make up for that (`benchmarks.bench_rollouts`).
SHORTEST = 32  # tokens that an answer may have
REPLACED = "the model's generate() is another's, or several processes are at work"
# What is left for `generate` to do where tokens are drawn by a processor of ours.
KEPT_OPTIONS = ("max_new_tokens", "max_length", "eos_token_id", "cache_implementation")
KEPT_OPTIONS += ("cache_config", "max_time", "stopping_criteria")


class Asked(NamedTuple):
    """What `answer_prompts` was asked, with as many seeds as prompts and a size of 1 or more."""

    prompts: Sequence[Sequence[int]]
    options: dict[str, Any]
    seeds: Sequence[int]
    size: int
    note: Callable[[int], Any]


def derive_seed(*place: int) -> int:
    """Return the seed of an answer for its place in a run: the run's seed, its step, its number.

    Args:
        place: whole numbers of 0 or more.
    """
    words = np.random.SeedSequence(place).generate_state(1, np.uint64)
    return int(words[0]) >> 1  # torch takes 64 bits, and the highest as a sign


def answer_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    seeds: Sequence[int] | None = None,
    size: int = 0,
    note: Callable[[int], Any] = lambda count: None,
) -> list[list[int]]:
    """Return the ids that follow each prompt; an end token belongs to them and is the last.

    Args:
        model: in evaluation mode, perhaps in wrappers of adapters.
        prompts: with a border at the end of each.
        options: of `generate`; the model's `generation_config` counts for what they do not say.
        seeds: one an answer, where tokens are drawn; None draws them with torch's own generator.
        size: answers that are decoded at once; 0 for all.
        note: is told how many answers are done each time that some are.

    Raises:
        ValueError: for options that cannot be, or another number of seeds than of prompts.
    """
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(prompts),), device="cpu").tolist()
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    if not prompts:
        return []
    reasons = find_reasons(model, options)
    if reasons:
        _tell_once(tuple(reasons))
    answer = _answer_in_batches if reasons else _answer_in_rows
    with torch.no_grad():
        return answer(model, Asked(prompts, options, seeds, size or len(prompts), note))


@functools.cache
def _tell_once(reasons: tuple[str, ...]) -> None:
    logger.warning(
        "Answers are decoded by generate() in padded batches, not as rows: %s.", ", ".join(reasons)
    )


def find_reasons(model: Any, options: dict[str, Any]) -> list[str]:
    """Return why answers are decoded in padded batches, in words; nothing if as rows.

    Rows are decoded with the same ease anywhere, but where a step is not one program of the
    engine's each of them takes calls of its own in every block, and a batch is faster.
    """
    foreign = _find_foreign(model, options)
    if foreign:
        return [REPLACED if name == ALONE else f"rows do not know {name}" for name in foreign]
    most = options.get("max_new_tokens") or SHORTEST
    if most < SHORTEST:
        return [f"a batch is faster for answers of {most} tokens or fewer"]
    if model.device.type != "cpu":
        return [f"a batch is faster on {model.device.type}"]
    if torch.is_autocast_enabled("cpu"):
        return ["a batch is faster under autocast"]
    if import_model_module(model, "environment_chatglm").find_twin("decode_step") is None:
        return ["a batch is faster without the engine"]
    from chatglm.cpu.decoding_step import is_for_programs  # needs llvmlite, which is there now

    is_plain = not getattr(model.config, "pre_seq_len", None)
    if is_plain and is_for_programs(model.transformer.layers, model.dtype):
        return []
    return ["a batch is faster through adapters, prefixes, hooks and layers of others"]


def uses_seeds(model: Any, options: dict[str, Any]) -> bool:
    """Tell whether each answer is drawn with a seed of its own: only `generate`'s are not."""
    return set(_find_foreign(model, options)) <= {ALONE}


def _find_foreign(model: Any, options: dict[str, Any]) -> list[str]:
    return import_model_module(model, "drawing_chatglm").find_foreign_options(model, options)


def _answer_in_rows(model: Any, asked: Asked) -> list[list[int]]:
    """Decode all prompts as rows, of which there are `size` as long as any wait."""
    prompts, size = asked.prompts, asked.size
    decoder = import_model_module(model, "decoding_chatglm").RowDecoder(model)
    waiting = deque(_group_alike(prompts, size))
    numbers: dict[int, int] = {}  # of the prompt of each answer
    answers: list[list[int]] = [[] for _ in prompts]
    while waiting or decoder.answers:
        while waiting and len(decoder.answers) + len(waiting[0]) <= size:
            group = object()
            for number in waiting.popleft():
                generator = torch.Generator().manual_seed(asked.seeds[number])
                added = decoder.add(prompts[number], generator, group, **asked.options)
                numbers[id(added)] = number
        decoder.read()
        ended = decoder.step()
        for answer in ended:
            if answer.error is not None:
                raise answer.error
            answers[numbers.pop(id(answer))] = answer.answer_ids
        asked.note(len(ended))
    return answers


def _group_alike(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return the numbers of equal prompts together, in groups of at most `size`.

    Such a group is read once.
    """
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        alike[tuple(prompt)].append(number)
    return [
        numbers[start : start + size]
        for numbers in alike.values()
        for start in range(0, len(numbers), size)
    ]


def _answer_in_batches(model: Any, asked: Asked) -> list[list[int]]:
    """Decode prompts of like length together, the longest first: little is padded then."""
    prompts, size = asked.prompts, asked.size
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        given = [prompts[number] for number in batch]
        seeds = [asked.seeds[number] for number in batch]
        found = _answer_batch(model, given, asked.options, seeds)
        for number, answer in zip(batch, found):
            answers[number] = answer
        asked.note(len(batch))
    return answers


def _answer_batch(
    model: Any, prompts: Sequence[Sequence[int]], options: dict[str, Any], seeds: Sequence[int]
) -> list[list[int]]:
    """Return the answers of one batch."""
    drawing = import_model_module(model, "drawing_chatglm")
    settings = drawing.settle(model, options)
    padded = pad_rows(prompts, model.config.pad_token_id, side="left")
    names = ("input_ids", "attention_mask")
    inputs = {name: part.to(model.device) for name, part in zip(names, padded)}
    width = padded[0].shape[1]
    if settings["do_sample"] and uses_seeds(model, options):
        ids = _generate_by_seeds(model, inputs, settings, seeds)
    else:
        ids = model.generate(**inputs, **{"pad_token_id": model.config.pad_token_id} | options)
    ends = settings["eos_token_id"]
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    return [cut_answer(row, ends) for row in ids[:, width:].tolist()]


def _generate_by_seeds(
    model: Any, inputs: dict[str, Tensor], settings: dict[str, Any], seeds: Sequence[int]
) -> Tensor:
    """Return prompts and answers `(B, T)`, each row drawn with its own seed.

    `generate` only takes what is likeliest: the processor leaves it no choice.
    """
    drawing = import_model_module(model, "drawing_chatglm")
    device, width = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    limit = import_model_module(model, "decoding_chatglm").find_limit(settings, width)
    ends = settings["eos_token_id"]
    end_ids = None if ends is None else torch.as_tensor(ends, device=device).reshape(-1)
    processors = drawing.build_processors(drawing.Draw(settings, width, limit, end_ids, device))
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    kept = {name: settings[name] for name in KEPT_OPTIONS if settings[name] is not None}
    kept |= {"pad_token_id": model.config.pad_token_id, "do_sample": False}
    kept["logits_processor"] = [DrawByRow(processors, generators, drawing.draw_token)]
    with only_options(model, {}):
        return model.generate(**inputs, **kept)


class DrawByRow(LogitsProcessor):
    """Draws a token for each row, and leaves no other.

    Args:
        processors: what stands between scores and draw.
        generators: one a row.
        draw: takes shares `(1, V)` and a generator, and returns a token.
    """

    def __init__(
        self, processors: Any, generators: Sequence[torch.Generator], draw: Callable[..., int]
    ) -> None:
        self.processors, self.generators, self.draw = processors, generators, draw

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores `(B, V)` of 0 for the drawn tokens and -inf for all others."""
        shares = self.processors(input_ids, scores).softmax(dim=-1)
        tokens = [self.draw(row[None], one) for row, one in zip(shares, self.generators)]
        drawn = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@contextlib.contextmanager
def only_options(model: Any, options: dict[str, Any]) -> Iterator[None]:
    """Put options in the place of a model's `generation_config`, not beside it.

    What the folder's own sets would be mixed in.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, core.generation_config = core.generation_config, GenerationConfig(**options)
    try:
        yield
    finally:
        core.generation_config = own


def cut_answer(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return an answer up to its first end token, which belongs to it."""
    stop = next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])


__all__ = [
    "answer_prompts",
    "cut_answer",
    "derive_seed",
    "find_reasons",
    "only_options",
    "uses_seeds",
]
