"""D14: sets that do not fit are streamed: every row in its turn, the same when a run goes on."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("chatglm", reason="these are the package's files")

from safetensors.torch import load_file
from torch.utils.data import DataLoader

from chatglm.cli import main
from chatglm.data import streaming
from chatglm.data.dialects import read_answers
from chatglm.data.records import Record
from chatglm.data.streaming import RecordStream
from chatglm.training.data import streams
from chatglm.training.data.streams import StreamedExamples, shuffle
from chatglm.training.settings import KeyProblem
from chatglm.training.stage_settings import PretrainSettings, SftSettings


def write(path: Path, count: int, *more: str) -> str:
    rows = [json.dumps({"prompt": f"{path.stem}{i}", "response": "yes."}) for i in range(count)]
    path.write_text("\n".join([*rows, *more]) + "\n", encoding="utf-8")
    return str(path)


def expand(record: Record, rng: random.Random) -> list[str]:
    return [record.query] if rng.random() < 2 else []


def open_stream(*paths: Any, **keys: Any) -> RecordStream:
    return RecordStream(list(paths), read_answers, SftSettings(output="out", **keys))


def test_each_pass_has_every_row_once_in_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BUFFER", 5)
    paths = [write(tmp_path / f"{name}.jsonl", 10) for name in "abc"]
    drawn = list(itertools.islice(StreamedExamples(open_stream(*paths), expand, 1), 90))
    passes = [drawn[i : i + 30] for i in (0, 30, 60)]
    rows = {f"{name}{i}" for name in "abc" for i in range(10)}
    assert all(set(part) == rows for part in passes)
    assert len({tuple(part) for part in passes}) == 3 and sorted(passes[0]) != passes[0]
    again = StreamedExamples(open_stream(*paths), expand, 1)
    assert list(itertools.islice(again, 90)) == drawn
    assert list(itertools.islice(StreamedExamples(open_stream(*paths), expand, 2), 30)) != passes[0]


def test_nothing_is_lost_in_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 3, 100):
        monkeypatch.setattr(streams, "BUFFER", size)
        assert sorted(shuffle(range(20), random.Random(0))) == list(range(20))


def test_worker_processes_share_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    examples = StreamedExamples(open_stream(path), expand, 1)
    loader = DataLoader(examples, batch_size=5, num_workers=2)
    drawn = [text for batch in itertools.islice(loader, 4) for text in batch]
    assert Counter(drawn) == Counter(f"a{i}" for i in range(20))


def test_first_rows_are_looked_at_and_others_in_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HEAD_ROWS", 5)
    early = write(tmp_path / "a.jsonl", 3, "{", *['{"prompt": "x", "response": "y"}'] * 9)
    with pytest.raises(ValueError, match=r"a\.jsonl:4: .*bad_rows: skip"):
        open_stream(early)
    late = write(tmp_path / "b.jsonl", 40, "{")
    stream = open_stream(late)
    assert len(stream.head) == 5 and "first 5 rows" in stream.head.report.warnings[0]
    with pytest.raises(ValueError, match=r"b\.jsonl:41: "):
        list(itertools.islice(StreamedExamples(stream, expand, 1), 41))
    stream = open_stream(late, bad_rows="skip")
    assert len(list(itertools.islice(StreamedExamples(stream, expand, 1), 80))) == 80
    assert stream.head.report.num_skipped >= 1
    with pytest.raises(ValueError, match="no row of the stream is short enough"):
        next(iter(StreamedExamples(stream, lambda record, rng: [], 1)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"group_by_length": True}, "group_by_length must be left out beside streaming"),
        ({"packing": True}, "packing must be left out beside streaming"),
        ({"val_ratio": 0.1}, "val_ratio must be left out beside streaming"),
        ({"max_samples": 3}, "max_samples must be left out beside streaming"),
    ],
)
def test_what_needs_all_rows_does_not_go_with_a_stream(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(KeyProblem, match=words):
        SftSettings(output="out", streaming=True, **keys).check()
    PretrainSettings(output="out", streaming=True).check()


def test_entries_with_a_weight_are_no_stream(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 5)
    with pytest.raises(ValueError, match="has a weight or max_samples"):
        open_stream(f"{path}:0.5")


def train(stage: str, repo: Path, data: str, output: Path, steps: int, *more: Any) -> None:
    words = ["--model", repo, "--train_data", data, "--output", output, "--streaming"]
    words += ["--max_steps", steps, "--save_steps", 3, "--per_device_train_batch_size", 2]
    words += ["--lr_scheduler_type", "constant", "--max_length", 64, "--disable_tqdm", *more]
    assert main(["train", stage, *map(str, words)]) == 0


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(
    stage: str, tiny_repo: Path, tmp_path: Path
) -> None:
    """Seven rows, twelve of them drawn: the second pass begins inside of the run."""
    path = write(tmp_path / "a.jsonl", 7)
    if stage == "pretrain":
        texts = [{"text": f"text {i} " + "east and west " * i} for i in range(1, 8)]
        Path(path).write_text("".join(json.dumps(text) + "\n" for text in texts))
    train(stage, tiny_repo, path, tmp_path / "whole", 6)
    train(stage, tiny_repo, path, tmp_path / "parts", 3)
    train(stage, tiny_repo, path, tmp_path / "parts", 6, "--resume")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_stream_needs_to_know_its_end(
    tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", 5)
    words = ["--model", tiny_repo, "--train_data", path, "--output", tmp_path / "out"]
    assert main(["train", "sft", *map(str, words), "--streaming"]) == 2
    assert "streaming needs max_steps" in capsys.readouterr().err
