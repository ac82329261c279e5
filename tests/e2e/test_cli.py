"""`chatglm chat` from the command line to the screen, with a scripted model behind it.

The model here is the only fake: it yields what a script says and records what it was asked, so the
transcripts are exact. The command line, the files and the terminal are the real ones.
"""

import io
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chatglm_6b.conversation_chatglm import ChatOverflowWarning

from chatglm import __version__, cli, loading
from chatglm.serving.chat import AnswerPrinter, make_parser

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 60


class FakeTokenizer:
    """One token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class FakeModel:
    """Yields the growing texts that `script` holds for a query; an exception in it is raised."""

    device = "cpu"
    config = SimpleNamespace(max_sequence_length=WINDOW)

    def __init__(self, script: dict[str, list[Any]]) -> None:
        self.script = script
        self.calls: list[tuple[str, list[tuple[str, str]], dict[str, Any]]] = []
        self.closed = 0

    @staticmethod
    def build_prompt(query: str, history: list[tuple[str, str]]) -> str:
        return "".join(q + a for q, a in history) + query

    def stream_chat(
        self, tokenizer: Any, query: str, history: list[tuple[str, str]], **options: Any
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        self.calls.append((query, list(history), options))
        try:
            for step in self.script[query]:
                if isinstance(step, BaseException):
                    raise step
                if step is signal.SIGINT:
                    signal.raise_signal(signal.SIGINT)
                else:
                    yield step, [*history, (query, step)]
        finally:
            self.closed += 1


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Return a function that pipes lines into `chatglm chat`: `(exit code, stdout, stderr)`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it

    def run_chat(model: FakeModel, lines: str | bytes, *options: str) -> tuple[int, str, str]:
        raw = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(loading, "load_model", lambda *args: (model, FakeTokenizer()))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
        code = cli.main(["chat", "--model", "m", *options])
        return code, *capsys.readouterr()

    yield run_chat
    signal.signal(signal.SIGINT, before)


def test_piped_lines_are_answered_one_by_one_and_nothing_else_is_printed(run: Any) -> None:
    model = FakeModel({"你好": ["你", "你好", "你好！"], "again": ["yes", "yes, 1\n2"]})
    assert run(model, "你好\n\nagain\n") == (0, "你好！\nyes, 1\n2\n", "")
    assert model.calls == [
        ("你好", [], {"max_length": WINDOW, "overflow": "rounds"}),
        ("again", [("你好", "你好！")], {"max_length": WINDOW, "overflow": "rounds"}),
    ]


def test_a_last_line_without_a_newline_is_answered(run: Any) -> None:
    assert run(FakeModel({"hi": ["hello"]}), "hi") == (0, "hello\n", "")


def test_an_empty_answer_is_an_empty_line(run: Any) -> None:
    assert run(FakeModel({"a": [], "b": ["x"]}), "a\nb\n") == (0, "\nx\n", "")


def test_clear_forgets_the_rounds_and_stop_ends(run: Any) -> None:
    model = FakeModel({"a": ["1"], "b": ["2"], "c": ["3"]})
    assert run(model, "a\n clear \nb\nstop\nc\n") == (0, "1\n2\n", "")
    assert [(query, history) for query, history, _ in model.calls] == [("a", []), ("b", [])]


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(run: Any) -> None:
    model = FakeModel({"a": ["one", "one two", signal.SIGINT, "never"], "b": ["2"]})
    assert run(model, "a\nb\n") == (0, "one two\n2\n", "")
    assert model.calls[1][1] == [("a", "one two")]
    assert model.closed == 2


@pytest.mark.parametrize("ending", [None, signal.SIGINT])
def test_a_warning_of_an_answer_is_a_line_behind_it(run: Any, ending: Any) -> None:
    class Broken(FakeModel):
        def stream_chat(self, *args: Any, **options: Any) -> Iterator[Any]:
            try:
                yield from super().stream_chat(*args, **options)
            finally:
                warnings.warn("scores were not finite", RuntimeWarning, stacklevel=2)

    model = Broken({"a": ["one", *([ending] if ending else [])]})
    line = "chatglm: scores were not finite\n"
    assert run(model, "a\na\n") == (0, "one\none\n", 2 * line)


def test_ctrl_c_before_the_first_word_leaves_no_round(run: Any) -> None:
    model = FakeModel({"a": [signal.SIGINT, "never"], "b": ["2"]})
    assert run(model, "a\nb\n") == (0, "\n2\n", "")
    assert model.calls[1][1] == []


def test_ctrl_c_while_waiting_for_input_ends_the_program(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chatglm.serving.chat.answer_lines", interrupt)
    assert run(FakeModel({}), "") == (130, "", "")


def test_a_refused_question_ends_a_pipe_with_one_line(run: Any) -> None:
    model = FakeModel({"a": ["1"], "b": [ValueError("70 tokens,\n limit 60: shorten it")]})
    assert run(model, "a\nb\na\n") == (2, "1\n", "chatglm: 70 tokens, limit 60: shorten it\n")


def test_an_error_inside_an_answer_ends_its_line(run: Any) -> None:
    model = FakeModel({"a": ["one ", "one two", torch.OutOfMemoryError("CUDA")]})
    code, out, err = run(model, "a\n")
    assert (code, out) == (2, "one two\n")
    assert err.count("\n") == 1 and err.startswith("chatglm: out of memory: ")


def test_input_that_is_not_utf8_is_named(run: Any) -> None:
    code, out, err = run(FakeModel({}), "你好\n".encode("gbk"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("chatglm: standard input is not UTF-8 text: ")


def test_options_reach_the_model_only_when_given(run: Any) -> None:
    model = FakeModel({"a": ["1"]})
    limits = ("--max-length", "40", "--max-new-tokens", "9", "--overflow", "error")
    run(model, "a\n", *limits, "--top-p", "0.5")
    run(model, "a\n", "--temperature", "0.1", "--greedy")
    assert [options for *_, options in model.calls] == [
        {"max_length": 40, "overflow": "error", "max_new_tokens": 9, "top_p": 0.5},
        {"max_length": WINDOW, "overflow": "rounds", "temperature": 0.1, "do_sample": False},
    ]


def test_the_seed_fixes_the_random_numbers(run: Any) -> None:
    drawn = []
    for _ in range(2):
        run(FakeModel({}), "", "--seed", "7")
        drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1]


def test_loading_gets_the_options(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    run(FakeModel({}), "")  # puts an empty standard input in place
    calls = []

    def record(*args: Any) -> None:
        calls.append(args)
        raise ValueError("enough")

    monkeypatch.setattr(loading, "load_model", record)
    code = cli.main(["chat", "--bits", "4", "--device", "cpu", "--dtype", "bfloat16"])
    assert (code, calls) == (
        2,
        [(loading.default_model_folder(), 4, "cpu", "bfloat16", False, None)],
    )


def test_what_the_model_left_out_is_said_behind_the_answer(run: Any) -> None:
    class ForgetfulModel(FakeModel):
        def stream_chat(self, *args: Any, **options: Any) -> Any:
            if args[2]:
                warnings.warn(ChatOverflowWarning("The oldest 1.", 1), stacklevel=2)
            return super().stream_chat(*args, **options)

    model = ForgetfulModel({"a": ["1"], "b": ["2"]})
    notice = "chatglm: 对话超出窗口，略去最早 1 轮 / The oldest 1.\n"
    assert run(model, "a\nb\nb\n") == (0, "1\n2\n2\n", notice * 2)
    assert [len(history) for _, history, _ in model.calls] == [0, 1, 2]


def test_a_short_answer_leaves_more_room_for_rounds(run: Any) -> None:
    lines = [f"{i}234567" for i in range(4)]
    model = FakeModel({line: ["answer" + line[0]] for line in lines})
    run(model, "\n".join(lines), "--max-new-tokens", "2")
    assert [len(history) for _, history, _ in model.calls] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "3"], "argument --bits: invalid choice: '3' (choose from 4, 8)"),
        (["--top-p", "1.5"], "argument --top-p: must be above 0 and at most 1, got 1.5"),
        (["--temperature", "0"], "argument --temperature: must be above 0, got 0"),
        (["--max-length", "0"], "argument --max-length: must be at least 1, got 0"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["chat", *options])
    out, err = capsys.readouterr()
    assert out == ""
    # Python 3.12 and later write the choices without quotes.
    assert message in err.replace("invalid choice: 3", "invalid choice: '3'")
    assert err.count("\n") == 1


def test_a_wrong_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["chat", "--model", str(tmp_path)]) == 2
    reason = f"{tmp_path} is an empty folder: download a model into it, or name another folder"
    assert capsys.readouterr() == ("", f"chatglm: {reason}\n")


def test_version_help_and_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"chatglm {__version__}\n"
    assert cli.main([]) == 0
    assert "chat " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["chant"])
    assert capsys.readouterr().err.count("\n") == 1


def test_the_options_of_chat_are_frozen() -> None:
    actions = make_parser()._actions
    assert {(*a.option_strings, a.dest)[0]: a.type for a in actions[1:]}.keys() == {
        "folder",
        "--model",
        "--trust-folder-code",
        "--verify",
        "--adapter",
        "--any-base",
        "--bits",
        "--device",
        "--dtype",
        "--max-length",
        "--max-new-tokens",
        "--overflow",
        "--top-p",
        "--temperature",
        "--greedy",
        "--seed",
    }
    assert all(a.help for a in actions)


def test_a_closed_pipe_is_no_error() -> None:
    command = "import sys; from chatglm import cli\ndef run(a):\n while 1: print('x' * 999)\n"
    command += "sys.exit(cli.run_command(run, None))"
    child = subprocess.Popen(
        [sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert (child.wait(timeout=60), child.stderr.read()) == (0, b"")
    child.stderr.close()


def test_a_printed_part_that_changes_is_followed_by_the_whole_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = AnswerPrinter()
    for text in ("wrong one", "wrong one at", "right one at all"):
        printer.show(text)
    printer.finish()
    assert capsys.readouterr().out == "wrong one at\nright one at all\n"


@pytest.mark.parametrize(("label", "out"), [("> ", "> \n"), ("", "")])
def test_a_line_that_has_begun_is_ended_before_an_error(
    label: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printer = AnswerPrinter(label)
    printer.show("")
    printer.break_off()
    assert capsys.readouterr().out == out


CHILD = """
import fcntl, sys, termios, time
from types import SimpleNamespace
from chatglm import cli, loading

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C typed into the terminal reaches this process

