"""Multiple choice: files of both tests, the wording, how an answer is picked, the marks."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.evaluating.multiple_choice import (
    PromptTemplate,
    Question,
    Subject,
    mark_subject,
    mark_test,
    read_questions,
    read_subjects,
)
from chatglm.evaluating.ranking import ChoiceRanker, Prompt, encode_letters
from chatglm.evaluating.scoring import BatchedModel
from chatglm.evaluating.subjects import CATEGORIES, CHINESE_NAMES
from chatglm.training.data.rendering import Example, Renderer, RowProblem

CEVAL_HEADER = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
CEVAL_ROWS = [
    ["0", "1加1等于几？", "1", "2", "3", "4", "B", "1+1=2"],
    ["1", "天空是什么颜色？", "蓝色", "绿色", "红色", "黑色", "A", "看一看"],
    ["7", "“水”的化学式是？", "H2O", "CO2", "O2", "N2", "A", "两个氢\n一个氧"],
]
MMLU_ROWS = [
    ["What is 2 + 2?", "3", "4", "5", "6", "B"],
    ['Which, of "these", is a fruit?', "stone", "apple", "sand", "iron", "B"],
    ["How many legs has a dog?", "2", "3", "4", "8", "C"],
]


def write_csv(path: Path, rows: Sequence[Sequence[str]], encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def ceval(tmp_path: Path) -> Path:
    """A folder as C-Eval's: headers, no answers in test."""
    folder = tmp_path / "ceval"
    for name in ("logic", "physician"):
        write_csv(folder / "dev" / f"{name}_dev.csv", [CEVAL_HEADER, *CEVAL_ROWS])
        val = [row[:-1] for row in (CEVAL_HEADER, *CEVAL_ROWS)]
        write_csv(folder / "val" / f"{name}_val.csv", val, "utf-8-sig")
        write_csv(folder / "test" / f"{name}_test.csv", [row[:6] for row in val])
    return folder


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """A folder as MMLU's: no headers."""
    folder = tmp_path / "mmlu"
    for split, rows in (("dev", MMLU_ROWS[:2]), ("test", MMLU_ROWS)):
        write_csv(folder / split / f"global_facts_{split}.csv", rows)
    return folder


# Files


def test_files_of_ceval(ceval: Path) -> None:
    subjects, problems = read_subjects(ceval, "val", 2, [])
    assert [subject.name for subject in subjects] == ["logic", "physician"] and not problems
    (first, _, last), shots = subjects[0].questions, subjects[0].shots
    source = f"{ceval / 'val' / 'logic_val.csv'}:2"
    assert first == Question(source, "0", "1加1等于几？", ("1", "2", "3", "4"), "B")
    assert last.key == "7" and last.options[0] == "H2O"
    assert [shot.answer for shot in shots] == ["B", "A"]
    (subject,), _ = read_subjects(ceval, "test", 0, ["physician"])
    assert (subject.name, subject.shots) == ("physician", [])
    assert [q.answer for q in subject.questions] == ["", "", ""]
    assert [q.key for q in subject.questions] == ["0", "1", "7"]


def test_files_of_mmlu(mmlu: Path) -> None:
    (subject,), _ = read_subjects(mmlu, "test", 2, [])
    assert subject.name == "global_facts"
    assert [q.key for q in subject.questions] == ["0", "1", "2"]
    second = subject.questions[1]
    assert second.text == 'Which, of "these", is a fruit?'
    assert second.options == ("stone", "apple", "sand", "iron") and second.answer == "B"
    assert [shot.text for shot in subject.shots] == [row[0] for row in MMLU_ROWS[:2]]


def test_headers_in_capitals_and_another_number_of_options(tmp_path: Path) -> None:
    """As CMMLU has them, whose files bear the subject's name alone."""
    rows = [["", "Question", "A", "B", "C", "Answer"], ["0", "一加一？", "1", "2", "3", "b"]]
    write_csv(tmp_path / "dev" / "agronomy.csv", rows)
    (subject,), _ = read_subjects(tmp_path, "dev", 0, [])
    assert subject.name == "agronomy"
    (question,) = subject.questions
    assert question.options == ("1", "2", "3") and (question.key, question.answer) == ("0", "B")


