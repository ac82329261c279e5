"""docs/training.md as its reader follows it: every command, in its order, on a tiny model."""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from chatglm.cli import main
from chatglm.training.estimate import report
from chatglm.training.progress import draw_curves

pytest.importorskip("trl", reason="the stages on trl need it")
# Transformers 5.23 has new names for checkpointing; trl and peft still say the old ones.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("pip ")
]
SHORT = ["--max_steps", "2", "--disable_tqdm", "--report_to", "none", "--logging_steps", "1"]
SMALLER: dict[str, list[str]] = {"eval": [], "score": [], "ppo": [*SHORT, "--max_new_tokens", "8"]}
HAND = [
    ("你好", "你好！", "不"),
    ("hello", "Hello!", "No."),
    ("再见", "再见！", "哼"),
    ("a", "b", "c"),
]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tiny_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and the data that the page names."""
    shutil.copytree(tiny_repo, tmp_path / "chatglm-6b")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    chat = [{"prompt": q, "response": a} for q, a, _ in HAND]
    pairs = [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in HAND]
    for name, rows in {
        "chat": chat,
        "chat_held_out": chat,
        "pairs": pairs,
        "pairs_held_out": pairs,
        "questions": [{"prompt": q} for q, *_ in HAND],
        "sampled": [{"prompt": q, "answers": answers} for q, *answers in HAND],
        "texts": [{"text": "The sun rises in the east. 太阳从东边升起。" * 4}],
    }.items():
        write(tmp_path / "data" / f"{name}.jsonl", rows)
    header = "id,question,A,B,C,D,answer,explanation\n"
    for split in ("dev", "val"):
        (tmp_path / "data" / "ceval" / split).mkdir(parents=True)
        lines = "".join(f"{i},What is {i}?,{i},b,c,d,A,\n" for i in range(3))
        (tmp_path / "data" / "ceval" / split / f"logic_{split}.csv").write_text(header + lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a line of the page, with fewer steps."""
    text, pipe, rest = command.partition(" | ")
    if pipe:
        said = text.removeprefix("echo ").encode() + b"\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
    words = shlex.split(rest if pipe else command)
    if words[:3] == ["python", "-m", "chatglm.training.planning"]:
        return report.main(words[3:])
    assert words[0] == "chatglm"
    if words[1] == "train":
        words += SMALLER.get(words[2], SHORT)
    return main(words[1:])


def test_every_command_of_the_page_runs_behind_the_ones_before_it(
    folder: Path,
    pictures: dict[Path, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(COMMANDS) >= 15
    for command in COMMANDS:
        assert run(command, monkeypatch) == 0, (command, capsys.readouterr().err)
    written = {path.name for path in (folder / "out").iterdir()}
    assert written >= {"sft_lora", "sft_merged", "reward", "ppo", "dpo", "grpo", "ptuning"}
    assert (folder / "out/sft_official/pytorch_model.bin").exists() or list(
        (folder / "out/sft_official").glob("pytorch_model-*.bin")
    )
    assert json.loads((folder / "out/eval_choices/eval.json").read_text())
    runs = [line for line in COMMANDS if re.search(r" train (?!eval|score)", line)]
    trained = {line.split(" --output ")[1].split()[0] for line in runs}
    assert {str(path.parent) for path in pictures} == trained
    path = max(pictures, key=lambda path: len(set().union(*pictures[path])))
    draw_curves(pictures[path], path)  # the one with the most figures; the others are drawn alike
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (folder / "out/eval_generation/generated_predictions.txt").read_text().count("\n") == 4


def test_the_page_names_every_stage_and_the_configurations_exist() -> None:
    from chatglm.training.command import STAGES

    assert set(re.findall(r"chatglm train (\w+) --", PAGE)) == set(STAGES)
    for path in re.findall(r"configs/[\w/]+\.(?:yaml|json)", PAGE):
        assert (ROOT / path).is_file(), path
