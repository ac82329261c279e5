"""Owns `chatglm bench`: how fast a model folder reads prompts and gives tokens on this machine.

    chatglm bench                                  # the model of this repository
    chatglm bench ../chatglm-6b --bits 4 --threads 4
    chatglm bench ../chatglm-6b-int4 --prompt-length 512 --batch 8 --json
    chatglm bench --train lora --length 256 --batch 4

`--batch` measures `generate` on prompts of one length, whose answers nothing ends: padded batches
are at their best there, as no row waits for another (`benchmarks.bench_rollouts`).

Does not know how the phases are timed (`measuring`), what a training step is (`training`), nor how
a folder becomes a model (`chatglm.loading`).
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from chatglm.cli import add_folder, choose_folder, open_parser, run_command

DESCRIPTION = """\
Measure a model on this machine: reading a prompt, giving tokens, memory; or a training step of it.
Prompts and rows are random; speed does not depend on the words. Let nothing else run meanwhile."""
# The ways to train that can be measured.
METHODS = ("full", "lora", "qlora")
# The prompt is read and answered so many times; the first round, which warms up, is not counted.
ROUNDS = 3


@dataclass
class Report:
    """What was measured.

    Attributes:
        model: the folder.
        bits: of its packed weights; 0 for plain ones.
        device, dtype, threads: what it computed on and in.
        prompt_length, new_tokens, batch_size: what it had to do.
        load_seconds: of loading.
        prefill_seconds: from the prompts to the first tokens, the middle of the rounds.
        token_seconds: of a decoding step, the middle of all.
        step_bytes: weights, keys and values that a step reads, on average.
        peak_bytes: the most memory that was in use on the device, or by the process on a CPU; 0
            where the system does not tell.
        versions: of what it ran on.
    """

    model: str
    bits: int
    device: str
    dtype: str
    threads: int
    prompt_length: int
    new_tokens: int
    batch_size: int
    load_seconds: float
    prefill_seconds: float
    token_seconds: float
    step_bytes: int
    peak_bytes: int
    versions: dict[str, str]

    @property
    def figures(self) -> dict[str, float]:
        """What follows from the seconds and the bytes: rates of prompts, tokens and reading."""
        return {
            "prefill_tokens_per_second": (
                self.batch_size * self.prompt_length / self.prefill_seconds
            ),
            "milliseconds_per_token": 1000 * self.token_seconds,
            "tokens_per_second": self.batch_size / self.token_seconds,
            "gigabytes_per_second": self.step_bytes / self.token_seconds / 1e9,
        }


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm bench`, as a command of its own or of `subparsers`."""
    parser = open_parser(subparsers, "bench", DESCRIPTION)
    add_folder(parser)
    add = parser.add_argument
    add("--bits", type=int, choices=(4, 8), help="quantize the weights (default: as they are)")
    add("--device", metavar="D", help="cpu, cuda, cuda:N or mps (default: the best one here)")
    add("--dtype", metavar="D", help="float16, bfloat16 or float32 (default: the fitting one)")
    add("--threads", type=_positive_int, metavar="N", help="of the CPU (default: torch's choice)")
    add("--prompt-length", type=_positive_int, metavar="N", default=64, help="tokens (64)")
    add("--new-tokens", type=_positive_int, metavar="N", default=32, help="tokens (32)")
    add("--batch", type=_positive_int, metavar="N", default=1, help="prompts or rows at once (1)")
    add("--train", choices=METHODS, help="measure training steps instead: of what")
    add("--length", type=_positive_int, metavar="N", default=512, help="tokens of a row (512)")
    add("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Load the model, measure it and print the figures.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: if the model cannot be loaded or trained, or the prompt is too short.
    """
    import transformers

    from chatglm.benching import training
    from chatglm.loading import check_model_folder, default_model_folder

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.verify:  # not within the seconds of loading
        check_model_folder(
            choose_folder(args.folder, args.model) or default_model_folder(), verify=True
        )
    report = training.measure(args) if args.train else measure(args)
    if args.json:
        sys.stdout.write(json.dumps(asdict(report) | report.figures, ensure_ascii=False) + "\n")
    elif isinstance(report, Report):
        sys.stdout.write(format_report(report))
    else:
        sys.stdout.write(training.format_report(report))
    return 0


def measure(args: argparse.Namespace) -> Report:
    """Load the model of the options and measure it.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: as `main`.
    """
    import torch

    from chatglm.loading import default_model_folder, load_model

    if args.threads:
        torch.set_num_threads(args.threads)
    folder = choose_folder(args.folder, args.model) or default_model_folder()
    began = time.perf_counter()
    model, _ = load_model(folder, args.bits, args.device, args.dtype)
    load_seconds = time.perf_counter() - began
    return measure_model(model, str(folder), load_seconds, args)


def time_rounds(model: Any, args: argparse.Namespace) -> list[list[float]]:
    """Return the seconds of each token of each round that counts; the first is the prompt's."""
    from chatglm.benching.measuring import draw_prompt, never_end, time_answer

    never_end(model)
    prompt = draw_prompt(model, args.prompt_length, args.batch)
    # One token more than is timed: the first one is the prompt's.
    return [time_answer(model, prompt, args.new_tokens + 1) for _ in range(ROUNDS)][1:]


def measure_model(model: Any, folder: str, load_seconds: float, args: argparse.Namespace) -> Report:
    """Measure a model that is loaded.

    Args:
        model: that was loaded.
        folder: that it came from.
        load_seconds: that this took.
        args: what `make_parser` parsed.

    Raises:
        ValueError: if the prompt is too short.
    """
    import torch

    from chatglm.benching.measuring import (
        count_position_bytes,
        count_step_bytes,
        list_versions,
        read_device_peak,
    )

    step_bytes = count_step_bytes(model)
    rounds = time_rounds(model, args)
    position_bytes = args.batch * count_position_bytes(model)
    return Report(
        model=folder,
        bits=model.config.quantization_bit,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        prompt_length=args.prompt_length,
        new_tokens=args.new_tokens,
        batch_size=args.batch,
        load_seconds=load_seconds,
        prefill_seconds=statistics.median(seconds[0] for seconds in rounds),
        token_seconds=statistics.median(s for seconds in rounds for s in seconds[1:]),
        step_bytes=step_bytes + position_bytes * (args.prompt_length + args.new_tokens // 2),
        peak_bytes=read_device_peak(model.device),
        versions=list_versions(),
    )


def format_report(report: Report) -> str:
    """The report as lines for people."""
    figures = report.figures
    weights = f"{report.bits} bits" if report.bits else "plain weights"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    place = f"{report.device}, {report.dtype}, threads: {report.threads}"
    batch = f", {report.batch_size} at once" if report.batch_size > 1 else ""
    peak = f", peak memory {report.peak_bytes / 1e9:.2f} GB" if report.peak_bytes else ""
    return (
        f"{report.model} ({weights}; {place})\n"
        f"load     {report.load_seconds:.2f} s{peak}\n"
        f"prefill  {figures['prefill_tokens_per_second']:.1f} tokens/s "
        f"({report.prompt_length} tokens{batch})\n"
        f"decode   {figures['milliseconds_per_token']:.2f} ms/token, "
        f"{figures['tokens_per_second']:.1f} tokens/s, "
        f"{figures['gigabytes_per_second']:.1f} GB/s ({report.new_tokens} tokens{batch})\n"
        f"{versions}\n"
    )


def _positive_int(text: str) -> int:
    """A whole number above 0; argparse reports any other in its own words."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
