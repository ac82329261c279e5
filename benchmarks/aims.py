"""The aims of the benchmarks, each beside what a machine's newest figures give.

Owns what is aimed at and which figures tell. Of several figures, as one a format, the worst counts
and is named. Does not know how a page is written.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.results import Row

Figure = tuple[str, float]
Finder = Callable[[Sequence[Row]], list[Figure]]
PRODUCT, HEAD = "4096x12288", "4096x130528"
# The bus allows a product of few rows so much of its time at least.
CLIFF = 1 / 1.3
PEERS = ("chatglm.cpp", "fastllm")
ALONE = "files alone"  # without the engine, which the aims are for


class Aim(NamedTuple):
    """What is aimed at.

    Attributes:
        what: is measured.
        limit: of the figure.
        is_most: whether the limit is the most it may be, and not the least.
        unit: of both.
        find: returns the figures among a machine's rows, with what they are of.
    """

    what: str
    limit: float
    is_most: bool
    unit: str
    find: Finder

    def describe_limit(self) -> str:
        """Return the limit in words."""
        return f"{'at most' if self.is_most else 'at least'} {self.limit:.3g}{self.unit}"

    def judge(self, rows: Sequence[Row]) -> tuple[str, str] | None:
        """Return the worst figure with what it is of, and the verdict; None if there is none."""
        figures = self.find(rows)
        if not figures:
            return None
        name, worst = (max if self.is_most else min)(figures, key=lambda figure: figure[1])
        is_met = worst <= self.limit if self.is_most else worst >= self.limit
        missing = abs(worst / self.limit - 1)
        return f"{worst:.3g}{self.unit} ({name})", "met" if is_met else f"missed by {missing:.0%}"


def of_model(case: str, size: int, unit: str, batch: int = 1, contender: str = "ours") -> Finder:
    """Find the values of the whole model's figures, ours; any size if that is 0."""

    def find(rows: Sequence[Row]) -> list[Figure]:
        return [
            (row.contender, row.value)
            for row in _list_model(rows, case, size, batch)
            if row.unit == unit
            and row.contender.startswith(contender)
            and not row.contender.endswith(ALONE)
        ]

    return find


def beside(case: str, size: int, *baselines: str, batch: int = 1) -> Finder:
    """Find how many times as fast as the baselines of these names ours is."""

    def find(rows: Sequence[Row]) -> list[Figure]:
        return [
            (f"{row.contender}, {row.baseline}", row.ratio)
            for row in _list_model(rows, case, size, batch)
            if row.ratio is not None
            and row.contender.startswith("ours")
            and row.baseline.startswith(baselines)
        ]

    return find


def _list_model(rows: Sequence[Row], case: str, size: int, batch: int) -> list[Row]:
    """Return the rows of a case of the whole model at full size."""
    return [
        row
        for row in rows
        if row.bench == "bench_generate"
        and row.layers == 28
        and (row.case, row.batch) == (case, batch)
        and size in (0, row.size)
    ]


def of_products(ours: Sequence[str], other: str, sizes: Sequence[int]) -> Finder:
    """Find how long products of ours take in units of another's of the same size."""

    def find(rows: Sequence[Row]) -> list[Figure]:
        times = {
            (row.contender, row.size): row.value
            for row in rows
            if row.bench == "bench_kernels" and row.case == PRODUCT and row.unit == "ms"
        }
        return [
            (f"{name}, {size} rows", times[name, size] / times[other, size])
            for name in ours
            for size in sizes
            if (name, size) in times and (other, size) in times
        ]

    return find


def of_head(rows: Sequence[Row]) -> list[Figure]:
    """Find the shares of the bandwidth that the head's product of few rows comes to."""
    return [
        (f"{row.contender}, {row.size} rows", row.value)
        for row in rows
        if row.bench == "bench_kernels"
        and (row.case, row.unit, row.contender) == (HEAD, "of the probe", "ours float16")
        and 3 <= row.size <= 32
    ]


