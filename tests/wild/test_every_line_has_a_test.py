"""Every numbered fault has a test that a reader finds by its number, or by the table beside."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

HERE = Path(__file__).parent
LINES = [
    *(f"A{n}" for n in range(1, 16)),
    *(f"B{n}" for n in range(1, 9)),
    *(f"C{n}" for n in range(1, 10)),
    *(f"D{n}" for n in range(1, 15)),
]


def read_rows() -> list[tuple[str, str]]:
    """Return line and test of the table's rows."""
    page = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| ([ABCD]\d+) \|.*\| `([^`]+)` \|$", page, re.MULTILINE)


def list_tests(file: Path) -> set[str]:
    """Return the names of a file's test functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("line", LINES)
def test_a_line_has_a_test(line: str) -> None:
    letter, number = line[0].lower(), int(line[1:])
    files = list(HERE.glob(f"test_{letter}{number:02}_*.py"))
    assert all(any(name.startswith("test_") for name in list_tests(file)) for file in files)
    names = {name for file in HERE.glob("test_*.py") for name in list_tests(file)}
    by_name = [name for name in names if name.startswith(f"test_{letter}{number}_")]
    by_table = [test for row, test in read_rows() if row == line]
    assert files or by_name or by_table


@pytest.mark.parametrize(("line", "test"), read_rows())
def test_a_test_of_the_table_exists(line: str, test: str) -> None:
    assert line in LINES
    path, _, name = test.partition("::")
    if not (ROOT / path).is_file() and not (ROOT / "chatglm").is_dir():
        pytest.skip("the model's files are alone")
    assert not name or name in list_tests(ROOT / path)
    assert name or any(found.startswith("test_") for found in list_tests(ROOT / path))


def test_the_table_has_its_rows() -> None:
    assert len(read_rows()) == (HERE / "README.md").read_text(encoding="utf-8").count("\n| ") - 1
