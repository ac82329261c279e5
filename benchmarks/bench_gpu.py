"""What a decoding step takes on an NVIDIA GPU: one, 8 and 32 rows, float16 and INT4.

    python -m benchmarks.bench_gpu [--rows 1 8 32] [--layers 28] [--tokens 64] [--rounds 3]

Without a GPU it prints this and the other command to run on one, and ends with exit code 2.

A model of the 6B shape with random weights decodes `--tokens` tokens greedily behind a prompt of 64
in every row, and one token alone; the difference, per step, is the time of a step. "growing" is
`generate` as it is, "static" with `cache_implementation="static"`, where transformers compiles a
step and captures it into a CUDA graph: INT4 is worth its while if its captured step beats that of
float16 at every number of rows. Formats and ways alternate within a round, medians are printed.
The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks.full_size import PRESET, load_class

PROMPT = 64
FORMATS = {"float16": None, "INT4": 4}
WAYS: dict[str, dict[str, Any]] = {"growing": {}, "static": {"cache_implementation": "static"}}
COMMANDS = """There is no CUDA device here. On a machine with one, from this folder:
  python -m pytest tests/gpu        what the kernels compute, and their bandwidth
  python -m benchmarks.bench_gpu    a step of 1, 8 and 32 rows, float16 and INT4, captured"""


def make_model(bits: int | None, device: str, **sizes: Any) -> Any:
    """Return a model of random weights, the same ones for every format."""
    fields = json.loads((PRESET / "config.json").read_text(encoding="utf-8")) | sizes
    config = load_class("configuration_chatglm.ChatGLMConfig").from_dict(fields)
    model_class = load_class("modeling_chatglm.ChatGLMForConditionalGeneration")
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config, dtype=torch.float16).eval()
    return model if bits is None else model.quantize(bits)


def make_prompt(model: Any, rows: int) -> torch.Tensor:
    """Return `(rows, 64)` ids of a prompt, which ends as every prompt does."""
    config = model.config
    ids = torch.randint(10, 1000, (rows, PROMPT), device=model.device)
    ids[:, -2], ids[:, -1] = config.gmask_token_id, config.bos_token_id
    return ids


def time_tokens(model: Any, ids: torch.Tensor, tokens: int, way: dict[str, Any]) -> float:
    """Return the seconds that it takes to read a prompt and decode some tokens."""
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **way)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(models: dict[str, Any], rows: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Return the milliseconds of a step by format and way, medians of interleaved rounds."""
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            ids = make_prompt(model, rows)
            for kind, way in WAYS.items():
                long, short = (time_tokens(model, ids, count, way) for count in (tokens, 1))
                if number:  # the first round compiles, builds and captures
                    step = 1000 * (long - short) / (tokens - 1)
                    found.setdefault((name, kind), []).append(step)
    return [
        {"weights": name, "cache": kind, "rows": rows, "ms": statistics.median(steps)}
        for (name, kind), steps in found.items()
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A decoding step on an NVIDIA GPU.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args(arguments)


def run(settings: argparse.Namespace, device: str, **sizes: Any) -> list[dict[str, Any]]:
    """Measure every number of rows, printing each line when it is known."""
    models = {name: make_model(bits, device, **sizes) for name, bits in FORMATS.items()}
    lines = []
    for rows in settings.rows:
        for line in measure(models, rows, settings.tokens, settings.rounds):
            rate = 1000 * rows / line["ms"]
            print(f"{rows:3} rows, {line['weights']:8} {line['cache']:8}", end="")
            print(f"{line['ms']:9.2f} ms a step, {rate:8.1f} tokens/s", flush=True)
            lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or say what to run where there is a GPU."""
    settings = parse(arguments)
    if not torch.cuda.is_available():
        print(COMMANDS)
        return 2
    lines = run(settings, "cuda", num_layers=settings.layers)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    gpu = torch.cuda.get_device_name()
    print(json.dumps({"gpu": gpu, **versions, "layers": settings.layers, "steps": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
