"""Run by torchrun on two or three CPU processes: what `tp_plan="auto"` makes of a model folder.

Writes a JSON file of what the first process found, or of the errors of all of them.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModel, AutoTokenizer

SHORT = {"max_new_tokens": 6, "do_sample": False}


def compare(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load a folder in parts and as a whole, and say how far apart they are."""
    trust: dict[str, Any] = {"trust_remote_code": True, **options}
    parts = AutoModel.from_pretrained(folder, tp_plan="auto", **trust).eval()
    whole = AutoModel.from_pretrained(folder, **trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(["hello", "what is 3 + 4?"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = parts(**ids).logits, whole(**ids).logits
    cut = [name for name, p in parts.named_parameters() if isinstance(p, DTensor)]
    try:
        parts.quantize(4)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {
        "difference": (found - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
        "cut": cut,
        "answers": [model.chat(tokenizer, "hello", **SHORT)[0] for model in (parts, whole)],
        "quantize": refusal,
    }


def main(file: str, jobs: str) -> None:
    warnings.filterwarnings("ignore", "Passing `tp_plan`")
    reports = []
    for folder, options in json.loads(jobs):
        try:
            reports.append(compare(folder, options))
        except Exception as error:
            reports.append({"error": type(error).__name__, "message": str(error)})
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, reports)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(gathered))
    dist.barrier()
    # What torch keeps of a process group may abort a process at its end, when all is done.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(*sys.argv[1:])
