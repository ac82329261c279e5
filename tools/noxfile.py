"""Runs all tests on every supported transformers release, and on the newest (`make compat`).

`oldest` and `python` are the ends of the other ranges: Python 3.10 with the lower bound of every
library, and Python 3.13.

Each run leaves a report and the versions that it met in build/compat, which tools/compatibility.py
makes docs/compatibility.md of. `make alone` runs the tests of the model's files where these are
alone, without the package and without what its engine compiles with.
"""

import ast
import shutil
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
NEWEST = "newest"
OLDEST_PYTHON, NEWEST_PYTHON = "3.10", "3.13"
STYLE_TOOLS = ("ruff", "pyright", "nox")
# Tests of the model's files: the few of them that ask for the package skip without, and say so.
TESTS_OF_THE_MODEL = ("unit", "parity", "property", "wild")
CONTRACTS_OF_THE_MODEL = (
    "decoding_steps",
    "generation_hooks",
    "model_hooks",
    "presets",
    "public_api",
    "remote_code_laws",
    "state_dict_names",
)
# What the tests of foreign tools ask for. Here alone: 120 MB, and peft imports it wherever it is.
FOREIGN_TOOLS = ("bitsandbytes==0.50.2",)
NOT_IMPORTABLE = (
    "import importlib.util as u; assert not any(map(u.find_spec, ('chatglm', 'llvmlite')))"
)
REPORTS = ROOT / "build" / "compat"
# It asks what the notes of these runs say, which are made when they end.
ABOUT_THESE_RUNS = (
    "tests/contract/test_documents.py::test_the_bounds_are_the_newest_releases_that_were_tested"
)


def read_releases() -> tuple[str, ...]:
    """The releases that environment_chatglm.py names; importing it would need transformers."""
    for node in ast.parse((ROOT / "environment_chatglm.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED_TRANSFORMERS":
            return ast.literal_eval(node.value)
    raise ValueError("environment_chatglm.py assigns no TESTED_TRANSFORMERS")


RELEASES = (*read_releases(), NEWEST)
nox.options.envdir = str(ROOT / ".nox")  # and not beside this file


@nox.session
@nox.parametrize("transformers", RELEASES, ids=RELEASES)
def tests(session: nox.Session, transformers: str) -> None:
    """All tests with one transformers release and CI's other pins, or with all that is newest."""
    session.chdir(ROOT)
    if transformers == NEWEST:
        session.install("--no-compile", "--upgrade", *without_bounds())
    else:
        session.install("--no-compile", *read_pins(transformers), f"transformers=={transformers}")
    session.install("--no-deps", "--editable", ".")
    run_tests(session, transformers)


@nox.session(python=OLDEST_PYTHON)
def oldest(session: nox.Session) -> None:
    """All tests on the oldest Python with the oldest release of everything that users need."""
    session.chdir(ROOT)
    session.install("--no-compile", *at_floors())
    session.install("--no-deps", "--editable", ".")
    run_tests(session, "oldest")


@nox.session(python=NEWEST_PYTHON)
def python(session: nox.Session) -> None:
    """All tests on the newest Python, with what the bounds let it have."""
    session.chdir(ROOT)
    session.install("--no-compile", "--editable", ".[test]")
    run_tests(session, f"python{NEWEST_PYTHON}")


@nox.session
def alone(session: nox.Session) -> None:
    """The tests of the model's files in a folder that holds no package, where none is installed."""
    release = read_releases()[-1]
    pins = [pin for pin in read_pins(release) if not pin.startswith("llvmlite")]
    session.install("--no-compile", *pins, *FOREIGN_TOOLS, f"transformers=={release}")
    tests = [f"tests/{name}" for name in TESTS_OF_THE_MODEL]
    tests += [f"tests/contract/test_{name}.py" for name in CONTRACTS_OF_THE_MODEL]
    options = ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": None}
    with tempfile.TemporaryDirectory(prefix="chatglm-alone-") as folder:
        copy_model(Path(folder) / "model")
        with session.chdir(Path(folder) / "model"):
            session.run("python", "-c", NOT_IMPORTABLE, env=environment)
            command = ("python", "-m", "pytest", *options, *(session.posargs or tests))
            session.run(*command, env=environment)


def copy_model(folder: Path) -> None:
    """Copy the model's files and what their tests read; golden data become a link beside it."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in ("docs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=without_caches)
    shutil.copytree(ROOT / "chatglm" / "presets", folder / "presets", ignore=without_caches)
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (folder.parent / "shared").symlink_to(shared.resolve())


def run_tests(session: nox.Session, name: str) -> None:
    """Run the tests, or those that were asked for, which leave no report."""
    report = REPORTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    options = ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    options += ["--deselect", ABOUT_THESE_RUNS]
    if not session.posargs:
        options.append(f"--junitxml={report}")
    command = ("python", "-m", "pytest", *options, *session.posargs)
    try:
        session.run(*command, env={"OMP_NUM_THREADS": "1"})
    finally:
        if report.is_file():
            session.run("python", "tools/compatibility.py", "record", str(report))


def read_pins(transformers: str) -> list[str]:
    """The requirements of CI but for transformers and what checks the style.

    CI's datasets needs a huggingface_hub that transformers 4 refuses: pip finds an older one.
    """
    lines = (ROOT / "requirements-ci.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    left_out = {"transformers", *STYLE_TOOLS}
    if transformers.startswith("4."):
        left_out.add("datasets")
        pins.append("datasets>=4.7")
    return [pin for pin in pins if pin.split("==")[0] not in left_out]


def read_requirements() -> list[str]:
    """What users and tests install, as pyproject.toml has it."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["train"], *extras["test"]]
    return [line for line in requirements if not line.startswith(project["name"])]


def without_bounds() -> list[str]:
    """The same without upper bounds: `torch>=2.6,<2.14` as `torch>=2.6`."""
    return [drop_bound(line) for line in read_requirements()]


def at_floors() -> list[str]:
    """The same at the lower bound, `torch==2.6`; tools of the tests alone are free.

    They have no upper bound, which is how they are told.
    """
    return [
        drop_bound(line).replace(">=", "==", 1) if "<" in line.partition(";")[0] else line
        for line in read_requirements()
    ]


def drop_bound(requirement: str) -> str:
    """A requirement without its upper bound; its marker stays."""
    specifier, semicolon, marker = requirement.partition(";")
    kept = [part for part in specifier.split(",") if not part.startswith("<")]
    return ",".join(kept) + semicolon + marker
