"""Owns the word about trl where it is missing: a library that not every Python can have.

Does not import it.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def importing_trl() -> Iterator[None]:
    """Turn a failed import of trl into one line that says how to get it.

    Raises:
        ImportError: if trl, or what it needs, is not there.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:
        # trl wraps a failed import of its own into a RuntimeError.
        raise ImportError(
            "this stage is built on trl, for Python 3.11 and newer: "
            f'pip install --editable ".[train]" in the folder of this repository ({error})'
        ) from error


__all__ = ["importing_trl"]
