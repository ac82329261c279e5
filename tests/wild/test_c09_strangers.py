"""C9: folders of other models in the place of one: every command and the Python API say so."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from wild_folders import STRANGERS, make_prefix

from chatglm import cli
from chatglm.door import package_code
from chatglm.loading import load_model


def list_commands(folder: Path) -> dict[str, list[str]]:
    """Every command that takes a model folder."""
    out, rows = str(folder.parent / "out"), folder.parent / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    train = ["--train_file", str(rows), "--output_dir", out, "--report_to", "none"]
    return {
        "chat": ["chat", str(folder), "--device", "cpu"],
        "chat --model": ["chat", "--model", str(folder), "--bits", "4", "--device", "cpu"],
        "quantize": ["quantize", str(folder), out, "--bits", "4"],
        "merge": ["merge", str(folder), out, "--lora", str(folder.parent)],
        "train sft": ["train", "sft", str(folder), *train],
        "train ptuning": ["train", "ptuning", "--model", str(folder), *train],
        "train reward": ["train", "reward", str(folder), *train],
        "export-tokenizer": ["export-tokenizer", out, "--model", str(folder)],
        "bench": ["bench", str(folder), "--device", "cpu"],
        "publish": ["publish", str(folder), "--repo", "you/model", "--dry-run"],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(words) == 2, words
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def needs_trl(command: str) -> bool:
    """Tell whether trl, which has no release for Python 3.10, is missing for a stage."""
    is_its = command in ("train reward", "train dpo", "train grpo")
    return is_its and importlib.util.find_spec("trl") is None


@pytest.mark.parametrize("name", STRANGERS)
def test_every_command_says_what_it_is(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, called = STRANGERS[name]
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes(b"")  # never opened
    for command, words in list_commands(folder).items():
        if needs_trl(command):
            continue
        error = run(words, capsys)
        if command != "publish":  # which tells all that it lacks, a line each
            line = error.splitlines()[-1]
            assert line.startswith(f"chatglm: {folder} is ") and called in line
            assert ", and not the first ChatGLM-6B: load it with" in line


def test_a_whole_stranger_is_not_published(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("ice_text.model", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    error = run(list_commands(folder)["publish"], capsys).splitlines()[-1]  # behind a progress bar
    assert error.startswith(f"chatglm: {folder} is a model of type gpt2, and not the first ChatGLM")


@pytest.mark.parametrize("name", ["chatglm2", "glm-4", "visualglm"])
def test_the_package_door_says_what_goes_by_the_family_s_name(folder: Path, name: str) -> None:
    fields, called = STRANGERS[name]
    (folder / "config.json").write_text(json.dumps(fields))
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoTokenizer):
        with package_code(), pytest.raises(ValueError, match=f"is {called}, and not the first"):
            auto_class.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"is {called}, and not the first"):
        load_model(folder, device="cpu")


def test_our_code_in_the_folder_of_a_later_model(
    tiny_repo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By trust, our own configuration class reads the fields of a ChatGLM2: it must not guess."""
    for file in tiny_repo.iterdir():
        os.symlink(file, folder / file.name)
    (folder / "config.json").unlink()
    fields: dict[str, Any] = json.loads((tiny_repo / "config.json").read_text())
    later = STRANGERS["chatglm2"][0] | {"auto_map": fields["auto_map"]}
    (folder / "config.json").write_text(json.dumps(later))
    from chatglm.door import folder_code

    with (
        folder_code(),
        pytest.raises(ValueError, match="do not belong together: the configuration"),
    ):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_a_prefix_in_the_place_of_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = make_prefix(tmp_path / "checkpoint-500")
    for command, words in list_commands(prefix).items():
        if command != "publish":  # a prefix may be published
            assert "is a P-Tuning prefix and no model" in run(words, capsys)
