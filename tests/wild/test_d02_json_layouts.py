"""D2: rows of JSON in any layout: a line each, arrays, laid out by hand, under a key."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="these are the package's files")

from chatglm.data import json_rows
from chatglm.data.dialects import read_answers
from chatglm.data.files import RecordFiles

ROWS: list[dict[str, Any]] = [
    {"instruction": f"问题 {i}", "input": "", "output": f'answer {i} \u2028 \\ " 。'}
    for i in range(25)
]
DUMPED = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(ROWS)]
LAYOUTS = {
    "JSON lines": "\n".join(DUMPED),
    "JSON lines, CRLF and empty lines": "\r\n\r\n".join(DUMPED) + "\r\n\r\n",
    "JSON array": json.dumps(ROWS, ensure_ascii=False),
    "JSON array, one object a line": "[\n" + ",\n".join(DUMPED) + "\n]\n",
    "JSON array, brackets in line": "[" + ",\n".join(DUMPED) + "]",
    "JSON array, pretty": json.dumps(ROWS, indent=4),
    "JSON array, a comma too many": "[" + ",".join(DUMPED) + ",]",
    "JSON arrays, one behind the other": "\n".join(f"[{text}]" for text in DUMPED),
    "JSON objects, pretty": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "JSON objects, in a row": " ".join(DUMPED),
    "JSON objects, commas between": ",\n".join(DUMPED),
    "JSON objects, CR between": "\r".join(DUMPED),
    "JSON objects, under a key": json.dumps({"version": "1", "data": ROWS, "n": [1]}, indent=1),
    "JSON objects, under a key in line": json.dumps({"type": "x", "instances": ROWS}),
}


def read(path: Path, text: str, **options: Any) -> RecordFiles:
    path.write_bytes(text.encode("utf-8"))
    return RecordFiles([str(path)], read_answers, **options)


@pytest.mark.parametrize("window", [16, 1 << 20])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(
    layout: str, suffix: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "WINDOW", window)
    records = read(tmp_path / f"rows{suffix}", LAYOUTS[layout])
    assert [(r.query, r.answer) for r in records] == [
        (row["instruction"], row["output"]) for row in ROWS
    ]
    assert records.report.files[0].kind == layout.split(",")[0].replace("arrays", "array")


def test_rows_of_any_layout_are_named_by_their_lines(tmp_path: Path) -> None:
    pretty = read(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    assert [int(r.source.rpartition(":")[2]) for r in pretty] == [2 + 5 * i for i in range(25)]
    lined = read(tmp_path / "b.json", LAYOUTS["JSON array, one object a line"])
    assert lined[24].source == f"{tmp_path / 'b.json'}:26"


def test_a_dialogue_that_is_laid_out_is_one_row(tmp_path: Path) -> None:
    """Its last message is an object on a line of its own, and no row."""
    message = '    {"role": "%s", "content": "%s"}'
    lines = ['{"messages": [', message % ("user", "q") + ",", message % ("assistant", "a"), "]}"]
    (record,) = read(tmp_path / "a.json", "\n".join(lines))
    assert (record.query, record.answer, record.source) == ("q", "a", f"{tmp_path / 'a.json'}:1")


def test_a_row_with_a_list_of_objects_is_no_wrapper_if_there_are_more(tmp_path: Path) -> None:
    row = {"instruction": "q", "output": "a", "items": [{"x": 1}]}
    assert len(read(tmp_path / "a.jsonl", f"{json.dumps(row)}\n{json.dumps(row)}\n")) == 2


def test_of_several_lists_one_is_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    text = json.dumps({"train": ROWS, "test": ROWS[:2]}, indent=1)
    with pytest.raises(ValueError, match=r"a\.json:\d+: a second list of rows under 'test'.*field"):
        read(path, text)
    assert len(RecordFiles([{"path": str(path), "field": "test"}], read_answers)) == 2
    assert len(RecordFiles([{"path": str(path), "field": "train"}], read_answers)) == 25
    with pytest.raises(ValueError, match="no object that has a list of rows under 'dev'"):
        RecordFiles([{"path": str(path), "field": "dev"}], read_answers)


GOOD = '{"prompt": "q", "response": "a"}'
HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{'prompt': 'q'}", "single quotes"),
        ('{"prompt": "q", "response": "a",}', "no JSON object on a line of its own"),
        ('{"prompt": "q" // so\n}'.replace("\n", " "), "a comment"),
        ('{"prompt": "q", "response": "a"', "it breaks off"),
        ('{"prompt": "q", "response": "a\x00b"}', "control character"),
        ('{"prompt": "q", "response": "a\tb"}', "control character"),
        ('{"prompt": "q", "prompt": "r", "response": "a"}', "twice in one object: 'prompt'"),
        ('{"prompt": "q", "response": "a", "n": Infinity}', "Infinity"),
        (f'{{"prompt": "q", "response": "a", "n": {HUGE}}}', "no JSON object"),
        ('{"prompt": "\\ud83d", "response": "a"}', "surrogate"),
        ("[" * 100_000, "deep"),
        ('"prompt"', r"\(str\)"),
        ("[1, 2]", r"\(list\)"),
        ("null", "NoneType"),
        ("1", r"\(int\)"),
        ("prompt: q", "no JSON object"),
        (f"{GOOD} {GOOD}", "Extra data"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_row_is_named_by_its_line_and_costs_no_other(
    bad: str, reason: str, tmp_path: Path
) -> None:
    path, text = tmp_path / "a.jsonl", "\n".join([GOOD, GOOD, bad, GOOD])
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{reason}.*bad_rows: skip"):
        read(path, text)
    records = RecordFiles([str(path)], read_answers, skips=True)
    assert [int(r.source[-1]) for r in records] == [1, 2, 4]
    assert list(records.report.skipped.values()) == [1]
    assert records.report.shown[0].startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    "good",
    [
        '{"prompt": "q", "response": "a", "history": NaN}',
        '{"prompt": "q", "response": "a", "n": 1e999}',
        '\ufeff{"prompt": "q", "response": "a"}',
        '{"prompt": "q", "response": "\\ud83d\\ude00"}',
        '{"prompt": "q", "response": "a\\u0000b"}',
        '\t{"prompt": "q",\r"response": "a"}  ',
    ],
)
def test_what_is_odd_and_clear_is_read(good: str, tmp_path: Path) -> None:
    (record,) = read(tmp_path / "a.jsonl", good)
    assert record.query == "q"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"[{GOOD},\n{GOOD},\n{GOOD[:-4]}", ":3: .*cut off"),
        (f"[{GOOD},\n{GOOD},\n", ":3: .*never ends.*cut off"),
        (f"[{GOOD},\n{GOOD}", ":2: .*never ends.*cut off"),
        (f"[{GOOD}\n{GOOD}]", ":2: .*where a comma"),
        (f"[{GOOD},\n// one more\n{GOOD}]", ":2: .*comment"),
        (f"[\n{GOOD},\n{{'prompt': 1}}]", ":3: .*single quotes"),
        (f"[\n{GOOD},\n{'[' * 100_000}", ":3: .*deep"),
        ('{\n "prompt": "q",\n "response": "a",\n}', ":4: no JSON"),
        ('{\n "prompt": "q",\n "response": "a"\n', ":1: .*cut off|line 1.*cut off"),
        ("prompt\tresponse\nq\ta\n", ":1: .*begins with 'prompt"),
        ("{'prompt': 'q', 'response': 'a'}\n" * 3, ":1: .*single quotes"),
    ],
)
def test_what_is_no_json_as_a_whole_is_never_to_be_skipped(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    for skips in (False, True):
        with pytest.raises(ValueError, match=rf"a\.json{reason}") as told:
            read(path, text, skips=skips)
        assert "skip" not in str(told.value)


def test_a_bad_object_in_an_array_costs_no_other(tmp_path: Path) -> None:
    twice = '{"prompt": "q",\n "prompt": "q"}'
    text = f'[{GOOD},\n{twice},\n3, "x", {GOOD}, {{"n": {HUGE}}}, {GOOD}]'
    records = read(tmp_path / "a.json", text, options=json_options())
    assert [r.source.rpartition(":")[2] for r in records] == ["1", "4", "4"]
    assert records.num_skipped == 4


def json_options() -> Any:
    from chatglm.data.files import ReadingOptions

    return ReadingOptions(skips=True, max_bad_share=1.0)
