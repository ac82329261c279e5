"""BLEU-4 and ROUGE as the official scripts print them, against numbers worked out by hand."""

import importlib.util
import math
import sys

import pytest

from chatglm.evaluating import metrics
from chatglm.evaluating.metrics import average_scores, compare_texts, load_packages

needs_packages = pytest.mark.skipif(
    importlib.util.find_spec("rouge_chinese") is None, reason='the extra "train" is not installed'
)
NOTHING = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0, "bleu-4": 0.0}


@needs_packages
def test_words_of_a_latin_text() -> None:
    """5 words each but for one, twice `the`: sets for ROUGE-1 and 2, the sequence for ROUGE-L."""
    scores = compare_texts("the cat sat on the mat", "the cat is on the mat")
    assert scores["rouge-1"] == 80.0  # 4 of 5
    assert scores["rouge-2"] == 60.0  # 3 of 5
    assert scores["rouge-l"] == 83.3333  # 5 of 6


@needs_packages
def test_words_and_characters_of_a_chinese_text() -> None:
    """The words are 我, 喜欢, 北京. No four characters in a row are right, which is smoothed."""
    scores = compare_texts("我喜欢上海", "我喜欢北京")
    bleu = (3 / 5 * 2 / 4 * 1 / 3 * 1 / (2 * 2)) ** 0.25
    assert scores == {
        "rouge-1": 66.6667,
        "rouge-2": 50.0,
        "rouge-l": 66.6667,
        "bleu-4": round(100 * bleu, 4),
    }


@needs_packages
def test_bleu_of_characters() -> None:
    scores = compare_texts("今天天气不好", "今天天气很好")
    assert scores["bleu-4"] == round(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, 4) == 53.7285
    # Shorter than the label, and than four characters: each missing order counts half the last.
    scores = compare_texts("好", "好的")
    assert scores["bleu-4"] == round(100 * math.exp(1 - 2) * (1 / 2 / 4 / 8) ** 0.25, 4) == 13.0065


@needs_packages
@pytest.mark.parametrize("text", ["今天天气很好。", "the cat is on the mat", "3 + 5 = 8"])
def test_a_right_answer_has_a_hundred(text: str) -> None:
    scores = compare_texts(text, text)
    assert scores["bleu-4"] == 100.0
    assert all(value > 99.9 for value in scores.values())


@needs_packages
@pytest.mark.parametrize("prediction", ["", " ", "\n"])
def test_an_empty_prediction_has_nothing(prediction: str) -> None:
    assert compare_texts(prediction, "好的") == NOTHING
    assert compare_texts("好的", prediction) == NOTHING


@needs_packages
@pytest.mark.parametrize("prediction", ["。", "...", "？\n", "a\n\nb", "”"])
def test_strange_predictions_do_not_stop_the_scores(prediction: str) -> None:
    scores = compare_texts(prediction, "今天天气很好。")
    assert scores.keys() == NOTHING.keys()
    assert all(0 <= value < 60 for value in scores.values())


@needs_packages
def test_the_mean_is_that_of_the_rows() -> None:
    pairs = [("我喜欢上海", "我喜欢北京"), ("", "好"), ("我喜欢北京", "我喜欢北京")]
    means = average_scores(pairs)
    rows = [compare_texts(*pair) for pair in pairs]
    assert means["rouge-2"] == pytest.approx((50 + 0 + rows[2]["rouge-2"]) / 3)
    assert means["bleu-4"] == pytest.approx((rows[0]["bleu-4"] + 100) / 3)


@pytest.mark.parametrize("package", ["jieba", "rouge_chinese", "nltk"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """The two others need not be there either: they are stand-ins."""
    stand_in = type("Package", (), {"setLogLevel": print, "Rouge": object})
    for name in ("jieba", "rouge_chinese", "nltk.translate.bleu_score"):
        is_missing = name.partition(".")[0] == package
        monkeypatch.setitem(sys.modules, name, None if is_missing else stand_in)
    load_packages.cache_clear()
    with pytest.raises(
        ImportError, match=rf'need the package {package}: pip install --editable "\.\[train\]"'
    ):
        metrics.load_packages()
    load_packages.cache_clear()
