"""D14: `chatglm train score` asks a finished reward model what pairs and answers are worth.

Every score is held against that of the row alone, of whichever folder the model is, and the
figures against their definitions.
"""

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model
from safetensors.torch import load_file, save_file

pytest.importorskip("chatglm", reason="needs the package for chatglm train")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from chatglm.cli import main
from chatglm.data.dialects import read_answers
from chatglm.data.records import Columns, RowProblem
from chatglm.evaluating.reward_scores import Scored as ScoredAnswer
from chatglm.evaluating.reward_scores import expect_best, read_candidates, summarize_answers
from chatglm.training.ppo.rewards import load_reward_model

# peft asks for transformers' old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

PAIRS = [
    {"prompt": "你好", "chosen": "你好！很高兴见到你。", "rejected": "哼", "kind": "rude"},
    {"prompt": "a", "chosen": "b", "rejected": "a longer and a wrong one", "kind": "long"},
    {
        "prompt": "那法国呢",
        "history": [["日本的首都是哪里", "东京"]],
        "chosen": "巴黎",
        "rejected": "柏林 [gMASK]",
    },
    {"prompt": "what is AI?", "chosen": "a field of study", "rejected": "<eop>", "kind": "rude"},
]
SAMPLED = [
    {"prompt": "你好", "answers": ["你好！", "哼", "你好！很高兴见到你，有什么可以帮你？", "a"]},
    {"prompt": "a", "response": "b"},
    {
        "prompt": "那法国呢",
        "history": [["日本的首都是哪里", "东京"]],
        "answers": [{"answer": "柏林", "score": 9}, {"answer": "巴黎", "score": 1}],
    },
    {
        "messages": [
            {"role": "user", "content": "1 + 1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "2 + 2"},
            {"role": "assistant", "content": "4"},
        ]
    },
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole reward model, as `chatglm train reward` writes it."""
    folder = tmp_path_factory.mktemp("whole") / "reward"
    shutil.copytree(tiny_repo, folder)
    fields = json.loads((tiny_repo / "config.json").read_text())
    sizes = {k: v for k, v in fields.items() if k not in ("torch_dtype", "architectures")}
    model = build_model("ChatGLMForSequenceClassification", seed=3, num_labels=1, **sizes)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"auto_map": fields["auto_map"]}))
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with a score head, which name their base."""
    folder = tmp_path_factory.mktemp("adapters") / "reward"
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_repo, trust_remote_code=True, num_labels=1
    )
    config = LoraConfig(
        r=2, target_modules=["query_key_value"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    trained = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    trained.save_pretrained(folder)
    return folder


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run the command in float32 on the CPU; the figures are its last line."""

    def run(folder: Path, data: Path, *words: str, output: str = "out") -> dict[str, Any]:
        given = ["--eval_data", str(data), "--output", str(tmp_path / output), "--device", "cpu"]
        assert main(["train", "score", str(folder), *given, *words]) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1])

    return run


def score_alone(folder: Path, base: Path, record: Any, answer: str, bits: int = 0) -> float:
    """Return the score of a row that is alone, through the model's own prompt."""
    policy = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    scorer: Any = load_reward_model(str(folder), policy.config, tokenizer)
    if bits:
        scorer = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        ).quantize(bits)
    prompt = policy.build_prompt(record["prompt"], record.get("history"))
    ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    ids = [*ids, *tokenizer(answer, **plain)["input_ids"], policy.config.eos_token_id]
    with torch.no_grad():
        return scorer(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0].item()


@pytest.mark.parametrize("kind", ["whole", "adapters", "base and adapters", "packed"])
def test_every_score_is_that_of_the_row_alone(
    kind: str, tiny_repo: Path, whole: Path, adapters: Path, tmp_path: Path, score: Any
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    folder = {"whole": whole, "adapters": adapters, "packed": whole}.get(kind, tiny_repo)
    words = {"packed": ["--bits", "8"], "base and adapters": ["--adapter", str(adapters)]}
    figures = score(folder, data, "--eval-batch-size", "3", *words.get(kind, []))
    scored = adapters if kind == "base and adapters" else folder
    bits = 8 if kind == "packed" else 0
    lines = read(tmp_path / "out" / "scores.jsonl")
    assert [line["row"] for line in lines] == [f"{data}:{n}" for n in (1, 2, 3, 4)]
    assert [line.get("kind") for line in lines] == [pair.get("kind") for pair in PAIRS]
    for pair, line in zip(PAIRS, lines):
        for key in ("chosen", "rejected"):
            alone = score_alone(scored, tiny_repo, pair, str(pair[key]), bits)
            # Products of packed weights round their input otherwise for one row than for several.
            assert line[key] == pytest.approx(alone, rel=1e-4, abs=2e-2 if bits else 1e-4)
            if bits:
                assert abs(line[key] - score_alone(scored, tiny_repo, pair, str(pair[key]))) > 1e-5
    check_pairs(figures, lines)
    assert json.loads((tmp_path / "out" / "pairs.json").read_text()) | {"task": "pairs"} == figures


def check_pairs(figures: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Hold the figures of pairs against the scores that were written."""
    margins = np.array([line["chosen"] - line["rejected"] for line in lines])
    assert figures["accuracy"] == (margins > 0).mean()
    assert figures["mean_margin"] == pytest.approx(margins.mean())
    assert figures["mean_chosen"] == pytest.approx(np.mean([line["chosen"] for line in lines]))
    assert (figures["pairs"], figures["ties"], figures["skipped"]) == (4, 0, 0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)

    def count(text: Any) -> int:
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        return len(tokenizer(text, **plain)["input_ids"])

    longer = [np.sign(count(pair["chosen"]) - count(pair["rejected"])) for pair in PAIRS]
    assert figures["longer_wins"] == np.mean([(1 + sign) / 2 for sign in longer])
    rude = margins[[0, 3]]
    assert figures["kinds"]["rude"]["accuracy"] == (rude > 0).mean()
    assert figures["kinds"]["long"]["longer_wins"] == 0


def test_the_figures_are_those_of_the_stage_that_trained_it(
    tiny_repo: Path, tmp_path: Path, pictures: Any, score: Any
) -> None:
    """Whole, with adapters, and with these merged: pairs.json is as `train reward` wrote it."""
    pytest.importorskip("trl")
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    short = ["--max_steps", "2", "--report_to", "none", "--disable_tqdm", "--learning_rate", "1e-3"]
    for name, more in {"full": [], "lora": ["--lora_rank", "2"]}.items():
        words = ["--model", str(tiny_repo), "--train_data", str(data), "--eval_data", str(data)]
        words += ["--output", str(tmp_path / name), *short, *more]
        assert main(["train", "reward", *words]) == 0
        found = score(tmp_path / name, data, output=f"scored_{name}")
        trained = json.loads((tmp_path / name / "pairs.json").read_text())
        assert trained.keys() <= found.keys()
        for key in ("accuracy", "ties", "longer_wins", "pairs"):
            assert found[key] == trained[key]
        for key in ("mean_margin", "mean_chosen", "mean_rejected"):
            assert found[key] == pytest.approx(trained[key], rel=1e-3, abs=1e-5)
        assert found["kinds"].keys() == trained["kinds"].keys() == {"rude", "long"}


def test_a_merged_reward_model_scores_as_its_adapters(
    tiny_repo: Path, adapters: Path, tmp_path: Path, score: Any
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_repo, trust_remote_code=True, num_labels=1
    )
    merged = PeftModel.from_pretrained(base, str(adapters)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(ROOT / name, tmp_path / "merged")
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    score(adapters, data, output="apart")
    score(tmp_path / "merged", data, output="joined")
    apart, joined = (read(tmp_path / name / "scores.jsonl") for name in ("apart", "joined"))
    for one, other in zip(apart, joined, strict=True):
        assert one["chosen"] == pytest.approx(other["chosen"], rel=1e-4)


def test_answers_are_scored_ranked_and_the_best_are_rows_for_sft(
    tiny_repo: Path, whole: Path, tmp_path: Path, score: Any
) -> None:
    data = write(tmp_path / "sampled.jsonl", SAMPLED)
    figures = score(whole, data, "--task", "answers", "--per_device_eval_batch_size", "2")
    lines = read(tmp_path / "out" / "scores.jsonl")
    places = [int(line["row"].rpartition(":")[2]) for line in lines]
    assert places == [1, 1, 1, 1, 2, 3, 3, 4, 4]
    assert [line.get("answer_number") for line in lines] == [0, 1, 2, 3, None, 0, 1, None, None]
    for line in lines[:7]:
        alone = score_alone(whole, tiny_repo, SAMPLED[places[0] - 1] | line, line["answer"])
        if line["row"].endswith(":3"):
            alone = score_alone(whole, tiny_repo, SAMPLED[2], line["answer"])
        assert line["score"] == pytest.approx(alone, rel=1e-4, abs=1e-4)
    first = sorted(lines[:4], key=lambda line: -line["score"])
    assert [line["rank"] for line in first] == [1, 2, 3, 4]
    best = read(tmp_path / "out" / "best.jsonl")
    assert [row["prompt"] for row in best] == ["你好", "那法国呢"]  # the rows with several answers
    assert best[0]["response"] == first[0]["answer"] and best[0]["score"] == first[0]["score"]
    assert best[1]["history"] == [["日本的首都是哪里", "东京"]]
    (taught,) = read_answers(best[1], Columns())
    assert (taught.history, taught.answer) == ([("日本的首都是哪里", "东京")], best[1]["response"])
    scores = np.array([line["score"] for line in lines])
    assert (figures["answers"], figures["questions"], figures["with_several"]) == (9, 5, 2)
    assert figures["mean"] == pytest.approx(scores.mean())
    assert (figures["lowest"], figures["highest"]) == (scores.min(), scores.max())
    assert list(figures["best_of"]) == ["1", "2"]
    expected = (scores[:4].mean() + scores[5:7].mean()) / 2
    assert figures["best_of"]["1"] == pytest.approx(expected)
    assert json.loads((tmp_path / "out" / "answers.json").read_text())["mean"] == figures["mean"]


def make_question(*scores: float) -> list[Any]:
    (record,) = read_answers({"prompt": "q", "response": "a"}, Columns())
    return [ScoredAnswer(record, score, tokens) for tokens, score in enumerate(scores)]


def test_the_best_of_n_is_the_mean_over_all_draws() -> None:
    question = make_question(3.0, -1.0, 0.5, 2.0, 0.5)
    scores = [answer.score for answer in question]
    found = expect_best([question])
    assert list(found) == ["1", "2", "4", "5"]
    for n, value in found.items():
        draws = [max(draw) for draw in combinations(scores, int(n))]
        assert value == pytest.approx(np.mean(draws))
    two = expect_best([question, make_question(1.0, 5.0)])
    assert list(two) == ["1", "2"] and two["2"] == pytest.approx((found["2"] + 5) / 2)


def test_longer_answers_are_held_against_their_scores() -> None:
    """Of three answers of 0, 1 and 2 tokens the pairs are (1, 0), (2, 0) and (2, 1)."""
    assert summarize_answers([make_question(0.0, 1.0, 0.0)])["longer_wins"] == (1 + 0.5 + 0) / 3
    alone = summarize_answers([make_question(7.0)])
    assert "best_of" not in alone and "longer_wins" not in alone


@pytest.mark.parametrize("answers", ["one text", [], [{"text": "a"}], [3], [""]])
def test_answers_that_are_none_are_refused(answers: Any) -> None:
    with pytest.raises(RowProblem, match="answers"):
        list(read_candidates({"prompt": "q", "answers": answers}, Columns()))


def cut_head(adapters: Path, folder: Path) -> Path:
    """Copy adapters without their score head."""
    shutil.copytree(adapters, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "score" not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def cut_scores(whole: Path, folder: Path) -> Path:
    """Copy a whole reward model without the weights of its head."""
    shutil.copytree(whole, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_has_no_scores_is_refused_before_anything_is_written(
    tiny_repo: Path,
    whole: Path,
    adapters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    language = tmp_path / "language"
    config = LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    policy = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    get_peft_model(policy, config).save_pretrained(language)
    cases: list[tuple[list[str], str]] = [
        ([str(tiny_repo)], "is no reward model but ChatGLMForConditionalGeneration"),
        ([str(language)], "is no reward model but adapters for CAUSAL_LM"),
        ([str(cut_head(adapters, tmp_path / "cut"))], "adapters without a tensor score.weight"),
        ([str(cut_scores(whole, tmp_path / "cut_whole"))], "score.weight"),
        ([str(tiny_repo), "--adapter", str(whole)], "has no adapter_config.json"),
        ([], "model must be the folder of a reward model"),
        ([str(whole), "--task", "rank"], "task must be pairs or answers, got 'rank'"),
        ([str(whole), "--resume"], "resume must be left out"),
        ([str(whole), "--max_length", "9"], "max_length is 9"),
    ]
    for words, message in cases:
        given = ["--eval_data", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
        assert main(["train", "score", *words, *given]) == 2
        said = capsys.readouterr().err
        assert said.startswith("chatglm: ") and said.count("\n") == 1 and message in said, said
        assert not (tmp_path / "out" / "scores.jsonl").exists()


def test_rows_that_are_left_out_are_counted(whole: Path, tmp_path: Path, score: Any) -> None:
    rows = [
        *PAIRS[:2],
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "long " * 80, **{k: PAIRS[0][k] for k in ("chosen", "rejected")}},
    ]
    data = write(tmp_path / "pairs.jsonl", rows)
    words = ["--bad_rows", "skip", "--long_rows", "skip", "--max_length", "60"]
    figures = score(whole, data, *words)
    assert (figures["pairs"], figures["skipped"]) == (2, 2)
    assert len(read(tmp_path / "out" / "scores.jsonl")) == 2


def test_a_reward_model_is_not_measured_as_a_language_model(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers would be those of a model whose head nobody trained with it."""
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    words = ["--eval_data", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["train", "eval", str(whole), *words]) == 2
    assert "is a reward model or classifier, which gives scores" in capsys.readouterr().err