BAD_ROWS: list[tuple[list[str], str]] = [
    (["Q", "1", "2", "3", "B"], "it has 5 columns, and the first row has 6"),
    (["Q", "1", "2", "3", "4", "E"], "the answer is 'E', and the options are A, B, C, D"),
    (["", "1", "2", "3", "4", "A"], "the question or an option is empty"),
    (["Q", "1", " ", "3", "4", "A"], "the question or an option is empty"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, row: list[str], message: str) -> None:
    file = write_csv(tmp_path / "x.csv", [*MMLU_ROWS[:2], row, MMLU_ROWS[2]])
    with pytest.raises(ValueError, match=rf"x\.csv:3: {message}; mend the row, or leave"):
        read_questions(file, False, [])
    problems: list[str] = []
    questions = read_questions(file, True, problems)
    assert problems == [f"{file}:3: {message}"]
    assert [question.text for question in questions] == [row[0] for row in MMLU_ROWS]


def test_other_files_and_folders_are_refused(mmlu: Path) -> None:
    for content, message in (
        (b"a,b,c\n", "has 3 columns: it needs question, A, B, C, D and answer"),
        (b"\xff\xfe,b,c,d\n", "is no CSV file in UTF-8"),
        (b"id,question,A,B,answer\n", "has no questions that can be used"),
        (b"", "has no questions that can be used"),
    ):
        file = mmlu / "x.csv"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.csv {message}"):
            read_questions(file, False, [])
    with pytest.raises(ValueError, match=r"has no val/\*\.csv: name the folder that has dev, val"):
        read_subjects(mmlu, "val", 0, [])
    with pytest.raises(ValueError, match="has no subject law, but global_facts"):
        read_subjects(mmlu, "test", 0, ["law"])
    with pytest.raises(ValueError, match="dev has 2 questions with answers of global_facts, and"):
        read_subjects(mmlu, "test", 3, [])


# Wording


def test_the_words_around_chinese_questions(ceval: Path) -> None:
    (subject, _), _ = read_subjects(ceval, "val", 1, [])
    record = PromptTemplate(subject).build_record(subject.questions[1], 1)
    assert record.history == [
        (
            "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
            "1加1等于几？\nA. 1\nB. 2\nC. 3\nD. 4\n答案：",
            "B",
        )
    ]
    assert record.query == "天空是什么颜色？\nA. 蓝色\nB. 绿色\nC. 红色\nD. 黑色\n答案："
    assert (
        PromptTemplate(subject).build_record(subject.questions[0], 0).query == record.history[0][0]
    )


def test_the_words_around_english_questions(mmlu: Path) -> None:
    (subject,), _ = read_subjects(mmlu, "test", 2, [])
    header = "The following are multiple choice questions (with answers) about global facts.\n\n"
    record = PromptTemplate(subject, lists_options=False).build_record(subject.questions[2], 2)
    assert record.history == [
        (f"{header}What is 2 + 2?\nAnswer:", "4"),
        ('Which, of "these", is a fruit?\nAnswer:', "apple"),
    ]
    assert record.query == "How many legs has a dog?\nAnswer:"
    assert (
        PromptTemplate(subject, "zh")
        .build_record(subject.questions[2], 0)
        .query.startswith("以下是中国")
    )


def test_all_subjects_of_both_tests_have_a_category() -> None:
    assert len(CHINESE_NAMES) == 52 and len(CATEGORIES) == 52 + 57 - 7  # names that both have
    assert CATEGORIES["law"] == "Humanities" and CATEGORIES["virology"] == "Other"
    assert set(CATEGORIES.values()) == {"STEM", "Social Science", "Humanities", "Other"}


# Picking


class Pieces:
    """A tokenizer with given ids for letters."""

    def __init__(self, ids: dict[str, list[int]]) -> None:
        self.ids = ids

    def encode_text(self, text: str) -> list[int]:
        return self.ids[text]


def test_letters_share_what_stands_before_them() -> None:
    renderer: Any = Pieces({"A": [5, 8], "B": [5, 9], "C": [5, 2]})
    assert encode_letters(renderer, 3) == ([5], [8, 9, 2])


@pytest.mark.parametrize(
    "ids",
    [
        {"A": [5, 8], "B": [9], "C": [5, 2]},
        {"A": [8], "B": [8], "C": [2]},
        {"A": [5, 8], "B": [6, 9], "C": [5, 2]},
    ],
)
def test_letters_without_a_token_are_refused(ids: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match=r"token of its own for each of A, B, C .*answer_by to te"):
        renderer: Any = Pieces(ids)
        encode_letters(renderer, 3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the official vocabularies are not there")
@pytest.mark.parametrize(
    ("name", "first_id", "ids"),
    [
        ("ice_text.v1.1.model", 0, [167, 333, 251, 416]),
        ("ice_text.v0.model", 20000, [20167, 20333, 20251, 20416]),
    ],
)
def test_letters_of_the_official_vocabularies(name: str, first_id: int, ids: list[int]) -> None:
    """One token each, whose piece begins with the space that opens every text."""
    tokenizer = ChatGLMTokenizer(str(SHARED / "tokenizers" / name), num_image_tokens=first_id)
    texts = {letter: tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABCD"}
    renderer: Any = Pieces(texts)
    assert encode_letters(renderer, 4) == ([], ids)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁A", "▁B", "▁C", "▁D"]


@pytest.fixture(scope="module")
def tokenizer(tiny_repo: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(tiny_repo: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_repo, trust_remote_code=True, dtype=torch.float32
    )
    return model.eval()


def make_picker(model: Any, tokenizer: Any, answer_by: str, **options: Any) -> ChoiceRanker:
    renderer = Renderer(model, tokenizer, **options)
    return ChoiceRanker(renderer, BatchedModel(model, renderer.pad_id, 4), answer_by)


@torch.no_grad()
def find_log_probs(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> torch.Tensor:
    """The log probability of each token of an answer, of a row alone and without padding."""
    row = torch.tensor([prompt_ids + answer_ids])
    scores = model(row).logits[0, len(prompt_ids) - 1 : -1].log_softmax(dim=-1)
    return scores[torch.arange(len(answer_ids)), answer_ids]


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("answer_by", ["letter", "text", "text_mean"])
def test_the_likeliest_answer_is_picked(
    model: Any, tokenizer: Any, ceval: Path, answer_by: str, shots: int
) -> None:
    (subject, _), _ = read_subjects(ceval, "val", shots, [])
    picker = make_picker(model, tokenizer, answer_by)
    picked, mean_shots = picker.answer(subject)
    assert mean_shots == shots
    asker = PromptTemplate(subject, lists_options=answer_by == "letter")
    for question, letter in zip(subject.questions, picked):
        record = asker.build_record(question, shots)
        prompt = model.build_prompt(record.query, record.history)
        prompt_ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
        answers = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in ("ABCD" if answer_by == "letter" else question.options)
        ]
        if answer_by != "letter":
            answers = [[*answer, model.config.eos_token_id] for answer in answers]
        log_probs = [find_log_probs(model, prompt_ids, answer) for answer in answers]
        sums = [row.mean() if answer_by == "text_mean" else row.sum() for row in log_probs]
        assert letter == "ABCD"[int(torch.stack(sums).argmax())]


def test_letters_are_compared_behind_what_they_share() -> None:
    """And only as many as a question has options."""
    judge = BatchedModel(None, 3, 2)
    asked: list[list[int]] = []
    scores = torch.tensor([[0.1, 0.2, 0.9], [0.1, 0.2, 0.9]])
    judge.score_next = lambda prompts, ids: asked.extend(prompts) or scores  # type: ignore
    renderer: Any = Pieces({"A": [5, 8], "B": [5, 9], "C": [5, 2]})
    prompts = [Prompt([7], 0, [[1], [1], [1]]), Prompt([6, 7], 0, [[1], [1]])]
    assert ChoiceRanker(renderer, judge, "letter")._pick_letters(prompts) == [2, 1]
    assert asked == [[7, 5], [6, 7, 5]]


def test_the_mean_forgives_a_long_answer_its_length() -> None:
    judge, renderer = BatchedModel(None, 3, 2), Pieces({})
    measured = torch.tensor([[3.0, 1.0, 0.0], [4.0, 4.0, 0.0]])
    rows: list[Example] = []
    judge.measure_answers = lambda given, _: rows.extend(given) or measured  # type: ignore
    renderer.end_id = 1  # type: ignore[attr-defined]
    prompts = [Prompt([7], 0, [[5], [5, 6, 7]])]
    stand_in: Any = renderer
    assert ChoiceRanker(stand_in, judge, "text")._pick_texts(prompts) == [0]
    assert [row.answer_ids for row in rows] == [[5, 1], [5, 6, 7, 1]]  # each with its end token
    assert ChoiceRanker(stand_in, judge, "text_mean")._pick_texts(prompts) == [1]


def test_shots_that_do_not_fit_are_left_out(model: Any, tokenizer: Any, ceval: Path) -> None:
    (subject, _), _ = read_subjects(ceval, "val", 3, [])
    asker = PromptTemplate(subject)
    room = make_picker(model, tokenizer, "letter")
    lengths = [len(room.encode(question, asker).ids) for question in subject.questions]
    picker = make_picker(model, tokenizer, "letter", max_length=max(lengths) - 1)
    _, shots = picker.answer(subject)
    assert 2 <= shots < 3
    alone = make_picker(model, tokenizer, "letter", max_length=12, long_rows="skip")
    assert alone.answer(subject) == (["", "", ""], 0.0)
    with pytest.raises(RowProblem, match=r"logic_val\.csv:2: the row has \d+ tokens and max_len"):
        make_picker(model, tokenizer, "letter", max_length=12).answer(subject)


# Marks


def make_questions(answers: str) -> list[Question]:
    return [Question("", str(i), "?", ("1", "2"), a.strip()) for i, a in enumerate(answers)]


def test_marks_of_a_subject() -> None:
    """Unknown answers and questions that were left out do not count."""
    mark = mark_subject(make_questions("ABA B"), ["A", "A", "", "B", "B"])
    assert mark == {"questions": 3, "accuracy": 2 / 3}
    assert mark_subject(make_questions("  "), ["A", "B"]) == {"questions": 0, "accuracy": None}


def test_marks_of_a_test() -> None:
    marks = {
        "logic": {"questions": 4, "accuracy": 0.25},
        "law": {"questions": 1, "accuracy": 1.0},
        "marxism": {"questions": 5, "accuracy": 0.0},
        "my_own": {"questions": 10, "accuracy": 0.5},
        "virology": {"questions": 0, "accuracy": None},
    }
    found = mark_test(marks)
    categories = found.pop("categories")
    assert found == {"questions": 20, "accuracy": 7 / 20, "mean_accuracy": 1.75 / 4}
    assert categories == {
        "Humanities": {"questions": 5, "accuracy": 2 / 5, "mean_accuracy": 1.25 / 2},
        "Social Science": {"questions": 5, "accuracy": 0.0, "mean_accuracy": 0.0},
    }
    assert mark_test({"law": {"questions": 0, "accuracy": None}}) == {}


def test_subjects_are_asked_in_their_own_language() -> None:
    question = Question("", "0", "What?", ("a", "b"), "A")
    assert PromptTemplate(Subject("law", [question], [])).header.startswith("The following")
    assert "about law." in PromptTemplate(Subject("law", [question], [])).header
    assert "关于法学考试" in PromptTemplate(Subject("law", [question], []), "zh").header
