"""Owns the plain copies of files that are packed, or that hold columns instead of rows.

The lines of a copy are those of what was packed; of a table of columns a line is a row. Does not
know what a row means.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chatglm.data.rows import FileProblem

PIECE = 1 << 20
ROWS_AT_ONCE = 1000
PACKED: dict[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
}
COLUMNAR = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def name_packing(head: bytes) -> str:
    """Return how a file is packed, by its first bytes; "" if it is not."""
    return next((name for magic, (name, _) in PACKED.items() if head.startswith(magic)), "")


def name_columnar(head: bytes) -> str:
    """Return what kind of columns a file holds, by its first bytes; "" if none."""
    return next((name for magic, name in COLUMNAR.items() if head.startswith(magic)), "")


def unpack(path: Path, packing: str, copy: Path) -> None:
    """Write what a packed file holds.

    Raises:
        FileProblem: if it is cut off or damaged.
    """
    opener = next(opener for name, opener in PACKED.values() if name == packing)
    try:
        with opener(path, "rb") as source, copy.open("wb") as target:
            while piece := source.read(PIECE):
                target.write(piece)
    except DAMAGED as error:
        raise FileProblem(f"{path}: {packing} breaks off or is damaged ({error})") from error
    except OSError as error:
        # bz2 says so of damaged data; errors of the system have a number.
        if error.errno is not None:
            raise
        raise FileProblem(f"{path}: {packing} is damaged ({error})") from error


def copy_columns(path: Path, source: Path, name: str, copy: Path) -> None:
    """Write the rows of a parquet or arrow file as JSON lines.

    Args:
        path: that was named.
        source: that is read.
        name: of the kind.
        copy: that is written.

    Raises:
        FileProblem: if it is damaged, or pyarrow is not there.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FileProblem(f"{path} is {name}, which pyarrow reads: pip install pyarrow") from error
    try:
        with copy.open("w", encoding="utf-8", newline="\n") as lines:
            for batch in _read_batches(source, name):
                for row in batch.to_pylist():
                    lines.write(json.dumps(row, ensure_ascii=False, default=_write_other) + "\n")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FileProblem(f"{path}: {name} is damaged ({str(error)[:100]})") from error


def _read_batches(path: Path, name: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if name == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=ROWS_AT_ONCE)
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            file = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
            return
        yield from (file.get_batch(i) for i in range(file.num_record_batches))


def _write_other(value: Any) -> Any:
    """Return what JSON has no form for as text; bytes that are none, as of pictures, as null."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return str(value)


__all__ = ["copy_columns", "name_columnar", "name_packing", "unpack"]
