"""Owns `chatglm quantize`: a model folder in, a smaller one with 4-bit or 8-bit weights out.

    chatglm quantize ../chatglm-6b ../chatglm-6b-int4 --bits 4
    chatglm quantize ../chatglm-6b ../mine --bits 8 --lora ../adapter --group-size 128

Does not know what is computed and written (`conversion`); what it prints is the outcome.
"""

import argparse
import sys
from typing import Any

from chatglm.cli import open_parser, run_command
from chatglm.converting.command import add_folders, add_lora, choose_source, run_conversion

DESCRIPTION = """\
Write a model folder with quantized weights, shard by shard: a few GB of memory are enough for the
6B models. DST is complete and appears only when it is; run a command that was stopped again, and it
goes on where it was."""


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm quantize`, as a command of its own or of `subparsers`."""
    parser = open_parser(subparsers, "quantize", DESCRIPTION)
    add_folders(parser)
    add = parser.add_argument
    add("--bits", type=int, choices=(4, 8), required=True, help="of a quantized weight")
    sizes = "columns that share a scale (default: whole rows, the official format)"
    add("--group-size", type=int, choices=(32, 64, 128), help=sizes)
    add("--embeddings", action="store_true", help="quantize the embedding and the head too")
    add_lora(parser)
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Make the quantized folder and say how large it is.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: if the folders, the weights or the adapter are not such as can be quantized.
    """
    from chatglm.converting.conversion import PackedFormat, quantize_checkpoint

    source = choose_source(args)
    packed_format = PackedFormat(args.bits, args.group_size, args.embeddings)
    size = run_conversion(
        lambda: quantize_checkpoint(
            source, args.target, packed_format, args.lora, any_base=args.any_base
        ),
        args.target,
    )
    sys.stdout.write(f"{args.target}: {args.bits} bits, {size}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
