"""What alignment changed: the fine-tuned model, and what PPO and DPO made of it, side by side.

    python -m recipes.mini.comparison --data DIR --work DIR

The rewards are those of the reward model that PPO practised for; everything else is measured
without it: whether an answer is the taught one, whether it ends, whether it turns in circles.
Questions are held out, and asked a second time with words missing. The better variant is chosen on
one half of them (`choice`), and reported on the other.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from chatglm.data.records import Record
from chatglm.training.data.batches import PaddingCollator
from chatglm.training.data.rendering import IGNORED_LABEL, Renderer
from recipes.mini.corpus import load_dialogues, open_gaps, split_dialogues
from recipes.mini.evaluation import draw_new_sums, numbers_of, pick_untaught
from recipes.mini.own import MAX_LENGTH, is_right, sample_answers

SEED = 20261125
BATCH_SIZE = 64
SHOWN = 30
CIRCLE = re.compile(r"(.{2,40}?)\1{3,}", re.DOTALL)  # four times the same in a row
VARIANTS = ("sft", "ppo", "dpo")


def load_variant(work: Path, name: str, device: str) -> Any:
    """Return a variant: the fine-tuned model, or that with a variant's adapters merged in."""
    model: Any = AutoModelForCausalLM.from_pretrained(work / "sft", trust_remote_code=True)
    if name != "sft":
        model = PeftModel.from_pretrained(model, str(work / name)).merge_and_unload()
    return model.to(device).eval()


def collect_questions(data: Path) -> dict[str, list[Record]]:
    """Return the held-out questions by what is tested with them."""
    seen, held_out = split_dialogues(load_dialogues(data))
    rng = random.Random(SEED)
    known = {numbers_of(r.answer) for d in seen if d.source == "arithmetic" for r in d.rounds}
    untaught = [q for q in pick_untaught(seen, held_out) if q.source == "seeds"]
    plain = [Record(q.dialogue, q.history, q.query, q.answer) for q in untaught]
    gaps = [record._replace(query=open_gaps(record.query, rng)) for record in plain]
    return {
        "held-out wordings": plain,
        "the same with words missing": [g for g, p in zip(gaps, plain) if g != p],
        "sums taught in neither language": [
            Record("", [], q.query, q.answer) for q in draw_new_sums(known)
        ],
    }


@torch.no_grad()
def score_answers(model: Any, renderer: Renderer, records: Sequence[Record]) -> list[float]:
    """Return what a reward model gives each record's answer."""
    scores: list[float] = []
    for batch in _iter_batches(renderer, records):
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
        scores += model(**inputs).logits[:, 0].tolist()
    return scores


@torch.no_grad()
def sum_log_probabilities(model: Any, renderer: Renderer, records: Sequence[Record]) -> list[float]:
    """Return the log probability of each record's answer, its end included, in nats."""
    sums: list[float] = []
    for batch in _iter_batches(renderer, records):
        labels = batch.pop("labels").to(model.device)[:, 1:]
        inputs = {k: v.to(model.device) for k, v in batch.items()}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        sums += _gather(logits, labels).tolist()
    return sums


def _gather(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the log probabilities of what carries labels, `(B,)`."""
    is_counted = labels != IGNORED_LABEL
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * is_counted).sum(1)


def _iter_batches(renderer: Renderer, records: Sequence[Record]) -> Any:
    collate = PaddingCollator(renderer.pad_id)
    for start in range(0, len(records), BATCH_SIZE):
        rendered = (renderer.render(record) for record in records[start : start + BATCH_SIZE])
        yield collate([example for example in rendered if example is not None])


def measure_variant(
    model: Any, reference: Any, judge: Any, tokenizer: Any, questions: dict[str, list[Record]]
) -> dict[str, Any]:
    """Return a variant's figures for each group of questions, and its answers.

    Args:
        model: the variant.
        reference: the fine-tuned model, from which its KL is counted.
        judge: the reward model.
        tokenizer: of all three.
        questions: groups of records with taught answers.
    """
    renderer = Renderer(model, tokenizer, MAX_LENGTH, "cut")
    measured: dict[str, Any] = {"groups": {}}
    for name, records in questions.items():
        said = list(sample_answers(model, tokenizer, records, do_sample=False))
        right = [is_right(a, r.answer, tokenizer) for (a, _), r in zip(said, records)]
        own = [r._replace(answer=a or " ") for (a, _), r in zip(said, records)]
        measured["groups"][name] = {
            "asked": len(records),
            "right": sum(right),
            "right in the half for the choice": sum(right[::2]),
            "ended": sum(has_stopped for _, has_stopped in said),
            "in circles": sum(bool(CIRCLE.search(answer)) for answer, _ in said),
            "reward": mean(score_answers(judge, renderer, own)),
        }
        if name == "held-out wordings":
            measured["answers"] = [answer for answer, _ in said]
    drawn = list(sample_answers(model, tokenizer, questions["held-out wordings"]))
    own = [r._replace(answer=a) for (a, _), r in zip(drawn, questions["held-out wordings"]) if a]
    now, before = (sum_log_probabilities(m, renderer, own) for m in (model, reference))
    measured["kl"] = mean(a - b for a, b in zip(now, before))
    return measured


def choose(variants: dict[str, Any]) -> str:
    """Return the variant with most right answers in the half of the questions for that."""
    key = "right in the half for the choice"
    return max(variants, key=lambda name: sum(g[key] for g in variants[name]["groups"].values()))


def compare(data: Path, work: Path) -> dict[str, Any]:
    """Measure every variant that there is; returns their figures and some answers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(work / "sft", trust_remote_code=True)
    judge = AutoModelForSequenceClassification.from_pretrained(
        work / "reward", trust_remote_code=True
    )
    judge = judge.to(device).eval()
    reference = load_variant(work, "sft", device)
    questions = collect_questions(data)
    torch.manual_seed(SEED)
    variants = {
        name: measure_variant(
            load_variant(work, name, device), reference, judge, tokenizer, questions
        )
        for name in VARIANTS
    }
    said = {name: variants[name].pop("answers") for name in VARIANTS}
    asked = questions["held-out wordings"]
    shown = sorted(random.Random(SEED).sample(range(len(asked)), SHOWN))
    samples = [
        {"question": asked[i].query, "taught": asked[i].answer}
        | {name: said[name][i] for name in VARIANTS}
        for i in shown
    ]
    return {"variants": variants, "choice": choose(variants), "samples": samples}


def main() -> None:
    """Write `comparison.json`."""
    parser = argparse.ArgumentParser(description="Compare the aligned variants of the small model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.sources")
    parser.add_argument("--work", type=Path, required=True, help="folder of recipes.mini.align")
    args = parser.parse_args()
    text = json.dumps(compare(args.data, args.work), ensure_ascii=False, indent=1)
    (args.work / "comparison.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
