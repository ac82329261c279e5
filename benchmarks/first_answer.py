"""A fresh process that loads a model folder as the command line does, and answers.

    python -m benchmarks.first_answer FOLDER --began SECONDS [--dtype D] [--threads N] [--context N]
        [--alone]

Prints one JSON line: the seconds from `--began` (`time.monotonic` of whoever started it) until the
model was loaded, until the first token of an answer was decoded to text and until all was done,
the most memory that was resident then, and the bytes of the weights and of a position's keys and
values. With `--context` it goes on to a prompt that long and some
tokens behind it, as the memory of a long chat needs.
"""

import argparse
import json
import os
import time
from pathlib import Path

QUESTION = "你好，请介绍一下你自己。"
TOKENS_BEHIND = 16


def main() -> None:
    """Load, answer, and tell how long it took."""
    parser = argparse.ArgumentParser(description="Time to the first answer of a fresh process.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--began", type=float, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    # Imported here: what the imports take belongs to the answer's time.
    import torch
    import transformers

    from benchmarks.full_size import leave_engine_out
    from chatglm.benching.measuring import (
        count_position_bytes,
        draw_prompt,
        never_end,
        time_answer,
    )
    from chatglm.loading import load_model
    from chatglm.process_memory import read_peak

    if args.alone:
        leave_engine_out()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(args.folder, device="cpu", dtype=args.dtype)
    loaded = time.monotonic() - args.began
    # Counted before a pass: kernels may keep weights in other forms.
    weights = sum(parameter.nbytes for parameter in model.parameters())
    inputs = tokenizer(model.build_prompt(QUESTION), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    answered = time.monotonic() - args.began
    if args.context:
        never_end(model)
        prompt = draw_prompt(model, args.context - TOKENS_BEHIND)
        time_answer(model, prompt, TOKENS_BEHIND)
    said = {"loaded": loaded, "answered": answered, "peak": read_peak()}
    said["weights"] = weights
    said["position"] = count_position_bytes(model)
    print(json.dumps({**said, "done": time.monotonic() - args.began}))


if __name__ == "__main__":
    main()
