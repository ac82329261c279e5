"""D13: keys of the official scripts, the fork, transformers 4, LLaMA-Factory and ms-swift."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from conftest import ROOT
from training.aligning import write_rows
from transformers import AutoTokenizer, TrainingArguments

from chatglm.training.keys.names import NAMES
from chatglm.training.keys.problems import KeyProblem
from chatglm.training.models import load_tokenizer, read_format
from chatglm.training.settings import read_settings
from chatglm.training.stage_list import STAGES, find_library, find_owners, find_settings
from chatglm.training.stage_settings import SftSettings
from chatglm.training.stages.sft import read_data

OFFICIAL_TRAIN = """--do_train --train_file AdvertiseGen/train.json
--validation_file AdvertiseGen/dev.json --prompt_column content --response_column summary
--overwrite_cache --model_name_or_path chatglm-6b --output_dir output/adgen
--overwrite_output_dir --max_source_length 64 --max_target_length 64
--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16
--predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
--learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4"""
OFFICIAL_EVALUATE = """--do_predict --validation_file dev.json --test_file dev.json
--overwrite_cache --prompt_column content --response_column summary --model_name_or_path chatglm-6b
--ptuning_checkpoint out/checkpoint-3000 --output_dir out/eval --overwrite_output_dir
--per_device_eval_batch_size 1 --predict_with_generate --quantization_bit 4"""
FACTORY = """
stage: sft
do_train: true
model_name_or_path: chatglm-6b
finetuning_type: lora
lora_target: all
dataset: a.json,b.json
template: chatglm
cutoff_len: 512
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: out
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
learning_rate: 1.0e-4
val_size: 0.1
eval_strategy: steps
mask_history: true
flash_attn: auto
"""
SWIFT = """--model chatglm-6b --train_type lora --dataset a.jsonl --val_dataset b.jsonl
--torch_dtype bfloat16 --lora_rank 16 --target_modules all-linear --max_length 512
--truncation_strategy delete --system helpful --output_dir out --attn_impl sdpa"""


def read(stage: str, words: str) -> tuple[Any, dict[str, Any], list[str]]:
    lines: list[str] = []
    what = (find_settings(stage), find_library(stage), words.split())
    settings, given = read_settings(*what, lines.append, find_owners)
    return settings, given, lines


def fail(stage: str, words: str) -> str:
    with pytest.raises(KeyProblem) as caught:
        read(stage, words)
    return str(caught.value)


def test_the_official_train_sh() -> None:
    settings, given, lines = read("ptuning", OFFICIAL_TRAIN)
    assert settings.train_data == ["AdvertiseGen/train.json"] and settings.bits == 4
    assert settings.eval_data == ["AdvertiseGen/dev.json"] and settings.output == "output/adgen"
    assert (settings.prompt_column, settings.response_column) == ("content", "summary")
    assert (settings.max_source_length, settings.max_target_length) == (64, 64)
    assert settings.pre_seq_len == 128 and settings.model == "chatglm-6b"
    assert given["learning_rate"] == 0.02 and given["gradient_accumulation_steps"] == 16
    idle = ("do_train", "overwrite_cache", "overwrite_output_dir", "predict_with_generate")
    for name in idle:
        (line,) = [line for line in lines if line.startswith(f"{name} has no effect: ")]
        assert len(line) > len(name) + 30
    assert "quantization_bit as bits" in lines[0] and "train_file as train_data" in lines[0]


def test_the_official_evaluate_sh() -> None:
    settings, given, _ = read("eval", OFFICIAL_EVALUATE)
    assert settings.eval_data == ["dev.json"] and settings.task == "generation"
    assert "out/checkpoint-3000" in settings.adapter and given == {}


def test_a_file_of_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(FACTORY)
    settings, given, lines = read("sft", f"--config {tmp_path}/sft.yaml")
    assert settings.train_data == ["a.json", "b.json"] and settings.lora_rank == 8
    assert (settings.max_length, settings.long_rows) == (512, "cut")
    assert (settings.val_ratio, settings.learn_turns) == (0.1, "last")
    assert given == {
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "eval_strategy": "steps",
    }
    assert "finetuning_type lora means lora_rank: 8" in lines
    settings, _, lines = read("sft", f"--config {tmp_path}/sft.yaml --lora_rank 4 --max_length 9")
    assert (settings.lora_rank, settings.max_length) == (4, 9)
    assert not any("lora_rank: 8" in line for line in lines), "what is set holds"
    said = fail("dpo", f"--config {tmp_path}/sft.yaml")
    assert "stage is 'sft', and the stage here is dpo: run chatglm train sft" in said


def test_a_command_of_ms_swift() -> None:
    settings, given, _ = read("sft", SWIFT)
    assert settings.lora_targets == ["all"] and settings.long_rows == "skip"
    assert settings.default_system == "helpful" and settings.eval_data == ["b.jsonl"]
    assert given == {"bf16": True} and settings.lora_rank == 16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--evaluation_strategy steps", {"eval_strategy": "steps"}),
        ("--per_gpu_train_batch_size 3", {"per_device_train_batch_size": 3}),
        ("--warmup_ratio 0.1", {"warmup_steps": 0.1}),
        ("--no_cuda", {"use_cpu": True}),
        ("--adafactor", {"optim": "adafactor"}),
        ("--save_safetensors", {}),
        ("--use_mps_device --include_tokens_per_second", {}),
        ("--fp16_backend auto --past_index -1 --jit_mode_eval false", {}),
    ],
)
def test_what_transformers_dropped(words: str, expected: dict[str, Any]) -> None:
    """Where a release still has the key, it is the release's."""
    library = find_library("sft")
    _, given, _ = read("sft", f"--output out {words}")
    still = {w[2:] for w in words.split() if w.startswith("--")} & library.keys()
    assert given == expected or still


