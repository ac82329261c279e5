"""Owns the figures of pairs of a better and a worse answer that a reward model has scored.

Does not know models, rows or files but the one that it writes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAIRS_FILE = "pairs.json"


def summarize_pairs(
    scores: np.ndarray, lengths: np.ndarray, kinds: Sequence[str]
) -> dict[str, Any]:
    """Return how often the better answer wins, by how much, and how often the longer one is it.

    Args:
        scores: `(N, 2)`, better first.
        lengths: `(N, 2)`, tokens of the answers.
        kinds: what is wrong with each worse answer; pairs with "" are in the whole only.

    Returns:
        `pairs`, `accuracy` (a tie is half a win), `ties` among them, `mean_margin`, the means
        `mean_chosen` and `mean_rejected`, and `longer_wins`; the same of each of `kinds`.
    """

    def summarize(chosen: np.ndarray) -> dict[str, Any]:
        better, worse = scores[chosen].T
        return {
            "pairs": int(chosen.sum()),
            "accuracy": share_of_wins(scores[chosen]),
            "ties": int((better == worse).sum()),
            "mean_margin": float((better - worse).mean()),
            "mean_chosen": float(better.mean()),
            "mean_rejected": float(worse.mean()),
            "longer_wins": share_of_wins(lengths[chosen]),
        }

    names = np.array(kinds)
    whole = summarize(np.ones(len(scores), dtype=bool))
    parts = {kind: summarize(names == kind) for kind in sorted(set(kinds) - {""})}
    return {**whole, "kinds": parts}


def share_of_wins(values: np.ndarray) -> float:
    """Return how often the first of two values `(N, 2)` is the greater one; a tie is half a win."""
    first, second = values[:, 0], values[:, 1]
    return float(((first > second) + 0.5 * (first == second)).mean())


def write_pairs(summary: dict[str, Any], folder: Path) -> None:
    """Write what `summarize_pairs` found into a folder."""
    text = json.dumps(summary, ensure_ascii=False, indent=2)
    (folder / PAIRS_FILE).write_text(text + "\n", encoding="utf-8")


__all__ = ["PAIRS_FILE", "share_of_wins", "summarize_pairs", "write_pairs"]
