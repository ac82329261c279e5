"""D4: kinds of files, how they are packed, how they are encoded; told by what is in them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="these are the package's files")

from chatglm.data import table_rows
from chatglm.data.dialects import read_answers, read_texts
from chatglm.data.encodings import guess_encoding
from chatglm.data.files import ReadingOptions, RecordFiles
from chatglm.data.kinds import FileOptions
from chatglm.data.records import Record

TEXTS = [
    ("你好", "你好，我是一个人工智能助手。"),
    ('say "hi", then\nbye', "hi\u2028bye;\t|"),
    ("第三个问题是什么？", "第三个回答"),
    ("  four  ", "4"),
]
ROWS = [{"prompt": q, "response": a, "history": [["x", "y"]]} for q, a in TEXTS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
EXPECTED = [([("x", "y")], q, a) for q, a in TEXTS]


def pack(data: bytes) -> bytes:
    """Return data in gzip, without the time of day, which would name each case anew."""
    return gzip.compress(data, mtime=0)


def write_table(separator: str, **options: Any) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, delimiter=separator, **options)
    table.writerow(["prompt", "response", "history"])
    table.writerows([q, a, json.dumps([["x", "y"]])] for q, a in TEXTS)
    return text.getvalue().encode()


def write_columns(kind: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    table, data = pyarrow.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, data, row_group_size=2)
    elif kind == "feather":
        feather.write_feather(table, data)
    else:
        make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with make(data, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return data.getvalue()


KINDS: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "lines": ("a.jsonl", lambda: LINES, "JSON lines", "UTF-8"),
    "lines, no suffix": ("part-00000", lambda: LINES, "JSON lines", "UTF-8"),
    "ndjson": ("a.ndjson", lambda: LINES, "JSON lines", "UTF-8"),
    "mark": ("a.jsonl", lambda: b"\xef\xbb\xbf" + LINES, "JSON lines", "UTF-8 with BOM"),
    "utf-16": ("a.jsonl", lambda: LINES.decode().encode("utf-16"), "JSON lines", "utf-16"),
    "utf-16-be": (
        "a.jsonl",
        lambda: b"\xfe\xff" + LINES.decode().encode("utf-16-be"),
        "JSON lines",
        "utf-16",
    ),
    "array": ("a.jsonl", lambda: json.dumps(ROWS).encode(), "JSON array", "UTF-8"),
    "array, mark": (
        "a.json",
        lambda: json.dumps(ROWS, indent=1, ensure_ascii=False).encode("utf-8-sig"),
        "JSON array",
        "UTF-8 with BOM",
    ),
    "csv": ("a.csv", lambda: write_table(","), "csv", "UTF-8"),
    "csv, unix": ("a.csv", lambda: write_table(",", lineterminator="\n"), "csv", "UTF-8"),
    "csv, all quoted": ("a.CSV", lambda: write_table(",", quoting=csv.QUOTE_ALL), "csv", "UTF-8"),
    "csv, mark": ("a.csv", lambda: b"\xef\xbb\xbf" + write_table(","), "csv", "UTF-8 with BOM"),
    "csv, semicolon": ("a.csv", lambda: write_table(";"), "csv with ';'", "UTF-8"),
    "csv, tab": ("a.csv", lambda: write_table("\t"), "tsv", "UTF-8"),
    "tsv": ("a.tsv", lambda: write_table("\t"), "tsv", "UTF-8"),
    "tsv, comma": ("a.tsv", lambda: write_table(","), "csv", "UTF-8"),
    "lines as csv": ("a.csv", lambda: LINES, "JSON lines", "UTF-8"),
    "lines as txt": ("a.txt", lambda: LINES, "JSON lines", "UTF-8"),
    "array as txt": ("a.txt", lambda: json.dumps(ROWS, indent=2).encode(), "JSON array", "UTF-8"),
    "gz": ("a.jsonl.gz", lambda: pack(LINES), "JSON lines, gzip", "UTF-8"),
    "gz, two parts": (
        "a.jsonl.gz",
        lambda: gzip.compress(LINES[:90]) + gzip.compress(LINES[90:]),
        "JSON lines, gzip",
        "UTF-8",
    ),
    "gz by content": (
        "a.jsonl",
        lambda: pack(LINES),
        "JSON lines, gzip",
        "UTF-8",
    ),
    "gz of csv": (
        "a.csv.gz",
        lambda: gzip.compress(write_table(";")),
        "csv with ';', gzip",
        "UTF-8",
    ),
    "bz2": ("a.jsonl.bz2", lambda: bz2.compress(LINES), "JSON lines, bzip2", "UTF-8"),
    "xz of an array": (
        "a.json.xz",
        lambda: lzma.compress(json.dumps(ROWS).encode()),
        "JSON array, xz",
        "UTF-8",
    ),
    "parquet": ("a.parquet", lambda: write_columns("parquet"), "parquet", ""),
    "parquet by content": ("a.bin", lambda: write_columns("parquet"), "parquet", ""),
    "arrow file": ("a.arrow", lambda: write_columns("file"), "arrow", ""),
    "arrow stream": ("a.arrow", lambda: write_columns("stream"), "arrow", ""),
    "feather": ("a.feather", lambda: write_columns("feather"), "arrow", ""),
}


def read(path: Path, reader: Any = read_answers, **options: str) -> RecordFiles:
    told = ReadingOptions(files=FileOptions(**options))  # pyright: ignore[reportArgumentType]
    return RecordFiles([str(path)], reader, options=told)


def see(records: RecordFiles) -> list[Any]:
    return [(r.history, r.query, r.answer) for r in records]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    file, make, kind, encoding = KINDS[name]
    (tmp_path / file).write_bytes(make())
    records = read(tmp_path / file)
    assert see(records) == EXPECTED
    (report,) = records.report.files
    assert (report.kind, report.encoding, report.rows) == (kind, encoding, 4)
    assert pickle.loads(pickle.dumps(records))[2] == records[2]
    # What a name says and what is in a file are two things: where they differ is told.
    is_told = any("in spite of its name" in warning for warning in records.report.warnings)
    assert is_told == (name in ("lines as csv", "lines as txt", "array as txt"))


def test_rows_of_tables_are_named_by_the_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(write_table(",", lineterminator="\n")))
    lines = [r.source for r in read(tmp_path / "a.csv.gz")]
    assert lines == [f"{tmp_path / 'a.csv.gz'}:{line}" for line in (2, 3, 5, 6)]


def test_a_plain_copy_lives_as_long_as_its_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    records = read(tmp_path / "a.jsonl.gz")
    copy = records.opened[0].plain
    assert copy.is_file() and copy.parent != tmp_path
    del records
    assert not copy.parent.exists()


CHINESE = "模型的训练数据可以是任何形式的中文文本，我们希望它们都能被正确地读取。这是第二句话。"
TRADITIONAL = "模型的訓練資料可以是任何形式的中文文本，我們希望它們都能被正確地讀取。這是第二句話。"
JAPANESE = "モデルの学習データはどのような形式の日本語でもかまいません。これは二番目の文です。"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("gb18030", CHINESE),
        ("big5", TRADITIONAL),
        ("shift_jis", JAPANESE),
        ("utf-16-le", CHINESE),
        ("utf-16-be", CHINESE),
        ("cp1252", "déjà vu; façade; naïve; über; größe; señor; coração"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_other_encodings_are_named_and_read_by_a_key(
    encoding: str, text: str, name: str, tmp_path: Path
) -> None:
    content = {
        "a.csv": f"prompt,response\n{text},a\n",
        "a.txt": text,
        "a.json": json.dumps([{"prompt": text, "response": "a"}], ensure_ascii=False),
    }.get(name, json.dumps({"prompt": text, "response": "a"}, ensure_ascii=False))
    data = content.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    reader = read_texts if name == "a.txt" else read_answers
    for skips in (False, True):
        with pytest.raises(ValueError, match=f"no UTF-8.*encoding: {encoding}") as told:
            RecordFiles([str(path)], reader, skips=skips)
        assert "skip" not in str(told.value) and str(path) in str(told.value)
    (record,) = read(path, reader, encoding=encoding)
    assert record.query == text
    (record,) = RecordFiles([{"path": str(path), "encoding": encoding}], reader)
    assert record.query == text


def test_the_encoding_is_found_behind_a_long_head_of_ascii(tmp_path: Path) -> None:
    lines = b'{"prompt": "q", "response": "a"}\n' * 5000
    odd = json.dumps({"prompt": CHINESE, "response": "a"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(lines + odd.encode("gb18030"))
    with pytest.raises(ValueError, match=r"a\.jsonl:5001: .*encoding: gb18030"):
        read(tmp_path / "a.jsonl")


def test_a_damaged_byte_of_utf8_is_a_bad_row(tmp_path: Path) -> None:
    good = json.dumps({"prompt": CHINESE, "response": "a"}, ensure_ascii=False) + "\n"
    damaged = good.encode()[:40] + b"\xff" + good.encode()[40:]
    (tmp_path / "a.jsonl").write_bytes(good.encode() * 5 + damaged + good.encode() * 5)
    with pytest.raises(ValueError, match=r"a\.jsonl:6: bytes that are no UTF-8.*bad_rows: skip"):
        read(tmp_path / "a.jsonl")
    assert len(RecordFiles([str(tmp_path / "a.jsonl")], read_answers, skips=True)) == 10


def test_a_wrong_key_of_encoding_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    with pytest.raises(ValueError, match=r"is UTF-8, and encoding says gb18030"):
        read(path, encoding="gb18030")
    with pytest.raises(ValueError, match="no encoding 'klingon'"):
        read(path, encoding="klingon")
    with pytest.raises(ValueError, match="no encoding 'base64'"):
        read(path, encoding="base64")
    path.write_bytes(CHINESE.encode("gb18030"))
    with pytest.raises(ValueError, match="near line 1: the file is no shift_jis"):
        read(path, encoding="shift_jis")
    assert guess_encoding(b"\xff\xfe\xfd") == "cp1252"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\0" * 50, "zstd"),
        ("a.zip", b"PK\x03\x04" + b"\0" * 50, "zip archive"),
        ("a.xlsx", b"PK\x03\x04" + b"\0" * 50, "Excel workbook"),
        ("a.xls", b"\xd0\xcf\x11\xe0" + b"\0" * 50, "old Excel"),
        ("a.pdf", b"%PDF-1.4\n" + b"\0" * 50, "PDF"),
        ("a.png", b"\x89PNG\r\n" + b"\0" * 50, "picture"),
        ("a.tar.gz", pack(b"a.jsonl".ljust(257, b"\0") + b"ustar\0"), "tar archive"),
        ("a.jsonl", b"<!DOCTYPE html><html></html>", "web page"),
        ("a.jsonl", b"\n<html><body>404</body></html>", "web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl", b"prompt,response\na,b\n", "no row begins with 'prompt"),
        ("a.dat", b"hello world\n", "no row begins with 'hello world"),
        ("a.jsonl.gz", pack(LINES * 50)[:-20], "gzip breaks off or is damaged"),
        ("a.jsonl.gz", pack(LINES)[:20] + b"x" * 30, "gzip breaks off or is damaged"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-9], "bzip2 (breaks off|is damaged)"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:30] + b"x" * 60, "bzip2 (breaks off or )?is damaged"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-30], "xz breaks off or is damaged"),
        ("a.parquet", b"PAR1" + b"x" * 100, "parquet is damaged"),
        ("a.arrow", b"ARROW1\0\0" + b"x" * 100, "arrow is damaged"),
        ("a.arrow", b"\xff\xff\xff\xff" + b"x" * 100, "arrow is damaged"),
        ("a.csv", b'prompt,response\na,"b\nc,d\n', ":2: a quote is opened and never closed"),
        ("a.csv", b"prompt,response,prompt\na,b,c\n", ":1: two columns are called 'prompt'"),
        ("a.csv", b'prompt,"resp"onse\na,b\n', ":1: no header"),
        ("a.csv", b"\xe4\xbd\xa0\xe5\xa5\xbd,hi\nq,a\n", "its columns: 你好, hi"),
        ("a.txt", b"only a text\n", "only the stage pretrain"),
        ("a.jsonl", b"", "no usable row"),
        ("a.jsonl", b" \n\n", "no usable row"),
        ("a.jsonl", b"\xef\xbb\xbf\n", "no usable row"),
        ("a.json", b"[]", "no usable row"),
        ("a.csv", b"prompt,response\n", "no usable row"),
        ("a.jsonl.gz", pack(b""), "no usable row"),
    ],
)  # fmt: skip
def test_files_that_are_no_data_are_refused_by_what_they_are(
    name: str, data: bytes, words: str, tmp_path: Path
) -> None:
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    for skips in (False, True):
        with pytest.raises(ValueError, match=words) as told:
            RecordFiles([str(tmp_path / name)], read_answers, skips=skips)
        assert "skip" not in str(told.value) and str(tmp_path / name) in str(told.value)


def test_bad_rows_of_a_table_cost_no_other(tmp_path: Path) -> None:
    rows = ["prompt,response", "q,a", "q,a,b", "q", "", 'q,"a"x', "q,a"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=r"a\.csv:3: 3 cells where the header has 2"):
        read(tmp_path / "a.csv")
    options = ReadingOptions(skips=True, max_bad_share=0.9)
    records = RecordFiles([str(tmp_path / "a.csv")], read_answers, options=options)
    assert [r.source[-1] for r in records] == ["2", "7"]
    assert records.num_skipped == 3


def test_a_table_without_a_header_and_one_of_pandas(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\nr,b\n")
    records = read(tmp_path / "a.csv", header=("prompt", "response"))  # pyright: ignore
    assert [(r.query, r.answer) for r in records] == [("q", "a"), ("r", "b")]
    (tmp_path / "b.csv").write_text(",prompt,response,history\n0,q,a,\n1,r,b,\n")
    assert [(r.query, r.answer) for r in read(tmp_path / "b.csv")] == [("q", "a"), ("r", "b")]


def test_cells_that_look_like_lists_are_texts_where_texts_belong(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("prompt", "response"), ("[1, 2]", '[{"name": "x"}]'), ("{}", "[a]")]
        )
    assert see(read(tmp_path / "a.csv")) == [
        ([], "[1, 2]", '[{"name": "x"}]'),
        ([], "{}", "[a]"),
    ]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("messages",), (json.dumps(messages),)])
    assert see(read(tmp_path / "b.csv")) == [([], "q", "a")]


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("document", ["[1] one\ntwo\n\n \nthree"]),
        ("paragraph", ["[1] one\ntwo", "three"]),
        ("line", ["[1] one", "two", "three"]),
    ],
)
def test_plain_texts_are_cut_as_asked(sample_by: str, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n[1] one\r\ntwo\n\n \nthree\n\n", newline="")
    records = read(tmp_path / "a.txt", read_texts, sample_by=sample_by)
    assert [r.query.replace("\r", "") for r in records] == texts
    assert records[0].source == f"{tmp_path / 'a.txt'}:3"
    assert records[-1].source.endswith(":3" if sample_by == "document" else ":7")


@pytest.mark.parametrize("text", ["一二三四五六七八九十" * 20, "一二三\n四五六七\n" * 20])
def test_long_texts_are_read_in_parts_and_whole(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_rows, "LONGEST_TEXT", 50)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    records = list(read(tmp_path / "a.txt", read_texts))
    assert len(records) > 5
    assert "".join(r.query for r in records).replace("\n", "") == text.replace("\n", "")


def test_bytes_and_dates_of_columns_are_texts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import datetime

    from pyarrow import parquet

    row = {"prompt": b"q", "response": "a", "day": datetime.date(2023, 3, 14), "image": b"\xff"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (record,) = read(tmp_path / "a.parquet")
    assert isinstance(record, Record) and (record.query, record.answer) == ("q", "a")
