"""D14: `chatglm train eval --matrix`: base against tuned models, in several number formats.

A cell has the figures of `chatglm train eval` for that model and that format; what was measured is
kept, and a model that cannot be measured takes nothing from the others.
"""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_adapter, replace_weights

pytest.importorskip("chatglm", reason="needs the package for chatglm train")

from transformers import AutoModel, AutoModelForCausalLM

from chatglm.cli import main
from chatglm.evaluating import matrix
from chatglm.evaluating.matrix import list_variants, place_cell
from chatglm.evaluating.matrix_page import Cell, Matrix, draw_matrix, format_page
from chatglm.evaluating.settings import EvalSettings
from chatglm.training.stage_settings import PtuningSettings
from chatglm.training.stages.ptuning import save_prefix

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

ROWS = [
    {"prompt": "你好", "response": "你好！很高兴见到你。"},
    {"prompt": "What is the capital of Japan?", "response": "Tokyo."},
    {"prompt": "那法国呢", "response": "巴黎", "history": [["日本的首都是哪里", "东京"]]},
]
FORMATS = ("float32", "INT8", "INT4")


@pytest.fixture(scope="module")
def tuned(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with other weights."""
    folder = tmp_path_factory.mktemp("tuned") / "out-sft"
    shutil.copytree(tiny_repo, folder)
    replace_weights(folder, lambda weights: [tensor.mul_(0.9) for tensor in weights.values()])
    return folder


@pytest.fixture(scope="module")
def lora(tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "sft_lora"
    make_adapter(tiny_repo, folder, task_type="CAUSAL_LM")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(
    tiny_repo: Path, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """Run `chatglm train eval`; return its figures, or what it says if it fails."""

    def run(*words: str, output: str = "matrix", model: Path = tiny_repo) -> Any:
        given = ["--eval_data", data, "--output", str(tmp_path / output), "--device", "cpu"]
        given = [w for w in given if "--eval_data" not in words or w not in ("--eval_data", data)]
        code = main(["train", "eval", str(model), *given, *map(str, words)])
        captured = capsys.readouterr()
        if code == 0:
            return json.loads(captured.out.splitlines()[-1])
        assert code == 2
        return captured.err

    return run


def cell(found: dict[str, Any], model: str, name: str) -> dict[str, Any]:
    (one,) = [c for c in found["cells"] if (c["model"], c["format"]) == (model, name)]
    return one


def test_every_cell_is_what_eval_gives(
    tiny_repo: Path, tuned: Path, lora: Path, tmp_path: Path, run: Any
) -> None:
    found = run("--matrix", "--models", tuned, lora)
    names = [tiny_repo.name, tuned.name, lora.name]
    assert (found["models"], found["formats"]) == (names, list(FORMATS))
    adapter = ["--adapter", str(lora)]
    for name, number_format, model, words in (
        (tiny_repo.name, "float32", tiny_repo, []),
        (tuned.name, "INT8", tuned, ["--bits", "8"]),
        (lora.name, "float32", tiny_repo, adapter),
        (lora.name, "INT4", tiny_repo, [*adapter, "--bits", "4"]),
    ):
        alone = run(*words, output=f"{name}{number_format}", model=model)
        one = cell(found, name, number_format)
        for key in ("perplexity", "token_accuracy", "tokens", "rows"):
            assert one[key] == alone[key]
    losses = {(c["model"], c["format"]): c["perplexity"] for c in found["cells"]}
    assert len(set(losses.values())) == 9  # no model stands for another, no format for another
    sizes = [cell(found, tuned.name, name)["gigabytes"] for name in FORMATS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    check_files(tmp_path / "matrix", found, names)


def check_files(folder: Path, found: dict[str, Any], names: list[str]) -> None:
    """The same in JSON, in tables and as a picture."""
    assert json.loads((folder / "matrix.json").read_text(encoding="utf-8")) == found
    assert (folder / "matrix.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "matrix.md").read_text(encoding="utf-8")
    assert "float32 stands where a GPU would have float16" in page
    for key in ("perplexity", "token_accuracy", "gigabytes"):
        table = page.partition(f"## {key} (")[2].partition("##")[0]
        lines = [line for line in table.splitlines() if line.startswith("| ")]
        assert lines[0] == "| model | float32 | INT8 | INT4 |"
        for name, line in zip(names, lines[2:], strict=True):
            shown = [text.strip().split(" ")[0] for text in line.strip("| ").split("|")]
            figures = [cell(found, name, number)[key] for number in FORMATS]
            assert shown == [name, *(f"{figure:.4g}" for figure in figures)]


def test_a_matrix_goes_on_and_grows(
    tiny_repo: Path, tuned: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured with these files and keys is not measured again, and all else is."""
    measured: list[tuple[str, int]] = []
    measure = matrix.measure_cell

    def note(settings: EvalSettings, asked: Any, task: Any) -> Any:
        measured.append((Path(settings.model).name, settings.bits))
        if len(measured) == 2:
            raise KeyboardInterrupt  # as by a person; a kill leaves no more
        return measure(settings, asked, task)

    monkeypatch.setattr(matrix, "measure_cell", note)
    words = ["--matrix", "--matrix_bits", "0", "4", "--models", tuned]
    assert main(["train", "eval", str(tiny_repo), *make_words(tmp_path, *words)]) == 130
    assert "is not empty" in run(*words)
    found = run(*words, "--resume")
    assert measured[2:] == [*measured[1:2], (tuned.name, 0), (tuned.name, 4)]
    count, again = len(measured), run(*words, "--resume")
    assert len(measured) == count and again["cells"] == found["cells"]
    assert strip(found) == strip(run(*words, output="straight"))
    grown = tmp_path / "grown"
    shutil.copytree(tuned, grown)
    count = len(measured)
    more = run(*words, grown, "--resume")
    assert measured[count:] == [("grown", 0), ("grown", 4)]
    assert strip(more)[:4] == strip(found)
    replace_weights(grown, lambda weights: [tensor.mul_(1.1) for tensor in weights.values()])
    count, changed = len(measured), run(*words, grown, "--resume")
    assert measured[count:] == [("grown", 0), ("grown", 4)]
    assert strip(changed)[4:] != strip(more)[4:]
    assert "task was 'perplexity' when" in run(*words, "--resume", "--task", "generation")


def make_words(tmp_path: Path, *words: Any) -> list[str]:
    given = ["--eval_data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "matrix")]
    return [*given, "--device", "cpu", *map(str, words)]


def strip(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells without the time that they took."""
    return [{k: v for k, v in one.items() if k != "seconds"} for one in found["cells"]]


def test_half_a_cell_is_measured_again(tmp_path: Path, run: Any) -> None:
    found = run("--matrix", "--matrix_bits", "8")
    (file,) = (tmp_path / "matrix" / "cells").glob("*/cell.json")
    file.write_text(file.read_text()[:40])
    assert strip(run("--matrix", "--matrix_bits", "8", "--resume")) == strip(found)
    assert json.loads(file.read_text())["figures"]["perplexity"]


def spoil(weights: dict[str, torch.Tensor]) -> None:
    name = next(name for name in weights if "mlp.dense_h_to_4h.weight" in name)
    weights[name][0, 0] = float("nan")


def test_a_cell_that_fails_is_told_and_the_others_are_measured(
    tiny_repo: Path, tuned: Path, tmp_path: Path, run: Any
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_repo, broken)
    replace_weights(broken, spoil)
    said = run("--matrix", "--models", broken, tuned, "--matrix_bits", "0", "4")
    last = said.splitlines()[-1]
    assert last.startswith(f"chatglm: {tmp_path / 'matrix'}/matrix.md is written, but: broken ")
    assert "broken float32: failed: " in said and "resume: true" in last
    found = json.loads((tmp_path / "matrix" / "matrix.json").read_text())
    failed = [c for c in found["cells"] if "problem" in c]
    assert {c["model"] for c in failed} == {"broken"} and len(failed) == len(found["problems"])
    for name in (tiny_repo.name, tuned.name):
        assert all("perplexity" in cell(found, name, number) for number in ("float32", "INT4"))
    page = (tmp_path / "matrix" / "matrix.md").read_text()
    assert "| broken | failed | " in page and "## Not measured\n\n- broken float32: " in page
    shutil.copy(tiny_repo / "model.safetensors", broken)
    mended = run("--matrix", "--models", broken, tuned, "--matrix_bits", "0", "4", "--resume")
    assert not mended["problems"]
    whole = cell(mended, tiny_repo.name, "float32")["perplexity"]
    assert cell(mended, "broken", "float32")["perplexity"] == whole


def test_one_model_is_in_memory_at_a_time(
    tuned: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    counts: list[int] = []

    class Watched(matrix.EvaluatedModel):
        def __init__(self, settings: EvalSettings) -> None:
            counts.append(sum(model() is not None for model in alive))
            super().__init__(settings)
            alive.append(weakref.ref(self.model.model))

    monkeypatch.setattr(matrix, "EvaluatedModel", Watched)
    run("--matrix", "--models", tuned, "--matrix_bits", "0", "8")
    gc.collect()
    assert counts == [0] * 4 and all(model() is None for model in alive)


def test_generation_and_choices_have_their_figures(tuned: Path, tmp_path: Path, run: Any) -> None:
    """Each cell keeps its own answers; drawn ones are the same whenever the cell is measured."""
    pytest.importorskip("rouge_chinese")
    keys = ["--task", "generation", "--max_new_tokens", "6", "--do_sample"]
    found = run("--matrix", *keys, "--matrix_bits", "0", "8", "--models", tuned)
    assert {"rouge-l", "bleu-4"} <= cell(found, tuned.name, "INT8").keys()
    texts = list((tmp_path / "matrix" / "cells").glob("*/generated_predictions.txt"))
    assert len(texts) == 4 and all(t.read_text().count("\n") == len(ROWS) for t in texts)
    alone = run(*keys, "--bits", "8", output="alone", model=tuned)
    assert cell(found, tuned.name, "INT8")["rouge-l"] == alone["rouge-l"]
    test = tmp_path / "ceval" / "val"
    test.mkdir(parents=True)
    lines = "".join(f"{i},What is {i}?,{i},b,c,d,A,\n" for i in range(3))
    (test / "logic_val.csv").write_text("id,question,A,B,C,D,answer,explanation\n" + lines)
    words = ["--task", "choices", "--eval_data", str(test.parent), "--matrix_bits", "4"]
    found = run("--matrix", *words, output="choices")
    assert found["cells"][0]["questions"] == 3 and "accuracy" in found["cells"][0]
    assert list((tmp_path / "choices" / "cells").glob("*/submission.json"))


def test_a_packed_folder_is_in_its_own_column_only(
    tiny_repo: Path, tmp_path: Path, run: Any
) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(tiny_repo, packed)
    (packed / "model.safetensors").unlink()
    AutoModel.from_pretrained(tiny_repo, trust_remote_code=True).quantize(4).save_pretrained(packed)
    found = run("--matrix", "--models", packed)
    assert "perplexity" in cell(found, "packed", "INT4")
    for name in ("float32", "INT8"):
        assert cell(found, "packed", name)["note"] == "its weights are stored in 4 bits"
        assert "perplexity" not in cell(found, "packed", name)
    row = (tmp_path / "matrix" / "matrix.md").read_text().partition("| packed | - | - | ")[2]
    assert row[0].isdigit() and "packed INT8: its weights are stored in 4 bits" in found["notes"]


def test_a_prefix_goes_onto_the_base(tiny_repo: Path, tmp_path: Path, run: Any) -> None:
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    options = {"trust_remote_code": True, "dtype": torch.float32, "pre_seq_len": 3}
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.transformer.prefix_encoder.parameters():
        parameter.data.normal_(0, 3, generator=generator)
    save_prefix(model, PtuningSettings(model=str(tiny_repo), output=str(prefix), pre_seq_len=3))
    found = run("--matrix", "--models", prefix, "--matrix_bits", "0")
    alone = run("--adapter", str(prefix), output="alone")
    assert cell(found, "prefix", "float32")["perplexity"] == alone["perplexity"]
    assert alone["perplexity"] != cell(found, tiny_repo.name, "float32")["perplexity"]


def test_what_no_matrix_can_be_made_of_is_refused_at_once(
    tiny_repo: Path, tuned: Path, tmp_path: Path, run: Any
) -> None:
    gone = tmp_path / "gone"
    for words, message in (
        (["--matrix", "--models", gone], f"models names {gone}, which is no folder"),
        (["--matrix", "--models", tuned, tuned], f"models names {tuned} a second time"),
        (["--matrix", "--models", tiny_repo], f"models names {tiny_repo} a second time"),
        (["--matrix", "--bits", "4"], "bits must be left out: a matrix has matrix_bits, got 4"),
        (["--matrix", "--matrix_bits", "4", "4"], "some of 0, 8 and 4, each once"),
        (["--matrix", "--matrix_bits", "16"], "some of 0, 8 and 4, each once"),
        (["--models", tuned], "models must be left out, or matrix be true"),
        (["--matrix_bits", "4"], "matrix_bits must be left out, or matrix be true"),
        (["--resume"], "resume must be left out"),
    ):
        said = run(*words)
        assert message in said and said.count("\n") == 1, said
        assert not (tmp_path / "matrix" / "cells").exists()


def test_models_of_one_name_keep_their_paths(tiny_repo: Path, tuned: Path, tmp_path: Path) -> None:
    same = tmp_path / tiny_repo.name
    shutil.copytree(tiny_repo, same)
    settings = EvalSettings(model=str(tiny_repo), output="out", models=[str(same), str(tuned)])
    variants = list_variants(settings)
    assert [v.name for v in variants] == [str(tiny_repo), str(same), tuned.name]
    assert len({place_cell(settings, v, bits) for v in variants for bits in (0, 8, 4)}) == 9


def make_matrix() -> Matrix:
    """Two models by two formats, of which one cell failed and one has no figure."""
    cells = [
        Cell("a", "float16", {"perplexity": 10.0, "tokens": 5, "rows": 2}),
        Cell("a", "INT4", {"perplexity": 11.0, "tokens": 5, "rows": 2}),
        Cell("一", "float16", {"perplexity": 8.0, "tokens": 6, "rows": 2}),
        Cell("一", "INT4", problem="out of memory"),
    ]
    return Matrix("perplexity", ["a", "一"], ["float16", "INT4"], cells)


def test_a_table_says_what_a_format_changed_and_what_cannot_be_compared(tmp_path: Path) -> None:
    page = format_page(make_matrix())
    assert "| a | 10 | 11 (+10.0 %) |" in page and "| 一 | 8 | failed |" in page
    assert "other vocabularies: perplexities cannot be compared" in page
    assert "What is not packed of INT8 and INT4 is float16." in page
    assert "float32" not in page and page.endswith("- 一 INT4: out of memory\n")
    draw_matrix(
        make_matrix(), tmp_path / "matrix.png"
    )  # a name that the font has not is no warning
    assert (tmp_path / "matrix.png").stat().st_size > 5000


def test_cells_of_other_rows_are_told() -> None:
    page = make_matrix()
    page.cells[1] = page.cells[1]._replace(figures={"perplexity": 11.0, "tokens": 5, "rows": 1})
    assert "the cells did not measure the same rows (['1', '2'])" in page.problems
