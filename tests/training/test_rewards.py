"""Rewards: functions of somebody's own, frozen reward models, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from chatglm.training.ppo.rewards import (
    RewardFunction,
    RewardModel,
    Sampled,
    load_function,
    load_reward_model,
)

# peft asks for transformers' old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

SAMPLED = Sampled([[1], [2]], [[3], [4]], ["你好", "hi"], ["好", ""], ["很好", ""])
REWARDS = """
LIMIT = 3
def judge(prompts, answers, references):
    return [len(p) + 10 * len(a) + 100 * len(r) for p, a, r in zip(prompts, answers, references)]
def fail(prompts, answers, references):
    raise KeyError("nothing here")
def count_one(prompts, answers, references):
    return [1.0]
def say_nan(prompts, answers, references):
    return [0.0, float("nan")]
def say_text(prompts, answers, references):
    return ["good", "bad"]
def say_none(prompts, answers, references):
    return None
"""


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(REWARDS)
    return path


def test_a_function_of_a_file_scores_texts(rewards_file: Path) -> None:
    scores = load_function(f"{rewards_file}:judge")(SAMPLED)
    assert scores.tolist() == [2 + 10 + 200, 2]
    assert scores.dtype == torch.float32


def test_a_function_of_a_module_scores_texts(
    rewards_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = rewards_file.parent / "reward_package"
    package.mkdir()
    shutil.copy(rewards_file, package / "inner.py")
    monkeypatch.syspath_prepend(rewards_file.parent)
    assert load_function("reward_package.inner:judge")(SAMPLED).tolist() == [212, 2]


@pytest.mark.parametrize(
    ("entry_point", "message"),
    (
        ("judge", "must be module:function or file.py:function, got 'judge'"),
        ("{file}:", "must be module:function"),
        ("{file}:nothing", "nothing is not there in"),
        ("{file}:LIMIT", "LIMIT is no function in"),
        ("{file}.absent.py:judge", "cannot be imported: FileNotFoundError"),
        ("no_such_module_of_ours:judge", "cannot be imported: ModuleNotFoundError"),
    ),
)
def test_a_wrong_entry_point_is_named(rewards_file: Path, entry_point: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(entry_point.format(file=rewards_file))


def test_a_file_that_does_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def judge(:\n")
    with pytest.raises(ValueError, match=r"broken\.py cannot be imported: SyntaxError"):
        load_function(f"{tmp_path / 'broken.py'}:judge")


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("fail", "fail failed: KeyError: 'nothing here'"),
        ("count_one", "a score for each of 2 answers, got 1"),
        ("say_nan", "gave an answer the score nan"),
        ("say_text", r"must return a list of numbers, got \['good', 'bad'\]"),
        ("say_none", "must return a list of numbers, got None"),
    ),
)
def test_a_function_that_does_not_keep_its_word_is_named(
    rewards_file: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(f"{rewards_file}:{name}")(SAMPLED)


def test_a_function_gets_lists_of_its_own() -> None:
    def spoil(prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
        answers.clear()
        return [1.0, 2.0]

    answers = list(SAMPLED.answers)
    assert RewardFunction(spoil, "spoil")(SAMPLED).tolist() == [1, 2]
    assert SAMPLED.answers == answers


@pytest.fixture(scope="module")
def scorer_folder(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole reward model, as `chatglm train reward` writes it."""
    folder = tmp_path_factory.mktemp("scorer") / "reward"
    shutil.copytree(tiny_repo, folder)
    config = json.loads((tiny_repo / "config.json").read_text())
    fields = {k: v for k, v in config.items() if k not in ("torch_dtype", "architectures")}
    model = build_model("ChatGLMForSequenceClassification", seed=3, num_labels=1, **fields)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["auto_map"] = config["auto_map"]
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def load_policy(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def encode_sampled(tokenizer: Any, end_id: int) -> Sampled:
    """Answers of different lengths, the last of which was cut off."""
    prompts = [tokenizer(text)["input_ids"] for text in ("你好", "what is AI?", "早")]
    texts = ("很好！", "a field of study", "早上好")
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers = [[*answers[0], end_id], [*answers[1], end_id], answers[2]]
    return Sampled(prompts, answers, [""] * 3, list(texts), [""] * 3)


def test_a_reward_model_scores_rows_as_if_alone(tiny_repo: Path, scorer_folder: Path) -> None:
    policy, tokenizer = load_policy(tiny_repo)
    scorer = load_reward_model(str(scorer_folder), policy.config, tokenizer)
    assert not any(p.requires_grad for p in scorer.parameters())
    sampled = encode_sampled(tokenizer, policy.config.eos_token_id)
    together = RewardModel(scorer, batch_size=2)(sampled)
    for row, score in enumerate(together):
        ids = sampled.prompt_ids[row] + sampled.answer_ids[row]
        if row == 2:  # its missing <eop> is added
            ids = [*ids, policy.config.eos_token_id]
        with torch.no_grad():
            alone = scorer(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(score, alone)
    assert together.unique().numel() == 3


def test_adapters_of_a_reward_model_are_loaded_with_their_head(
    tiny_repo: Path, tmp_path: Path
) -> None:
    policy, tokenizer = load_policy(tiny_repo)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_repo, trust_remote_code=True, num_labels=1
    )
    config = LoraConfig(
        r=2, target_modules=["query_key_value"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    trained = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    trained.save_pretrained(tmp_path / "adapters")
    loaded = load_reward_model(str(tmp_path / "adapters"), policy.config, tokenizer)
    sampled = encode_sampled(tokenizer, policy.config.eos_token_id)
    torch.testing.assert_close(RewardModel(loaded)(sampled), RewardModel(trained)(sampled))


def change_config(source: Path, target: Path, **fields: Any) -> Path:
    """Copy a model folder with another configuration."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def resize(folder: Path, name: str, rows: int) -> None:
    """Give a stored matrix another number of rows."""
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.zeros(rows, weights[name].shape[1])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "value"), (("vocab_size", 130528), ("eos_token_id", 8005), ("pad_token_id", 5003))
)
def test_a_reward_model_of_another_vocabulary_is_refused(
    tiny_repo: Path, scorer_folder: Path, tmp_path: Path, key: str, value: int
) -> None:
    policy, tokenizer = load_policy(tiny_repo)
    folder = change_config(scorer_folder, tmp_path / "other", **{key: value})
    if key == "vocab_size":
        resize(folder, "transformer.word_embeddings.weight", value)
    ours = getattr(policy.config, key)
    message = f"another vocabulary than the policy: its {key} is {value}, the policy's {ours}"
    with pytest.raises(ValueError, match=message):
        load_reward_model(str(folder), policy.config, tokenizer)


def test_a_reward_model_with_other_words_at_its_ids_is_refused(
    tiny_repo: Path, scorer_folder: Path
) -> None:
    policy, _ = load_policy(tiny_repo)

    class OtherTokenizer:
        def get_vocab(self) -> dict[str, int]:
            tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
            return {**tokenizer.get_vocab(), "an added word": 8000}

    with pytest.raises(
        ValueError, match="only one of the two has 'an added word' with the id 8000"
    ):
        load_reward_model(str(scorer_folder), policy.config, OtherTokenizer())


def test_what_is_no_reward_model_is_refused(
    tiny_repo: Path, scorer_folder: Path, tmp_path: Path
) -> None:
    policy, tokenizer = load_policy(tiny_repo)
    classifier = change_config(
        scorer_folder, tmp_path / "classifier", id2label={"0": "a", "1": "b", "2": "c"}
    )
    resize(classifier, "score.weight", 3)
    adapters = tmp_path / "adapters"
    get_peft_model(
        policy, LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    ).save_pretrained(adapters)
    homeless = tmp_path / "homeless"
    homeless.mkdir()
    lost = {"peft_type": "LORA", "task_type": "SEQ_CLS"}
    lost |= {"base_model_name_or_path": str(tmp_path / "gone")}
    (homeless / "adapter_config.json").write_text(json.dumps(lost))
    for folder, message in (
        (tiny_repo, "is no reward model but ChatGLMForConditionalGeneration"),
        (classifier, "is no reward model but a classifier with 3 scores a row"),
        (adapters, "is no reward model but adapters for CAUSAL_LM"),
        (homeless, "gone, is not there any more: name the model's folder, or put its place"),
        (tmp_path / "absent", "is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward_model(str(folder), policy.config, tokenizer)
