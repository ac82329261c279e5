"""Writes docs/remote_code.md: the files that `trust_remote_code=True` executes, and their SHA-256.

    python tools/hash_remote_code.py            # write the page
    python tools/hash_remote_code.py --check    # exit with 1 if the page is out of date

Which files these are, `chatglm/model_files.py` knows; what they do, their own first sentence.
Needs the standard library alone.
"""

import argparse
import ast
import hashlib
import sys
from pathlib import Path

from generated import write_or_check

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nothing is installed where only this page is written

from chatglm.model_files import find_modules, read_entry_points  # noqa: E402

PAGE = ROOT / "docs" / "remote_code.md"

HEAD = """\
# What `trust_remote_code=True` executes

Written by `python tools/hash_remote_code.py`; a test checks it. These files of the folder, and no
others, are copied into the cache of transformers and imported. They import each other, torch,
transformers, sentencepiece, packaging and the standard library; importing them changes no global
setting. On a CPU they also use the installed package `chatglm.cpu`, where it is, which compiles
what it computes with by llvmlite and keeps the result in the user's cache
(`CHATGLM_KERNEL_CACHE`). The hashes are of the files with LF line ends, as git stores them: compare
with `sha256sum $(python -m chatglm.model_files)`.

"""
TABLE = """
| file | needed by | what it owns | SHA-256 |
|---|---|---|---|
"""


def read_purpose(path: Path) -> str:
    """Return the first sentence of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path.name} has no docstring: say in its first line what it owns")
    first = docstring.partition("\n\n")[0].replace("\n", " ")
    return first.partition(". ")[0].removesuffix(".")


def build_page(root: Path) -> str:
    """Return the text of the page."""
    entry_points = read_entry_points(root)
    needed_by: dict[str, list[str]] = {}
    page = HEAD
    for module, auto_classes in sorted(entry_points.items()):
        page += f"- `{module}.py` for {', '.join(f'`{name}`' for name in sorted(auto_classes))}\n"
        for needed in find_modules(root, module):
            needed_by.setdefault(needed, []).append(f"`{module}.py`")
    page += TABLE
    for module, users in sorted(needed_by.items()):
        path = root / f"{module}.py"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        page += f"| `{path.name}` | {', '.join(users)} | {read_purpose(path)} | `{digest}` |\n"
    return page


def main(argv: list[str] | None = None) -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description="List and hash what trust_remote_code executes.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    args = parser.parse_args(argv)
    return write_or_check(PAGE, build_page(ROOT), args.check, "python tools/hash_remote_code.py")


if __name__ == "__main__":
    sys.exit(main())
