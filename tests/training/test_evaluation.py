"""`chatglm train eval`: figures equal those of rows alone, for every way to name a model."""

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.evaluating import evaluation
from chatglm.evaluating.scoring import BatchedModel
from chatglm.evaluating.stage import STAGE
from chatglm.training.command import describe_stage
from chatglm.training.settings import KeyProblem, read_settings
from chatglm.training.stages.ptuning import PtuningSettings, save_prefix

# peft asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
needs_packages = pytest.mark.skipif(
    importlib.util.find_spec("rouge_chinese") is None, reason='the extra "train" is not installed'
)
ROWS = [
    {"prompt": "你好", "response": "你好！很高兴见到你。"},
    {"prompt": "What is the capital of Japan?", "response": "Tokyo."},
    {"prompt": "那法国呢", "response": "巴黎", "history": [["日本的首都是哪里", "东京"]]},
    {"prompt": "3 + 5", "response": "3 加 5 等于 8，这是一个比较长的回答，用来看看填充。"},
    {"prompt": "天空是什么颜色？请用一句很长很长很长的话回答。", "response": "蓝色。"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def evaluate(tiny_repo: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the stage on words as typed, in float32 on the CPU; the output folder is `out`."""

    def run(*words: str, model: Path = tiny_repo, output: str = "out") -> dict[str, Any]:
        given = ["--model", str(model), "--output", str(tmp_path / output), "--device", "cpu"]
        return STAGE.run(
            *read_settings(STAGE.settings, STAGE.arguments, [*given, "--dtype", "float32", *words])
        )

    return run


def load(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, **options
    )
    return model.eval()


@torch.no_grad()
def measure_alone(model: Any, folder: Path, rows: list[dict[str, Any]] = ROWS) -> torch.Tensor:
    """Loss in nats, tokens and right ones of each row's answer, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    measured = []
    for row in rows:
        prompt = core.build_prompt(row["prompt"], row.get("history"))
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        answer_ids = torch.tensor([*answer, core.config.eos_token_id])
        ids = torch.cat((torch.tensor(prompt_ids), answer_ids)).unsqueeze(0)
        logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, answer_ids, reduction="sum")
        right = (logits.argmax(-1) == answer_ids).sum()
        measured.append([loss.item(), len(answer_ids), right.item()])
    return torch.tensor(measured, dtype=torch.float64)


def assert_figures(
    figures: dict[str, Any], measured: torch.Tensor, tolerance: float = 1e-5
) -> None:
    loss, tokens, right = measured.sum(dim=0).tolist()
    assert figures["token_loss"] == pytest.approx(loss / tokens, rel=tolerance)
    assert figures["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=10 * tolerance)
    assert figures["token_accuracy"] == pytest.approx(right / tokens)
    assert (figures["tokens"], figures["rows"]) == (tokens, len(measured))


# Perplexity


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_perplexity_is_that_of_the_rows_alone(
    tiny_repo: Path, tmp_path: Path, data: str, evaluate: Any, batch_size: str
) -> None:
    """Each token counts once, in whatever batch; and each file has figures of its own."""
    other = write_rows(tmp_path / "other.jsonl", ROWS[:2])
    figures = evaluate("--eval_data", data, other, "--eval-batch-size", batch_size)
    measured = measure_alone(load(tiny_repo), tiny_repo)
    assert_figures(figures, torch.cat((measured, measured[:2])))
    assert list(figures["files"]) == [data, other]
    assert_figures(figures["files"][data], measured)
    assert_figures(figures["files"][other], measured[:2])
    assert (figures["task"], figures["skipped"]) == ("perplexity", 0)
    written = (tmp_path / "out" / "eval.json").read_text(encoding="utf-8")
    assert json.loads(written) == figures
    assert (tmp_path / "out" / "settings.yaml").is_file()


def test_rows_that_are_skipped_are_counted(
    tiny_repo: Path, tmp_path: Path, data: str, evaluate: Any
) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "?"}, ROWS[0]])
    long = write_rows(tmp_path / "long.jsonl", [ROWS[0], {**ROWS[0], "prompt": "3 + " * 200}])
    words = ["--max_length", "200", "--eval_data", data]
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: no answer.*bad_rows: skip"):
        evaluate(*words, bad)
    with pytest.raises(ValueError, match=r"long\.jsonl:2: the row has \d+ tokens and max_length"):
        evaluate(*words, long, output="second")
    words += [long, bad]
    figures = evaluate(*words, "--bad_rows", "skip", "--long_rows", "skip", output="third")
    assert figures["skipped"] == 2
    measured = measure_alone(load(tiny_repo), tiny_repo)
    assert_figures(figures, torch.cat((measured, measured[:1], measured[:1])))


