"""What roll-outs take: 64 answers of the repository's own model, as rows and in padded batches.

    python -m benchmarks.bench_rollouts [--answers N] [--rounds N] [--quick] [--write]

Questions are those of the model's own dialogues; answers are drawn at temperature 1 from all of the
vocabulary, as PPO draws them, and end where the model ends them: their lengths differ, from a few
tokens to `--new-tokens`. `each` asks so many questions once, `groups` an eighth of them eight times
each, as GRPO does. `as before` is one draw for all rows of a batch, the way before answers had
seeds of their own. It gives other answers: figures are per token.

Everything is measured in one process and on one thread, by the time that this thread computed: a
busy machine makes all ways slower alike. Passes are those of the whole network, prompts among them.
`--write` appends the figures to benchmarks/results.csv. `--quick` tries every line in seconds; its
figures mean nothing and are not written.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import AutoTokenizer

from benchmarks.results import RESULTS, ROOT, Case, Recorder
from benchmarks.workers import Spread
from chatglm import answering
from chatglm.answering import answer_prompts, cut_answer, only_options
from chatglm.benching.measuring import list_versions
from chatglm.loading import load_model
from chatglm.training.data.batches import pad_rows
from recipes.mini.corpus import load_dialogues

GROUP = 8  # answers to one question
BEFORE, BATCHES, ROWS = "padded batches as before", "padded batches, a seed each", "rows"
WAYS = (BEFORE, BATCHES, ROWS)
SIZES = (8, 64)  # answers at once
FORMATS = {"float32": None, "INT4": 4}
QUICK = {"answers": 8, "rounds": 1, "new_tokens": 6}


class Measured(NamedTuple):
    """What a way took.

    Attributes:
        seconds: that the thread computed.
        passes: of the network.
        tokens: of all answers.
    """

    seconds: float
    passes: int
    tokens: int


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options.

    Raises:
        ValueError: if figures of `--quick` are to be written.
    """
    parser = argparse.ArgumentParser(description="What roll-outs take.")
    parser.add_argument("--answers", type=int, default=64, help="of a roll-out (64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="most of an answer (64)")
    parser.add_argument("--rounds", type=int, default=5, help="that are measured (5)")
    parser.add_argument("--quick", action="store_true", help="try the lines")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results.csv")
    args = parser.parse_args(words)
    if args.quick and args.write:
        raise ValueError("--quick tries the lines, and its figures mean nothing: leave out --write")
    if args.quick:
        vars(args).update(QUICK)
    return args


def list_prompts(model: Any, count: int) -> list[list[int]]:
    """Return the ids of so many questions of the model's dialogues."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    dialogues = load_dialogues(None)
    step = len(dialogues) // count
    texts = [dialogues[n * step].rounds[0].questions[0] for n in range(count)]
    return [tokenizer(model.build_prompt(text))["input_ids"] for text in texts]


def list_options(model: Any, new_tokens: int) -> dict[str, Any]:
    """Return the options that PPO draws with."""
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "remove_invalid_values": True}
    ids = {name: getattr(model.config, name) for name in ("eos_token_id", "pad_token_id")}
    return {**options, **ids, "max_new_tokens": new_tokens}


def answer_as_before(
    model: Any, prompts: Sequence[Sequence[int]], options: dict[str, Any], size: int
) -> list[list[int]]:
    """Return answers whose draws are one for all rows of a batch."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: list[list[int]] = []
    for start in range(0, len(order), size):
        batch = [prompts[number] for number in order[start : start + size]]
        ids, mask = pad_rows(batch, options["pad_token_id"], side="left")
        found = model.generate(inputs=ids, attention_mask=mask)[:, ids.shape[1] :]
        answers += [cut_answer(row, [options["eos_token_id"]]) for row in found.tolist()]
    return answers


@contextlib.contextmanager
def counting_passes(model: Any) -> Iterator[list[int]]:
    """Yield a list that grows by one at each pass of the network."""
    passes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *args: passes.append(1))
    try:
        yield passes
    finally:
        hook.remove()


def measure(
    way: str, model: Any, prompts: Sequence[Sequence[int]], size: int, round_: int, new_tokens: int
) -> Measured:
    """Answer all prompts by one of `WAYS`, with the seeds of a round."""
    options = list_options(model, new_tokens)
    seeds = [answering.derive_seed(round_, number) for number in range(len(prompts))]
    torch.manual_seed(round_)
    reasons = ["it is measured"] if way == BATCHES else []
    chosen = mock.patch.object(answering, "find_reasons", lambda *args: reasons)
    with only_options(model, options), counting_passes(model) as passes, chosen:
        began = time.thread_time()
        if way == BEFORE:
            answers = answer_as_before(model, prompts, options, size)
        else:
            answers = answer_prompts(model, prompts, options, seeds, size)
        seconds = time.thread_time() - began
    return Measured(seconds, len(passes), sum(map(len, answers)))


def measure_ways(
    model: Any, prompts: Sequence[Sequence[int]], size: int, args: argparse.Namespace
) -> dict[str, list[Measured]]:
    """Measure all ways in turns, after a round that warms up."""
    found: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for round_ in range(args.rounds + 1):
        for way in WAYS:
            measured = measure(way, model, prompts, size, round_, args.new_tokens)
            found[way] += [measured] * (round_ > 0)
    return found


def record(
    recorder: Recorder,
    name: str,
    answers: int,
    size: int,
    found: dict[str, list[Measured]],
    versions: str,
) -> None:
    """Record the time and the passes of each way, and how much faster than before it was."""
    before = [one.seconds / one.tokens for one in found[BEFORE]]
    for way, measured in found.items():
        each = [one.seconds / one.tokens for one in measured]
        case = Case(way, name, versions, answers, size, len(measured))
        ratio = None if way == BEFORE else Spread.of([a / b for a, b in zip(before, each)])
        baseline = "" if ratio is None else BEFORE
        recorder.add(case, Spread.of(each).scaled(1000), "CPU ms/token", ratio, baseline)
        recorder.add(case, Spread.of([float(one.passes) for one in measured]), "passes")


def run(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure every format, kind of roll-out and number of answers at once."""
    versions = ", ".join(f"{k} {v}" for k, v in list_versions().items() if k != "processor")
    for name, bits in FORMATS.items():
        model, _ = load_model(ROOT, bits, "cpu", "float32")
        single = list_prompts(model, args.answers)
        groups = [prompt for prompt in single[: args.answers // GROUP] for _ in range(GROUP)]
        for kind, prompts in (("each", single), ("groups", groups)):
            for size in SIZES:
                found = measure_ways(model, prompts, size, args)
                case = f"roll-outs, {kind}, {name}"
                record(recorder, case, len(prompts), size, found, versions)


def main(words: Sequence[str]) -> int:
    """Measure, and print the figures."""
    args = parse(words)
    torch.set_num_threads(1)
    run(args, Recorder("bench_rollouts", 8, 1, RESULTS if args.write else None))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
