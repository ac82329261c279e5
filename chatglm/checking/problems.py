"""Owns what is told of a fault: its code, how grave it is, the file, the fault and the remedy.

A fault is mostly an error of the code that would read the file: the one home of its words. Knows no
fault itself.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

PROBLEM, ODD = "problem", "odd"
# Errors end with their remedy, behind the last of these.
REMEDY_MARK = re.compile(r"(?:; |: )(?!.*(?:; |: ))", re.DOTALL)
DEFAULT_REMEDY = "use the files that came with the weights"


class Problem(NamedTuple):
    """A fault of a folder.

    Attributes:
        code: a name for programs, the same in every release.
        severity: `PROBLEM` if the folder does not work by it, `ODD` if it is only worth knowing.
        file: its name in the folder; "" for the folder as a whole.
        what: the fault, in a sentence.
        remedy: what to do.
    """

    code: str
    severity: str
    file: str
    what: str
    remedy: str

    def __str__(self) -> str:
        mark = ";" if ": " in self.what else ":"
        return f"{self.what}{mark} {self.remedy}"

    @classmethod
    def of_error(cls, code: str, file: str, error: Exception, severity: str = PROBLEM) -> "Problem":
        """Return the fault that an error tells.

        Args:
            code, file, severity: of the fault.
            error: a ValueError of ours, or an OSError of the system.
        """
        if isinstance(error, OSError) and error.filename is not None:
            what = f"{error.filename} cannot be read: {error.strerror}"
            return cls(code, severity, file, what, "make it readable, or fetch it again")
        text = " ".join(str(error).split()).rstrip(".")
        mark = REMEDY_MARK.search(text)
        if mark is None:
            return cls(code, severity, file, text, DEFAULT_REMEDY)
        return cls(code, severity, file, text[: mark.start()], text[mark.end() :])


def gather(code: str, file: str, check: Callable[[], object]) -> list[Problem]:
    """Return what a check that raises its fault finds, if it finds any.

    Args:
        code, file: of the fault.
        check: raises ValueError or OSError.
    """
    try:
        check()
    except (ValueError, OSError) as error:
        return [Problem.of_error(code, file, error)]
    return []


__all__ = ["ODD", "PROBLEM", "Problem", "gather"]