def test_packed_weights(tiny_repo: Path, data: str, evaluate: Any) -> None:
    """Products with packed weights round their input on a CPU, batch or no batch."""
    figures = evaluate("--eval_data", data, "--bits", "8", "--group_size", "32")
    packing = {"quant_method": "chatglm", "bits": 8, "group_size": 32}
    packed = load(tiny_repo, quantization_config=packing)
    assert_figures(figures, measure_alone(packed, tiny_repo), 1e-3)
    plain = measure_alone(load(tiny_repo), tiny_repo).sum(dim=0)
    assert figures["token_loss"] != pytest.approx(float(plain[0] / plain[1]), rel=1e-7)


@pytest.mark.parametrize("bits", ["0", "8"])
def test_lora_adapters(
    tiny_repo: Path, tmp_path: Path, data: str, evaluate: Any, bits: str
) -> None:
    from peft import LoraConfig, get_peft_model

    options = {"quantization_config": {"quant_method": "chatglm", "bits": 8}} if bits != "0" else {}
    config = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    adapted = get_peft_model(load(tiny_repo, **options), config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    words = ["--eval_data", data, "--bits", bits, "--adapter", str(tmp_path / "lora")]
    tolerance = 1e-5 if bits == "0" else 1e-3
    figures = evaluate(*words)
    assert_figures(figures, measure_alone(adapted, tiny_repo), tolerance)
    plain = measure_alone(load(tiny_repo, **options), tiny_repo).sum(dim=0)
    assert abs(figures["token_loss"] - float(plain[0] / plain[1])) > 0.01


@pytest.fixture(params=[False, True], ids=["table", "projection"])
def prefixed(request: Any, tiny_repo: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A model with a wide random prefix, and the folder that the stage `ptuning` writes of it."""
    settings = PtuningSettings(
        model=str(tiny_repo),
        output=str(tmp_path / "prefix"),
        pre_seq_len=3,
        prefix_projection=request.param,
    )
    fields = {"pre_seq_len": 3, "prefix_projection": request.param}
    torch.manual_seed(0)
    model = load(tiny_repo, **fields)
    for parameter in model.transformer.prefix_encoder.parameters():
        parameter.data.normal_(0, 3)
    Path(settings.output).mkdir()
    save_prefix(model, settings)
    return model, Path(settings.output)


@pytest.mark.parametrize("layout", ["", "peft"])
def test_p_tuning_prefixes(
    tiny_repo: Path, prefixed: Any, data: str, evaluate: Any, layout: str
) -> None:
    model, folder = prefixed
    figures = evaluate("--eval_data", data, "--adapter", str(folder / layout))
    assert_figures(figures, measure_alone(model, tiny_repo))
    plain = measure_alone(load(tiny_repo), tiny_repo).sum(dim=0)
    assert abs(figures["token_loss"] - float(plain[0] / plain[1])) > 5e-4


def test_other_folders_of_adapters_are_refused(
    tiny_repo: Path, tmp_path: Path, prefixed: Any, data: str, evaluate: Any
) -> None:
    words = ["--eval_data", data, "--adapter"]
    with pytest.raises(ValueError, match=r"has neither adapter_config\.json nor tensors transfor"):
        evaluate(*words, str(tiny_repo))
    with pytest.raises(ValueError, match="away is no folder"):
        evaluate(*words, str(tmp_path / "away"), output="second")
    _, folder = prefixed
    file = folder / "pytorch_model.bin"
    narrow = {n: t[..., :-2] for n, t in torch.load(file, weights_only=True).items()}
    torch.save({name: tensor.clone() for name, tensor in narrow.items()}, file)
    with pytest.raises(ValueError, match=r"prefix has a prefix of .*and this model takes \{'emb"):
        evaluate(*words, str(folder), output="third")


def test_scores_that_are_no_numbers_are_refused(
    tiny_repo: Path, tmp_path: Path, data: str, evaluate: Any
) -> None:
    shutil.copytree(tiny_repo, tmp_path / "broken")
    weights = load_file(tiny_repo / "model.safetensors")
    weights["transformer.final_layernorm.bias"][3] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"scores are no numbers in torch\.float32: set dtype to"):
        evaluate("--eval_data", data, model=tmp_path / "broken")


# Generation


@needs_packages
@pytest.mark.skipif(
    not (ROOT / "pytorch_model.bin.index.json").is_file(), reason="the small model is not there"
)
def test_generated_answers_are_those_of_the_rows_alone(
    tmp_path: Path, data: str, evaluate: Any
) -> None:
    """By this repository's own model, whose answers are texts."""
    words = ["--task", "generation", "--max_new_tokens", "12", "--eval-batch-size", "3"]
    figures = evaluate("--eval_data", data, *words, model=ROOT)
    model = load(ROOT)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    expected = []
    for row in ROWS:
        prompt = model.build_prompt(row["prompt"], row.get("history"))
        inputs = tokenizer([prompt], return_tensors="pt")
        options = {"do_sample": False, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 3}
        ids = model.generate(**inputs, max_new_tokens=12, **options)[0]
        text = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        label = row["response"].replace("！", "!").replace("，", ",")  # as the vocabulary has them
        expected.append({"labels": label, "predict": text.strip()})
    lines = (tmp_path / "out" / "generated_predictions.txt").read_text(encoding="utf-8")
    assert [json.loads(line) for line in lines.splitlines()] == expected
    assert len({line["predict"] for line in expected}) > 3
    pairs = [(line["predict"], line["labels"]) for line in expected]
    counts = {"rows": len(ROWS), "empty": 0, "skipped": 0}
    assert figures == {"task": "generation", **evaluation.metrics.average_scores(pairs), **counts}


@needs_packages
def test_empty_and_right_answers_are_scored(
    data: str, evaluate: Any, tiny_repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    ids = [tokenizer(row["response"], add_special_tokens=False)["input_ids"] for row in ROWS]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    answers = [[end, pad], [end], [*ids[2], end, pad], [*ids[3], end], [*ids[4], end]]
    monkeypatch.setattr(BatchedModel, "generate", lambda *args: answers)
    figures = evaluate("--eval_data", data, "--task", "generation")
    assert figures["empty"] == 2
    # Orders that a short text has none of are smoothed: two of 巴黎, one of 蓝色。
    parts = [0, 0, (1 / 2 * 1 / 4) ** 0.25, 1, (1 / 2) ** 0.25]
    assert figures["bleu-4"] == pytest.approx(100 * sum(parts) / len(parts), abs=1e-4)


@needs_packages
def test_drawn_answers_follow_the_seed(tmp_path: Path, data: str, evaluate: Any) -> None:
    words = ["--task", "generation", "--max_new_tokens", "6", "--do_sample", "--temperature", "3"]
    texts = []
    for output, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        evaluate("--eval_data", data, *words, "--top_p", "1", "--seed", seed, output=output)
        texts.append((tmp_path / output / "generated_predictions.txt").read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]


def test_a_missing_package_is_found_before_anything_is_written(
    tmp_path: Path, data: str, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miss() -> None:
        raise ImportError("no jieba")

    monkeypatch.setattr(evaluation.metrics, "load_packages", miss)
    with pytest.raises(ImportError, match="no jieba"):
        evaluate("--eval_data", data, "--task", "generation")
    assert not (tmp_path / "out").exists()


# Choices


@pytest.fixture
def exam(tmp_path: Path) -> Path:
    """Two subjects in C-Eval's form; one of them without answers, as its test files are."""
    folder = tmp_path / "ceval"
    for split in ("dev", "val"):
        (folder / split).mkdir(parents=True)
        rows = "id,question,A,B,C,D,answer\n0,一加一？,1,2,3,4,B\n5,二加二？,1,2,3,4,D\n"
        (folder / split / f"logic_{split}.csv").write_text(rows, encoding="utf-8")
    rows = "id,question,A,B,C,D\n3,三加三？,1,2,6,4\n"
    (folder / "val" / "law_val.csv").write_text(rows, encoding="utf-8")
    return folder


def test_a_test_is_marked_and_its_answers_are_written(
    exam: Path, tmp_path: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest letter behind each prompt is B, whatever the model."""
    scores = torch.tensor([0.1, 0.9, 0.2, 0.3])
    monkeypatch.setattr(
        BatchedModel, "score_next", lambda self, prompts, ids: scores.expand(len(prompts), 4)
    )
    words = ["--task", "choices", "--eval_data", str(exam)]
    figures = evaluate(*words)
    half = {"questions": 2, "accuracy": 0.5}
    assert figures == {
        "task": "choices",
        **half,
        "mean_accuracy": 0.5,
        "categories": {"Humanities": {**half, "mean_accuracy": 0.5}},
        "bad_rows": 0,
        "subjects": {
            "law": {"questions": 0, "accuracy": None, "shots": 0.0, "skipped": 0},
            "logic": {**half, "shots": 0.0, "skipped": 0},
        },
    }
    written = json.loads((tmp_path / "out" / "submission.json").read_text(encoding="utf-8"))
    assert written == {"law": {"3": "B"}, "logic": {"0": "B", "5": "B"}}
    assert json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8")) == figures


@pytest.mark.parametrize("answer_by", ["letter", "text", "text_mean"])
def test_a_test_with_shots(exam: Path, evaluate: Any, answer_by: str) -> None:
    words = ["--task", "choices", "--eval_data", str(exam), "--answer_by", answer_by]
    figures = evaluate(*words, "--shots", "2", "--subjects", "logic")
    assert list(figures["subjects"]) == ["logic"]
    assert figures["subjects"]["logic"]["shots"] == 2
    assert figures["accuracy"] in (0, 0.5, 1)


# Settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "speed"], "task must be perplexity or choices or generation, got 'speed'"),
        (["--lora_rank", "4"], "lora_rank must be left out: an evaluation trains nothing, got 4"),
        (["--train_data", "x"], "train_data must be left out"),
        (["--resume"], "resume must be left out"),
        (["--learning_rate", "1"], "there is no key learning_rate"),
        (["--eval-batch-size", "0"], "per_device_eval_batch_size must be 1 or more, got 0"),
        (["--shots", "-1"], "shots must be 0 or more, got -1"),
        (["--shots", "1", "--split", "dev"], "shots must be 0 for the split dev"),
        (["--split", "train"], "split must be dev or val or test, got 'train'"),
        (["--answer_by", "luck"], "answer_by must be letter or text or text_mean"),
        (["--language", "fr"], "language must be zh or en, got 'fr'"),
        (["--top_p", "0"], r"top_p must be in \(0, 1\], got 0"),
        (["--temperature", "0"], "temperature must be more than 0"),
        (["--device", "gpu9"], "device must be one of .*, got gpu9"),
        (["--task", "choices", "--eval_data", "a", "b"], "eval_data must be the one folder of"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    data: str, evaluate: Any, words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate("--eval_data", data, *words)


def test_no_data_and_a_full_folder_are_refused(tmp_path: Path, data: str, evaluate: Any) -> None:
    with pytest.raises(KeyProblem, match="eval_data must be files, or a test's folder, got"):
        evaluate()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match=r"the output folder .*out is not empty"):
        evaluate("--eval_data", data)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_help_lists_every_key() -> None:
    text = describe_stage("eval")
    assert all(f"--{field.name} " in text for field in dataclasses.fields(STAGE.settings))
