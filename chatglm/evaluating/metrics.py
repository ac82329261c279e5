"""Owns how near a generated text is to the expected one: BLEU-4 and ROUGE as the official scripts.

The same packages, called in the same way, give the same numbers: words cut by jieba for ROUGE,
characters for BLEU. They belong to the extra `train` and are imported when they are used. Does not
know where the texts come from.
"""

import functools
import importlib
import logging
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
# Each text's scores are rounded to so many digits before they are averaged.
DIGITS = 4


class Packages(NamedTuple):
    """What the scores are computed with.

    Attributes:
        jieba: cuts Chinese text into words.
        rouge: an object of `rouge_chinese.Rouge`.
        bleu: the module `nltk.translate.bleu_score`.
    """

    jieba: Any
    rouge: Any
    bleu: Any


@functools.cache
def load_packages() -> Packages:
    """Import what the scores need.

    Raises:
        ImportError: if a package is not installed; it says how to install it.
    """
    jieba = _import("jieba")
    jieba.setLogLevel(logging.WARNING)
    rouge = _import("rouge_chinese").Rouge()
    return Packages(jieba, rouge, _import("nltk.translate.bleu_score"))


def _import(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            # jieba and rouge_chinese are older than today's Python, which warns of their code.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f'BLEU and ROUGE need the package {package}: pip install --editable ".[train]"'
        ) from error


def compare_texts(prediction: str, label: str) -> dict[str, float]:
    """Return the scores of a text in percent, by the names in `SCORES`.

    Args:
        prediction: the generated text; an empty one has 0 everywhere.
        label: the expected text.

    Raises:
        ImportError: as `load_packages`.
    """
    packages = load_packages()
    if not prediction.strip() or not label.strip():
        # rouge_chinese cannot take an empty text.
        return dict.fromkeys(SCORES, 0.0)
    words = (" ".join(packages.jieba.cut(text)) for text in (prediction, label))
    (rouge,) = packages.rouge.get_scores(*words)
    smoothing = packages.bleu.SmoothingFunction().method3
    bleu = packages.bleu.sentence_bleu(
        [list(label)], list(prediction), smoothing_function=smoothing
    )
    shares = {name: rouge[name]["f"] for name in SCORES if name in rouge} | {"bleu-4": bleu}
    return {name: round(100 * shares[name], DIGITS) for name in SCORES}


def average_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Return the mean scores of predictions and labels, one pair at least.

    Raises:
        ImportError: as `load_packages`.
    """
    rows = [compare_texts(prediction, label) for prediction, label in pairs]
    return {name: sum(row[name] for row in rows) / len(rows) for name in SCORES}


__all__ = ["SCORES", "average_scores", "compare_texts", "load_packages"]
