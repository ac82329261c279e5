"""What each format of packed weights costs: perplexity, size, and time on the torch path.

    python -m benchmarks.bench_formats [--data DIR] [--threads N] [--write]

Perplexity is that of the answers to held-out questions, per token, by the model of this repository:
in untaught wordings of its own dialogues ("own"), and with `--data` (the folder of
`recipes.mini.sources`) also of the fetched sources that it was trained on to the end ("fetched").
The difference is the mean, over the questions, of what a format adds to an answer's loss per token,
with its standard error: one and the same questions are asked of every format.

Sizes are bytes of the stored tensors, those of the 6B model computed on the meta device. Times are
of one block's four matrix products at the sizes of the 6B model, one row as in decoding, float32
activations; `relative` is the median over rounds of the ratio to float32 weights timed in the same
round. They are the torch path's, which unpacks a matrix and multiplies: the fallback that works
everywhere, and not a kernel.

The last line is one JSON document; `--write` puts the table into docs/quantization.md.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from recipes.mini.corpus import PHASES, ROOT, Example, Sampler, load_dialogues, split_dialogues
from recipes.mini.evaluation import encode_questions, pick_untaught, sum_losses

PAGE = ROOT / "docs" / "quantization.md"
MARKS = ("<!-- formats:begin -->", "<!-- formats:end -->")
FORMATS: tuple[dict[str, Any], ...] = (
    {},
    {"bits": 8},
    {"bits": 8, "group_size": 128},
    {"bits": 8, "group_size": 32},
    {"bits": 8, "embeddings": True},
    {"bits": 4},
    {"bits": 4, "group_size": 128},
    {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "embeddings": True},
    {"bits": 4, "group_size": 32, "embeddings": True},
)
ROUNDS = 5
HIDDEN, INNER = 4096, 16384
BLOCK_SIZES = ((HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN))


def name_format(options: dict[str, Any]) -> str:
    """Return what a table calls a format."""
    if not options:
        return "not packed"
    group = f", groups of {options['group_size']}" if "group_size" in options else ""
    return f"INT{options['bits']}{group}{' + embeddings' if options.get('embeddings') else ''}"


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors, tied ones once."""
    return sum(tensor.nbytes for tensor in model.parameters())


def load_own_model() -> Any:
    """Load the model of this repository in its stored float16."""
    return AutoModelForCausalLM.from_pretrained(
        ROOT, trust_remote_code=True, dtype=torch.float16
    ).eval()


def draw_examples(model: Any, data: Path | None) -> dict[str, list[Example]]:
    """Return the held-out questions, as ids, of our own dialogues and of fetched sources."""
    seen, held_out = split_dialogues(load_dialogues(data))
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    sampler = Sampler(seen, tokenizer, model.build_prompt)
    untaught = pick_untaught(seen, held_out)
    own = [question for question in untaught if question.source == "seeds"]
    kept = PHASES[-1].shares.keys() - {"seeds"}
    fetched = [question for question in untaught if question.source in kept]
    parts = {"own": own, "fetched": fetched}
    return {name: encode_questions(part, sampler) for name, part in parts.items() if part}


def measure_answers(model: Any, examples: Sequence[Example]) -> list[float]:
    """Return each answer's loss per token, in nats."""
    pad_id = model.config.pad_token_id
    return [sum_losses(model, [e], pad_id) / len(e.answer_ids) for e in examples]


def compare(losses: list[float], plain: list[float], examples: list[Example]) -> dict[str, float]:
    """Return the perplexity per token and what was added to the plain model's losses."""
    tokens = [len(example.answer_ids) for example in examples]
    total = sum(loss * count for loss, count in zip(losses, tokens))
    added = [loss - other for loss, other in zip(losses, plain)]
    return {
        "perplexity": math.exp(total / sum(tokens)),
        "added": statistics.fmean(added),
        "error": statistics.stdev(added) / math.sqrt(len(added)),
    }


