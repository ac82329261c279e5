"""The campaigns at small counts, and that each of them sees a fault."""

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.endurance import (
    calls,
    campaign,
    data_rows,
    kills,
    mutations,
    page,
    rounds,
    strings,
    trainings,
)
from benchmarks.endurance.campaign import Campaign, Finding, Raised, main_of, run_apart
from benchmarks.endurance.folders import write_sources
from chatglm import door
from chatglm.training.checkpoints import seal

SMALL = {"strings": 100, "mutations": 3, "calls": 20, "kills": 2, "rounds": 6, "data_rows": 40}
MODULES = (strings, mutations, calls, kills, rounds, data_rows)
SMALL = {"strings": 100, "mutations": 3, "calls": 20, "kills": 2, "trainings": 1, "rounds": 6}
MODULES = (strings, mutations, calls, kills, trainings, rounds)
CAMPAIGNS = [module.CAMPAIGN for module in MODULES]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(autouse=True)
def package_code() -> Iterator[None]:
    with door.package_code():
        yield


def draw_three(rng: random.Random) -> str:
    number = rng.randrange(3)
    if number == 0:
        raise Finding("a zero")
    return "one" if number == 1 else "two"


THREES = Campaign("threes", "Numbers", "numbers", 40, 1, lambda: draw_three)


def read(runs: Path, name: str = "threes") -> dict[str, Any]:
    found = json.loads((runs / f"{name}.json").read_text(encoding="utf-8"))
    return {key: found[key] for key in ("done", "outcomes", "findings", "num_findings")}


@pytest.mark.parametrize("chosen", CAMPAIGNS, ids=lambda c: c.name)
def test_a_few_cases_find_nothing(
    chosen: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "STAGES", ("sft",))
    words = [chosen.name, "--count", str(SMALL[chosen.name]), "--runs", str(tmp_path)]
    assert main_of(CAMPAIGNS, words) == 0
    found = read(tmp_path, chosen.name)
    assert found["done"] == sum(found["outcomes"].values()) == SMALL[chosen.name]


def test_a_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main_of([THREES], ["--runs", str(whole)]) == 1
    for count in ("7", "30", "40"):
        assert main_of([THREES], ["--runs", str(parts), "--count", count]) == 1
    assert read(whole) == read(parts) and read(whole)["done"] == 40
    number = read(whole)["findings"][0]["case"]
    capsys.readouterr()
    main_of([THREES], ["--runs", str(whole), "--only", str(number)])
    assert capsys.readouterr().out == f"threes {number} Counter({{'found': 1}}) ['a zero']\n"
    main_of([THREES], ["--runs", str(whole), "--seed", "1", "--count", "5"])
    assert read(whole)["done"] == 5


def test_two_processes_do_not_write_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def case(rng: random.Random) -> str:
        assert main_of([THREES], ["--runs", str(tmp_path)]) == 2
        return "told"

    outer = THREES._replace(prepare=lambda: case)
    assert main_of([outer], ["--runs", str(tmp_path), "--count", "1"]) == 0
    assert "Another process writes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main_of([THREES], ["fours"])


def test_crashes_hangs_and_exceptions_of_a_process_are_seen() -> None:
    assert run_apart(lambda: {"a": 1}, 10) == {"a": 1}
    raised = run_apart(lambda: json.loads("{"), 10)
    assert isinstance(raised, Raised) and "ValueError" in raised.kinds
    with pytest.raises(Finding, match="the process dies: 7"):
        run_apart(lambda: os._exit(7), 10)
    with pytest.raises(Finding, match=r"hangs: 0\.2 s are over"):
        run_apart(lambda: time.sleep(60), 0.2)


def test_a_broken_tokenizer_is_seen() -> None:
    class Sloppy:
        def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
            is_one = isinstance(texts, str)
            return {"input_ids": [len(texts)] if is_one else [[0] for _ in texts]}

    with pytest.raises(Finding, match="another encoding in a batch"):
        strings.check_texts(Sloppy(), ["abc"], set())


def test_refusals_must_name_the_file_and_be_of_the_right_kind(tmp_path: Path) -> None:
    path, truth = tmp_path / "config.json", {"logits": 1, "config": {}}
    named = Raised(("ValueError", "Exception"), "config.json has no x", "")
    assert mutations.judge(named, path, {}, truth, False) == "refused"
    weight = named._replace(message="a.weight is not finite")
    assert mutations.judge(weight, path, {}, {"a.weight": 1}, False) == "refused"
    for odd in (weight, named._replace(kinds=("KeyError",))):
        with pytest.raises(Finding):
            mutations.judge(odd, path, {}, truth, False)
    assert mutations.judge(dict(truth), path, {}, truth, False) == "the same"
    with pytest.raises(Finding, match="lets it through"):
        mutations.judge(dict(truth), path, {}, truth, True)
    path.write_text('{"layernorm_epsilon": 2}')
    seen = {"logits": 2, "config": {"layernorm_epsilon": 1}}
    with pytest.raises(Finding, match="other logits than before"):
        mutations.judge(seen, path, {"layernorm_epsilon": 1}, truth, False)
    seen["config"] = {"layernorm_epsilon": 2}
    assert mutations.judge(seen, path, {"layernorm_epsilon": 1}, truth, False) == "as written"