PACKED = "ours INT4 + embeddings"
MANY = (8, 16, 32, 64, 512)
AIMS: Sequence[Aim] = (
    *(
        Aim(
            f"a step of {count} rows, in steps of one row, context 64",
            limit,
            True,
            " x",
            of_model("rows", 64, "steps of one row", count, PACKED),
        )
        for count, limit in ((8, 1.5), (16, 2.3), (32, 4.0))
    ),
    Aim(
        "product 4096 → 12288 of 8 to 512 rows, INT4 and INT8, in oneDNN's int8 products",
        1.0,
        True,
        " x",
        of_products(("ours INT4", "ours INT8"), "torch onednn int8", MANY),
    ),
    Aim(
        "the same in groups of 32, in products without groups",
        1.3,
        True,
        " x",
        of_products(("ours INT4 g32",), "ours INT4", (1, *MANY)),
    ),
    *(
        Aim(
            f"decode behind {context} tokens, every format, of the bandwidth",
            0.9,
            False,
            "",
            of_model("decode", context, "of the probe"),
        )
        for context in (64, 512, 2000, 8192)
    ),
    *(
        Aim(
            f"prefill of {tokens}, of what its products alone allow",
            limit,
            False,
            "",
            of_model("prefill", tokens, "of its products"),
        )
        for tokens, limit in ((512, 0.85), (1984, 0.75))
    ),
    Aim("prefill of 512 beside chatglm.cpp", 10, False, " x", beside("prefill", 512, "chatglm")),
    *(
        Aim(f"decode at {size} beside each peer", 1.5, False, " x", beside("decode", size, *PEERS))
        for size in (64, 2000)
    ),
    *(
        Aim(
            f"prefill of {tokens} beside each peer",
            5,
            False,
            " x",
            beside("prefill", tokens, *PEERS),
        )
        for tokens in (512, 1984)
    ),
    Aim(
        "tokens a second of 16 rows beside chatglm.cpp",
        10,
        False,
        " x",
        beside("rows", 64, "chatglm", batch=16),
    ),
    Aim(
        "first prompt of a process, in later ones",
        1.15,
        True,
        " x",
        of_model("first prompt", 0, "later prompts"),
    ),
    Aim(
        "memory of a chat at 2,048 tokens beyond weights, keys and values",
        0.5,
        True,
        " GB",
        of_model("peak memory", 2048, "GB beyond weights and cache"),
    ),
    *(
        Aim(
            f"a token beyond the kernels, {name}",
            limit,
            True,
            " ms",
            of_model(f"overhead, {name}", 0, "ms/token"),
        )
        for name, limit in (("greedy", 5), ("top_p 0.7", 8))
    ),
    Aim(
        "start to the first answered token, in imports of torch and transformers",
        1.0,
        True,
        " x",
        of_model("start to answer", 0, "imports alone"),
    ),
    *(
        Aim(f"prompt lookup, {name}", limit, False, " x", beside(f"lookup, {text}", 0, "one token"))
        for name, text, limit in (
            ("text that is copied", "copy", 1.8),
            ("text that is corrected", "edit", 1.8),
            ("text that is new", "new", 0.97),
        )
    ),
    Aim("head in float16, 3 to 32 rows, of the bandwidth", CLIFF, False, "", of_head),
    Aim(
        "float16 product of 8 to 512 rows, in torch's bfloat16 products",
        1.0,
        True,
        " x",
        of_products(("ours float16",), "torch bfloat16", MANY),
    ),
)


def format_aims(rows: Sequence[Row]) -> str:
    """Return the table of the aims that a machine's rows tell about, and what is not measured.

    Empty if they tell about none.
    """
    found = {aim: aim.judge(rows) for aim in AIMS}
    lines = ["| aim | limit | got | |", "| --- | --- | --- | --- |"]
    for aim, judged in found.items():
        if judged is not None:
            lines.append(f"| {aim.what} | {aim.describe_limit()} | {judged[0]} | {judged[1]} |")
    missing = [aim.what for aim, judged in found.items() if judged is None]
    if len(missing) == len(AIMS):
        return ""
    rest = [f"\nNot measured here: {'; '.join(missing)}."] if missing else []
    return "\n".join([*lines, *rest])
