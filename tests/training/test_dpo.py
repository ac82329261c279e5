"""Direct preference optimization: its loss, its reference, what it learns, what loads again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import (
    SPECIAL,
    answer_ids,
    chat_ids,
    make_pairs,
    read_log,
    run_until_killed,
    sum_log_probs,
    train,
    words,
    write_rows,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl", reason="trl has no release for Python 3.10")

from chatglm.cli import main
from chatglm.training.models import load_policy, load_tokenizer, read_format
from chatglm.training.settings import KeyProblem
from chatglm.training.stages.dpo import STAGE, AnswerTrainer, DpoSettings, build_dpo_trainer
from chatglm.training.stages.trl_stages import build_trl_arguments

# trl and peft ask for an attribute by the name it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

PAIRS = [*make_pairs([3]), SPECIAL, {**SPECIAL, "prompt": "a much longer question than the others"}]
BETA = 0.3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", make_pairs(range(12)))


def build(repo: Path, folder: Path, fields: Any = None, **given: Any) -> AnswerTrainer:
    data = write_rows(folder / "some.jsonl", PAIRS)
    names = {"model": str(repo), "output": str(folder / "out"), "train_data": [str(data)]}
    settings = DpoSettings(**names, **(fields or {}))
    given |= {"report_to": "none", "beta": BETA}
    arguments = build_trl_arguments(STAGE.arguments, settings, given, max_length=None)
    torch.manual_seed(0)
    model, tokenizer = load_policy(settings), load_tokenizer(settings)
    rows = STAGE.read_data(read_format(settings), tokenizer, settings, arguments)
    return build_dpo_trainer(model, tokenizer, settings, arguments, rows)


def disturb(model: Any, spread: float = 0.2) -> None:
    """Move what is trained away from where it began."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += spread * torch.randn_like(parameter)


def expect_loss(model: Any, reference: Any, repo: Path) -> Tensor:
    """Return the mean loss of the pairs by the formula, each row alone and unpadded."""
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    asked = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    losses = []
    for pair in PAIRS:
        prompt = chat_ids(asked, tokenizer, pair)
        ratios = []
        for key in ("chosen", "rejected"):
            answer = answer_ids(asked, tokenizer, pair[key])
            with torch.no_grad():
                held = sum_log_probs(reference, prompt, answer)
            ratios.append(sum_log_probs(model, prompt, answer) - held)
        losses.append(-torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean()


def take_gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("precompute", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_formula(
    precompute: bool, tiny_repo: Path, tmp_path: Path
) -> None:
    trainer = build(tiny_repo, tmp_path, precompute_ref_log_probs=precompute)
    assert (trainer.ref_model is None) == precompute
    rows: Any = trainer.train_dataset
    assert len({len(row["prompt_ids"] + row["chosen_ids"]) for row in rows}) > 1
    disturb(trainer.model)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(rows)))
    found = take_gradients(trainer.model, loss)
    expected_loss = expect_loss(trainer.model, load(tiny_repo), tiny_repo)
    assert abs(expected_loss - torch.tensor(2.0).log()) > 0.01
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    expected = take_gradients(trainer.model, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_new_adapters_are_compared_with_the_model_without_them(
    tiny_repo: Path, tmp_path: Path
) -> None:
    trainer = build(tiny_repo, tmp_path, {"lora_rank": 4})
    assert trainer.ref_model is None
    model: Any = trainer.model
    assert list(model.peft_config) == ["default"]
    disturb(model, spread=1.0)
    loss = trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset)))
    expected = expect_loss(model.get_base_model(), load(tiny_repo), tiny_repo)
    assert abs(expected - torch.tensor(2.0).log()) > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_a_folder_are_compared_with_what_they_were(
    tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    train("dpo", tiny_repo, data, tmp_path / "one", lora_rank=4)
    trainer = build(tiny_repo, tmp_path, {"adapter": str(tmp_path / "one")})
    model: Any = trainer.model
    disturb(model, spread=1.0)
    loss = trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset)))
    before = PeftModel.from_pretrained(load(tiny_repo), tmp_path / "one").get_base_model()
    expected = expect_loss(model.get_base_model(), before, tiny_repo)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    keys = {"adapter": tmp_path / "one", "save_steps": 2}
    train("dpo", tiny_repo, data, tmp_path / "two", **keys)
    for folder in (tmp_path / "two", tmp_path / "two" / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "ref").exists()


def test_rows_are_what_chat_reads_and_what_the_model_would_write(
    tiny_repo: Path, tmp_path: Path
) -> None:
    rows: Any = build(tiny_repo, tmp_path).train_dataset
    model = load(tiny_repo)
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    for pair, row in zip(PAIRS, rows, strict=True):
        assert row["prompt_ids"] == chat_ids(model, tokenizer, pair)
        for key in ("chosen", "rejected"):
            assert row[f"{key}_ids"] == answer_ids(model, tokenizer, pair[key])


