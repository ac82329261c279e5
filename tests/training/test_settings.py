"""The keys of a training: files, flags, types, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from chatglm.training.command import describe_stage
from chatglm.training.settings import (
    KeyProblem,
    read_config,
    read_settings,
    write_settings,
)
from chatglm.training.stages.sft import SftSettings


def read(*words: str) -> tuple[SftSettings, dict[str, Any]]:
    return read_settings(SftSettings, TrainingArguments, ["--output", "out", *words])


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text("lora_rank: 8\nlearning_rate: 1e-4\npacking: true\ntrain_data: [a, b]\n")
    settings, given = read("--config", str(config), "--lora_rank", "4", "--max-steps=3")
    assert (settings.lora_rank, settings.packing, settings.train_data) == (4, True, ["a", "b"])
    assert given == {"learning_rate": 1e-4, "max_steps": 3}


def test_flags_take_lists_numbers_and_no_value_at_all() -> None:
    settings, given = read("--train_data", "a", "b", "--packing", "--lora_dropout", "0.1")
    assert settings.train_data == ["a", "b"] and settings.packing is True
    assert settings.lora_dropout == 0.1
    assert read("--train_data", "a")[0].train_data == ["a"]
    assert given == {}


def test_the_names_of_other_scripts_are_understood() -> None:
    settings, given = read("--model_name_or_path", "m", "--train_file", "t", "--num_epochs", "2")
    assert (settings.model, settings.train_data) == ("m", ["t"])
    assert given == {"num_train_epochs": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rnak", "8"], "there is no key lora_rnak; did you mean lora_rank?"),
        (["--bits", "5"], "bits must be 0, 4 or 8, got 5"),
        (["--bits", "four"], "bits must be of type int, got 'four'"),
        (["--packing", "3"], "packing must be of type bool, got 3"),
        (["--lora_rank", "2.5"], "lora_rank must be of type int, got 2.5"),
        (["--lora_dropout", "1"], "lora_dropout must be in [0, 1), got 1.0"),
        (["--long_rows", "cutt"], "long_rows must be error, cut or skip, got 'cutt'"),
        (["--output", ""], "output must be a folder to write to, got ''"),
        (["--dtype", "float8"], "dtype must be"),
        (["stray"], "output must be of type str"),
    ],
)
def test_what_cannot_be_is_refused_with_value_and_remedy(words: list[str], message: str) -> None:
    with pytest.raises(KeyProblem) as caught:
        read(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [1", "just words"])
def test_a_file_without_keys_is_refused(content: str, tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text(content)
    with pytest.raises(KeyProblem, match=r"sft\.yaml"):
        read_config(config)


def test_settings_are_kept_as_a_file_that_reads_back(tmp_path: Path) -> None:
    settings, given = read("--lora_rank", "8", "--learning_rate", "1e-4", "--train_data", "数据")
    write_settings(settings, given, tmp_path)
    again = read_settings(SftSettings, TrainingArguments, ["--config", f"{tmp_path}/settings.yaml"])
    assert again == (settings, given)


def test_the_help_names_every_key_and_its_default() -> None:
    text = describe_stage("sft")
    assert "--packing False" in text
    assert "--lora_targets ['query_key_value']" in text
