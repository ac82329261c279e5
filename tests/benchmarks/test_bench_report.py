"""The results file, the page and the plots that are made from it."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import plots, report, results
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
    assert set(files) == {report.PAGE, *report.PLOTS}


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


def test_plots_stay_in_their_frame(tmp_path: Path) -> None:
    for name, plot in report.draw_plots(make_rows(tmp_path)).items():
        places = []
        for shape in ElementTree.fromstring(plot).iter():
            points = shape.get("points", "").split()
            places += [tuple(map(float, point.split(","))) for point in points]
            if "cx" in shape.attrib:
                places.append((float(shape.attrib["cx"]), float(shape.attrib["cy"])))
        assert places, name
        for x, y in places:
            assert plots.LEFT <= x <= plots.RIGHT and plots.TOP <= y <= plots.BOTTOM, name


def test_the_roof_is_the_probe_and_the_fastest_product(tmp_path: Path) -> None:
    plot = report.draw_roofline(make_rows(tmp_path))
    assert plot is not None and "what 25 GB/s and the fastest product allow" in plot
    axis = plots.Axis.over("x", [2.0, 300.0], is_log=True)
    assert axis.ticks() == [1, 10, 100, 1000] and axis.share(10) == pytest.approx(1 / 3)


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
