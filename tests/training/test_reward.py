"""Reward models: the pairwise loss, what it learns, what is reported of it, what loads again."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligning import (
    BETTER,
    SPECIAL,
    answer_ids,
    chat_ids,
    make_pairs,
    run_until_killed,
    train,
    words,
    write_rows,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("trl", reason="trl has no release for Python 3.10")

from chatglm.cli import main
from chatglm.evaluating.pairs import share_of_wins, summarize_pairs
from chatglm.training.models import load_scorer, load_tokenizer, read_format
from chatglm.training.ppo.rewards import load_reward_model
from chatglm.training.stages.reward import (
    STAGE,
    PairTrainer,
    RewardSettings,
    build_reward_trainer,
)
from chatglm.training.stages.trl_stages import build_trl_arguments

# trl and peft ask for an attribute by the name it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

PAIRS = [*make_pairs([3]), SPECIAL, {**SPECIAL, "prompt": "a much longer question than the others"}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", make_pairs(range(12)))


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "held_out.jsonl", make_pairs(range(20, 25)))


def build(repo: Path, folder: Path, pairs: list[dict[str, Any]]) -> PairTrainer:
    data = write_rows(folder / "some.jsonl", pairs)
    settings = RewardSettings(model=str(repo), output=str(folder / "out"), train_data=[str(data)])
    arguments = build_trl_arguments(
        STAGE.arguments, settings, {"report_to": "none"}, max_length=None
    )
    torch.manual_seed(0)
    model, tokenizer = load_scorer(settings), load_tokenizer(settings)
    rows = STAGE.read_data(read_format(settings), tokenizer, settings, arguments)
    return build_reward_trainer(model, tokenizer, settings, arguments, rows)


def score(model: Any, ids: list[int]) -> Tensor:
    """Return the score of a row that is alone."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0]


