"""Perplexity over the length of the prompt, with and without `rope_scaling`.

    python -m benchmarks.long_prompts [--count N] [--lengths N ...] [--fresh]

The model of this folder was trained on 256 tokens at most, so that a prompt of 300 is to it what
one of 2,400 is to the released weights. A prompt is a taught question behind rounds of other taught
dialogues, as many as fill the length; what is measured is the taught answer, token by token.
Stopped at any time it goes on where it was; `python -m benchmarks.long_page` shows what was found.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.records import BUILD, describe_run, progress_of, write_json
from benchmarks.results import ROOT
from chatglm import door
from recipes.mini.corpus import (
    MAX_TOKENS,
    Dialogue,
    Example,
    Sampler,
    load_dialogues,
    split_dialogues,
)
from recipes.mini.evaluation import sum_losses

RUN = BUILD / "long_dialogue" / "prompts.json"
LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
FACTORS = (2.0, 4.0, 8.0)
SEED = 12
MISSES = 8  # rounds in a row that did not fit, before a prompt counts as full
PLAIN = "none"
BOTH_ROWS = "linear 4, both rows"


def list_variants() -> dict[str, dict[str, Any] | None]:
    """Return every `rope_scaling` that is compared, by name.

    The last one is what `linear` is not: it divides the positions of answers too.
    """
    variants: dict[str, dict[str, Any] | None] = {PLAIN: None}
    for factor in FACTORS:
        for kind in ("linear", "dynamic"):
            scaling = {"rope_type": kind, "factor": factor}
            variants[f"{kind} {factor:g}"] = scaling | {
                "original_max_position_embeddings": MAX_TOKENS
            }
    return variants | {BOTH_ROWS: None}


def load(name: str, folder: Path) -> Any:
    """Return the model in float32 with a variant's scaling."""
    scaling = list_variants()[name]
    options = {} if scaling is None else {"rope_scaling": scaling}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if name == BOTH_ROWS:
        factor = float(name.split()[1].rstrip(","))
        model.transformer.rotary_emb.register_forward_pre_hook(
            lambda module, given: (given[0] / factor, *given[1:])
        )
    return model.eval()


def fill_prompt(
    dialogue: Dialogue, seen: Sequence[Dialogue], length: int, sampler: Sampler
) -> Example:
    """Return a dialogue's first round behind as many other rounds as its prompt has room for."""
    rng, history = random.Random(f"{SEED} {dialogue.id}"), []
    question, answer = dialogue.rounds[0].questions[0], dialogue.rounds[0].answer
    example, misses = sampler.encode(question, history, answer), 0
    while misses < MISSES:
        other = rng.choice(seen).rounds[0]
        longer = [*history, (other.questions[0], other.answer)]
        tried = sampler.encode(question, longer, answer)
        if len(tried.prompt_ids) > length:
            misses += 1
        else:
            example, history = tried, longer
    return example


def measure(model: Any, examples: Sequence[Example], pad_id: int) -> dict[str, float]:
    """Return the answers' loss in nats, its tokens, and how long the prompts are."""
    loss = sum(sum_losses(model, [example], pad_id) for example in examples)
    return {
        "loss": loss,
        "tokens": sum(len(example.answer_ids) for example in examples),
        "prompts": len(examples),
        "prompt_tokens": sum(len(example.prompt_ids) for example in examples) / len(examples),
    }


def run(args: argparse.Namespace) -> None:
    """Measure every variant at every length that is not measured yet."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    seen, _ = split_dialogues(load_dialogues(None))
    with progress_of(args.run, {"count": args.count}, args.fresh) as found:
        found |= describe_run()
        for name in list_variants():
            model = load(name, args.model)
            sampler = Sampler([], tokenizer, model.build_prompt)
            chosen = random.Random(SEED).sample(seen, args.count)
            for length in args.lengths:
                cells = found.setdefault("cells", {}).setdefault(name, {})
                if str(length) not in cells:
                    examples = [fill_prompt(d, seen, length, sampler) for d in chosen]
                    cells[str(length)] = measure(model, examples, tokenizer.pad_token_id)
                    write_json(args.run, found)
                    print(name, length, cells[str(length)], flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure perplexity over the prompt's length.")
    parser.add_argument("--model", type=Path, default=ROOT, help="folder (this one)")
    parser.add_argument("--count", type=int, default=32, help="prompts of each length (32)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in tokens")
    parser.add_argument("--run", type=Path, default=RUN, help="file to go on with")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    with door.package_code():
        run(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
