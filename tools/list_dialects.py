"""Writes the table of dialects in docs/training.md, or compares it, from `chatglm.data.registry`.

    python tools/list_dialects.py
    python tools/list_dialects.py --check

Does not know what rows mean.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from generated import write_or_check

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chatglm.data.registry import DIALECTS, Dialect  # noqa: E402 - found by the path above

PAGE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- dialects: written by tools/list_dialects.py -->\n", "<!-- /dialects -->\n"
# What rows are read for, as people ask for it.
AIMS = {"answers": "answers", "prompts": "questions", "pairs": "pairs", "texts": "texts"}


def describe(dialect: Dialect) -> str:
    """Return the line of a dialect."""
    example = json.dumps(dialect.example, ensure_ascii=False).replace("|", "\\|")
    aims = ", ".join(word for aim, word in AIMS.items() if aim in dialect.aims)
    return f"| `{dialect.name}` | {dialect.meaning} | {aims} | `{example}` |"


def build_table() -> str:
    """Return the table of the dialects that are told of."""
    head = ["| dialect | whose | holds | a row |", "|---|---|---|---|"]
    return "\n".join([*head, *(describe(d) for d in DIALECTS if d.meaning)]) + "\n"


def build_page(page: str) -> str:
    """Return a page with the table in its place."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{build_table()}\n{END}{after}"


def main(words: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="The table of dialects in docs/training.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    is_check = parser.parse_args(words).check
    page = PAGE.read_text(encoding="utf-8")
    return write_or_check(PAGE, build_page(page), is_check, "python tools/list_dialects.py")


if __name__ == "__main__":
    sys.exit(main())
