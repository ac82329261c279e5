"""Owns the word about installed packages that are newer than the ones that were tested.

What was tested stands in pyproject.toml, and from there in the installed package's own metadata.
Does not load any of those packages.
"""

import importlib.metadata

from packaging.requirements import Requirement

EXTRAS = ("", "train")


def list_untested() -> list[str]:
    """Return one line for each installed package outside of its tested range, mostly none.

    A package that is not installed at all is the business of whoever imports it.
    """
    try:
        requirements = importlib.metadata.requires("chatglm") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, never installed
        return []
    lines = [_describe(Requirement(requirement)) for requirement in requirements]
    return [line for line in lines if line is not None]


def _describe(requirement: Requirement) -> str | None:
    """Say so if a requirement is met by a release that was not tested."""
    marker = requirement.marker
    if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in EXTRAS):
        return None
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    wanted = f"{requirement.name}{requirement.specifier}"
    return (
        f"{requirement.name} {installed} was not tested with chatglm, which asks for "
        f'"{wanted}": if something is odd, `pip install "{wanted}"`, and report it with this line.'
    )