def take_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_batch_has_the_loss_and_the_gradients_of_its_pairs_alone(
    tiny_repo: Path, tmp_path: Path
) -> None:
    trainer = build(tiny_repo, tmp_path, PAIRS)
    rows: Any = trainer.train_dataset
    assert len({len(row["chosen_ids"]) for row in rows}) > 1
    model: Any = trainer.model.train()
    batch = trainer.data_collator(list(rows))
    loss = trainer.compute_loss(model, batch)
    found = take_gradients(model, loss)
    margins = [score(model, r["chosen_ids"]) - score(model, r["rejected_ids"]) for r in rows]
    expected_loss = -torch.stack(margins).sigmoid().log().mean()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    sizes = [len(row[key]) for row in rows for key in ("chosen_ids", "rejected_ids")]
    assert trainer.tokens_seen == sum(sizes)
    expected = take_gradients(model, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_are_what_chat_reads_and_what_the_model_would_write(
    tiny_repo: Path, tmp_path: Path
) -> None:
    rows: Any = build(tiny_repo, tmp_path, PAIRS).train_dataset
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    for pair, row in zip(PAIRS, rows, strict=True):
        prompt = chat_ids(model, tokenizer, pair)
        assert row["chosen_ids"] == prompt + answer_ids(model, tokenizer, pair["chosen"])
        assert row["rejected_ids"] == prompt + answer_ids(model, tokenizer, pair["rejected"])
        assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert rows.column_names == ["chosen_ids", "rejected_ids", "row", "length"]


@torch.no_grad()
def mean_margin(model: Any, tokenizer: Any, language_model: Any, path: Path) -> float:
    margins = []
    for pair in map(json.loads, path.read_text().splitlines()):
        prompt = chat_ids(language_model, tokenizer, pair)
        chosen, rejected = (
            score(model, prompt + answer_ids(language_model, tokenizer, pair[key]))
            for key in ("chosen", "rejected")
        )
        margins.append(float(chosen - rejected))
    return float(np.mean(margins))


@pytest.mark.parametrize(("lora_rank", "bits"), [(0, 0), (4, 0), (4, 4)])
def test_preferences_are_learned_reported_and_loaded_again(
    lora_rank: int,
    bits: int,
    tiny_repo: Path,
    data: Path,
    held_out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    keys = {"eval_data": held_out, "lora_rank": lora_rank, "bits": bits, "eval_steps": 1000}
    rate = 1e-2 if lora_rank else 3e-3
    train("reward", tiny_repo, data, output, max_steps=20, learning_rate=rate, **keys)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["eval_pair_accuracy"] == 1.0 and figures["eval_pair_margin"] > 1
    pairs = json.loads((output / "pairs.json").read_text())
    assert pairs["pairs"] == 10 and pairs["accuracy"] == 1.0
    assert pairs["mean_margin"] == pytest.approx(figures["eval_pair_margin"])
    assert {kind: part["pairs"] for kind, part in pairs["kinds"].items()} == {
        "contrary": 5,
        "truncated": 5,
    }
    assert pairs["kinds"]["truncated"]["longer_wins"] == 1.0
    assert figures["eval_pair_accuracy/contrary"] == pairs["kinds"]["contrary"]["accuracy"]
    language_model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    model = load_reward_model(str(output), language_model.config, tokenizer)
    if bits:
        # The base of adapters is as it was packed.
        settings = RewardSettings(model=str(tiny_repo), adapter=[str(output)], bits=bits)
        model = load_scorer(settings).eval()
    elif not lora_rank:
        model = AutoModelForSequenceClassification.from_pretrained(output, trust_remote_code=True)
        assert model.config.num_labels == 1
    found = mean_margin(model, tokenizer, language_model, held_out)
    assert found == pytest.approx(pairs["mean_margin"], rel=1e-4)


def test_an_untrained_model_is_right_half_of_the_time() -> None:
    scores = np.array([[1.0, 2.0], [2.0, 1.0], [5.0, 5.0], [0.0, -3.0]])
    lengths = np.array([[4, 2], [4, 4], [1, 9], [2, 1]])
    summary = summarize_pairs(scores, lengths, ["a", "b", "b", ""])
    assert summary["pairs"] == 4
    assert summary["accuracy"] == (0 + 1 + 0.5 + 1) / 4
    assert summary["mean_margin"] == (-1 + 1 + 0 + 3) / 4
    assert summary["longer_wins"] == (1 + 0.5 + 0 + 1) / 4
    assert (summary["ties"], summary["mean_chosen"], summary["mean_rejected"]) == (1, 2.0, 1.25)
    lone = {"pairs": 1, "accuracy": 0.0, "ties": 0, "mean_margin": -1.0, "longer_wins": 1.0}
    two = {"pairs": 2, "accuracy": 0.75, "ties": 1, "mean_margin": 0.5, "longer_wins": 0.25}
    assert summary["kinds"] == {
        "a": {**lone, "mean_chosen": 1.0, "mean_rejected": 2.0},
        "b": {**two, "mean_chosen": 3.5, "mean_rejected": 3.0},
    }
    assert share_of_wins(lengths[:1]) == 1.0


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    quick_python: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"max_steps": 4, "save_steps": 2, "group_by_length": True}
    command = words("reward", tiny_repo, data, tmp_path / "cut", **keys)
    run_until_killed(quick_python, command, step=3)
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    train("reward", tiny_repo, data, tmp_path / "cut", resume=True, **keys)
    train("reward", tiny_repo, data, tmp_path / "whole", **keys)
    resumed, straight = (
        load_file(tmp_path / run / "model.safetensors") for run in ("cut", "whole")
    )
    assert resumed.keys() == straight.keys()
    for key, tensor in straight.items():
        assert torch.equal(resumed[key], tensor), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_liger_kernel", True),
        ("chat_template_path", "chat_template.jinja"),
        ("eos_token", "</s>"),
        ("trust_remote_code", False),
        ("model_init_kwargs", "{}"),
        ("remove_unused_columns", True),
        ("parallelism_config", "cp.yaml"),
        ("sample_prompts", "hello"),
    ],
)
def test_keys_that_would_be_wrong_are_refused(
    key: str,
    value: Any,
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words("reward", tiny_repo, data, tmp_path / "out", **{key: value})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"chatglm: {key} cannot be ") and line.endswith("eave the key out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_head_are_refused(tiny_repo: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    settings = RewardSettings(model=str(tiny_repo), adapter=[str(tmp_path)])
    with pytest.raises(ValueError, match="was trained for CAUSAL_LM and SEQ_CLS is wanted"):
        load_scorer(settings)


def test_pairs_that_are_the_same_tokens_are_refused(
    tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": "a", "chosen": BETTER * 9, "rejected": BETTER * 9 + " And so on."}
    data = write_rows(tmp_path / "pairs.jsonl", [pair])
    keys = {"max_length": 32, "long_rows": "cut"}
    assert main(words("reward", tiny_repo, data, tmp_path / "out", **keys)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pairs.jsonl:1: chosen and rejected are the same" in line


def test_without_trl_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("reward", "dpo", "grpo"):
        monkeypatch.delitem(sys.modules, f"chatglm.training.stages.{name}", raising=False)
        assert main(["train", name, "--output", "out"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert 'pip install --editable ".[train]"' in line
    monkeypatch.undo()
    importlib.import_module("chatglm.training.stages.reward")