def test_the_fork() -> None:
    words = "--output_dir o --model_name_or_path m --train_filename t.jsonl --num_epochs 2"
    words += " --actor_learning_rate 1e-6 --critic_learning_rate 5e-6 --actor_lora_rank 8"
    settings, given, _ = read("ppo", f"{words} --reward_model_path r --ppo_epochs 2")
    assert (settings.reward_model, settings.num_ppo_epochs, settings.lora_rank) == ("r", 2, 8)
    assert (given["learning_rate"], settings.value_learning_rate) == (1e-6, 5e-6)
    said = fail("ppo", f"{words} --reward_model_path r --critic_lora_rank 4 --enable_ema")
    assert "critic_lora_rank (of the fork): the critic is a value head" in said
    assert "enable_ema (of the fork) cannot be True" in said, "all that is refused is said"


def test_names_of_one_key_do_not_contradict() -> None:
    words = "--output o --train_data a --train_file"
    assert read("sft", f"{words} a")[0].train_data == ["a"]
    assert "train_data is 'a' and train_file is ['b'], which are one key" in fail(
        "sft", f"{words} b"
    )
    said = fail("sft", "--output o --lora_rank 8 --finetuning_type full")
    assert "lora_rank is 8, and another key asks for 0: leave one of the two out" in said


def test_flags_go_before_a_file_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: a\ntrain_data: x\n")
    settings, _, _ = read("sft", f"--config {tmp_path}/c.yaml --output b --train_file y")
    assert (settings.output, settings.train_data) == ("b", ["y"])


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("sft", "--do_train false", "do_train (of the official scripts) cannot be False"),
        ("eval", "--do_train", "do_train (of the official scripts) cannot be True"),
        ("sft", "--do_predict", "chatglm train eval --task generation"),
        ("sft", "--ignore_pad_token_for_loss false", "pads are never learned"),
        ("sft", "--source_prefix ask:", "write it into the rows"),
        ("sft", "--template llama3", "prompts are the model's own"),
        ("sft", "--flash_attn fa2", "no other one reads a prefix in both directions"),
        ("sft", "--finetuning_type freeze", "cannot be 'freeze': lora or full"),
        ("sft", "--warmup_ratio 5", "must be in [0, 1)"),
        ("sft", "--push_to_hub_token x", "chatglm publish"),
        ("dpo", "--max_source_length 5", "elsewhere set max_length"),
        ("sft", "--reward_model_path r", "is reward_model here, which this stage does not have"),
        ("sft", "--pre_seq_len 5", "there is no key pre_seq_len here, but in ptuning"),
        ("sft", "--beta 0.1", "there is no key beta here, but in dpo, grpo"),
        ("sft", "--quantization_bit x", "got 'x' (given as quantization_bit)"),
    ],
)
def test_what_is_refused_names_reason_and_remedy(stage: str, words: str, said: str) -> None:
    name = words.split()[0][2:]
    if (
        stage == "sft"
        and name in {"warmup_ratio", "push_to_hub_token"} & find_library("sft").keys()
    ):
        pytest.skip("this release of transformers has the key")
    keys = "--eval_data e " if stage == "eval" else ""
    told = fail(stage, f"--output out {keys}{words}")
    assert said in told


