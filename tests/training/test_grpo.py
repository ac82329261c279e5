"""Group relative optimization: what is asked, how it is answered, scored and learned from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import (
    SPECIAL,
    answer_ids,
    chat_ids,
    read_log,
    sum_log_probs,
    train,
    words,
    write_rows,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("trl", reason="trl has no release for Python 3.10")

from chatglm.cli import main
from chatglm.training.models import load_policy, load_tokenizer, read_format
from chatglm.training.settings import KeyProblem
from chatglm.training.stages.grpo import STAGE, GroupTrainer, GrpoSettings, build_grpo_trainer
from chatglm.training.stages.trl_stages import REFUSED, build_trl_arguments

# trl and peft ask for an attribute by the name it had before.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

ROWS = [
    SPECIAL,
    {"prompt": "你好", "response": "你好！"},
    {"messages": [{"role": "user", "content": "a much longer question than the others, really"}]},
    {"prompt": "1", "history": [["2", "3"], ["4", "5"]]},
]
JUDGES = """
def says_yes(prompts, answers, references):
    return [float(answer == "yes") for answer in answers]

def counts(prompts, answers, references):
    return [len(answer) for answer in answers]

def knows(prompts, answers, references):
    return [float(reference != "") + 10 * len(prompt) for prompt, reference in
            zip(prompts, references)]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def judges(tmp_path: Path) -> Path:
    path = tmp_path / "judges.py"
    path.write_text(JUDGES)
    return path


@pytest.fixture(scope="module")
def scorer(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_repo, num_labels=1, trust_remote_code=True
    )
    model.save_pretrained(folder)
    load(tiny_repo)[1].save_pretrained(folder)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    )


def build(repo: Path, data: Path, fields: dict[str, Any], **given: Any) -> GroupTrainer:
    names = {"model": str(repo), "output": str(data.parent / "out"), "train_data": [str(data)]}
    settings = GrpoSettings(**names, **fields)
    sizes = {"per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 6}
    arguments = build_trl_arguments(
        STAGE.arguments, settings, {**sizes, "report_to": "none", **given}
    )
    torch.manual_seed(0)
    model, tokenizer = load_policy(settings), load_tokenizer(settings)
    rows = STAGE.read_data(read_format(settings), tokenizer, settings, arguments)
    return build_grpo_trainer(model, tokenizer, settings, arguments, rows)


def disturb(model: Any) -> None:
    """Move what is trained away from where it began."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def group_keys(judges: Path, **keys: Any) -> dict[str, Any]:
    return {
        "reward_function": f"{judges}:says_yes",
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 4,
        **keys,
    }


def test_questions_are_what_chat_reads(tiny_repo: Path, data: Path, judges: Path) -> None:
    trainer = build(tiny_repo, data, {"reward_function": [f"{judges}:says_yes"]})
    model, tokenizer = load(tiny_repo)
    for given, row in zip(ROWS, trainer.train_dataset, strict=True):
        messages = given.get("messages")
        asked = {"prompt": messages[0]["content"]} if messages else given
        assert row["prompt_ids"] == chat_ids(model, tokenizer, asked)
        assert row["reference"] == given.get("response", given.get("chosen", ""))
    rows = [row for row in trainer.train_dataset for _ in range(2)]
    batch = trainer._generate_and_score_completions(rows)
    for row, ids, mask in zip(rows, batch["prompt_ids"], batch["prompt_mask"], strict=True):
        assert ids[mask.bool()].tolist() == row["prompt_ids"]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_answers_and_their_probabilities_are_the_models_own(
    lora_rank: int, tiny_repo: Path, data: Path, judges: Path
) -> None:
    fields = {"reward_function": [f"{judges}:says_yes"], "lora_rank": lora_rank}
    trainer = build(tiny_repo, data, fields, top_k=1, temperature=0.7)
    model: Any = trainer.model
    disturb(model)
    rows = [row for row in trainer.train_dataset for _ in range(2)]
    batch = trainer._generate_and_score_completions(rows)
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1)
    width = batch["completion_ids"].shape[1]
    found, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, width)
    core = model.get_base_model() if lora_rank else model
    core.eval()
    for number, row in enumerate(rows):
        prompt = torch.tensor([row["prompt_ids"]])
        alone = core.generate(prompt, do_sample=False, max_new_tokens=6)[0, prompt.shape[1] :]
        answer = batch["completion_ids"][number][batch["completion_mask"][number].bool()]
        assert answer.tolist() == alone.tolist()
        whole = torch.cat((prompt[0], answer))[None]
        with torch.no_grad():
            logits = type(core).forward(core, input_ids=whole, use_cache=False).logits / 0.7
        places = torch.arange(prompt.shape[1] - 1, whole.shape[1] - 1)
        expected = logits.log_softmax(-1)[0, places, answer]
        torch.testing.assert_close(found[number, : len(answer)], expected, rtol=1e-4, atol=1e-4)


def test_an_answer_is_drawn_by_its_own_seed(tiny_repo: Path, data: Path, judges: Path) -> None:
    """Whoever is asked beside it, with torch's generator anywhere; but not twice the same."""
    trainer = build(tiny_repo, data, {"reward_function": [f"{judges}:says_yes"]})
    trainer.model.train()
    rows = [row for row in trainer.train_dataset for _ in range(3)]

    def draw(rows: list[Any], step: int) -> list[list[int]]:
        trainer.state.global_step = step
        batch = trainer._generate_and_score_completions(rows)
        pairs = zip(batch["completion_ids"], batch["completion_mask"])
        return [ids[mask.bool()].tolist() for ids, mask in pairs]

    first = draw(rows, 0)
    again = draw(rows[:6], 0)  # the same questions in the same step
    other = draw(rows, 1)
    torch.manual_seed(5)
    trainer._asked = (None, trainer._asked[1])  # as a run that goes on
    assert draw(rows[:6], 1) == other[:6]
    assert draw(rows[6:], 1) == other[6:]
    answers = [*first, *again, *other]
    assert len({tuple(ids) for ids in answers}) == len(answers)
    trainer.model.eval()
    assert draw(rows[:6], 1) == draw(rows, 1)[:6]  # every evaluation draws alike


def test_beams_of_a_user_are_trls(tiny_repo: Path, data: Path, judges: Path) -> None:
    fields = {"reward_function": [f"{judges}:says_yes"]}
    trainer = build(tiny_repo, data, fields, generation_kwargs={"num_beams": 2, "do_sample": False})
    batch = trainer._generate_and_score_completions(list(trainer.train_dataset) * 2)
    model, _ = load(tiny_repo)
    prompt = torch.tensor([trainer.train_dataset[0]["prompt_ids"]])
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 6, "eos_token_id": 7853}
    expected = model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    found = batch["completion_ids"][0][batch["completion_mask"][0].bool()].tolist()
    assert found == expected


