"""The documents say what is so: versions, hashes, links, file trees, names, numbers."""

import ast
import importlib.util
import json
import re
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.environment_chatglm import TESTED_TRANSFORMERS
from chatglm_6b.masking_chatglm import SpecialIds, build_geometry
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import MODEL_FILES, ROOT

import chatglm
from chatglm.serving.chat import QUESTION_LABEL, WELCOME

READMES = ("README.md", "README_zh.md")
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("chatglm/presets/*.md")]
)
# Only the owner of the small model's training can write these.
WEIGHTS = {"pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"}

each_readme = pytest.mark.parametrize("readme", READMES)
each_document = pytest.mark.parametrize("document", DOCUMENTS)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def load_script(name: str) -> Any:
    """A script of the repository, which imports what lies beside it."""
    path = ROOT / name
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hash_remote_code() -> Any:
    return load_script("tools/hash_remote_code.py")


@pytest.fixture
def compatibility() -> Any:
    return load_script("tools/compatibility.py")


@cache
def full_model() -> ChatGLMForConditionalGeneration:
    config = json.loads(read("chatglm/presets/chatglm-6b/config.json"))
    with torch.device("meta"):
        return ChatGLMForConditionalGeneration(ChatGLMConfig(**config)).half()


def test_the_changelog_has_the_package_s_version() -> None:
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.M)
    assert released[0] == chatglm.__version__
    assert released == sorted(released, key=lambda v: [*map(int, v.split("."))], reverse=True)
    assert 'version = { attr = "chatglm.__version__" }' in read("pyproject.toml")


