"""Run by torchrun on two or three CPU processes: what `tp_plan="auto"` makes of a model folder.

Each process writes a JSON file of what it found, or of its errors, and leaves when all have
written. None of them talks to another at the end, or leaves while another may still want to: what
gloo's threads make of a peer that is gone can abort a process whose work is done.
"""

import datetime
import faulthandler
import json
import os
import sys
import time
import traceback
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


TIMEOUT = 120  # seconds: of one exchange between processes, and of the wait for the last report


def wait_for_all(folder: Path, processes: int) -> None:
    """Return when every process has written its report, or after a time."""
    end = time.monotonic() + TIMEOUT
    while len(list(folder.glob("*.json"))) < processes and time.monotonic() < end:
        time.sleep(0.01)


def main(folder: str, jobs: str) -> None:
    warnings.filterwarnings("ignore", "Passing `tp_plan`")
    reports = []
    for model, options in json.loads(jobs):
        try:
            reports.append(compare(model, options))
        except Exception as error:
            reports.append({"error": type(error).__name__, "message": str(error)})
    part = Path(folder, f"{dist.get_rank()}.part")
    part.write_text(json.dumps(reports))
    part.rename(part.with_suffix(".json"))  # is whole as soon as it is there
    wait_for_all(part.parent, dist.get_world_size())


def leave(code: int) -> None:
    """End without torch's own end of a process group, which may abort, whatever has happened."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    faulthandler.enable()  # an abort says where
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
