"""Owns `chatglm merge`: a model folder and LoRA adapters in, a whole model folder out.

    chatglm merge ../chatglm-6b ../mine --lora ../adapter
    chatglm merge ../mine --lora ../sft ../ppo         # onto the base of the first, in this order
    chatglm merge ../chatglm-6b ../mine --lora ../adapter --format bin --dtype float16

Does not know what is computed and written (`conversion`); what it prints is the outcome.
"""

import argparse
import sys
from typing import Any

from chatglm.cli import open_parser, run_command
from chatglm.converting.command import add_folders, add_lora, choose_source, run_conversion

DESCRIPTION = """\
Write a model folder whose weights have LoRA adapters in them, under the official names, shard by
shard: a few GB of memory are enough for the 6B models. Without SRC it is the base that the first
adapter was trained on; another base than that of an adapter is refused. DST is complete and appears
only when it is; run a command that was stopped again, and it goes on where it was."""


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm merge`, as a command of its own or of `subparsers`."""
    parser = open_parser(subparsers, "merge", DESCRIPTION)
    add_folders(parser)
    add_lora(parser, is_required=True)
    add = parser.add_argument
    kinds = "of the weight files: bin is the official layout (default: safetensors)"
    add("--format", choices=("safetensors", "bin"), default="safetensors", help=kinds)
    dtypes = "of the new weights; norms in float32 stay so (default: that of the old ones)"
    add("--dtype", choices=("float32", "float16", "bfloat16"), help=dtypes)
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Make the merged folder and say how large it is.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: if the folders, the weights or the adapter are not such as can be merged.
    """
    from chatglm.converting.conversion import merge_checkpoint
    from chatglm.loading import DTYPES

    source = choose_source(args)
    dtype = DTYPES.get(args.dtype)
    size = run_conversion(
        lambda: merge_checkpoint(
            source, args.target, args.lora, dtype, args.format, any_base=args.any_base
        ),
        args.target,
    )
    sys.stdout.write(f"{args.target}: merged, {size}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