@pytest.mark.parametrize(("lora_rank", "bits"), [(0, 0), (4, 0), (4, 4)])
def test_preferences_are_learned_and_loaded_again(
    lora_rank: int,
    bits: int,
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    held_out = write_rows(tmp_path / "held_out.jsonl", make_pairs(range(20, 23)))
    keys = {"eval_data": held_out, "lora_rank": lora_rank, "bits": bits, "eval_steps": 100}
    rate = 5e-2 if lora_rank else 2e-3
    train("dpo", tiny_repo, data, output, max_steps=12, save_steps=12, learning_rate=rate, **keys)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    least = 0.1 if lora_rank else 0.5
    assert figures["eval_rewards/accuracies"] == 1.0 and figures["eval_rewards/margins"] > least
    losses = read_log(output, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0] - 0.5 * least
    model, base = load(output if not lora_rank else tiny_repo), load(tiny_repo)
    if lora_rank:
        model = PeftModel.from_pretrained(model, output).get_base_model()
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    prompt = chat_ids(base, tokenizer, {"prompt": "is 21 good?"})
    pair = make_pairs([21])[0]
    gains = []
    for key in ("chosen", "rejected"):
        answer = answer_ids(base, tokenizer, pair[key])
        with torch.no_grad():
            gains.append(sum_log_probs(model, prompt, answer) - sum_log_probs(base, prompt, answer))
    assert gains[0] - gains[1] > least / 0.1  # beta


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    quick_python: str, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"lora_rank": 4, "max_steps": 4, "save_steps": 2, "lora_dropout": 0.1}
    command = words("dpo", tiny_repo, data, tmp_path / "cut", **keys)
    run_until_killed(quick_python, command, step=3)
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    train("dpo", tiny_repo, data, tmp_path / "cut", resume=True, **keys)
    train("dpo", tiny_repo, data, tmp_path / "whole", **keys)
    name = "adapter_model.safetensors"
    resumed, straight = (load_file(tmp_path / run / name) for run in ("cut", "whole"))
    assert resumed.keys() == straight.keys() and len(straight) == 4
    for key, tensor in straight.items():
        assert torch.equal(resumed[key], tensor), key


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("padding_free", True, "one prefix"),
        ("truncation_mode", "keep_end", "long_rows"),
        ("use_liger_kernel", True, "Liger"),
        ("router_aux_loss_coef", 0.1, "experts"),
        ("label_smoothing_factor", 0.1, "label_smoothing"),
        ("pad_token", "<pad>", "chat()"),
        ("dataset_num_proc", 4, "before the training"),
    ],
)
def test_keys_that_would_be_wrong_are_refused(
    key: str,
    value: Any,
    reason: str,
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words("dpo", tiny_repo, data, tmp_path / "out", **{key: value})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"chatglm: {key} cannot be {value!r}: ") and reason in line


def test_a_loss_that_is_no_number_stops_the_run(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"learning_rate": 1e30, "max_grad_norm": 0}
    assert main(words("dpo", tiny_repo, data, tmp_path / "out", **keys)) == 2
    assert "the loss was nan in step 2" in capsys.readouterr().err.splitlines()[-1]


def test_a_packed_head_is_refused(tiny_repo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    load(tiny_repo).quantize(8, embeddings=True).save_pretrained(folder)
    load_tokenizer(DpoSettings(model=str(tiny_repo))).save_pretrained(folder)
    with pytest.raises(KeyProblem, match=r"packed head \(torch.int8\)"):
        build(folder, tmp_path, {"lora_rank": 4})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"lora_rank": 4, "sync_ref_model": True}, "lora_rank"),
        ({"lora_rank": 4, "lora_dropout": 0.1, "disable_dropout": True}, "lora_dropout"),
        ({"use_weighting": True, "loss_type": "aot"}, "aot"),
        ({"loss_type": "no_such_loss"}, "no_such_loss"),
    ],
)
def test_keys_that_do_not_go_together_are_one_line(
    keys: dict[str, Any],
    named: str,
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words("dpo", tiny_repo, data, tmp_path / "out", **keys)) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_default_that_is_written_down_is_no_reason_to_stop(
    tiny_repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **kw: sent.append(kw))
    keys = {"padding_free": False, "use_liger_kernel": False, "trust_remote_code": True}
    keys |= {"sample_prompts": ["hello", "你好"], "sample_steps": 1, "save_steps": 1}
    train("dpo", tiny_repo, data, tmp_path / "out", max_steps=1, **keys)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["hello", "你好"]
    # The only card is ours: trl would write one into every checkpoint too.
    assert not sent and list((tmp_path / "out").rglob("README.md")) == [tmp_path / "out/README.md"]
    assert "chatglm train dpo" in (tmp_path / "out" / "README.md").read_text()
