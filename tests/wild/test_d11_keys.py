"""D11: keys are told and refused at once, all together, each with its meaning and a remedy."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from conftest import ROOT

from chatglm.training.command import describe_stage, read_keys
from chatglm.training.keys.describing import list_own
from chatglm.training.keys.library import list_fields, read_library
from chatglm.training.keys.meanings import read_meanings, shorten
from chatglm.training.keys.problems import KeyProblem
from chatglm.training.keys.reading import read_config, read_flags
from chatglm.training.keys.values import name_kinds
from chatglm.training.stage_list import STAGES, find_library, find_settings

HEAVY = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")
LIBRARIES = sorted({e.library for e in STAGES.values() if e.library.startswith(("trl", "transf"))})
GIVEN = {
    "ppo": ["--reward_function", "a:b"],
    "grpo": ["--reward_function", "a:b"],
    "eval": ["--eval_data", "rows.jsonl"],
}


def read(stage: str, *words: str) -> object:
    return read_keys(stage, ["--output", "out", *GIVEN.get(stage, []), *words])


def fail(stage: str, *words: str) -> str:
    with pytest.raises(KeyProblem) as caught:
        read(stage, *words)
    return str(caught.value)


def test_help_and_misspelt_keys_load_none_of_the_libraries() -> None:
    """What takes ten seconds is what is imported, so that is what is looked at."""
    code = f"""
import json, sys
from chatglm import cli
codes = []
for stage in {list(STAGES)}:
    codes.append(cli.main(["train", stage, "--help"]))
    codes.append(cli.main(["train", stage, "--outptu", "out"]))
