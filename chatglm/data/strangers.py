"""Owns the forms of rows that are refused by name: of tools, of pictures, of other trainings.

Without these a part of such rows would be left out and the rest learned. Does not know the forms
that are read.
"""

from dataclasses import dataclass

from chatglm.data.fields import Row, is_filled
from chatglm.data.messages import parse_json
from chatglm.data.records import RowProblem


@dataclass(frozen=True)
class Stranger:
    """A form of row that is not read.

    Attributes:
        name: whose it is.
        keys: that show it, all of them, the oddest one last.
        reason: why it is not read, and what to do.
    """

    name: str
    keys: tuple[str, ...]
    reason: str


TREES = "write each way through the tree as messages"
STRANGERS = (
    Stranger("OpenAssistant's trees", ("message_tree_id", "prompt", "tree_state"), TREES),
    Stranger("OpenAssistant's single messages", ("text", "message_id", "parent_id"), TREES),
    Stranger(
        "stepwise rewards", ("prompt", "completions", "labels"),
        "no stage learns from marks of single steps",
    ),
    Stranger(
        "ranks of many answers", ("prompt", "responses", "scores"),
        "write answers: [{answer, score}, ...]",
    ),
)  # fmt: skip
# Columns of yes or no: whether the only answer of a row is a good one.
VERDICTS = ("label", "kto_tag")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
TOOLS = ("tools", "functions")
# A row with none of these is no stranger, as most rows.
SUSPECT = {*VERDICTS, *MEDIA, *TOOLS, *(stranger.keys[-1] for stranger in STRANGERS)}


def refuse_strangers(row: Row, aim: str) -> None:
    """Refuse rows that would be read wrongly.

    Args:
        row: with the columns that are there.
        aim: as in `dialects`; plain texts are never refused.

    Raises:
        RowProblem: naming the form, and the remedy.
    """
    if aim == "texts" or SUSPECT.isdisjoint(row):
        return
    for stranger in STRANGERS:
        if all(key in row for key in stranger.keys):
            raise RowProblem(
                f"rows of {stranger.name} ({', '.join(stranger.keys)}) are not read: "
                f"{stranger.reason}"
            )
    for key in (*MEDIA, *TOOLS):
        value = row.get(key)
        if is_filled(parse_json(value) if isinstance(value, str) else value):
            reads = "knows no tools" if key in TOOLS else "reads text alone"
            raise RowProblem(
                f"the row has {key}, and ChatGLM-6B {reads}: take the row out, or name its form "
                "with dialect: NAME to leave that column aside"
            )
    if aim != "prompts":
        _refuse_verdict(row)


def _refuse_verdict(row: Row) -> None:
    """Refuse single answers that are marked good or bad."""
    is_pair = "rejected" in row or "answers" in row
    for key in VERDICTS:
        if row.get(key) in (0, 1) and not isinstance(row.get(key), float) and not is_pair:
            raise RowProblem(
                f"the row is an unpaired preference ({key}: {row[key]!r}, as for KTO), of which no "
                "stage learns; keep the good ones without that column for sft, or write pairs "
                "(chosen, rejected)"
            )


__all__ = ["refuse_strangers"]
