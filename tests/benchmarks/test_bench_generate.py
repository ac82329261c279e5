"""The whole-model benchmark, the tokenizer's, and the user's command, at tiny sizes."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks import (
    bench_generate,
    bench_tokenizer,
    contenders,
    copying,
    fresh,
    lookup,
    phases,
)
from benchmarks.full_size import Recipe, make_model, save_folder
from benchmarks.results import Case, Recorder, read_rows
from benchmarks.workers import Spread, Worker
from chatglm.benching import command

PROBE = """
from benchmarks.serving import serve

class Probe:
    def describe(self):
        return {"versions": "none"}
    def read(self):
        return {"rate": 2e9}

serve(Probe)
"""
TINY = ["--layers", "1", "--rounds", "1", "--tokens", "2", "--threads", "1"]


def test_recipes_are_read_from_words() -> None:
    recipe = contenders.parse_recipe("bits=8,group_size=32,embeddings=1,dtype=bfloat16")
    assert recipe == Recipe(8, 32, True, "bfloat16")
    assert str(recipe) == "INT8 g32 + embeddings, bfloat16"
    assert contenders.parse_recipe("") == Recipe()
    alone = contenders.parse_recipe("dtype=bfloat16,alone=1")
    assert alone.alone is True and str(alone) == "INT4, bfloat16, files alone"


@pytest.mark.parametrize("words", ["colour=4", "bits=four"])
def test_a_wrong_recipe_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_generate.main([*TINY, "--only", "overhead", "--ours", words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_generate: ") and error.count("\n") == 1


def test_phases_are_measured_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    words = [*TINY, "--only", "prefill", "decode", "--prompts", "6", "--contexts", "9", "--write"]
    monkeypatch.setattr(bench_generate, "RESULTS", path)
    probe = [sys.executable, "-c", PROBE]
    monkeypatch.setattr(phases, "start_probe", lambda *_: Worker("probe", probe))
    assert bench_generate.main([*words, "--ours", "hidden=64,bits=8"]) == 0
    cells = {(row.contender, row.case, row.unit): row for row in read_rows(path)}
    time, size, rate = (
        cells["ours INT8, float32", "decode", unit] for unit in ("ms/token", "GB/token", "GB/s")
    )
    assert rate.value == pytest.approx(1000 * size.value / time.value, rel=1e-3)
    assert cells["ours INT8, float32", "prefill", "tokens/s"].size == 6
    assert cells["probe", "decode", "GB/s"].value == 2
    share = cells["ours INT8, float32", "decode", "of the probe"]
    assert share.value == pytest.approx(rate.value / 2, rel=1e-3)


def try_quickly(
    monkeypatch: pytest.MonkeyPatch, python: str, *cases: str
) -> dict[tuple[str, int, str], list[tuple[str, float]]]:
    """Return contender and value of what `--quick` records, by case, batch and unit."""
    found: dict[tuple[str, int, str], list[tuple[str, float]]] = {}
    add = Recorder.add

    def note(self: Recorder, case: Case, figures: Spread, unit: str, *rest: Any) -> None:
        add(self, case, figures, unit, *rest)
        place = (case.name, case.batch, unit)
        found.setdefault(place, []).append((case.contender, figures.median))

    probe = [sys.executable, "-c", PROBE]
    for module in (phases, lookup):
        monkeypatch.setattr(module, "start_probe", lambda *_: Worker("probe", probe))
    monkeypatch.setattr(Recorder, "add", note)
    monkeypatch.setattr(sys, "executable", python)
    assert bench_generate.main(["--quick", "--threads", "1", "--only", *cases]) == 0
    return found


def test_the_lines_of_many_rows_are_tried_quickly(
    quick_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = try_quickly(monkeypatch, quick_python, "prefill", "rows", "company")
    ((name, price),) = found["rows", 8, "steps of one row"]
    assert name == "ours INT4, float32" and price > 0
    ((_, step),), ((_, speed),) = found["rows", 8, "ms/step"], found["rows", 8, "tokens/s"]
    assert speed == pytest.approx(8000 / step)
    assert ("rows", 1, "ms/step") in found and ("rows of mixed lengths", 8, "ms/step") in found
    assert 0 < found["prefill", 1, "of its products"][0][1] < 2
    assert {f"beside {busy} busy" for busy in (0, 1, 2)} <= {name for name, _, _ in found}


def test_the_lines_of_prompts_are_tried_quickly(
    quick_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = try_quickly(monkeypatch, quick_python, "lookup", "overhead", "first")
    for text in copying.TEXTS:
        names = [name.rpartition(", ")[2] for name, _ in found[f"lookup, {text}", 1, "ms/token"]]
        assert names == [lookup.DRAFTED, lookup.PLAIN]
    for case in ("greedy", "top_p 0.7"):
        assert found[f"overhead, {case}", 1, "ms/token"][0][1] > 0
    assert found["first prompt", 1, "later prompts"][0][1] > 0


def test_quick_figures_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_generate.main(["--quick", "--write"]) == 2
    assert "its figures mean nothing: leave out --write" in capsys.readouterr().err


def test_answers_that_drafts_change_are_no_measurement() -> None:
    class Fickle:
        name = "fickle"

        def ask(self, call: str, drafts: int, **sizes: Any) -> dict[str, Any]:
            return {"seconds": 1.0, "ids": [sizes["tokens"], drafts]}

    args = bench_generate.make_parser().parse_args([])
    asker, worker = lookup.Asker(args, "copy"), cast(Worker, Fickle())
    assert asker.ask(worker, 0) == 1
    with pytest.raises(ValueError, match=r"fickle says .* they must agree"):
        asker.ask(worker, 10)


def test_a_copier_copies_corrects_and_goes_its_own_way() -> None:
    model = make_model(Recipe(layers=1, hidden=64))
    period = copying.make_copier(model)
    for text, share in (("copy", 1.0), ("edit", 11 / 12), ("new", 0.1)):
        prompt = copying.draw_text(model, 50, text, period)
        answer = model.generate(prompt, do_sample=False, max_new_tokens=40)[0, 50:].tolist()
        counted = [(model.config.bos_token_id + 1 + place) % period for place in range(40)]
        assert answer == counted
        told = prompt[0, :40].tolist()
        same = sum(a == b for a, b in zip(answer, told)) / 40
        assert same <= share if text == "new" else same >= share - 0.05
    with pytest.raises(ValueError, match="a text is one of copy, edit, new, got poem"):
        copying.draw_text(model, 50, "poem", period)


def test_a_contender_does_without_the_engine() -> None:
    """In a process of its own: what of the engine it has imported stays out of reach there."""
    recipe = contenders.parse_recipe("hidden=64,dtype=bfloat16,alone=1")._replace(layers=1)
    with contenders.start_ours(recipe, 1) as worker:
        assert worker.name == "ours INT4, bfloat16, files alone"
        assert worker.ask("decode", context=9, tokens=2)["seconds"]
        assert worker.facts["engine"] is False
    with contenders.start_ours(recipe._replace(alone=False), 1) as worker:
        assert worker.facts["engine"] is True


def test_a_process_answers_from_a_folder_and_is_watched(tmp_path: Path) -> None:
    folder = tmp_path / "random_model"
    folder.mkdir()
    save_folder(folder, Recipe(layers=1, hidden=64, dtype="float16"))
    args = bench_generate.make_parser().parse_args(TINY)
    said, curve = fresh.run_first_answer(folder, args, Recipe(), context=40)
    assert 0 < said["loaded"] < said["answered"] < said["done"]
    assert said["done"] - 1 < curve[-1][0] <= said["done"]
    assert 10**8 < max(resident for _, resident in curve) <= 1.01 * said["peak"]


def test_starts_and_their_memory_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.csv"
    contexts: list[int] = []

    def answer(
        folder: Path, args: Any, recipe: Any, context: int = 0, checkout: Path | None = None
    ) -> Any:
        assert (folder / "model.safetensors").is_file() and recipe.dtype == "float32"
        contexts.append(context)
        said = {"loaded": 2.0, "answered": len(contexts), "peak": 3e9}
        said |= {"weights": 2e9, "position": 1e5}
        return said, [(0.1 * step, step * 10**7) for step in range(200)]

    monkeypatch.setattr(bench_generate, "RESULTS", path)
    monkeypatch.setattr(fresh, "run_first_answer", answer)
    monkeypatch.setattr(fresh, "time_imports", lambda: 1.5)
    words = [*TINY, "--rounds", "3", "--only", "start", "memory", "--write"]
    assert bench_generate.main([*words, "--ours", "hidden=64"]) == 0
    assert contexts == [0, 0, 0, 0, 2048]  # one that warms the disk cache, three, a long chat
    rows = {(row.case, row.unit): row for row in read_rows(path)}
    start = rows["start to answer", "s"]
    assert start.value == 3 and start.rounds == 3
    assert rows["start to answer", "imports alone"].value == 2
    assert rows["imports alone", "s"].contender == "torch and transformers"
    assert rows["peak memory", "GB"].value == 3
    beyond = rows["peak memory", "GB beyond weights and cache"]
    assert beyond.value == pytest.approx(1 - 2048 * 1e-4)
    curve = [(row.size, row.value) for row in read_rows(path) if row.case == "memory over time"]
    assert 60 <= len(curve) <= 80 and curve[1] == (300, 0.03)


def test_another_checkout_starts_in_turns_with_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "results.csv", []

    def answer(*args: Any, checkout: Path, **options: Any) -> Any:
        asked.append(checkout)
        seconds = 3.0 if checkout == tmp_path else 2.0
        return {"loaded": seconds - 1, "answered": seconds}, []

    monkeypatch.setattr(bench_generate, "RESULTS", path)
    monkeypatch.setattr(fresh, "run_first_answer", answer)
    monkeypatch.setattr(fresh, "time_imports", lambda: 1.0)
    words = [*TINY, "--rounds", "2", "--only", "start", "--write", "--checkout", str(tmp_path)]
    assert bench_generate.main([*words, "--ours", "hidden=64"]) == 0
    assert asked == 3 * [fresh.ROOT, tmp_path]
    ours, peer = (r for r in read_rows(path) if r.case == "start to answer" and r.unit == "s")
    assert (ours.value, ours.ratio, ours.baseline) == (2, 1.5, peer.contender)
    assert peer.value == 3 and peer.ratio is None


def test_the_tokenizer_is_measured_beside_its_floor(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    recorder = Recorder("bench_tokenizer", 0, 1, path)
    bench_tokenizer.measure_vocabulary(bench_tokenizer.OWN, recorder, rounds=1, repeat=1)
    rows = read_rows(path)
    cases = 4 + 3 * len(bench_tokenizer.SIZES)
    assert len(rows) == 2 * cases * len(bench_tokenizer.SOURCES)
    ours = [row for row in rows if row.baseline == "sentencepiece"]
    assert {row.contender for row in ours} == {"our tokenizer"} and len(ours) == len(rows) // 2
    assert all(row.size == 8192 and (row.ratio or 0) > 0 for row in ours)


def test_a_missing_vocabulary_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_tokenizer.main(["--vocabulary", "nowhere.model"]) == 2
    assert capsys.readouterr().err == "bench_tokenizer: nowhere.model is no vocabulary file\n"


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.make_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


def test_the_command_measures_a_folder(tiny_repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--prompt-length", "9", "--new-tokens", "4", "--batch", "2", "--bits", "8"]
    words = [*options, "--threads", "1", "--device", "cpu", "--json"]
    assert command.main(parse(str(tiny_repo), *words)) == 0
    torch.set_num_threads(threads)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (report["bits"], report["dtype"], report["threads"]) == (8, "float16", 1)
    assert report["prefill_tokens_per_second"] == pytest.approx(18 / report["prefill_seconds"])
    assert report["tokens_per_second"] == pytest.approx(2 / report["token_seconds"])
    # Two blocks of width 32, two rows with 9 + 2 positions of float16 keys and values on average.
    cache = 2 * (9 + 2) * 2 * 2 * 32 * 2
    assert report["step_bytes"] - cache > 8192 * 32 * 2  # the head
    assert report["peak_bytes"] > 10**8


def test_the_report_is_for_people() -> None:
    head = ("a/model", 4, "cpu", "float32", 2, 64, 32, 1)
    measured = (1.5, 0.5, 0.125, 10**9, 4 * 10**9, {"torch": "2"})
    lines = command.format_report(command.Report(*head, *measured)).splitlines()
    assert lines[0] == "a/model (4 bits; cpu, float32, threads: 2)"
    assert lines[1] == "load     1.50 s, peak memory 4.00 GB"
    assert lines[2] == "prefill  128.0 tokens/s (64 tokens)"
    assert lines[3] == "decode   125.00 ms/token, 8.0 tokens/s, 8.0 GB/s (32 tokens)"


def test_a_prompt_without_room_is_refused(tiny_repo: Path) -> None:
    with pytest.raises(ValueError, match="3 tokens or more, got 2"):
        command.main(parse(str(tiny_repo), "--prompt-length", "2", "--device", "cpu"))
    with pytest.raises(SystemExit):
        parse("--batch", "0")
