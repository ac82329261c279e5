"""The fine-tuned model's own wrong answers, as the worse halves of pairs.

    python -m recipes.mini.own --model FOLDER --prompts FILE --out FILE [--count N]

Every question is answered once by sampling; an answer that is not the taught one, to the letter, is
the worse one. Questions answered rightly teach nothing here and are left out.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.data.dialects import read_prompts
from chatglm.data.files import RecordFiles
from chatglm.training.data.batches import pad_rows
from chatglm.training.data.rendering import Renderer
from recipes.mini.preferences import write_rows

SEED = 20261124
BATCH_SIZE = 256
MAX_NEW_TOKENS = 96
MAX_LENGTH = 384


@torch.no_grad()
def sample_answers(
    model: Any, tokenizer: Any, records: Sequence[Any], **options: Any
) -> Iterator[tuple[str, bool]]:
    """Yield an answer to each question, and whether it ended by itself.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        records: the questions.
        options: for `generate`; samples from the whole distribution by default.
    """
    renderer = Renderer(model, tokenizer, MAX_LENGTH, "cut")
    if options.get("do_sample", True):
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} | options
    for start in range(0, len(records), BATCH_SIZE):
        part = [records[i] for i in range(start, min(start + BATCH_SIZE, len(records)))]
        rows = [renderer.render_prompt(record, MAX_NEW_TOKENS) or [] for record in part]
        input_ids, mask = pad_rows(rows, renderer.pad_id, side="left")
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            **options,
        )
        for ids in output[:, input_ids.shape[1] :].tolist():
            has_stopped = renderer.end_id in ids
            kept = ids[: ids.index(renderer.end_id)] if has_stopped else ids
            yield tokenizer.decode(kept).strip(), has_stopped


def is_right(answer: str, reference: str, tokenizer: Any) -> bool:
    """Tell whether an answer is the taught one, as the vocabulary can write it."""
    ids = tokenizer(reference, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    return answer == tokenizer.decode(ids).strip()


def find_wrong(model: Any, tokenizer: Any, records: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield pairs of the taught answer and a wrong one of the model's own."""
    for record, (answer, _) in zip(records, sample_answers(model, tokenizer, records)):
        if answer and not is_right(answer, record.answer, tokenizer):
            yield {
                "prompt": record.query,
                "history": [list(pair) for pair in record.history],
                **({"system": record.system} if record.system else {}),
                "chosen": record.answer,
                "rejected": answer,
                "kind": "own",
            }


def main() -> None:
    """Write the pairs."""
    parser = argparse.ArgumentParser(description="Collect a model's own wrong answers.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the fine-tuned model")
    parser.add_argument("--prompts", type=Path, required=True, help="questions with answers")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--count", type=int, default=12_000, help="questions to ask (12000)")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
    records = RecordFiles([str(args.prompts)], read_prompts)[: args.count]
    number = write_rows(args.out, find_wrong(model.to(device).eval(), tokenizer, records))
    print(json.dumps({"asked": len(records), "wrong": number}))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
