"""`chatglm export-tokenizer`: what is written, what it is equal to, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, SHARED
from tokenizers import Tokenizer
from transformers import AutoTokenizer

pytest.importorskip("chatglm", reason="the model's files alone")

from chatglm import cli
from chatglm.door import package_code
from chatglm.exporting import command
from chatglm.exporting.rust_tokenizer import build_tokenizer, read_charsmap, read_fields

TEXTS = [
    "你好，世界！ Hello  world\tand\n  more",
    " x ",
    "  ",
    "\n",
    "",
    "def f(x):\n    return x  # 一\n",
    "ａｂｃ　ｄ①",
    "😀 e\u0301 naïve",
    " " * 200 + "y",
    "a [MASK] b[MASK]c",
    "1 < 2 > 0",
]
ODD = "Hello </s> x"  # the small vocabulary has no piece for "<"
VOCABULARIES = {
    "small": (ROOT / "ice_text.model", 0),
    "first": (SHARED / "tokenizers" / "ice_text.v0.model", 20000),
    "later": (SHARED / "tokenizers" / "ice_text.v1.1.model", 0),
}


def export(folder: Path, target: Path, *options: str) -> int:
    return cli.main(["export-tokenizer", str(target), "--model", str(folder), *options])


def read(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_plain_texts_have_the_class_s_ids_and_come_back(name: str) -> None:
    file, images = VOCABULARIES[name]
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    own = ChatGLMTokenizer(str(file), num_image_tokens=images)
    built = build_tokenizer(own)
    assert built.get_vocab_size() == own.vocab_size
    for text in TEXTS[:-2]:
        ids = own(text)["input_ids"]
        assert built.encode(text).ids == ids
        shown = own.decode(ids, clean_up_tokenization_spaces=False)
        assert built.decode(ids, skip_special_tokens=False) == shown
    open_ids = own(TEXTS[-2], add_special_tokens=False)["input_ids"]
    assert built.encode(TEXTS[-2], add_special_tokens=False).ids == open_ids
    assert built.encode("a b", "c").ids == own("a b", "c")["input_ids"]
    some = [0, images, images + 5, images + 100, own.vocab_size - 1]
    assert [built.id_to_token(index) for index in some] == own.convert_ids_to_tokens(some)


def test_added_tokens_and_the_options_of_a_text_go_along() -> None:
    own = ChatGLMTokenizer(
        str(ROOT / "ice_text.model"), num_image_tokens=0, do_lower_case=True, remove_space=True
    )
    own.add_tokens(["<new>"])
    own.add_special_tokens({"additional_special_tokens": ["<own>"]})
    built = build_tokenizer(own)
    assert built.token_to_id("<new>") == own.convert_tokens_to_ids("<new>") == own.vocab_size
    assert built.token_to_id("<own>") == own.vocab_size + 1
    assert own.vocab_size in built.encode("a<new>b").ids
    text = "ABC  Def\n\tG"
    assert built.encode(text).ids == own(text)["input_ids"] != built.encode("ABC").ids


def test_the_command_writes_two_files_and_says_what_differs(
    tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, target = tmp_path / "mine.txt", tmp_path / "new" / "out"
    text.write_text("\n".join([*TEXTS[1:3], ODD, "", "你好"]) + "\n", encoding="utf-8")
    assert export(tiny_repo, target, "--check", str(text)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{target}: tokenizer.json written; README.md has its limits"
    assert shown[1] == f"{text}: 1 of 4 lines that are not empty get other ids"
    assert shown[2].startswith(f'  "{ODD}": token ') and len(shown) == 3
    assert read(target).keys() == {"tokenizer.json", "README.md"}
    assert "tokenizer.json: what it is not" in read(target)["README.md"].decode()
    with package_code():
        own: Any = AutoTokenizer.from_pretrained(tiny_repo)
    written = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert written.encode(TEXTS[0]).ids == own(TEXTS[0])["input_ids"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    before = read(target)
    assert export(tiny_repo, target, "--check", str(text)) == 0
    assert read(target) == before and "is so already" in capsys.readouterr().out


def test_lines_beyond_a_batch_are_counted(tiny_repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MANY", 2)
    own = ChatGLMTokenizer(str(tiny_repo / "ice_text.model"), num_image_tokens=0)
    lines = ["a", "b", ODD, "c", ODD]
    found = [*command.find_differences(lines, own, build_tokenizer(own))]
    assert [place for place, _, _ in found] == [2, 4]
    assert found[0][1] == own(ODD, add_special_tokens=False)["input_ids"] != found[0][2]


def test_a_folder_with_other_things_is_left_as_it_is(
    tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    (tmp_path / "other").mkdir()
    for name in ("tokenizer.json", "README.md"):
        (tmp_path / "other" / name).write_text("{}")
    (tmp_path / "file").write_text("x")
    said = {"mine": "holds notes.txt", "other": "of another vocabulary", "file": "is no folder"}
    for name, words in said.items():
        assert export(tiny_repo, tmp_path / name) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert read(tmp_path / "mine") == {"notes.txt": b"x"}
    assert set(read(tmp_path / "other").values()) == {b"{}"}
    assert export(tiny_repo, tiny_repo) == 2


def test_all_or_nothing(tiny_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def fail_at_the_second(path: Path, content: bytes) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail_at_the_second)
        assert export(tiny_repo, tmp_path / "out") == 2
    assert not any(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    assert export(tiny_repo, tmp_path / "out") == 0
    assert len(read(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"\xff", "is no UTF-8 (byte 0)"), (b"\n\n", "has no text in it")],
)
def test_a_text_that_cannot_be_checked_is_refused_first(
    tiny_repo: Path,
    tmp_path: Path,
    content: bytes | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    assert export(tiny_repo, tmp_path / "out", "--check", str(tmp_path / "mine.txt")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_auto_tokenizer_never_gives_the_export(tiny_repo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_repo, tmp_path / "with_an_export"))
    assert export(folder, tmp_path / "out") == 0
    shutil.copy(tmp_path / "out" / "tokenizer.json", folder)
    with package_code():
        installed: Any = AutoTokenizer.from_pretrained(folder)
    for own in (installed, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)):
        assert type(own).__name__ == "ChatGLMTokenizer" and not own.is_fast
        ids = own(ODD, add_special_tokens=False)["input_ids"]
        expected = ChatGLMTokenizer(str(ROOT / "ice_text.model"), num_image_tokens=0)
        assert ids == expected(ODD, add_special_tokens=False)["input_ids"]
        own.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "ice_text.model").is_file()
        assert not (tmp_path / "saved" / "tokenizer.json").exists()


def test_the_table_of_characters_is_the_one_of_the_file() -> None:
    content = (ROOT / "ice_text.model").read_bytes()
    table = read_charsmap(content)
    assert len(table) > 1000 and table in content
    message = b"\x08\x96\x01\x12\x02ab\x1d\0\0\0\0\x21" + bytes(8)
    sizes = [(number, len(body)) for number, body in read_fields(message)]
    assert sizes == [(1, 2), (2, 2), (3, 4), (4, 8)]
