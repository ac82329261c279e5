"""The results file, the page and the plots that are made from it."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import aims, plots, report, results
from benchmarks.results import Case, Recorder, Row
from benchmarks.workers import Spread

PAGE = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n"


def make_rows(folder: Path, layers: int = 28) -> list[Row]:
    path = folder / "results.csv"
    recorder = Recorder("bench_generate", layers, 2, path)
    for size, ours, peer in ((64, 100.0, 240.0), (2000, 150.0, 400.0)):
        case = Case("ours INT4", "decode", "torch 2", size, rounds=5)
        ratio = Spread(peer / ours, 2.2, 2.9)
        recorder.add(case, Spread(ours, ours - 5, ours + 5), "ms/token", ratio, "peer")
        recorder.add(case, Spread.of([0.8]), "of the probe")
        recorder.add(case._replace(contender="peer"), Spread.of([peer]), "ms/token")
    for when in (0, 500, 1000):
        point = Case("ours INT4", "memory over time", "torch 2", when)
        recorder.add(point, Spread.of([when / 250]), "GB", is_point=True)
    kernels = Recorder("bench_kernels", 0, 2, path)
    for size, unit, value in ((1, "GB/s", 20.0), (1, "GOP/s", 80.0), (1, "of the probe", 0.8)):
        kernels.add(Case("ours INT4", "4096x4096", "torch 2", size), Spread.of([value]), unit)
    return results.read_rows(path)


def test_rows_read_back_as_they_were_written(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    first = rows[0]
    assert (first.value, first.p20, first.p80, first.ratio) == (100, 95, 105, 2.4)
    assert (first.size, first.layers, first.threads, first.rounds) == (64, 28, 2, 5)
    assert rows[1].ratio is None and rows[1].baseline == ""
    assert (tmp_path / "results.csv").read_text().count("contender") == 1


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\]"):
        results.read_rows(path)


def test_figures_are_printed_but_points_of_a_curve_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_rows(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ours INT4: decode 64: 100 ms/token (95 to 105), 2.40 x peer"
    assert not any("memory over time" in line for line in lines)


def test_the_newest_figure_counts_and_a_curve_is_of_one_run(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    later = [row._replace(date="2999-01-01T00:00Z", value=1.0) for row in rows]
    curve = [row for row in later if row.case == "memory over time"][:2]
    kept = report.keep_newest([*rows, later[0], *curve])
    assert [row.value for row in kept if row.size == 64 and row.unit == "ms/token"] == [1.0, 240.0]
    assert [row.date[:4] for row in kept if row.case == "memory over time"] == ["2999", "2999"]


def test_a_disturbed_figure_never_stands_for_an_undisturbed_one(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    old, new = rows[0]._replace(load=0.02, value=908.0), rows[0]._replace(load=0.98, value=4585.0)
    assert [row.value for row in report.keep_newest([old, new])] == [908.0]
    newer = new._replace(value=4000.0)
    assert [row.value for row in report.keep_newest([new, newer])] == [4000.0]
    assert [row.value for row in report.keep_newest([new, newer, old])] == [908.0]
    point = next(row for row in rows if row.case == "memory over time")._replace(load=0.0)
    later = point._replace(date="2999-01-01T00:00Z", load=0.9)
    assert report.keep_newest([point, later]) == [point]


def test_the_page_shows_spread_ratio_and_share(tmp_path: Path) -> None:
    files = report.build_files(make_rows(tmp_path), PAGE)
    page = files[report.PAGE]
    assert page.startswith("# Title\n") and page.endswith("The end.\n") and "old" not in page
    assert "| decode | 64 | ours INT4 | 100 (95.0 to 105) | 0.800 | 2.40 x peer |" in page
    assert "| decode | 64 | peer | 240 |  |  |" in page
    assert set(files) == {report.PAGE, *report.PLOTS} - {"bench_rows.svg"}


def test_a_disturbed_run_says_so(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    assert "Disturbed" not in report.describe_runs(rows)
    disturbed = report.describe_runs([rows[0]._replace(load=0.7), *rows])
    assert disturbed.endswith("Disturbed: other programs used up to 0.7 processors.")


def test_runs_with_fewer_blocks_stay_out_of_the_page(tmp_path: Path) -> None:
    files = report.build_files(make_rows(tmp_path, layers=2), PAGE)
    assert "decode" not in files[report.PAGE]
    assert set(files) == {report.PAGE, "bench_roofline.svg"}


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one line <!-- results:begin -->"):
        report.build_files([], "# Title\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.000"), (1.6e-7, "1.6e-07"), (0.0816, "0.082"), (9.876, "9.88"), (73210.0, "73,210")],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert report.format_number(value) == text


def read_places(shape: ElementTree.Element) -> list[tuple[float, float]]:
    """Return where the dots and the corners of a shape of a picture lie."""
    points = [tuple(map(float, point.split(","))) for point in shape.get("points", "").split()]
    center = (
        [(float(shape.attrib["cx"]), float(shape.attrib["cy"]))] if "cx" in shape.attrib else []
    )
    return [*((x, y) for x, y in points), *center]


def test_plots_stay_in_their_panels(tmp_path: Path) -> None:
    for name, plot in report.draw_plots(make_rows(tmp_path)).items():
        picture = ElementTree.fromstring(plot)
        places = [place for shape in picture.iter() for place in read_places(shape)]
        assert places, name
        width, height = plots.LEFT + plots.WIDTH + plots.RIGHT, plots.TOP + plots.HEIGHT
        for x, y in places:
            across, down = x % width, y % (height + plots.BOTTOM)
            assert plots.LEFT <= across <= plots.LEFT + plots.WIDTH, name
            assert plots.TOP <= down <= height, name


def test_every_series_is_coloured_once_and_grey_in_the_others_panels() -> None:
    series = {"one": [(0.0, 1.0), (10.0, 2.0)], "two": [(0.0, 3.0), (10.0, 4.0)]}
    plot = plots.draw_panels(("x", "y"), series)
    shapes = list(ElementTree.fromstring(plot))
    lines = [shape.get("stroke") for shape in shapes if shape.get("points")]
    assert lines == [plots.GREY, plots.COLOR] * 2
    texts = [shape.text for shape in shapes if shape.tag.endswith("text")]
    assert {"one", "two", "2", "4", "x", "y"} <= set(texts)


def test_the_roof_is_the_probe_and_the_fastest_product(tmp_path: Path) -> None:
    plot = report.draw_roofline(make_rows(tmp_path))
    assert plot is not None and "dashed: what 25 GB/s allow" in plot
    axis = plots.Axis.over("x", [2.0, 300.0], is_log=True)
    assert axis.ticks() == [1, 10, 100, 1000] and axis.share(10) == pytest.approx(1 / 3)


def test_machines_of_one_name_are_told_apart_by_what_they_can(tmp_path: Path) -> None:
    rows = [row._replace(features="family 1 model 2: avx2") for row in make_rows(tmp_path)]
    other = [row._replace(features="family 3 model 4: avx512f", value=7.0) for row in rows]
    page = report.format_results([*rows, *other])
    assert page.count("## ") == 2 * 4  # the machines; aims and two tables of each
    assert "Processor: family 1 model 2: avx2." in page
    assert "Processor: family 3 model 4: avx512f." in page


def test_features_are_those_that_products_are_fast_by() -> None:
    features = results.list_features()
    assert features == "" or features.startswith("family ")
    assert set(features.partition(": ")[2].split()) <= set(results.FEATURES)


def make_row(case: str, value: float, unit: str, **fields: object) -> Row:
    case_row = Case("ours INT4 + embeddings, float16", case, "torch 2", 64)
    head = ("2026-12-01T00:00Z", "abc", "bench_generate", *case_row[:2], 64, 1, 28)
    row = Row(*head, value, unit, value, value, None, None, None, "", 5, 0.0, "cpu", 2, "torch 2")
    return row._replace(**fields)  # pyright: ignore[reportArgumentType]


def test_aims_tell_the_worst_figure_and_by_how_much_it_misses() -> None:
    rows = [
        make_row("rows", 1.4, "steps of one row", batch=8),
        make_row("rows", 4.6, "steps of one row", batch=16),
        make_row("decode", 0.95, "of the probe"),
        make_row("decode", 0.81, "of the probe", contender="ours INT8, float16"),
        make_row("decode", 0.3, "of the probe", contender="ours INT4, files alone"),
        make_row("decode", 90, "ms/token", ratio=1.7, baseline="fastllm int4"),
        make_row("decode", 90, "ms/token", ratio=0.9, baseline="abc INT4"),
    ]
    table = aims.format_aims(rows)
    step = "in steps of one row, context 64"
    assert f"| a step of 8 rows, {step} | at most 1.5 x | 1.4 x (ours INT4 + embeddings" in table
    assert "| at most 2.3 x | 4.6 x (ours INT4 + embeddings, float16) | missed by 100% |" in table
    assert "| at least 0.9 | 0.81 (ours INT8, float16) | missed by 10% |" in table
    assert "1.7 x (ours INT4 + embeddings, float16, fastllm int4) | met |" in table
    assert f"Not measured here: a step of 32 rows, {step}; " in table
    assert aims.format_aims([]) == ""


def test_aims_of_products_are_paired_by_size() -> None:
    fields = {"bench": "bench_kernels", "case": "4096x12288", "unit": "ms", "layers": 0}
    times = {("ours INT4", 8): 3.0, ("ours INT8", 8): 1.0, ("torch onednn int8", 8): 2.0}
    times |= {("ours INT4", 16): 9.0}  # without one of oneDNN's there
    rows = [
        make_row("", value, "ms", contender=name, size=size)._replace(**fields)
        for (name, size), value in times.items()
    ]
    assert "| at most 1 x | 1.5 x (ours INT4, 8 rows) | missed by 50% |" in aims.format_aims(rows)


def test_the_docs_are_what_the_results_give() -> None:
    page = (ROOT / "docs" / report.PAGE).read_text(encoding="utf-8")
    rows = results.read_rows(results.RESULTS)
    for name, text in report.build_files(rows, page).items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, (
            f"docs/{name} is stale: run python -m benchmarks.report"
        )


def test_check_names_what_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_rows(tmp_path)
    capsys.readouterr()
    (tmp_path / report.PAGE).write_text(PAGE)
    words = ["--results", str(tmp_path / "results.csv"), "--docs", str(tmp_path)]
    assert report.main([*words, "--check"]) == 1
    assert "benchmarks.md is not what the results give" in capsys.readouterr().out
    assert report.main(words) == 0 and report.main([*words, "--check"]) == 0
