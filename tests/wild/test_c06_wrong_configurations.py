"""C6: a wrong config.json, index or JSON file, by every door: one line, the file, no memory."""

import builtins
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

import torch
from model_folders import change_json, read_json
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from chatglm import cli
from chatglm.checking.command import format_json, format_table
from chatglm.checking.inspection import inspect_folder
from chatglm.checkpoints.reading import build_empty
from chatglm.door import folder_code, package_code

NUMBER = "must be a whole number of at least"
VALUES: list[Any] = [None, -1, 0, 1, 3, 1.5, 1e30, True, False, "x", "", "4", [], [1], [None], {}]
VALUES += [{"a": 1}, 10**9, 10**18, 10**40, ["x"], {"rope_type": "x"}]
SIZES = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size")
SIZES += ("max_sequence_length",)
IDS = tuple(f"{name}_token_id" for name in ("bos", "eos", "mask", "gmask", "pad"))
SWITCHES = ("use_cache", "position_encoding_2d", "prefix_projection", "tie_word_embeddings")
OTHERS = ("layernorm_epsilon", "pre_seq_len", "quantization_bit", "quantization_group_size")
OTHERS += ("quantization_embeddings", "quantization_activations", "dtype", "torch_dtype")
OTHERS += ("architectures", "auto_map", "id2label", "label2id", "num_labels", "head_dim")
OTHERS += ("num_hidden_layers", "max_position_embeddings", "attn_implementation", "layer_types")
OTHERS += ("quantization_config", "rope_scaling", "problem_type", "transformers_version")


@pytest.fixture
def folder(tiny_repo: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_repo, tmp_path / "model")


def load_by_hub(folder: Path) -> Any:
    with folder_code():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def load_by_package(folder: Path) -> Any:
    with package_code():
        return AutoModel.from_pretrained(folder)


# A field, its value, what is told by every door.
FIELDS: list[tuple[str, Any, str]] = [
    *((name, -1, f"{name} {NUMBER} 1") for name in SIZES),
    *((name, value, f"{name} {NUMBER} 1|no whole") for name in SIZES for value in (1.5, True)),
    *((name, 10**9, f"{name} {NUMBER} 1 and below") for name in SIZES),
    *((name, value, f"{name} {NUMBER} 0 and below") for name in IDS for value in (-1, "x", 8192)),
    *((name, "yes", f"{name} must be true or false, got 'yes'; use") for name in SWITCHES),
    ("num_hidden_layers", 10**9, f"num_layers {NUMBER} 1 and below 1024"),
    ("num_labels", 10**9, f"num_labels {NUMBER} 0 and below 65536"),
    ("layernorm_epsilon", True, "layernorm_epsilon must be a number above 0, got True"),
    ("layernorm_epsilon", 5, "layernorm_epsilon must be a number above 0 and below 1, got 5"),
    ("quantization_bit", 5, r"quantization_bit must be one of \(0, 4, 8\), got 5; use the config"),
    ("quantization_group_size", 7, r"group_size must be one of \(32, 64, 128\), or None"),
    ("quantization_activations", "x", r"activations must be one of \('int8', 'exact'\), got 'x'"),
    ("id2label", [1], r"id2label must be a table of names, got \[1\]; use the config.json"),
    ("head_dim", 3, "transformers cannot use it, AttributeError: .*head_dim"),
    ("hidden_size", 31, r"hidden_size \(31\) must be a multiple of num_attention_heads \(2\)"),
    ("num_attention_heads", 16, "rotary positions need a"),
]


@pytest.mark.parametrize(("name", "value", "told"), FIELDS)
def test_a_wrong_field_is_told_with_its_file(
    folder: Path, name: str, value: Any, told: str
) -> None:
    change_json(folder / "config.json", **{name: value})
    for load in (load_by_hub, load_by_package):
        with pytest.raises(ValueError, match=told) as caught:
            load(folder)
        line = str(caught.value)
        assert line.startswith(f"{folder}/config.json") or "config.json has" in line
        assert "\n" not in line