def measure_quality(data: Path | None) -> list[dict[str, Any]]:
    """Return the size of our model in each format, and the perplexity of its answers."""
    model = load_own_model()
    parts = draw_examples(model, data)
    plain: dict[str, list[float]] = {}
    rows = []
    for options in FORMATS:
        packed = copy.deepcopy(model)
        packed = packed.quantize(**options) if options else packed
        row: dict[str, Any] = {"name": name_format(options), "own_bytes": count_bytes(packed)}
        packed.float()
        for part, examples in parts.items():
            losses = measure_answers(packed, examples)
            row[part] = compare(losses, plain.setdefault(part, losses), examples)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def load_class(reference: str) -> Any:
    """Return a class of the model files, as transformers loads them."""
    return get_class_from_dynamic_module(reference, str(ROOT))


def count_full_bytes(options: dict[str, Any]) -> int:
    """Return the bytes of the 6B model's tensors in a format."""
    preset = json.loads(
        (ROOT / "chatglm" / "presets" / "chatglm-6b" / "config.json").read_text("utf-8")
    )
    model_class = load_class("modeling_chatglm.ChatGLMForConditionalGeneration")
    config = load_class("configuration_chatglm.ChatGLMConfig").from_dict(preset)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.float16)
        model.tie_weights()
        if options:
            model.quantize(empty_init=True, **options)
    return count_bytes(model)


def build_products(options: dict[str, Any]) -> Callable[[], Tensor]:
    """Return a call that does one block's four products for one row, at full size."""
    packed_type = load_class("quantization.QuantizedLinear")
    layers: list[nn.Module] = [nn.Linear(i, o) for i, o in BLOCK_SIZES]
    if options:
        bits, group = options["bits"], options.get("group_size")
        layers = [packed_type.from_linear(layer, bits, group_size=group) for layer in layers]
    rows = [torch.randn(1, i) for i, _ in BLOCK_SIZES]

    @torch.no_grad()
    def multiply() -> Tensor:
        return [layer.float()(row) for layer, row in zip(layers, rows)][-1]

    return multiply


def measure_times() -> dict[str, dict[str, float]]:
    """Time the products of every block format, interleaved, and relate them to float32."""
    formats = [options for options in FORMATS if not options.get("embeddings")]
    calls = {name_format(options): build_products(options) for options in formats}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):  # the first round warms up
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    plain = times[name_format({})][1:]
    return {
        name: {
            "milliseconds": 1000 * statistics.median(measured[1:]),
            "relative": statistics.median(a / b for a, b in zip(measured[1:], plain)),
        }
        for name, measured in times.items()
    }


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def format_row(row: dict[str, Any], parts: Sequence[str]) -> str:
    """Return a line of the table."""
    cells = [row["name"], f"{row['own_bytes'] / 1e6:.1f} MB", f"{row['full_bytes'] / 1e9:.2f} GB"]
    for part in parts:
        measured = row[part]
        cells.append(f"{measured['perplexity']:.3f}")
        cells.append(f"{measured['added']:+.4f} ± {measured['error']:.4f}")
    speed = row.get("speed")
    cells.append(f"{speed['milliseconds']:.0f} ms, {speed['relative']:.2f}" if speed else "")
    return "| " + " | ".join(cells) + " |"


def format_table(report: dict[str, Any]) -> str:
    """Return the table and the line about the machine."""
    parts = [part for part in ("own", "fetched") if part in report["formats"][0]]
    head = ["format", "our model", "6B model"]
    head += [text for part in parts for text in (f"perplexity, {part}", "added nats per token")]
    head.append("a 6B block's products, times float32")
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, rule)]
    lines += [format_row(row, parts) for row in report["formats"]]
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    asked = ", ".join(f"{count} {part}" for part, count in report["questions"].items())
    return "\n".join([*lines, "", f"Questions: {asked}. Machine: {machine}."])


def main() -> None:
    """Measure, print the table and the JSON line, and write the table if asked to."""
    parser = argparse.ArgumentParser(description="What each format of packed weights costs.")
    parser.add_argument("--data", type=Path, help="folder of recipes.mini.sources")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="write the table to the docs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    rows, times = measure_quality(args.data), measure_times()
    for row, options in zip(rows, FORMATS):
        row["full_bytes"] = count_full_bytes(options)
        row["speed"] = times.get(row["name"])
    counts = {
        part: len(part_) for part, part_ in draw_examples(load_own_model(), args.data).items()
    }
    report = {"formats": rows, "questions": counts, "machine": describe_machine()}
    table = format_table(report)
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        page = f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}"
        PAGE.write_text(page, encoding="utf-8")
    print(table)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