def test_answers_that_differ_are_seen() -> None:
    one = torch.ones(1, 2)
    assert calls.compare(one, one.clone(), torch.float32) == "right"
    assert calls.compare(ValueError("a"), ValueError("b"), torch.float32) == "refused"
    for other in (one * 2, torch.ones(2, 2), ValueError("x")):
        with pytest.raises(Finding):
            calls.compare(one, other, torch.float32)
    with pytest.raises(Finding, match="without a word"):
        calls.try_call(lambda: (_ for _ in ()).throw(ValueError()), (ValueError,))


def test_a_target_that_is_not_whole_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    kills.check_target(tmp_path / "none", {}, "then")
    kills.check_target(tmp_path, kills.hash_folder(tmp_path), "then")
    with pytest.raises(Finding, match=r"differs in \['a', 'b'\]"):
        kills.check_target(tmp_path, {"a": "0", "b": "0"}, "then")


@pytest.mark.parametrize("words", [["--format", "bin"], []], ids=["bin", "safetensors"])
def test_a_full_disk_is_one_line_and_no_traceback(words: list[str], tmp_path: Path) -> None:
    """Neither library that writes tensors raises an OSError then."""
    write_sources()
    command = kills.list_commands(tmp_path / "target")["merge"] + words
    assert kills.wait(kills.start(command, 300_000)) == 2
    assert kills.wait(kills.start(command)) == 0


def test_rows_that_are_read_wrongly_are_seen(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q"}, {"prompt": "q", "response": "b"}]
    rng = random.Random(0)
    written = data_rows.write_rows(rows, tmp_path / "a.jsonl", "lined array", rng)
    right = [data_rows.read_alone(row, "answers") for row in rows]
    found, refused = (data_rows.read(written, "answers", skips) for skips in (True, False))
    assert data_rows.judge(found, written, right, True) == "left out and told"
    assert data_rows.judge(refused, written, right, False) == "refused"
    with pytest.raises(Finding, match=r"read Record.*due was Record"):
        data_rows.judge(found, written, [right[2], [], right[0]], True)
    with pytest.raises(Finding, match="left out"):
        data_rows.judge(found, written, [right[0], [], []], True)
    with pytest.raises(Finding, match="refused with"):
        data_rows.judge(refused, written, [[], right[0], right[2]], False)
    with pytest.raises(Finding, match="read without a word"):
        data_rows.judge(found, written, right, False)
    filled = data_rows.fill({"instruction": "do", "input": "this", "output": "a"}, "answers", rng)
    query = f"{filled.row['instruction']}\n{filled.row['input']}"
    assert [r.query for r in filled.records] == [query] and "do" not in filled.row.values()


def test_what_a_killed_training_leaves_is_seen(tmp_path: Path) -> None:
    truth = trainings.Truth([], {}, 1.0, 1)
    for step in (4, 5, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "optimizer.pt").write_bytes(b"1")
        seal(folder)
    with pytest.raises(Finding, match=r"it keeps \['checkpoint-4', 'checkpoint-5', 'checkpoint-6'"):
        trainings.check_output(tmp_path, truth)
    (tmp_path / "checkpoint-4").rename(tmp_path / "removing-checkpoint-4")
    with pytest.raises(Finding, match=r"it leaves \['removing-checkpoint-4'\]"):
        trainings.check_output(tmp_path, truth)
    (tmp_path / "removing-checkpoint-4").rename(tmp_path / "elsewhere")
    trainings.check_output(tmp_path, truth)
    (tmp_path / "checkpoint-5" / "optimizer.pt").write_bytes(b"2")
    with pytest.raises(Finding, match=r"checkpoint-5 is not whole: optimizer\.pt is not what was"):
        trainings.check_output(tmp_path, truth)
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(Finding, match="its weights are others"):
        trainings.check_output(tmp_path, truth)


def test_memory_that_grows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([10 << 20, 10 << 20, 10 << 20, 12 << 20, 99 << 20])
    monkeypatch.setattr(rounds, "read_status", lambda field: next(resident))
    talk = rounds.Talk()
    for talk.rounds in (100, 200, 300, 400):
        assert talk._look_at_memory() == "right"
    talk.rounds = 500
    with pytest.raises(Finding, match="89 MB more after 500 rounds"):
        talk._look_at_memory()


def test_the_page_says_what_the_record_says(tmp_path: Path) -> None:
    main_of([THREES], ["--runs", str(tmp_path)])
    found = campaign.RUNS, json.loads((tmp_path / "threes.json").read_text(encoding="utf-8"))
    text = page.format_runs({"threes": found[1]})
    assert "| Numbers (`threes`) | 40 numbers | " in text and "`a zero`" in text
    assert page.format_runs({}) == "No run is recorded yet."
    assert page.main(["--check"]) == 0