def test_rewards_are_those_of_the_folder_and_the_functions(
    tiny_repo: Path, data: Path, judges: Path, scorer: Path
) -> None:
    fields = {"reward_model": str(scorer), "reward_function": [f"{judges}:knows"]}
    trainer = build(tiny_repo, data, fields)
    assert trainer.reward_func_names == ["reward_model", "knows"]
    model, tokenizer = load(tiny_repo)
    rows: Any = list(trainer.train_dataset)
    answers = ["hello", "你好", "<eop>", "a b"]
    ids = [answer_ids(model, tokenizer, answer) for answer in answers]
    ids[3] = ids[3][:-1]  # cut off
    prompts = [row["prompt"] for row in rows]
    found = trainer._calculate_rewards(rows, prompts, answers, ids)
    judge = AutoModelForSequenceClassification.from_pretrained(scorer, trust_remote_code=True)
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        whole = row["prompt_ids"] + answer_ids(model, tokenizer, answer)
        with torch.no_grad():
            expected = judge(input_ids=torch.tensor([whole])).logits[0, 0]
        torch.testing.assert_close(found[number, 0], expected, rtol=1e-4, atol=1e-5)
        assert found[number, 1] == float(row["reference"] != "") + 10 * len(row["prompt"])


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_reference_is_the_model_that_training_began_with(
    lora_rank: int, tiny_repo: Path, data: Path, judges: Path
) -> None:
    fields = {"reward_function": [f"{judges}:says_yes"], "lora_rank": lora_rank}
    trainer = build(tiny_repo, data, fields, beta=0.1)
    assert (trainer.ref_model is None) == bool(lora_rank)
    disturb(trainer.model)
    batch = trainer._generate_and_score_completions(list(trainer.train_dataset) * 2)
    model, _ = load(tiny_repo)
    for number in range(8):
        prompt = batch["prompt_ids"][number][batch["prompt_mask"][number].bool()]
        answer = batch["completion_ids"][number][batch["completion_mask"][number].bool()]
        held = batch["ref_per_token_logps"][number, : len(answer)].sum()
        expected = sum_log_probs(model, prompt.tolist(), answer.tolist())
        torch.testing.assert_close(held, expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_reward_rises_and_the_model_loads_again(
    tiny_repo: Path, judges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"is {n} good?", "response": a} for n in range(6) for a in ("yes", "no")]
    data, base, output = write_rows(tmp_path / "both.jsonl", rows), tmp_path / "sft", tmp_path / "a"
    train("sft", tiny_repo, data, base, max_steps=30, learning_rate=1e-2)
    keys = group_keys(judges, per_device_train_batch_size=16, max_completion_length=3)
    held_out = {"eval_data": data, "per_device_eval_batch_size": 16, "eval_steps": 100}
    train("grpo", base, data, output, max_steps=12, save_steps=12, beta=0.01, **keys, **held_out)
    rewards = read_log(output, "reward")
    assert sum(rewards[:2]) < 1.2 and sum(rewards[-4:]) > 3.2, rewards
    spent = read_log(output, "kl")
    assert spent[0] == pytest.approx(0, abs=1e-5) and spent[-1] > 0.01
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval_reward"] > 0.8
    model, tokenizer = load(output)
    answers = [model.chat(tokenizer, f"is {n} good?", do_sample=False)[0] for n in range(6)]
    assert answers == ["yes"] * 6


