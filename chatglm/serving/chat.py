"""Owns `chatglm chat`: reads questions, streams the answers, remembers the rounds.

    chatglm chat ../chatglm-6b --bits 4
    chatglm chat                                # in a clone: its small model
    echo 你好 | chatglm chat --greedy           # one answer a line of input, nothing else

Does not know how a prompt looks or how a token is chosen (the model does), nor how a folder becomes
a model (`chatglm.loading`).
"""

import argparse
import re
import sys
import warnings
from collections.abc import Generator, Iterable
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from chatglm.cli import add_folder, choose_folder, open_parser, run_command

WELCOME = """\
ChatGLM: {folder} ({device})
直接输入即可对话；clear 忘记之前的对话，stop 结束，Ctrl-C 打断回答。
Type to chat; "clear" forgets the rounds, "stop" ends, Ctrl-C ends an answer."""
QUESTION_LABEL = "\n用户 You: "
ANSWER_LABEL = "ChatGLM: "
# What the next token may still change at the end of an answer: the training-time stamp ("[[", 4
# hanzi, "]]") until it is complete, a space (dropped before "n't" and the like), any last character
# (punctuation takes its width from what follows).
UNSETTLED = re.compile(r"(\[\[.{0,5}| .{0,2}|.)\Z", re.DOTALL)
# The part of the window that old rounds may not take from the answer.
ANSWER_SHARE = 1 / 4


def make_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """The options of `chatglm chat`, as a command of its own or of `subparsers`."""
    description = "Chat in the terminal; through a pipe, answer every line of standard input."
    parser = open_parser(subparsers, "chat", description)
    add_folder(parser)
    add = parser.add_argument
    add("--bits", type=int, choices=(4, 8), help="quantize the weights (default: as they are)")
    add("--device", metavar="D", help="cpu, cuda, cuda:N or mps (default: the best one here)")
    add("--dtype", metavar="D", help="float16, bfloat16 or float32 (default: the fitting one)")
    add("--max-length", type=_positive_int, metavar="N", help="tokens of prompt plus answer")
    add("--max-new-tokens", type=_positive_int, metavar="N", help="tokens of one answer")
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
    import transformers

    from chatglm.loading import default_model_folder, load_model

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    folder = choose_folder(args.folder, args.model) or default_model_folder()
    model, tokenizer = load_model(folder, args.bits, args.device, args.dtype, args.verify)
    if args.seed is not None:
        transformers.set_seed(args.seed)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    conversation = Conversation(model, tokenizer, _stream_options(args, model), is_interactive)
    if is_interactive:
        talk(conversation, WELCOME.format(folder=folder, device=model.device))
    else:
        answer_lines(conversation, sys.stdin)
    return 0


@dataclass
class Conversation:
    """The rounds so far, and the model that continues them.

    Args:
        model: has `stream_chat(tokenizer, query, history, **options)`, which yields the answer so
            far with the new history, and `build_prompt(query, history)`.
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
            self.history = self._answer(line, self._fitting_rounds(line))
        return True

    def _fitting_rounds(self, query: str) -> list[tuple[str, str]]:
        """The latest rounds whose prompt leaves the answer its room; says how many it left out."""
        window = self.options["max_length"]
        room = min(self.options.get("max_new_tokens", window), int(window * ANSWER_SHARE))
        kept = self.history
        while kept and self._prompt_length(query, kept) > window - room:
            kept = kept[1:]
        dropped = len(self.history) - len(kept)
        if dropped:
            print(
                f"chatglm: 对话超出窗口，忘记最早 {dropped} 轮 / the window of {window} tokens is "
                f"full, the oldest rounds are forgotten: {dropped}",
                file=sys.stderr,
            )
        return kept

    def _prompt_length(self, query: str, history: list[tuple[str, str]]) -> int:
        """How many tokens the model would read for this question."""
        return len(self.tokenizer(self.model.build_prompt(query, history))["input_ids"])

    def _answer(self, query: str, history: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Stream one answer, return the rounds with it; Ctrl-C ends it and keeps what was said."""
        from torch import OutOfMemoryError

        printer = AnswerPrinter(ANSWER_LABEL if self.is_interactive else "")
        stream = self.model.stream_chat(self.tokenizer, query, history, **self.options)
        try:
            with lines_of_warnings():
                with suppress(KeyboardInterrupt), closing(stream):
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
                print(f"chatglm: {warning.message}", file=sys.stderr)


class AnswerPrinter:
    """Prints a growing answer, each character once.

    The next token may still change the end of an answer (`,` becomes `，` before a Chinese
    character), so the end is held back until it is settled.
    """

    def __init__(self, label: str = "") -> None:
        """Print `label` before the first character."""
        self._label = label
        self._text = ""
        self._shown = ""
        self._has_begun = False

    def show(self, text: str) -> None:
        """Print what is settled of the answer so far and not printed yet."""
        self._text = text
        settled = settled_part(text)
        if settled.startswith(self._shown):
            self._print(settled)

    def finish(self) -> None:
        """Print the rest and end the line; the whole text again if a printed part has changed."""
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


def settled_part(text: str) -> str:
    """The part of an unfinished answer that no later token changes."""
    return UNSETTLED.sub("", text)


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
