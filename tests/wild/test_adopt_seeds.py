"""The usage sections of both forks' pages, line for line: by the package before, by itself after.

sunzeyeah/chatglm-6B has the first vocabulary and fb700/chatglm-fitness-RLHF the later one. Their
weights here are those of the golden conversations; an end at every fourth id keeps answers short.
"""

import builtins
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, import_from_package
from model_folders import make_adapter, old_name
from old_folders import FIRST, LATE, make_chatting, needs_shared, snapshot

cli = import_from_package("chatglm.cli")
door = import_from_package("chatglm.door")
pytestmark = [
    needs_shared,
    old_name,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]
PAGES = SHARED / "seeds"


def read_usage(name: str) -> list[str]:
    """The Python of a fork's page: fenced blocks, or what stands behind prompts."""
    for page in PAGES.glob("*.txt"):
        text = page.read_text(encoding="utf-8")
        if name in text:
            blocks = re.findall(r"^```(?:i?python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
            return [keep_typed(block) for block in blocks]
    pytest.skip(f"needs the page of {name} in {PAGES}")


def keep_typed(block: str) -> str:
    typed = [line.removeprefix(">>> ") for line in block.splitlines() if line.startswith(">>> ")]
    return "\n".join(typed) if typed else block


def make_fork(folder: Path, vocab_size: int) -> Path:
    make_chatting(folder, vocab_size)
    offset = vocab_size - LATE
    ends = [vocab_size - 523, *range(7 + offset, 130000 + offset, 4)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture
def as_in_2023(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder to type in, on a machine whose GPU is a CPU, with a user who says yes."""
    asked: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *args: self)
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    monkeypatch.setattr(door, "_is_registered", False)
    return asked


def run_usage(code: str, name: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, name, "exec"), names)
    return names


def core_module(names: dict[str, Any]) -> str:
    model = names["model"]
    core = model.get_base_model() if hasattr(model, "peft_config") else model
    return type(core).__module__


def test_sunzeyeah(
    tmp_path: Path,
    as_in_2023: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (code,) = read_usage("sunzeyeah/chatglm-6B")
    assert code.count("model.chat(") == 2
    folder = make_fork(tmp_path / "sunzeyeah" / "chatglm-6B", FIRST)
    before = snapshot(folder)
    import chatglm

    for is_adopted in (False, True):
        if is_adopted:
            monkeypatch.setattr(door, "_is_registered", False)
            assert cli.main(["adopt", str(folder)]) == 0
        else:
            chatglm.register()
        capsys.readouterr()
        names = run_usage(code, "sunzeyeah")
        module = "transformers_modules." if is_adopted else "chatglm.model."
        assert core_module(names).startswith(module)
        assert type(names["tokenizer"]).__module__.startswith(module)
        assert [question for question, _ in names["history"]] == ["你好", "晚上睡不着应该怎么办"]
        printed = capsys.readouterr().out
        assert printed.endswith(f"{names['response']}\n")
    assert cli.main(["adopt", str(folder), "--undo"]) == 0
    assert snapshot(folder) == before


@pytest.mark.parametrize("number", [0, 1], ids=["lora", "quantized"])
def test_fb700(
    number: int,
    tmp_path: Path,
    as_in_2023: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = read_usage("fb700/chatglm-fitness-RLHF")[number]
    name = "fb700/chatglm-fitness-RLHF" if number else "THUDM/chatglm-6b"
    folder = make_fork(tmp_path / name, LATE)
    if number == 0:
        assert cli.main(["adopt", str(folder), "--out", str(tmp_path / "base")]) == 0
        make_adapter(tmp_path / "base", tmp_path / "model" / "chatglm_fitness_lora")
    import chatglm

    for is_adopted in (False, True):
        if is_adopted:
            monkeypatch.setattr(door, "_is_registered", False)
            assert cli.main(["adopt", str(folder)]) == 0
        else:
            chatglm.register()
        as_in_2023.clear()
        capsys.readouterr()
        names = run_usage(code, "fb700")
        assert any("custom code" in text for text in as_in_2023) is is_adopted
        module = "transformers_modules." if is_adopted else "chatglm.model."
        assert core_module(names).startswith(module)
        assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith(("('", '("'))
        answer, history = names["response"]
        assert history == [(names["sents"][0], answer)]
        assert names["model"].config.quantization_bit == (4 if number else 0)
