"""Runs the tests of the model files on every supported transformers release (`make compat`)."""

from pathlib import Path

import nox

TRANSFORMERS = ("4.56.2", "4.57.6", "5.8.1", "5.23.0")
NOT_FOR_TESTS = ("transformers", "ruff", "pyright", "nox", "trl", "datasets", "tensorboard")
SUITES = ("tests/unit", "tests/parity", "tests/contract")


@nox.session
@nox.parametrize("transformers", TRANSFORMERS, ids=TRANSFORMERS)
def tests(session: nox.Session, transformers: str) -> None:
    """Unit, parity and contract tests with one transformers release and CI's other pins."""
    session.install("--no-compile", *_pins(), f"transformers=={transformers}")
    session.install("--no-deps", "--editable", ".")
    jobs = ("--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    command = ("python", "-m", "pytest", *jobs, *SUITES, *session.posargs)
    session.run(*command, env={"OMP_NUM_THREADS": "1"})


def _pins() -> list[str]:
    """The requirements of CI that the tests need beside transformers."""
    lines = Path("requirements-ci.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    return [pin for pin in pins if pin.split("==")[0] not in NOT_FOR_TESTS]
