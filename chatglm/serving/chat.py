"""Owns `chatglm chat`: reads questions, streams the answers, remembers the rounds.

    chatglm chat ../chatglm-6b --bits 4
    chatglm chat --adapter out/sft_lora         # with its base, or FOLDER --adapter A B
    chatglm chat                                # in a clone: its small model
    echo 你好 | chatglm chat --greedy           # one answer a line of input, nothing else

Does not know how a prompt looks or how a token is chosen (the model does), nor how a folder becomes
a model (`chatglm.loading`).
"""

import argparse
import sys
import warnings
from collections.abc import Generator, Iterable
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chatglm.cli import (
    add_adapters,
    add_folder,
    choose_folder,
    leaving_at_once,
    open_parser,
    run_command,
)

WELCOME = """\
ChatGLM: {folder} ({device})
直接输入即可对话；clear 忘记之前的对话，stop 结束，Ctrl-C 打断回答。
Type to chat; "clear" forgets the rounds, "stop" ends, Ctrl-C ends an answer."""
QUESTION_LABEL = "\n用户 You: "
ANSWER_LABEL = "ChatGLM: "


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm chat`, as a command of its own or of `subparsers`."""
    description = "Chat in the terminal; through a pipe, answer every line of standard input."
    parser = open_parser(subparsers, "chat", description)
    add_folder(parser)
    add_adapters(parser)
    add = parser.add_argument
    add("--bits", type=int, choices=(4, 8), help="quantize the weights (default: as they are)")
    add("--device", metavar="D", help="cpu, cuda, cuda:N or mps (default: the best one here)")
    add("--dtype", metavar="D", help="float16, bfloat16 or float32 (default: the fitting one)")
    add("--max-length", type=_positive_int, metavar="N", help="tokens of prompt plus answer")
    add("--max-new-tokens", type=_positive_int, metavar="N", help="tokens of one answer")
    add(
        "--overflow",
        choices=("rounds", "summarize", "error"),
        default="rounds",
        help="beyond the window: the newest rounds that fit (default), a summary, or an error",
    )
    add("--top-p", type=_share, metavar="F", help="sample from this share of the probability")
    add("--temperature", type=_positive, metavar="F", help="below 1 bolder, above 1 more varied")
    add("--greedy", action="store_true", help="always the most probable token, no sampling")
    add("--seed", type=int, metavar="N", help="the same answers each time")
    parser.set_defaults(run=main)
    return parser


def main(args: argparse.Namespace) -> int:
    """Load the model and chat until the input ends.

    Args:
        args: what `make_parser` parsed.

    Raises:
        ValueError: if the model cannot be loaded, or a piped question cannot be answered.
    """
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise ValueError("standard input is closed, and questions come from there: pipe them in")
    with leaving_at_once():
        import transformers

        from chatglm.loading import load_model

        transformers.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            transformers.logging.disable_progress_bar()
        folder, adapters = choose_model(args)
        loading = (args.bits, args.device, args.dtype, args.verify, adapters)
        model, tokenizer = load_model(folder, *loading)
    if args.seed is not None:
        transformers.set_seed(args.seed)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    conversation = Conversation(model, tokenizer, _stream_options(args, model), is_interactive)
    if is_interactive:
        talk(conversation, WELCOME.format(folder=folder, device=model.device))
    else:
        answer_lines(conversation, sys.stdin)
    return 0


def choose_model(args: argparse.Namespace) -> tuple[str | Path, Any]:
    """Return the model folder that was asked for and its adapters, having said what is to be said.

    Args:
        args: with the options of `add_folder` and `add_adapters`.

    Raises:
        ValueError: if there is no such folder, or if the adapters are not for it.
    """
    from chatglm.adapters.kinds import announce, stack_adapters
    from chatglm.loading import check_model_folder, default_model_folder

    named = choose_folder(args.folder, args.model)
    if not args.adapter:
        return named or default_model_folder(), None
    stack = stack_adapters(
        args.adapter, check_model_folder(named) if named else None, args.any_base
    )
    announce(stack)
    return stack.base, stack


@dataclass
class Conversation:
    """The rounds so far, and the model that continues them.

    Args:
        model: has `stream_chat(tokenizer, query, history, **options)`, which yields the answer so
            far with the new history.
        tokenizer: the model's.
        options: for `stream_chat`; `max_length` is the window of prompt plus answer, in tokens.
        is_interactive: whether a person sits at a terminal on both ends.
        history: the rounds, (question, answer), oldest first.
    """

    model: Any
    tokenizer: Any
    options: dict[str, Any]
    is_interactive: bool = False
    history: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def take(self, line: str) -> bool:
        """Do what a line of input asks for; False once it asks to stop.

        Raises:
            ValueError: if the model refuses the question; the rounds stay as they were.
        """
        word = line.strip()
        if word == "stop":
            return False
        if word == "clear":
            self.history = []
        elif word:
            self.history = self._answer(line)
        return True

    def _answer(self, query: str) -> list[tuple[str, str]]:
        """Stream one answer, return the rounds with it; Ctrl-C ends it and keeps what was said."""
        from torch import OutOfMemoryError

        history = self.history
        printer = AnswerPrinter(ANSWER_LABEL if self.is_interactive else "")
        try:
            with lines_of_warnings():
                talk = partial(self.model.stream_chat, self.tokenizer, query, history)
                with suppress(KeyboardInterrupt), closing(talk(**self.options)) as stream:
                    for text, rounds in stream:
                        printer.show(text)
                        history = rounds
                printer.finish()
        except OutOfMemoryError as error:
            printer.break_off()
            raise ValueError(
                "out of memory: forget the rounds with clear, or load --bits 4"
            ) from error
        except ValueError:
            printer.break_off()
            raise
        return history


@contextmanager
def lines_of_warnings() -> Generator[None, None, None]:
    """Print warnings as lines of the command, and behind the answer that they are about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            yield
        finally:
            for warning in caught:
                left_out = getattr(warning.message, "left_out", 0)
                chinese = f"对话超出窗口，略去最早 {left_out} 轮 / " if left_out else ""
                print(f"chatglm: {chinese}{warning.message}", file=sys.stderr)


class AnswerPrinter:
    """Prints a growing answer, each character once."""

    def __init__(self, label: str = "") -> None:
        """Print `label` before the first character."""
        self._label = label
        self._text = ""
        self._shown = ""
        self._has_begun = False

    def show(self, text: str) -> None:
        """Print what is new of the answer so far; `stream_chat` withdraws nothing."""
        self._text = text
        if text.startswith(self._shown):
            self._print(text)

    def finish(self) -> None:
        """End the line; the whole text again if a folder's own code has withdrawn a part."""
        if not self._text.startswith(self._shown):
            self._print(self._shown + "\n")
            self._shown = ""
        self._print(self._text)
        print(flush=True)

    def break_off(self) -> None:
        """End a line that an error cuts off."""
        if self._has_begun:
            print(flush=True)

    def _print(self, text: str) -> None:
        """Print what `text` adds to what was printed."""
        addition = self._label + text[len(self._shown) :]
        print(addition, end="", flush=True)
        self._has_begun = self._has_begun or bool(addition)
        self._label = ""
        self._shown = text


def talk(conversation: Conversation, welcome: str) -> None:
    """Chat with the person at the terminal, who may edit lines and recall earlier ones."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.shortcuts import clear

    session: PromptSession[str] = PromptSession(QUESTION_LABEL)
    print(welcome)
    while True:
        try:
            line = session.prompt()
            if not conversation.take(line):
                return
            if line.strip() == "clear":
                clear()
                print(welcome)
        except KeyboardInterrupt:  # at the prompt: the line is dropped, as a shell does
            continue
        except EOFError:
            return
        except ValueError as error:
            print(f"chatglm: {error}", file=sys.stderr)


def answer_lines(conversation: Conversation, lines: Iterable[str]) -> None:
    """Answer every line that is not empty, until they end or one says stop."""
    try:
        for line in lines:
            if not conversation.take(line.rstrip("\n")):
                return
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from error


def _stream_options(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What `stream_chat` is told: the options given; for the others the model's defaults hold."""
    options: dict[str, Any] = {"max_length": args.max_length or model.config.max_sequence_length}
    options["overflow"] = args.overflow
    for name in ("max_new_tokens", "top_p", "temperature"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.greedy:
        options["do_sample"] = False
    return options


def _positive_int(text: str) -> int:
    """Parse a count of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _positive(text: str) -> float:
    """Parse a number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


def _share(text: str) -> float:
    """Parse a number above 0 and up to 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return float(text)


if __name__ == "__main__":
    sys.exit(run_command(main, make_parser().parse_args()))
