"""Owns the keys that say which rows a stage reads: files, how many, what columns are called.

Does not know what rows mean (`Columns`) nor what is done with them.
"""

from dataclasses import dataclass, field
from typing import Any

from chatglm.data.columns import check_learning
from chatglm.training.keys.problems import either, require

BAD_ROWS = ("error", "skip")
SAMPLES = ("document", "paragraph", "line")
# What stands in the place of the entries of `eval_data` where a share of `train_data` is held out.
HELD_OUT = "a share of train_data"


@dataclass
class DataSettings:
    """What every stage can be told of its files.

    Attributes:
        train_data: files, folders or globs; an entry may be a mapping `{path: ..., weight: ...,
            max_samples: ..., columns: {...}}`, or written as `a.jsonl:0.5` or `a.jsonl#1000`.
        eval_data: the same, held out.
        val_ratio: share of the rows of `train_data` that is held out instead, drawn by split_seed.
        max_samples: rows of each entry that are read, the first ones; 0 is all.
        split_seed: of what is drawn of rows: those held out, and parts of an entry with a weight.
        bad_rows: "error" to stop at a row that cannot be used, "skip" to count it and go on.
        max_bad_share: share of bad rows, of a file or of all, at which "skip" stops too.
        max_long_share: the same of rows that `long_rows: skip` leaves out.
        encoding: of files that are not UTF-8, as gb18030.
        header: names of the columns of csv and tsv files that have no header.
        sample_by: what of a plain text is a row: "document", "paragraph" or "line".
        prompt_column, response_column, history_column: what the columns of prompt/response rows are
            called; "" is what their form has.
        columns: the same for any column, as `prompt=query response=reply`: prompt, response,
            history, input, system, messages, chosen, rejected, text; and of messages role_tag,
            content_tag, user_tag, assistant_tag, system_tag.
        dialect: the form of the rows; "" recognizes it by their columns.
        learn_turns: which answers of a dialogue are learned, "last" or "all"; "" is the habit of
            its form, all of messages and the last one behind a history.
        default_system: the system text of dialogues that have none.
    """

    train_data: list[Any] = field(default_factory=list)
    eval_data: list[Any] = field(default_factory=list)
    val_ratio: float = 0.0
    max_samples: int = 0
    split_seed: int = 42
    bad_rows: str = "error"
    max_bad_share: float = 0.1
    max_long_share: float = 0.5
    encoding: str = ""
    header: list[str] = field(default_factory=list)
    sample_by: str = "document"
    prompt_column: str = ""
    response_column: str = ""
    history_column: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    dialect: str = ""
    learn_turns: str = ""
    default_system: str = ""

    @property
    def held_out_data(self) -> list[Any]:
        """What is held out: the entries of `eval_data`, or a share of `train_data`."""
        return self.eval_data or ([HELD_OUT] if self.val_ratio else [])

    def check_data(self) -> None:
        """Refuse values that no reading can work with.

        Raises:
            KeyProblem: naming the key, the value, and what is possible.
        """
        require(self.bad_rows in BAD_ROWS, "bad_rows", self.bad_rows, either(BAD_ROWS))
        require(self.sample_by in SAMPLES, "sample_by", self.sample_by, either(SAMPLES))
        for key in ("max_bad_share", "max_long_share"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "from 0 to 1")
        require(0 <= self.val_ratio < 1, "val_ratio", self.val_ratio, "in [0, 1)")
        is_alone = not (self.val_ratio and self.eval_data)
        require(is_alone, "val_ratio", self.val_ratio, "left out beside eval_data")
        require(self.max_samples >= 0, "max_samples", self.max_samples, "0 or more")
        check_learning(self)


__all__ = ["HELD_OUT", "DataSettings"]