def test_adapters_load_onto_the_base(
    tiny_repo: Path, data: Path, judges: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    keys = group_keys(judges, reward_function=f"{judges}:counts", lora_rank=4, beta=0.01)
    keys |= {"sample_prompts": "hello", "sample_steps": 2, "log_completions": True}
    keys |= {"per_device_train_batch_size": 4, "num_generations": 2}
    train("grpo", tiny_repo, data, output, max_steps=2, **keys)
    assert not (output / "ref").exists()
    assert json.loads((output / "samples.jsonl").read_text())["prompt"] == "hello"
    assert len(list((output / "completions").iterdir())) == 2
    model = PeftModel.from_pretrained(load(tiny_repo)[0], output)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), model.disable_adapter():
        before = model(ids).logits
    assert not torch.allclose(model(ids).logits, before, atol=1e-5)


def test_a_run_goes_on_bit_for_bit(
    tiny_repo: Path, data: Path, judges: Path, tmp_path: Path
) -> None:
    sizes = {"per_device_train_batch_size": 4, "num_generations": 2, "save_steps": 3}
    keys = group_keys(judges, reward_function=f"{judges}:counts", max_steps=6, **sizes)
    train("grpo", tiny_repo, data, tmp_path / "whole", **keys)
    train("grpo", tiny_repo, data, tmp_path / "cut", **{**keys, "max_steps": 3})
    train("grpo", tiny_repo, data, tmp_path / "cut", **keys, resume=True)
    resumed, straight = (
        load_file(tmp_path / run / "model.safetensors") for run in ("cut", "whole")
    )
    for key, tensor in straight.items():
        assert torch.equal(resumed[key], tensor), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_vllm", True),
        ("vllm_mode", "server"),
        ("use_transformers_paged", True),
        ("use_transformers_continuous_batching", True),
        ("cache_implementation", "paged"),
        ("chat_template_kwargs", "{}"),
        ("max_tool_calling_iterations", 2),
        ("remove_unused_columns", True),
    ],
)
def test_keys_that_would_be_wrong_are_refused(
    key: str,
    value: Any,
    tiny_repo: Path,
    data: Path,
    judges: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = group_keys(judges, **{key: value})
    assert main(words("grpo", tiny_repo, data, tmp_path / "out", **keys)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"chatglm: {key} cannot be ")


def test_every_causal_shortcut_of_trl_is_refused() -> None:
    from dataclasses import fields

    from trl import DPOConfig, GRPOConfig, RewardConfig

    parts = ("packing", "padding_free", "vllm", "paged", "continuous", "liger", "parallelism")
    names = {f.name for c in (RewardConfig, DPOConfig, GRPOConfig) for f in fields(c)}
    found = {name for name in names if any(part in name for part in parts)}
    assert {"padding_free", "use_vllm", "use_liger_kernel", "parallelism_config"} <= found
    assert {n for n in found if n not in REFUSED and not n.startswith("vllm_")} == set()


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"reward_function": []}, "set reward_model or reward_function"),
        ({"max_completion_length": 2048}, "max_completion_length must be from 1 to 2040"),
        ({"num_generations": 2}, "takes 16 questions at once, and there are 4"),
        ({"num_generations": 5}, "must be divisible by num_generations"),
    ],
)
def test_what_cannot_be_grouped_is_one_line(
    keys: dict[str, Any],
    named: str,
    tiny_repo: Path,
    data: Path,
    judges: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = group_keys(judges) | keys
    if not given["reward_function"]:
        del given["reward_function"]
    assert main(words("grpo", tiny_repo, data, tmp_path / "out", **given)) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_head_that_is_tied_cannot_be_cast(tiny_repo: Path, data: Path, judges: Path) -> None:
    fields = {"reward_function": [f"{judges}:says_yes"]}
    with pytest.raises(KeyProblem, match="not tied"):
        build(tiny_repo, data, fields, cast_lm_head_to_fp32=True)
