"""Model cards: what a folder says of its licence, its base, and how it was made."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import ROOT, load_as_told
from model_folders import copy_in_half, make_adapter, make_official, old_name

import chatglm
from chatglm.cards import (
    Base,
    Card,
    copy_licenses,
    format_card,
    read_base,
    read_head,
    read_own_card,
    strip_place,
    write_card,
)
from chatglm.converting.conversion import merge_checkpoint, quantize_checkpoint
from chatglm.converting.planning import PackedFormat
from chatglm.training.describing import describe_training
from chatglm.training.ppo.settings import PpoSettings
from chatglm.training.settings import write_settings
from chatglm.training.stages.sft import SftSettings

BASE = Base("chatglm-6b", None, {"license": "mit"}, False)
CARD = Card("A title", "A summary.", BASE, {"weights": "float16"}, {"command": "`x`"}, "pass")


@pytest.fixture
def source(tiny_repo: Path, tmp_path: Path) -> Path:
    return copy_in_half(tiny_repo, tmp_path / "private" / "source")


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", text, re.MULTILINE))


def read_code(text: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return code


def test_the_head_and_the_rows() -> None:
    text = format_card(CARD)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {
        "license": "mit",
        "language": ["zh", "en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["glm", "chatglm"],
    }
    told = rows(text)
    assert told["date"] == datetime.date.today().isoformat()
    for module in (chatglm, transformers, torch):
        assert f"{module.__name__} {module.__version__}" in told["versions"]
    assert (told["base model"], told["weights"]) == ("chatglm-6b", "float16")
    assert "Of chatglm-6b it is `mit`." in text and "](MODEL_LICENSE)" not in text


def test_what_is_told_cannot_break_the_card() -> None:
    base = BASE._replace(name="a: [b", licence={"license": "other", "license_name": "x: #y"})
    card = CARD._replace(base=base, making={"told": "one|two\n| three"}, tags=("a: b",))
    text = format_card(card)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license_name"] == "x: #y" and head["tags"][-1] == "a: b"
    assert r"| told | one\|two \| three |" in text


@pytest.mark.parametrize(
    ("card", "fields", "file", "expected"),
    [
        ("", {}, "", ({"license": "unknown"}, None)),
        ("no head", {"vocab_size": 8192}, "LICENSE", ({"license": "unknown"}, None)),
        ("", {"vocab_size": 130528}, "", ("official", None)),
        ("", {"vocab_size": 150528}, "", ("official", None)),
        ("---\ntags: [x]\n---\n", {}, "MODEL_LICENSE", ("official", None)),
        ("---\nlicense: mit\nbase_model: a/b\n---\n", {}, "", ({"license": "mit"}, "a/b")),
        ("", {"_name_or_path": "THUDM/chatglm-6b"}, "", ({"license": "unknown"}, "own")),
        ("", {"_name_or_path": "out/checkpoint"}, "", ({"license": "unknown"}, None)),
        ("", {"_name_or_path": "/home/me/x"}, "", ({"license": "unknown"}, None)),
        ("---\nbase_model: [a/b, c/d]\n---\n", {}, "", ({"license": "unknown"}, None)),
    ],
)
def test_licence_and_name_of_a_base(
    tmp_path: Path, card: str, fields: dict[str, Any], file: str, expected: Any
) -> None:
    if card:
        (tmp_path / "README.md").write_text(card)
    if file:
        (tmp_path / file).write_text("text")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    base = read_base(tmp_path)
    official = {"license": "other", "license_name": "chatglm-6b-model-license"}
    licence, name = expected
    assert base.licence == (official if licence == "official" else licence)
    assert base.hub_name == (fields["_name_or_path"] if name == "own" else name)
    assert (base.name, base.has_licence_file) == (tmp_path.name, file == "MODEL_LICENSE")


def test_the_repository_s_own_card_is_read() -> None:
    assert read_base(ROOT).licence == {"license": "apache-2.0"}


def test_a_head_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"the head of .*README\.md is no YAML"):
        read_head(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("/home/me/data/rows.jsonl", "rows.jsonl"),
        ("C:\\me\\rows.jsonl", "rows.jsonl"),
        ("/home/me/data/", "data"),
        (["/a/b", "c"], "b, c"),
        (0.5, "0.5"),
    ],
)
def test_no_place_is_told(value: Any, text: str) -> None:
    assert strip_place(value) == text


def test_a_card_by_hand_is_known_from_one_by_a_program(tmp_path: Path) -> None:
    assert read_own_card(tmp_path) is None
    for text in (format_card(CARD), "# Model Card for x\n", "tags:\n- generated_from_trainer\n"):
        write_card(tmp_path, text)
        assert read_own_card(tmp_path) is None
    write_card(tmp_path, "# Mine\n")
    assert read_own_card(tmp_path) == "# Mine\n"


def test_licences_are_copied_and_none_is_replaced(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "folder"
    for place in (base, folder):
        place.mkdir()
    (base / "MODEL_LICENSE").write_text("of the weights")
    (base / "LICENSE").write_text("of the code")
    (folder / "LICENSE").write_text("mine")
    copy_licenses(base, folder)
    assert (folder / "MODEL_LICENSE").read_text() == "of the weights"
    assert (folder / "LICENSE").read_text() == "mine"


# Folders that are converted


@pytest.mark.parametrize(
    ("packed_format", "expected"),
    [
        (PackedFormat(4), ("4 bits, with a scale for every row", "float16")),
        (PackedFormat(8, 32, True), ("8 bits, with a scale for every 32 columns", "8 bits")),
    ],
)
def test_a_quantized_folder_s_card(
    source: Path,
    tmp_path: Path,
    packed_format: PackedFormat,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = "---\nlicense: mit\nbase_model: owner/name\n---\n# By hand\n"
    (source / "README.md").write_text(mine)
    (source / "MODEL_LICENSE").write_text("of the weights")
    new = tmp_path / "new"
    quantize_checkpoint(source, new, packed_format)
    text = (new / "README.md").read_text(encoding="utf-8")
    head, told = read_head(new / "README.md"), rows(text)
    assert (head["license"], head["base_model"]) == ("mit", "owner/name")
    assert f"{packed_format.bits}-bit" in head["tags"]
    assert f"# source, quantized to {packed_format.bits} bits" in text
    assert (told["matrices of the blocks"], told["embedding and head"]) == expected
    assert told["command"] == "`chatglm quantize`"
    assert str(tmp_path) not in text and "private" not in text
    assert (new / "README.base.md").read_text() == mine
    assert "Its text is in [MODEL_LICENSE](MODEL_LICENSE)" in text
    assert (new / "MODEL_LICENSE").read_text() == "of the weights"
    sums = (new / "SHA256SUMS").read_text()
    assert "  README.base.md\n" in sums and "  README.md\n" not in sums
    model = load_as_told(new, monkeypatch)["model"]
    assert model.config.quantization_bit == packed_format.bits


@old_name
def test_a_merged_folder_s_card(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(source, tmp_path / "secret" / "my-lora")
    merge_checkpoint(source, tmp_path / "new", str(tmp_path / "secret" / "my-lora"))
    text = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    told = rows(text)
    assert (told["adapter"], told["command"]) == ("my-lora", "`chatglm merge`")
    assert told["weights"] == "float16" and "secret" not in text
    assert not (tmp_path / "new" / "README.base.md").exists()
    names = load_as_told(tmp_path / "new", monkeypatch)
    assert names["model"].dtype == torch.float16
    assert names["tokenizer"]("你好").input_ids


def test_what_is_made_of_official_weights_has_their_licence(tmp_path: Path) -> None:
    make_official(tmp_path / "chatglm-6b", 130528)
    quantize_checkpoint(tmp_path / "chatglm-6b", tmp_path / "new", PackedFormat(4))
    head = read_head(tmp_path / "new" / "README.md")
    assert (head["license"], head["license_name"]) == ("other", "chatglm-6b-model-license")
    assert "base_model" not in head  # the folder does not say that it is the official one


# Folders that are trained; whole runs are in tests/training


def test_the_settings_that_matter_are_told_and_no_secret(tiny_repo: Path, tmp_path: Path) -> None:
    settings = SftSettings(
        model=str(tiny_repo),
        output=str(tmp_path / "out"),
        train_data=["/home/me/data/rows.jsonl"],
        lora_rank=8,
        bits=4,
        group_size=32,
        sample_prompts=["a secret"],
    )
    (tmp_path / "out").mkdir()
    given = {"learning_rate": 1e-4, "hub_token": "hf_abc", "logging_dir": "/home/me/logs"}
    write_settings(settings, given, tmp_path / "out")
    weights = {"a": torch.zeros(9), "b": torch.zeros(2).half()}
    text = describe_training(settings, tiny_repo, weights, "adapter")
    told = rows(text)
    assert (told["train_data"], told["lora_rank"]) == ("rows.jsonl", "8")
    assert (told["learning_rate"], told["adapter"]) == ("0.0001", "float32")
    assert told["base model while training"] == "4 bits, with a scale for every 32 columns"
    assert not {"lora_dropout", "output", "model", "logging_dir"} & told.keys()
    for secret in ("a secret", "hf_abc", "/home/me", str(tmp_path), str(tiny_repo)):
        assert secret not in text
    options = "{'quant_method': 'chatglm', 'bits': 4, 'group_size': 32}"
    assert f'from_pretrained("{tiny_repo.name}", trust_remote_code=True, ' in text
    assert f"quantization_config={options})" in read_code(text)


def test_other_stages_are_named(tiny_repo: Path, tmp_path: Path) -> None:
    settings = PpoSettings(model=str(tiny_repo), output=str(tmp_path), reward_model="/x/reward")
    text = describe_training(settings, tiny_repo, {"a": torch.zeros(1).bfloat16()}, "model")
    assert rows(text)["reward_model"] == "reward" and "/x" not in text
    assert f"# {tiny_repo.name}, ppo\n" in text and "trained by PPO" in text
    assert rows(text)["weights"] == "bfloat16"
