"""D14: where rows come from and how many: mixing, shares, splits, folders, globs, names."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="these are the package's files")

from chatglm.data.dialects import read_answers, read_texts
from chatglm.data.files import RecordFiles, open_records
from chatglm.training.settings import KeyProblem
from chatglm.training.stage_settings import SftSettings

TALK = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"))]


def write(path: Path, count: int, **more: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{path.stem}{i}", "response": "a", **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def see(records: RecordFiles) -> Counter[str]:
    return Counter(record.query for record in records)


def open_both(**keys: Any) -> tuple[RecordFiles, RecordFiles | None]:
    settings = SftSettings(output="out", **keys)
    settings.check()
    held_out = settings.held_out_data
    return (
        open_records(settings.train_data, read_answers, settings),
        open_records(held_out, read_answers, settings) if held_out else None,
    )


def test_weights_say_how_often_a_row_is_seen(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", 10) for name in "abc")
    entries = [{"path": a, "weight": 0.3}, f"{b}:2.5", c]
    records, _ = open_both(train_data=entries)
    seen = see(records)
    assert len(records) == 3 + 25 + 10
    assert sorted(n for query, n in seen.items() if query[0] == "b") == [2] * 5 + [3] * 5
    assert all(n == 1 for query, n in seen.items() if query[0] in "ac")
    assert see(open_both(train_data=entries)[0]) == seen
    other, _ = open_both(train_data=entries, split_seed=7)
    assert see(other) != seen and len(other) == len(records)


def test_max_samples_takes_the_first_rows_of_each_entry(tmp_path: Path) -> None:
    a, b = write(tmp_path / "d" / "a.jsonl", 6), write(tmp_path / "b.jsonl", 6)
    write(tmp_path / "d" / "c.jsonl", 6)
    records, _ = open_both(train_data=[str(tmp_path / "d"), b], max_samples=8)
    assert [r.query for r in records] == [
        *(f"a{i}" for i in range(6)), "c0", "c1", *(f"b{i}" for i in range(6))
    ]  # fmt: skip
    records, _ = open_both(train_data=[f"{a}#2", {"path": b, "max_samples": 1}])
    assert [r.query for r in records] == ["a0", "a1", "b0"]
    records, _ = open_both(train_data=[f"{a}#4:0.5"])
    assert len(records) == 2 and set(see(records)) < {"a0", "a1", "a2", "a3"}


def test_nothing_is_read_behind_the_last_row_that_is_wanted(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", 3))
    path.write_text(path.read_text() + "{broken\n")
    assert len(open_both(train_data=[str(path)], max_samples=3)[0]) == 3
    with pytest.raises(ValueError, match=r"a\.jsonl:4"):
        open_both(train_data=[str(path)], max_samples=4)


def test_a_share_is_held_out_by_rows_and_drawn_again_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    talk = [*TALK, *TALK]
    rows = [
        {"messages": [{**turn, "content": f"{i} {turn['content']}"} for turn in talk]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"train_data": [str(path)], "val_ratio": 0.25}
    train, held_out = open_both(**keys)
    assert held_out is not None and (len(train), len(held_out)) == (60, 20)
    assert (train.report.kept, held_out.report.kept) == (30, 10)
    numbers = [{r.source for r in side} for side in (train, held_out)]
    assert not numbers[0] & numbers[1] and len(numbers[0] | numbers[1]) == 40
    again, held_again = open_both(**keys)
    assert list(again) == list(train) and list(held_again or []) == list(held_out)
    assert list(open_both(**keys, split_seed=1)[1] or []) != list(held_out)


def test_every_entry_is_held_out_from_and_weights_count_for_training_alone(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", 100), write(tmp_path / "b.jsonl", 10)
    train, held_out = open_both(train_data=[a, f"{b}:3"], val_ratio=0.1)
    assert held_out is not None
    assert Counter(query[0] for query in see(held_out).elements()) == {"a": 10, "b": 1}
    assert Counter(query[0] for query in see(train).elements()) == {"a": 90, "b": 27}
    assert not set(see(train)) & set(see(held_out))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"val_ratio": 1.0}, r"val_ratio must be in \[0, 1\)"),
        ({"val_ratio": -0.1}, "val_ratio"),
        ({"val_ratio": 0.1, "eval_data": ["x"]}, "val_ratio must be left out beside eval_data"),
        ({"val_ratio": 0.001}, "val_ratio 0.001 of 5 rows leaves no row"),
        ({"max_bad_share": 2.0}, "max_bad_share must be from 0 to 1"),
        ({"max_samples": -1}, "max_samples must be 0 or more"),
        ({"sample_by": "page"}, "sample_by must be document, paragraph or line"),
        ({"train_data": [{"file": "x"}]}, "has no key file; its keys are path, weight"),
        ({"train_data": [{"weight": 1}]}, "needs the key path"),
        ({"train_data": [{"path": "x", "weight": 0}]}, "weight must be more than 0"),
        ({"train_data": [{"path": "x", "weight": "much"}]}, "weight of the data entry x cannot be"),
        ({"train_data": [{"path": "x", "max_samples": True}]}, "max_samples of the data entry x"),
        ({"train_data": ["nothing.jsonl"]}, "no data file nothing.jsonl"),
        ({"train_data": ["nowhere/a.jsonl"]}, "there is no folder nowhere"),
        ({"train_data": ["no*.jsonl"]}, r"no data file is called no\*\.jsonl"),
        ({"train_data": []}, "give files with train_data"),
    ],
)
def test_values_that_cannot_be_are_refused(
    keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", 5)
    with pytest.raises((ValueError, KeyProblem), match=words):
        open_both(**{"train_data": [path], **keys})


def test_folders_are_read_with_those_in_them_and_strangers_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 1)
    write(tmp_path / "deep" / "er" / "b.json", 1)
    write(tmp_path / ".hidden" / "c.jsonl", 1)
    for name in ("dataset_info.json", "README.md", "cat.png", "notes.txt", "LICENSE"):
        (tmp_path / name).write_text("{}")
    records = RecordFiles([str(tmp_path)], read_answers)
    assert [r.query for r in records] == ["a0", "b0"]
    (warning,) = records.report.warnings
    assert "LICENSE, README.md, cat.png, dataset_info.json, notes.txt" in warning
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("x")
    with pytest.raises(ValueError, match=r"has no \.jsonl.*only README\.md"):
        RecordFiles([str(tmp_path / "empty")], read_answers)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one text")
    (tmp_path / "texts" / "README.txt").write_text("about it")
    assert [r.query for r in RecordFiles([str(tmp_path / "texts")], read_texts)] == ["one text"]


def test_files_of_several_splits_in_a_folder_are_told(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 2)
    write(tmp_path / "test.jsonl", 2)
    (warning,) = RecordFiles([str(tmp_path)], read_answers).report.warnings
    assert "those called test and train alike" in warning


def test_globs_lists_and_odd_names(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c/d.jsonl", "e:0.5", "f,g.jsonl", "h#3.jsonl", "[i].jsonl"):
        write(tmp_path / name, 2)
    base = str(tmp_path)
    assert len(RecordFiles([f"{base}/*.jsonl"], read_answers)) == 10
    assert len(RecordFiles([f"{base}/**/*.jsonl"], read_answers)) == 12
    assert len(RecordFiles([f"{base}/a.jsonl,{base}/b.jsonl"], read_answers)) == 4
    assert len(RecordFiles([f"{base}/e:0.5"], read_answers)) == 2
    assert len(RecordFiles([f"{base}/f,g.jsonl"], read_answers)) == 2
    assert len(RecordFiles([f"{base}/h#3.jsonl", f"{base}/[i].jsonl"], read_answers)) == 4
    with pytest.raises(
        ValueError, match=r"no data file .*/k\.jsonl; .* has \[i\]\.jsonl, a\.jsonl"
    ):
        RecordFiles([f"{base}/k.jsonl"], read_answers)


def test_a_file_that_is_read_twice_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 2)
    (tmp_path / "link.jsonl").symlink_to(path)
    records, _ = open_both(train_data=[path, str(tmp_path / "link.jsonl")])
    assert records.report.warnings == [
        f"{tmp_path / 'link.jsonl'} is named twice: its rows are read twice"
    ]
    records, _ = open_both(train_data=[path], eval_data=[str(tmp_path)])
    assert f"{path} is in train_data and in eval_data" in records.report.warnings[0]


def test_empty_files_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 2)
    (tmp_path / "b.jsonl").touch()
    records, _ = open_both(train_data=[path, str(tmp_path / "b.jsonl")])
    assert records.report.warnings == [f"{tmp_path / 'b.jsonl'} is empty"]
    assert records.report.files[1].rows == 0


def test_entries_have_columns_of_their_own(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", 1)
    (tmp_path / "b.csv").write_text("ask,say\nq,b\n")
    entry = {"path": str(tmp_path / "b.csv"), "columns": {"prompt": "ask", "response": "say"}}
    records, _ = open_both(train_data=[a, entry])
    assert [(r.query, r.answer) for r in records] == [("a0", "a"), ("q", "b")]
    with pytest.raises(ValueError, match=r"no role 'ask'.*did you mean prompt=ask"):
        open_both(train_data=[{**entry, "columns": {"ask": "prompt"}}])


def test_names_of_llama_factory_are_looked_up(tmp_path: Path) -> None:
    write(tmp_path / "talks.json", 3)
    rows = [{"talk": [{"who": "u", "says": "q"}, {"who": "b", "says": "a"}]}]
    (tmp_path / "tagged.json").write_text(json.dumps(rows))
    registry = {
        "plain": {"file_name": "talks.json", "num_samples": 2},
        "tagged": {
            "file_name": "tagged.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {
                "role_tag": "who",
                "content_tag": "says",
                "user_tag": "u",
                "assistant_tag": "b",
            },
        },
        "far": {"hf_hub_url": "x/y"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
    records, _ = open_both(train_data=[f"{tmp_path}/plain", f"{tmp_path}/tagged"])
    assert [(r.query, r.answer) for r in records] == [
        ("talks0", "a"), ("talks1", "a"), ("q", "a")
    ]  # fmt: skip
    for name, words in (("far", "download it"), ("none", "no such name but plain, tagged, far")):
        with pytest.raises(ValueError, match=words):
            open_both(train_data=[f"{tmp_path}/{name}"])
    with pytest.raises(ValueError, match=r"name one of its data sets, as .*/plain"):
        open_both(train_data=[f"{tmp_path}/dataset_info.json"])
