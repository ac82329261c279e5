"""SHA256SUMS: its lines, what is compared with them, and what is refused."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from chatglm.checkpoints.checksums import hash_file, read_sums, verify_folder, write_sums

CONTENTS = {"a.bin": b"weights", "b c.json": b"{}", "presets/x.json": b"\0" * (2**20 + 1)}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files, and the hashes of all of them."""
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path, HASHES)
    return tmp_path


def test_what_is_written_is_read_by_us_and_by_sha256sum(folder: Path) -> None:
    assert read_sums(folder) == HASHES
    assert {name: hash_file(folder / name) for name in CONTENTS} == HASHES
    verify_folder(folder, ["a.bin"])
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, check=True)


def test_lines_of_other_tools(folder: Path) -> None:
    one = HASHES["a.bin"]
    (folder / "SHA256SUMS").write_bytes(f"# made by hand\r\n\r\n{one.upper()} *./a.bin".encode())
    assert read_sums(folder) == {"a.bin": one}
    verify_folder(folder, ["a.bin"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0" * 63 + "  a.bin", r"line 4 of .*SHA256SUMS is '0{63}  a.bin', and not 64"),
        ("0" * 64, "and not 64"),
        ("0" * 64 + "  ", "and not 64|outside"),
        ("x" * 64 + "  a.bin", "and not 64"),
        ("0" * 64 + " a.bin", "and not 64"),
        ("0" * 64 + "  a.bin", "line 4 of .* has another hash of a.bin than a line above"),
        ("0" * 64 + "  ../a.bin", r"names '\.\./a.bin', which is outside"),
        ("0" * 64 + "  presets/../../a.bin", "outside"),
        ("0" * 64 + "  /etc/hosts", "names '/etc/hosts', which is outside"),
        ("0" * 64 + "  C:\\a.bin", "outside"),
        ("0" * 64 + "  ..\\a.bin", "outside"),
    ],
)
def test_a_line_that_cannot_be_followed_is_refused(folder: Path, line: str, message: str) -> None:
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        verify_folder(folder, [])


def test_sums_that_are_absent_or_no_text(folder: Path) -> None:
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"SHA256SUMS is no UTF-8 text"):
        verify_folder(folder, [])
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="has no SHA256SUMS to be verified by"):
        verify_folder(folder, [])


def test_all_that_is_wrong_is_named_at_once(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"Weights")
    large = folder / "presets" / "x.json"
    large.write_bytes(large.read_bytes()[:-1] + b"\1")  # behind the first block
    (folder / "b c.json").unlink()
    wrong = r"\(b c.json missing; a.bin, presets/x.json damaged or changed\): download"
    with pytest.raises(ValueError, match=wrong):
        verify_folder(folder, [])


def test_a_weight_file_without_a_sum_is_not_verified_silently(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"does not name model\.safetensors, which cannot"):
        verify_folder(folder, ["a.bin", "model.safetensors"])


def test_links_into_a_download_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """As in a snapshot folder of the Hub's cache, whose files lie elsewhere."""
    (folder / "a.bin").rename(tmp_path / "blob")
    (folder / "a.bin").symlink_to(tmp_path / "blob")
    verify_folder(folder, ["a.bin"])
    (tmp_path / "blob").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"a\.bin damaged or changed"):
        verify_folder(folder, ["a.bin"])
