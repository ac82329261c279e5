"""Owns `chatglm publish`: the files of a model folder go to a repository on the Hugging Face Hub.

    chatglm publish ../chatglm-6b-int4 --repo you/chatglm-6b-int4 --dry-run
    chatglm publish ../chatglm-6b-int4 --repo you/chatglm-6b-int4 --private

Does not know which files these are (`contents`) nor what would be wrong with them (`checks`). Who
publishes is huggingface_hub's business: `hf auth login`, or HF_TOKEN.
"""

import argparse
import sys
from typing import Any

from chatglm import __version__
from chatglm.cli import BAD_INPUT, open_parser, run_command
from chatglm.publishing.contents import Contents, list_contents

DESCRIPTION = """\
Put a model or adapter folder on the Hugging Face Hub: configurations, vocabulary, weights, the
Python files that the model imports, presets, licences and the card. Nothing else of the folder is
sent. Log in first, once: hf auth login."""


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm publish`, as a command of its own or of `subparsers`."""
    parser = open_parser(subparsers, "publish", DESCRIPTION)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the model or adapter folder")
    repo = "on the Hub, yours if no OWNER is named; it is made if it is not there"
    add("--repo", metavar="OWNER/NAME", required=True, help=repo)
    add("--private", action="store_true", help="let nobody else see it")
    add("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    add("--message", metavar="TEXT", help="of the commit")
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """List a folder, and send it unless there is a problem or nothing is to be sent.

    Args:
        args: what `make_parser` parsed.

    Returns:
        0, or 2 if a problem keeps it from being published.

    Raises:
        ValueError: for something that is no folder or no name of a repository, or if the Hub does
            not take it.
    """
    from huggingface_hub.utils import validate_repo_id

    from chatglm.publishing.checks import find_problems, list_remarks

    validate_repo_id(args.repo)
    contents = list_contents(args.folder)
    sys.stdout.write(format_contents(contents))
    problems = find_problems(contents)
    if problems:
        sys.stderr.write("".join(f"chatglm: {problem}\n" for problem in problems))
        return BAD_INPUT
    for remark in list_remarks(contents):
        sys.stdout.write(f"remark: {remark}\n")
    if args.dry_run:
        sys.stdout.write(f"{args.repo}: nothing was sent (--dry-run)\n")
        return 0
    from chatglm.publishing.sending import send

    message = args.message or f"Publish {contents.folder.name} with chatglm {__version__}"
    sys.stdout.write(f"{send(contents, args.repo, args.private, message)}\n")
    return 0


def format_contents(contents: Contents) -> str:
    """Return the list of what is sent and what is not, for people."""
    sizes = [(contents.folder / name).stat().st_size for name in contents.kept]
    sent = [f"{size:>16,}  {name}\n" for size, name in zip(sizes, contents.kept)]
    total = f"{sum(sizes):>16,}  bytes in {len(sizes)} files\n"
    stays = [f"  {name}  ({reason})\n" for name, reason in contents.left_out.items()]
    return "".join([*sent, total, *(["left out:\n"] if stays else []), *stays])


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