def test_files_are_looked_for_in_the_folder_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    settings, _, _ = read("sft", f"--output o --dataset a.json,b --dataset_dir {tmp_path}")
    assert settings.train_data == [f"{tmp_path}/a.json", "b"]
    assert read("sft", f"--output o --data_dir {tmp_path}")[0].train_data == [str(tmp_path)]


def test_adapters_that_are_gone_on_from_keep_their_rank() -> None:
    words = "--output o --finetuning_type lora --adapter_name_or_path before"
    settings, _, _ = read("sft", words)
    assert "before" in settings.adapter and settings.lora_rank == 0


def test_official_lengths_are_cut_as_the_official_script_does(
    tiny_repo: Path, tmp_path: Path
) -> None:
    """`a_ids[: source - 1]`, the markers, `b_ids[: target - 2]` and `<eop>`, before any pads."""
    row = {"prompt": "a question of many words, 你好吗, " * 3, "response": "an answer, 很好, " * 3}
    short = {"prompt": "hi", "response": "you"}
    data = write_rows(tmp_path / "rows.jsonl", [row, short])
    settings = SftSettings(
        model=str(tiny_repo),
        output=str(tmp_path / "out"),
        train_data=[str(data)],
        max_source_length=9,
        max_target_length=7,
    )
    tokenizer: Any = load_tokenizer(settings)
    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    source = read_format(settings)
    rows = read_data(source, tokenizer, settings, arguments).train
    official = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    markers = official("x")["input_ids"][-2:]
    for number, texts in enumerate((row, short)):
        a_ids = official.encode(text=texts["prompt"], add_special_tokens=False)
        b_ids = official.encode(text=texts["response"], add_special_tokens=False)
        assert rows[number].prompt_ids == [*a_ids[: 9 - 1], *markers]
        assert rows[number].answer_ids == [*b_ids[: 7 - 2], source.config.eos_token_id]
    with pytest.raises(KeyProblem, match="max_target_length must be 0, or 3 or more, got 2"):
        SftSettings(output="o", max_target_length=2).check()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_understood_or_refused_by_name(name: str) -> None:
    """No name of the table ends as a key that nobody knows, in any stage that could be meant."""
    for stage in ("ptuning", "eval", "ppo"):
        keys = {"eval": " --eval_data e", "ppo": " --reward_function a:b"}.get(stage, "")
        try:
            read(stage, f"--output out{keys} --{name} true")
        except KeyProblem as problem:
            assert f"there is no key {name}" not in str(problem)


def test_targets_are_keys_of_a_stage() -> None:
    stages = [{*find_library(n), *read_hints(n)} for n in STAGES]
    known = set().union(*stages)
    later = {"modules_to_save"}  # of trainings of adapters
    for name, readings in NAMES.items():
        for found in readings:
            named = (
                {found.key} if found.key else {key for keys in found.turns.values() for key in keys}
            )
            assert named <= known | later, name


def read_hints(stage: str) -> list[str]:
    return list(find_settings(stage).__dataclass_fields__)


def test_the_page_is_made_from_the_table() -> None:
    tool = [sys.executable, str(ROOT / "tools" / "list_names.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in NAMES)