class Model:
    device = "cpu"
    config = SimpleNamespace(max_sequence_length=10**6)

    def build_prompt(self, query, history):
        return query

    def stream_chat(self, tokenizer, query, history, **options):
        if query == "beyond":
            raise ValueError("beyond the window")
        for count in range(1, 600 if query == "long" else 2):
            text = f"<{query}|{len(history)}|" + "." * count
            yield text, [*history, (query, text)]
            time.sleep(0.05)
        yield text + ">", [*history, (query, text + ">")]

loading.load_model = lambda *args: (Model(), lambda prompt: {"input_ids": prompt})
sys.exit(cli.main(["chat", "--model", "folder"]))
"""


class Terminal:
    """`chatglm chat` in a pseudo-terminal: type into it, wait for what it shows."""

    def __init__(self, script: Path) -> None:
        import pty

        self.master, slave = pty.openpty()
        locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        environment = os.environ | locale | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment |= {"PYTHONPATH": str(ROOT)}
        self.child = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` appears; return what came since the last call, up to it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            left = max(deadline - time.monotonic(), 0)
            assert select.select([self.master], [], [], left)[0], f"{text!r} not in {self.seen!r}"
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        before, self.seen = self.seen.split(text, 1)
        return before + text

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    pytest.importorskip("pty", reason="pseudo-terminals need a Unix")
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    terminal = Terminal(script)
    yield terminal
    terminal.close()


def test_a_session_at_a_terminal(terminal: Terminal) -> None:
    """Welcome, Chinese editing, recall, an error, Ctrl-C twice, clear and Ctrl-D, as typed."""
    terminal.wait_for("ChatGLM: folder (cpu)")
    terminal.wait_for("You:")
    terminal.type("你好吗\x7f\r")  # backspace takes one character, not one byte
    terminal.wait_for("ChatGLM: <你好|0|.>")
    terminal.wait_for("You:")
    terminal.type("beyond\r")
    terminal.wait_for("chatglm: beyond the window")
    terminal.wait_for("You:")
    terminal.type("half a line\x03")  # Ctrl-C at the prompt drops the line
    terminal.wait_for("You:")
    terminal.type("long\r")
    terminal.wait_for("<long|1|...")
    terminal.type("\x03")
    terminal.wait_for("You:")
    terminal.type("\x1b[A\x1b[A\x1b[A\r")  # the third line back
    terminal.wait_for("ChatGLM: <你好|2|.>")
    terminal.wait_for("You:")
    terminal.type("clear\r")
    assert "\x1b[2J" in terminal.wait_for("ChatGLM: folder (cpu)")
    terminal.wait_for("You:")
    terminal.type("你好\r")
    terminal.wait_for("ChatGLM: <你好|0|.>")
    terminal.wait_for("You:")
    terminal.type("\x04")
    assert terminal.child.wait(timeout=20) == 0


def test_stop_ends_a_session_at_a_terminal(terminal: Terminal) -> None:
    terminal.wait_for("You:")
    terminal.type("stop\r")
    assert terminal.child.wait(timeout=20) == 0