print(json.dumps([codes, [name for name in {HEAVY} if name in sys.modules]]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 2] * len(STAGES) and loaded == []
    assert done.stderr.count("there is no key outptu; did you mean output?") == len(STAGES)
    assert done.stderr.count("\n") == len(STAGES)


@pytest.mark.parametrize("place", LIBRARIES)
def test_keys_that_are_read_from_a_source_are_those_of_the_class(place: str) -> None:
    """The class itself is the oracle: the same names, in its order, and the same types."""
    module, _, name = place.partition(":")
    real = getattr(importlib.import_module(module), name)
    hints, found = get_type_hints(real), read_library(place)
    assert list(found) == [item.name for item in dataclasses.fields(real) if item.init]
    simple = {"int", "float", "bool", "None"}
    for key, told in found.items():
        kinds = name_kinds(hints[key])
        assert (told.kinds <= simple) == (kinds <= simple), key
        assert told.kinds == kinds or not kinds <= simple, key
    assert found.keys() == list_fields(real).keys()
    silent = [key for key, told in found.items() if not told.meaning]
    assert len(silent) < len(found) / 20, silent


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_has_a_line_of_meaning(stage: str) -> None:
    own = list_own(find_settings(stage))
    assert [key for key, told in own.items() if not told.meaning] == []
    lines = describe_stage(stage).splitlines()
    for key, told in own.items():
        (line,) = [text for text in lines if text.startswith(f"  --{key} ")]
        assert told.default in line and shorten(told.meaning, 30).removesuffix(" ...") in line
    assert max(map(len, lines)) <= 160
    shown = [text.split()[0] for text in lines if text.startswith("  --")]
    assert shown[: len(own)] == [f"--{key}" for key in own]
    assert len(shown) == len(set(shown)) and "--output_dir" not in shown


def test_defaults_that_are_shown_are_those_that_hold() -> None:
    assert "  --learning_rate 0.02 " in describe_stage("ptuning")
    assert "  --learning_rate 1e-06 " in describe_stage("dpo")
    assert "  --lr_scheduler_type 'cosine' " in describe_stage("sft")


def test_all_of_a_key_is_told_when_it_is_asked_for() -> None:
    text = describe_stage("sft", ["--long_rows", "warmup-steps"])
    assert "never its end token" in text and "--warmup_steps 0" in text
    with pytest.raises(KeyProblem, match="there is no key warmth"):
        describe_stage("sft", ["warmth"])


def test_keys_that_are_refused_whatever_their_value_are_not_listed() -> None:
    assert "--use_vllm" not in describe_stage("grpo") and "--vllm_" not in describe_stage("grpo")
    assert "--label_smoothing_factor" in describe_stage("sft")


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_is_wrong_is_said_at_once(stage: str) -> None:
    said = fail(stage, "--mdoel", "m", "--verfy", "--bits", "four", "--max_length", "-1")
    assert "there is no key mdoel; did you mean model?" in said
    assert "there is no key verfy; did you mean verify?" in said
    assert "bits must be of type int, got 'four'" in said
    assert "max_length must be 0 or more, got -1" in said
    assert "bits must be 0, 4 or 8" not in said


def test_values_of_the_library_are_among_them() -> None:
    said = fail("sft", "--learning_rate", "abc", "--max_steps", "1.5", "--bf16", "3", "--bits", "5")
    assert "learning_rate must be of type float, got 'abc'" in said
    assert "max_steps must be of type int, got 1.5" in said
    assert "bf16 must be of type bool, got 3" in said
    assert "bits must be 0, 4 or 8, got 5" in said


def test_a_key_of_a_file_is_named_with_file_and_line(tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text("output: out\nlora_rnak: 8\nbits: four\npakcing: true\n")
    said = fail("sft", "--config", str(config), "--bits", "4")
    assert f"there is no key lora_rnak ({config}:2); did you mean lora_rank?" in said
    assert f"there is no key pakcing ({config}:4); did you mean packing?" in said
    assert "bits must be of" not in said, "the flag goes before it"
    said = fail("sft", "--config", str(config))
    assert f"bits must be of type int, got 'four' ({config}:3)" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "lora_rank: 8\noutput: a\nlora_rank: 4\n",
            "has the key lora_rank twice, in lines 1 and 3",
        ),
        ("max-steps: 8\nmax_steps: 4\n", "has the key max_steps twice, in lines 1 and 2"),
        ("a: 1\nb: [1\nc: 2\n", "config.yaml:3 is no YAML"),
        ("a: 1\n\tb: 2\n", "config.yaml:2 is no YAML"),
        ("a: 1\n---\nb: 2\n", "config.yaml:2 is no YAML"),
        ("- a\n", "holds no keys"),
        ("", "holds no keys"),
    ],
)
def test_files_that_are_no_keys(text: str, said: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(KeyProblem) as caught:
        read_config(config)
    assert said in str(caught.value) and str(config) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_an_editor_of_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("\ufeffoutput: 数据\r\nmax_length: 64\r\n".encode())
    assert read_config(tmp_path / "c.yaml") == {"output": "数据", "max_length": 64}
    (tmp_path / "c.yaml").write_bytes("output: 数据\n".encode("gbk"))
    with pytest.raises(KeyProblem, match=r"c\.yaml is no YAML file that can be read"):
        read_config(tmp_path / "c.yaml")


def test_words_of_a_shell_that_yaml_would_trip_over() -> None:
    words = ["--output", "a: b: c", "--model", "*x", "--seed=3", "--note", "@home"]
    assert read_flags(words) == {"output": "a: b: c", "model": "*x", "seed": 3, "note": "@home"}
    with pytest.raises(KeyProblem, match=r"lr_scheduler_kwargs '\{a' is no YAML"):
        read_flags(["--lr_scheduler_kwargs", "{a"])


def test_docstrings_of_both_forms_are_read() -> None:
    ours = """Something.

    Attributes:
        a, b: two of them: with a colon,
            in two lines.
        c: one.

    Raises:
        d: nothing.
    """
    assert read_meanings(ours) == {"a": "two of them: with a colon, in two lines.", "c": "one."} | {
        "b": "two of them: with a colon, in two lines."
    }
    theirs = "\n    Head.\n\n    Parameters:\n        > Part\n\n        x (`int`, *optional*):\n"
    theirs += "            One. Two.\n        y(`str` or [`A.b`], defaults to `(1)`): Three.\n    "
    assert read_meanings(theirs) == {"x": "One. Two.", "y": "Three."}
    assert read_meanings(None) == {} == read_meanings("No section.")
    assert shorten("One [`~a.B`] of [them](http://x). Two.", 80) == "One a.B of them"
    assert shorten("so many words as there are", 12) == "so many ..."


def test_a_library_without_a_source_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    """As in an archive or of compiled files; `json` has no class of the name in its source."""
    found = read_library("chatglm.training.ppo.run:PpoArguments")
    assert found["learning_rate"].default == "1e-05"
    assert "chatglm.training.ppo.run was imported for its keys" in capsys.readouterr().err


def test_no_is_a_word_where_a_strategy_is_named() -> None:
    """YAML reads it as false, and the library knows no such strategy."""
    _, given = read_keys("sft", ["--output", "o", "--save_strategy", "no", "--bf16", "no"])
    assert given == {"save_strategy": "no", "bf16": False}


def test_the_keys_of_every_stage_are_found() -> None:
    assert find_library("eval") == {}
    assert "beta" in find_library("dpo") and "num_generations" in find_library("grpo")
    assert "center_rewards_coefficient" in find_library("reward")
    assert find_library("ppo").keys() < find_library("sft").keys() | {"gradient_checkpointing"}
