"""The card of every folder that a stage writes: its head, and that its code loads the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_as_told

from chatglm.cards import read_head
from chatglm.cli import main

# Transformers 5.23 has new names for checkpointing; peft and trl still say the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

ROWS = [{"prompt": f"{i}?", "response": "yes", "chosen": "yes", "rejected": "no"} for i in "123"]
SHORT = {"max_steps": 2, "disable_tqdm": True, "report_to": "none", "learning_rate": 0.01}


def train(stage: str, repo: Path, output: Path, **keys: Any) -> None:
    data = output.with_name("data.jsonl")
    columns = ("chosen", "rejected") if stage in ("dpo", "reward") else ("response",)
    rows = [{name: row[name] for name in ("prompt", *columns)} for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": repo, "train_data": data, "output": output, **SHORT, **keys}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(["train", stage, *words]) == 0


def check(repo: Path, output: Path, stage: str) -> str:
    """Assert what all cards have in common, and return the text."""
    text = (output / "README.md").read_text(encoding="utf-8")
    head = read_head(output / "README.md")
    assert head["license"] == "unknown" and "base_model" not in head
    assert stage in head["tags"]
    assert f"| command | `chatglm train {stage}` |" in text
    assert f"| base model | {repo.name} |" in text and "| train_data | data.jsonl |" in text
    assert "| learning_rate | 0.01 |" in text
    assert str(repo.parent) not in text and str(output.parent) not in text
    return text


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]])).logits


def test_a_whole_model_s_card(
    tiny_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    train("sft", tiny_repo, output)
    assert "| weights | float32 |" in check(tiny_repo, output, "sft")
    names = load_as_told(output, monkeypatch)
    assert names["tokenizer"]("yes").input_ids
    assert names["model"].dtype == torch.float32


@pytest.mark.parametrize(
    ("stage", "bits", "auto_class"),
    [
        ("sft", 4, "AutoModelForCausalLM"),
        ("reward", 0, "AutoModelForSequenceClassification"),
        ("dpo", 0, "AutoModelForCausalLM"),
    ],
)
def test_an_adapter_s_card_replaces_those_of_other_tools(
    stage: str,
    bits: int,
    auto_class: str,
    tiny_repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """peft's would name the base by its path, and trl's the folder."""
    if stage != "sft":
        pytest.importorskip("trl", reason="the stage needs it")
    output = tmp_path / "out"
    train(stage, tiny_repo, output, lora_rank=4, bits=bits, save_steps=1)
    text = check(tiny_repo, output, stage)
    assert "| adapter | float32 |" in text and auto_class in text
    assert ("| base model while training | 4 bits, with" in text) == bool(bits)
    head = read_head(output / "README.md")
    task = "text-classification" if stage == "reward" else "text-generation"
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", task)
    (output / tiny_repo.name).symlink_to(tiny_repo)
    names = load_as_told(output, monkeypatch)
    model = names["model"]
    assert type(model).__name__.startswith("PeftModel")
    with torch.no_grad(), model.disable_adapter():
        before = answer(model)
    assert not torch.equal(answer(model), before)
    assert model.get_base_model().config.quantization_bit == bits


def test_a_prefix_s_card(tiny_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    train("ptuning", tiny_repo, output, pre_seq_len=5)
    text = check(tiny_repo, output, "ptuning")
    assert "| prefix | float32 |" in text and "| pre_seq_len | 5 |" in text
    (output / tiny_repo.name).symlink_to(tiny_repo)
    names = load_as_told(output, monkeypatch)
    plain = answer(names["model"].base_model)
    assert not torch.equal(answer(names["model"]), plain)


def test_a_card_by_hand_stays(tiny_repo: Path, tmp_path: Path) -> None:
    """A run that goes on finds what was written in the meantime."""
    output = tmp_path / "out"
    keys = {"lora_rank": 4, "save_steps": 1}
    train("sft", tiny_repo, output, **keys)
    mine = "---\nlicense: mit\n---\n# Mine\n"
    (output / "README.md").write_text(mine)
    train("sft", tiny_repo, output, resume=True, **keys)
    assert (output / "README.md").read_text() == mine
