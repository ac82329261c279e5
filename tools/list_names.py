"""Writes docs/keys.md, the names of other programs' keys, or compares it, from `training.keys`.

    python tools/list_names.py
    python tools/list_names.py --check

Does not know what a training does with keys.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from generated import write_or_check

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from chatglm.training.keys.names import (  # noqa: E402 - found by the path above
    ANYTHING,
    CUTOFF,
    FACTORY,
    FOLDER_KEYS,
    NAMES,
    STAGE_KEYS,
    Name,
)

PAGE = ROOT / "docs" / "keys.md"
HEAD = """\
# Keys of other programs

`chatglm train` and `chatglm data` understand the keys of the official scripts, of the fork, of
transformers 4, trl, LLaMA-Factory and ms-swift: a file or a command line of theirs can be taken as
it is. Each name is one of

- **a key** of ours or of the library, which it is read as;
- **turned into keys** by its value: they hold unless they are set themselves;
- **without effect**, because what it asks for is so already: a line says why;
- **refused**, with the reason and the remedy.

All names of one kind are told at once. Two names of one key that say different things are refused,
and so is a key of ours that says something else than another program's name. Names that a library
still has (`warmup_ratio` with transformers 4) are the library's. This page is written by
`tools/list_names.py` from `chatglm/training/keys/names.py`, and a test compares it.

| name | of | here |
|---|---|---|
"""


def describe(found: Name) -> str:
    """Return what a name is here, in words."""
    if found.key:
        return f"`{found.key}`{', a share below 1' if found.is_share else ''}"
    parts = []
    for value, keys in found.turns.items():
        told = ", ".join(f"`{key}: {item}`" for key, item in keys.items()) or "nothing"
        parts.append(f"{value}: {told}")
    if found.accepts == (ANYTHING,):
        return f"no effect: {found.why}"
    if found.accepts:
        words = ", ".join(f"`{value!r}`" for value in found.accepts)
        parts.append(f"no effect with {words}")
    if found.why:
        parts.append(f"otherwise refused: {found.why}" if parts else f"refused: {found.why}")
    return "; ".join(parts)


def build_lines() -> list[str]:
    """Return a line for each name, in the order of the alphabet."""
    lines = [f"| `{name}` | | the stage, named once more |" for name in STAGE_KEYS]
    lines += [
        f"| `{name}` | | the folder that data files are looked for in |" for name in FOLDER_KEYS
    ]
    lines.append(f"| `{CUTOFF}` | {FACTORY} | `max_length`, and `long_rows: cut` |")
    for name, readings in NAMES.items():
        for found in readings:
            stages = f" ({', '.join(found.stages)})" if found.stages else ""
            lines.append(f"| `{name}` | {found.whose} | {describe(found)}{stages} |")
    return sorted(lines)


def build_page() -> str:
    """Return the page."""
    return HEAD + "\n".join(build_lines()) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="The names of other programs' keys.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    is_check = parser.parse_args(words).check
    return write_or_check(PAGE, build_page(), is_check, "python tools/list_names.py")


if __name__ == "__main__":
    sys.exit(main())