def test_the_remote_code_page_is_up_to_date(
    hash_remote_code: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hash_remote_code.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_remote_code_page_is_noticed(
    hash_remote_code: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "remote_code.md"
    monkeypatch.setattr(hash_remote_code, "PAGE", page)
    assert hash_remote_code.main(["--check"]) == 1  # no page at all
    assert hash_remote_code.main([]) == 0
    assert hash_remote_code.main(["--check"]) == 0
    text = page.read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+\.py)` .*`[0-9a-f]{64}` \|$", text, re.MULTILINE))
    assert listed == set(MODEL_FILES)
    page.write_text(re.sub(r"`[0-9a-f]{64}`", f"`{'0' * 64}`", text, count=1), encoding="utf-8")
    capsys.readouterr()
    assert hash_remote_code.main(["--check"]) == 1
    assert "run `python tools/hash_remote_code.py`" in capsys.readouterr().err


@each_readme
def test_the_model_card_s_head(readme: str) -> None:
    head = yaml.safe_load(read(readme).split("---\n")[1])
    assert head.pop("tags")[:2] == ["glm", "chatglm"]
    assert head == {
        "language": ["zh", "en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "Apache License" in read("LICENSE")


@each_document
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(document))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / document).parent / path if path else ROOT / document
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", without_code(linked.read_text("utf-8")), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, target


def tree_paths() -> list[str]:
    """The paths of the file tree, folders with their slash."""
    text = read("docs/architecture.md")
    (tree,) = re.findall(r"^```text\n(README\.md .*?)^```$", text, re.DOTALL | re.MULTILINE)
    paths, folder = [], ""
    for line in filter(str.strip, tree.splitlines()):
        indented = line.startswith("  ")
        names = re.split(r"\s{2,}", line.strip())[0].split(" ")
        paths += [folder * indented + name for name in names]
        if not indented:
            folder = names[0] if names[0].endswith("/") else ""
    return paths


def test_the_file_tree_is_the_repository() -> None:
    expected = set(tree_paths())
    if not (ROOT / "pytorch_model.bin.index.json").is_file():
        expected -= WEIGHTS
    assert not {path for path in expected if not list(ROOT.glob(path.rstrip("/")))}
    present = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.json", "*.md", "*.toml", "*.jinja", "docs/*.md", "chatglm/*.py")
        for path in ROOT.glob(pattern)
        if not path.name.startswith("__")
    }
    assert present <= expected


def test_both_readmes_have_the_same_tables_and_headings() -> None:
    english_rows, chinese_rows = (table_rows(read(name)) for name in READMES)
    assert [len(row) for row in english_rows] == [len(row) for row in chinese_rows]
    headings = [re.findall(r"^#+", without_code(read(name)), re.MULTILINE) for name in READMES]
    assert headings[0] == headings[1]


@each_readme
def test_the_welcome_is_what_one_sees(readme: str) -> None:
    welcome = WELCOME.format(folder="/home/you/chatglm", device="cpu")
    assert f"```text\n{welcome}\n{QUESTION_LABEL.rstrip()}\n```\n" in read(readme)


def test_the_small_model_s_size_is_its_number_of_parameters() -> None:
    config = ChatGLMConfig(**json.loads(read("config.json")))
    with torch.device("meta"):
        count = ChatGLMForConditionalGeneration(config).num_parameters()
    assert f" {count / 1e6:.1f} million parameters" in read("README.md")
    assert f" {count / 1e4:.0f} 万参数" in read("README_zh.md")


def read_project() -> dict[str, list[str]]:
    """Name and specifiers of every package that users install."""
    project = read("pyproject.toml").partition("\ntest = [")[0]
    found = re.findall(r'^    "([\w-]+)((?:[<>=]+[\d.]+,?)+)[";]', project, re.M)
    return {name: specifiers.split(",") for name, specifiers in found}


def first_numbers(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


@each_readme
def test_the_supported_versions_are_those_of_code_and_package(readme: str) -> None:
    rows = {row[0]: row for row in table_rows(read(readme))}
    oldest, newest = TESTED_TRANSFORMERS[0], TESTED_TRANSFORMERS[-1].removesuffix(".0")
    assert oldest in rows["transformers"][1] and newest in rows["transformers"][1]
    assert all(version in rows["transformers"][2] for version in TESTED_TRANSFORMERS)
    opening = read(readme).partition("\n## ")[0]
    assert oldest in opening and newest in opening
    project = read("pyproject.toml")
    pythons = re.findall(r"Python :: (3\.\d+)", project)
    assert pythons[0] in rows["Python"][1] and pythons[-1] in rows["Python"][1]
    assert f'requires-python = ">={pythons[0]}"' in project
    least, bound = read_project()["torch"]
    assert least.removeprefix(">=") in rows["PyTorch"][1]
    major, minor = first_numbers(bound.removeprefix("<"))
    assert f"{major}.{minor - 1}" in rows["PyTorch"][1]
    (pinned_torch,) = re.findall(r"^torch==(\S+)", read("requirements-ci.txt"), re.MULTILINE)
    assert pinned_torch in rows["PyTorch"][2]


def test_the_bounds_are_the_newest_releases_that_were_tested() -> None:
    """What a fresh machine installs is what a run of all tests has met, and passed."""
    notes = json.loads(read("docs/compatibility.json"))
    assert {*TESTED_TRANSFORMERS, "newest"} == set(notes)
    for package, (least, bound) in read_project().items():
        runs = [notes[release] for release in TESTED_TRANSFORMERS]  # the canary bounds nothing
        met = [first_numbers(run["versions"][package]) for run in runs]
        major, minor = first_numbers(f"{bound.removeprefix('<')}.0")
        assert max(met) < (major, minor), package
        assert max(met)[0] == major - 1 if minor == 0 else max(met) == (major, minor - 1), package
        assert min(met) >= first_numbers(f"{least.removeprefix('>=')}.0"), package
    assert read_project()["transformers"][0] == f">={TESTED_TRANSFORMERS[0]}"
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", read("requirements-ci.txt"), re.MULTILINE))
    assert pins["transformers"] == TESTED_TRANSFORMERS[-1]


def test_the_picture_of_the_imports_is_up_to_date_and_has_no_circle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = load_script("tools/draw_imports.py")
    assert drawing.main(["--check"]) == 0, capsys.readouterr().err
    graph = drawing.read_graph()
    assert graph["configuration_chatglm"] == {"environment_chatglm"}
    assert all(
        "chatglm." not in target for part in graph if "." not in part for target in graph[part]
    )
    graph["environment_chatglm"] = {"configuration_chatglm"}
    with pytest.raises(ValueError, match=r"(configuration|environment)_chatglm -> (env|conf)"):
        drawing.draw(graph)
    monkeypatch.setattr(drawing, "PICTURE", tmp_path / "imports.svg")
    assert drawing.main(["--check"]) == 1
    assert drawing.main([]) == drawing.main(["--check"]) == 0


def test_the_compatibility_page_is_up_to_date(
    compatibility: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compatibility.main(["--check"]) == 0, capsys.readouterr().err


REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="0" failures="1"
skipped="1" tests="4" time="61.2"><testcase classname="tests.unit.test_a" name="test_one"/>
<testcase classname="tests.unit.test_a" name="test_two"><failure message="no"/></testcase>
<testcase classname="tests.unit.test_a" name="test_3"><skipped/></testcase>
<testcase classname="tests.unit.test_a" name="test_4"/></testsuite></testsuites>"""


def test_a_run_is_noted_and_shown(
    compatibility: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, place in (("REPORTS", ""), ("NOTES", "notes.json"), ("PAGE", "page.md")):
        monkeypatch.setattr(compatibility, name, tmp_path / place)
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "5.99.0.xml").write_text(REPORT)
    assert compatibility.main(["record", str(tmp_path / "5.99.0.xml")]) == 0
    assert capsys.readouterr().out == "5.99.0: 2 passed, **1 failed**, 1 skipped\n"
    (tmp_path / "notes.json").unlink()
    assert compatibility.main([]) == compatibility.main(["--check"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| 5.99.0 | all | 20" in page and "| 1.0 min |" in page and version("torch") in page
    assert "Failed with 5.99.0:\n\n- `tests.unit.test_a::test_two`\n" in page
    (tmp_path / "page.md").write_text(page.replace("2 passed", "3 passed"))
    assert compatibility.main(["--check"]) == 1


def test_the_sessions_of_nox_are_the_tested_releases_and_the_newest() -> None:
    pytest.importorskip("nox")
    noxfile = load_script("tools/noxfile.py")
    assert (*TESTED_TRANSFORMERS, "newest") == noxfile.RELEASES
    wanted = noxfile.without_bounds()
    assert {re.split("[<>=;]", line)[0] for line in wanted} >= {"torch", "transformers", "peft"}
    assert not [line for line in wanted if "<" in line.partition(";")[0]]
    assert "trl>=1.16; python_version >= '3.11'" in wanted
    assert {"torch==2.6", "transformers==4.56.2", "pytest>=8"} <= set(noxfile.at_floors())


def test_the_tensors_page_names_the_model_s_tensors() -> None:
    page = read("docs/tensors.md").partition("## Into `forward`")[0]
    rows = [row for row in table_rows(page) if row[0].startswith("`transformer.layers.n")]
    rows += [row for row in table_rows(page) if re.match(r"`(transformer\.[wf]|lm_head)", row[0])]
    sizes = {"V": 130528, "H": 4096, "I": 16384}
    listed: dict[str, tuple[int, ...]] = {}
    for name, shape, *_ in rows:
        letters = re.findall(r"(\d*)([VHI])", shape)
        numbers = tuple(int(factor or 1) * sizes[letter] for factor, letter in letters)
        for layer in range(28) if ".n." in name else [0]:
            listed[name.strip("`").replace(".n.", f".{layer}.")] = numbers
    assert listed == {n: tuple(tensor.shape) for n, tensor in full_model().state_dict().items()}


def python_names(path: str) -> set[str]:
    """Functions, classes and methods of a file, methods also as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.ClassDef):
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            names |= {node.name, *methods, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


def walk_text() -> str:
    _, _, rest = read("docs/architecture.md").partition("## The walk of one query")
    return rest.partition("## The laws")[0]


def test_the_walk_names_functions_that_exist() -> None:
    walk = without_code(walk_text())
    placed = re.findall(r"`([\w/]+\.py): ([\w.]+)`", walk)
    assert len(placed) > 10
    for path, name in placed:
        assert name in python_names(path), f"{path}: {name}"
    known: set[str] = set().union(
        *(python_names(path.relative_to(ROOT).as_posix()) for path in code_files())
    )
    unplaced = re.findall(r"`(\w*[A-Z_]\w*(?:\.\w+)?)`", walk)
    foreign = {"AutoTokenizer", "AutoModel", "split_special_tokens"}
    assert {name for name in unplaced if not name.isupper()} <= known | foreign


def test_the_walk_s_positions_are_the_geometry_s() -> None:
    table = re.search(r"^ token (.*)\n position (.*)\n block position (.*)$", walk_text(), re.M)
    assert table is not None
    tokens, *rows = (line.split() for line in table.groups())
    ids = {"[gMASK]": 2, "<sop>": 3}
    input_ids = torch.tensor([[ids.get(token, 9) for token in tokens]])
    geometry = build_geometry(input_ids, None, SpecialIds(bos=3, mask=1, gmask=2))
    assert geometry.position_ids[0].tolist() == [[int(number) for number in row] for row in rows]


def code_files() -> list[Path]:
    return [*ROOT.glob("*.py"), *ROOT.glob("chatglm/**/*.py")]


@each_readme
def test_the_memory_sizes_follow_from_the_shapes(readme: str) -> None:
    parameters = {id(p): p for p in full_model().parameters()}.values()
    half = sum(p.nbytes for p in parameters)
    packed = sum(p.numel() for n, p in full_model().named_parameters() if is_packed(n))
    rows = sum(p.shape[0] for n, p in full_model().named_parameters() if is_packed(n))
    sizes = [half, half - packed + 2 * rows, half - packed * 3 // 2 + 2 * rows]
    found: list[Any] = re.findall(r"(\d+\.\d) GB", read(readme))
    assert found == [f"{size / 1e9:.1f}" for size in sizes]


def is_packed(name: str) -> bool:
    return bool(re.search(r"layers.*(query_key_value|dense\w*)\.weight$", name))