JSON_FILES: dict[str, tuple[Callable[[str], bytes], str]] = {
    "a byte order mark": (lambda t: t.encode("utf-8-sig"), "save it as UTF-8 without a byte order"),
    "UTF-16": (lambda t: t.encode("utf-16"), "is no JSON file in UTF-8: .*; save it as UTF-8"),
    "Latin-1": (
        lambda t: t.replace("{", '{"ä": "é",', 1).encode("latin-1"),
        "no JSON file in UTF-8",
    ),
    "cut off": (lambda t: t[:-9].encode(), "is no JSON file: .*; fetch it again"),
    "a trailing comma": (lambda t: t.rstrip()[:-1].encode() + b",}", "is no JSON file: "),
    "a comment": (lambda t: b"// mine\n" + t.encode(), "is no JSON file: Expecting value"),
    "a list": (lambda t: f"[{t}]".encode(), "holds a list, and not fields by name[;:] fetch it"),
    "a number": (lambda t: b"3", "holds a int, and not fields by name"),
    "null": (lambda t: b"null", "holds a NoneType, and not fields by name"),
    "nothing": (lambda t: b"", "is an empty file and no JSON file: download it again"),
    "a page": (lambda t: b"<!DOCTYPE html><html>", "is a web page and no JSON file: download it"),
    "a field twice": (
        lambda t: t.replace("{", '{"num_layers": 28,', 1).encode(),
        "has num_layers twice, 28 and 2; remove the wrong one",
    ),
    "NaN": (
        lambda t: t.replace("{", '{"a": NaN,', 1).encode(),
        "has the value NaN, whi",
    ),
    "infinity": (
        lambda t: t.replace("{", '{"a": -Infinity,', 1).encode(),
        "has the value -Inf",
    ),
    "depth": (lambda t: b'{"a":' + b"[" * 100_000, "is no JSON file: "),
    "digits": (lambda t: b'{"a": ' + b"9" * 5000 + b"}", "is no JSON file: "),
}


@pytest.mark.parametrize("case", JSON_FILES)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_json(
    folder: Path, case: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, told = JSON_FILES[case]
    text = (folder / name).read_text(encoding="utf-8")
    is_missing = case == "a field twice" and name != "config.json"
    (folder / name).write_bytes(spoil(text))
    if is_missing:
        return
    assert cli.main(["check", str(folder)]) == 1
    assert cli.main(["chat", str(folder), "--device", "cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"chatglm: {folder}/{name} ") and "Traceback" not in line
    with pytest.raises(ValueError, match=told):
        raise ValueError(line)


def test_a_field_twice_with_one_value_is_read(folder: Path) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace("{", '{"num_layers": 2,', 1), encoding="utf-8")
    assert load_by_package(folder).config.num_layers == 2


@pytest.mark.parametrize(("name", "value"), [("pad_token", -1), ("eos_token", 0.5)])
def test_a_token_that_is_no_text(folder: Path, name: str, value: Any) -> None:
    change_json(folder / "tokenizer_config.json", **{name: value})
    with package_code(), pytest.raises(ValueError, match=f"tokenizer_config.json of .*{name}"):
        AutoTokenizer.from_pretrained(folder)


def refuse(text: str = "") -> str:
    raise ValueError("config.json is of another family, and transformers asks for its code")


@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated")
@pytest.mark.parametrize("name", [*SIZES, *IDS, *SWITCHES, *OTHERS])
def test_no_value_of_any_field_ends_in_a_traceback(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field with every value: a configuration, or one line that names the file."""
    monkeypatch.setattr(builtins, "input", refuse)
    fields = read_json(folder / "config.json")
    for value in VALUES:
        (folder / "config.json").write_text(json.dumps({**fields, name: value}))
        try:
            with package_code():
                config = AutoConfig.from_pretrained(folder)
                build_empty(config)
        except (ValueError, OSError) as error:
            assert "config.json" in str(error), (value, error)
            assert "\n" not in str(error), (value, error)


@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated")
def test_random_configurations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three fields at once, and letters that fall over: `check` ends in no traceback."""
    monkeypatch.setattr(builtins, "input", refuse)
    draw = random.Random(6)
    fields = read_json(folder / "config.json")
    for turn in range(40):
        changed = {draw.choice([*fields, *OTHERS]): draw.choice(VALUES) for _ in range(3)}
        text = json.dumps({**fields, **changed})
        if turn % 4 == 0:
            place = draw.randrange(len(text))
            text = text[:place] + chr(draw.randrange(1, 500)) + text[place + 1 :]
        (folder / "config.json").write_text(text, encoding="utf-8")
        report = inspect_folder(folder)
        assert format_table(report) and format_json(report)


def test_a_6b_configuration_beside_other_weights(folder: Path) -> None:
    """Told by the tables of contents, before a model of 28 wide blocks is thought of."""
    full = Path(cli.__file__).parent / "presets" / "chatglm-6b" / "config.json"
    shutil.copy(full, folder / "config.json")
    report = inspect_folder(folder)
    sizes = "vocab_size 130528, hidden_size 4096, inner_hidden_size 16384, num_layers 28"
    assert f"{sizes}, and the weights 8192, 32, 64, 2" in str(report.problems[0])
    assert report.problems[0].code == "sizes"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pad_token_id", "x"),
        ("eos_token_id", [5, None]),
        ("bos_token_id", True),
        ("bos_token_id", 10**30),
    ],
)
def test_an_id_of_generation_config_json_that_is_none(folder: Path, name: str, value: Any) -> None:
    """transformers ends in a TypeError that names no option."""
    model = load_by_package(folder)
    with pytest.raises(ValueError, match=rf"generate\(\) has {name}=.*must be a whole number"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, **{name: value})
    change_json(folder / "generation_config.json", **{name: value})
    for load in (load_by_package, load_by_hub):
        with pytest.raises(
            ValueError, match=f"generation_config.json has {name}=.*must be a whole"
        ):
            load(folder)
