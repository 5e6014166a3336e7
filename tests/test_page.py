"""The page of the bench holds the newest figures of its CSV, in tables and in figures, and owns up to a missed mark."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The bench's conftest, which writes the CSV, under a name that is not this folder's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def page(bench: ModuleType) -> ModuleType:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra bench, is not installed")
    return importlib.import_module("page")


@pytest.fixture(scope="module")
def history(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures of two runs, at two revisions: in the first, linear was slower in memory."""
    path = tmp_path_factory.mktemp("history") / "history.csv"
    row, ratio = bench.Row, bench.Ratio
    peer, fast = "mergekit 0.1.5", "as fast"

    def share(median: float) -> object:
        return ratio(median, median - 0.01, median + 0.01)

    first = [
        row("merge", "mlp", "linear", "BF16", 0.25, 11.7, 90.1, share(0.13)),
        row("merge", "mlp", "task_arithmetic", "BF16", 0.125, 72.3, 88.2, share(0.82)),
        row("merge", "mlp", "linear", "BF16", 0.2, 66.6, 77.7, share(0.86), provider="mine.py"),
    ]
    second = [
        row("merge", "mlp", "linear", "BF16", 0.0625, 81.4, 89.6, share(0.97)),
        row("gram", "mlp", "2", "BF16", 0.0625, 41.9, 42.3, share(0.99)),
        row(
            *("mergekit", "1093 M", "ties", "BF16", 2.0, 5.3),
            **{"times": ratio(98.4, 97.0, 99.0), "against": fast, "peer": peer, "peer_seconds": 196.8},
            **{"error_ulp": 0.5, "peer_error_ulp": 439, "anonymous_mb": 23, "peer_anonymous_mb": 3578},
        ),
        row("disk", "1093 M", "linear", "BF16", 1.0, 8.7, 9.1, share(0.95), times=share(1.7), against=f"{fast} as cp"),
        row(
            *("peer", "mlp", "linear", "BF16", 0.01, 80),
            **{"times": ratio(2.6, 2.5, 2.7), "against": fast, "peer": "eager torch", "peer_seconds": 0.026},
            **{"error_ulp": 0.5, "peer_error_ulp": 1.56},
        ),
        *(row("scale", "bytes", "ties", "BF16", at / 5e9, 5.1, 6, share(0.83), at=at) for at in (4e7, 2e9)),
        *(row("scale", "threads", "ties", "BF16", 1 / at, 17 * at, 40, share(0.44), at=at) for at in (1, 2)),
        *(row("scale", "models", "gram", "BF16", at, 37.5, 40, share(0.91), at=at) for at in (2, 8)),
        *(
            row("scale", "settings", f"ties{variant}", "BF16", times, 17, times=share(times), at=at)
            for variant, at, times in (
                *(("", 1, 1), ("", 8, 3.4), (", one by one", 8, 8.1)),
                *((", disk to disk", 8, 4.4), (", disk to disk, at most", 8, 4)),
            )
        ),
        *(
            row(
                *("session", case, "ties", "BF16", 0.0625, 21, 30, share(0.7), 1.9, ratio(times, times - 1, times + 1)),
                **{"against": anew, "peer": "merging anew", "peer_seconds": 0.0625 * times, "at": parameters},
            )
            for case, anew, times, parameters in (
                ("one", "as fast as a merge to disk and back", 24, 3e8),
                ("one", "as fast as a merge to disk and back", 12, 1e6),
                ("one-anew", "as fast as merge_state_dicts", 1.5, 3e8),
            )
        ),
        *(
            row(
                *(op, parameters, method, dtype, 0.5, 0.1),
                **{"times": ratio(2 * its, 2 * its - 1, 2 * its + 1), "against": fast},
                **{"peer": "PEFT 0.21.2", "peer_seconds": its, "anonymous_mb": 31, "peer_anonymous_mb": 1415},
            )
            for op, parameters, method, dtype, its in (
                ("fuse", "303 M", "merge_and_unload", "BF16", 1.5),
                ("fuse", "303 M", "merge_and_unload, whole process", "BF16", 8),
                ("combine", "51 M", "svd", "F32", 32),
                ("combine", "51 M", "svd, whole process", "F32", 41),
                ("combine", "51 M", "cat", "F32", 0.5),
            )
        ),
        row("extract", "303 M", "rank 16", "BF16", 2.5, 0.5, anonymous_mb=233),
        row("scale", "tensors", "merge of 256 elements, overhead per tensor", "BF16", 1.38e-6, 1, times=share(1), at=9),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for run, rows, revision in (("2026-01-02T00", second, "new"), ("2026-01-01T00", first, "older")):
            patch.setattr(bench, "_revision", lambda revision=revision: revision)
            for each in rows:
                bench.append(path, each, 2, run)
    return path


@pytest.fixture(scope="module")
def written(page: ModuleType, history: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    page.main(history, folder)
    return folder


FIGURES = {
    "speed.svg": ["ties", "2.0 s, 98 times as fast", "197 s", "mergekit 0.1.5"],
    "memory.svg": ["23 MB", "3,578 MB"],
    "disk.svg": ["linear", "95%"],
    "roofline.svg": ["merge linear", "97%", "merge task_arithmetic", "82%", "gram 2", "99%"],
    "in-memory.svg": ["linear", "2.6 x", "eager torch"],
    "bytes.svg": ["ties", "GB/s"],
    "threads.svg": ["ties", "% of the ceiling"],
    "models.svg": ["gram", "models"],
    "settings.svg": ["ties", "one by one", "outputs"],
    "tensors.svg": ["merge of 256 elements", "1.38"],
    "session.svg": ["ties, one by one", "0.062 s, 24 times as fast", "1.5 s", "merging anew", "fastmerge"],
    "lora.svg": ["fuse, merge_and_unload", "0.5 s, 3 times as fast", "combine, svd", "32 s", "PEFT 0.21.2"],
    "accuracy.svg": ["disk to disk", "in memory", "fastmerge", "mergekit", "eager torch"],
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_an_svg_with_its_numbers(written: Path, name: str) -> None:
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(written / name).getroot()
    assert root.tag == f"{svg}svg"
    texts = {"".join(text.itertext()).strip() for text in root.iter(f"{svg}text")}
    assert set(FIGURES[name]) <= texts
    assert f"]({name})" in (written / "README.md").read_text()


def test_nothing_else_is_written(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {"README.md", *FIGURES}


@pytest.mark.parametrize(
    "line",
    [
        "| merge | linear | mlp | 0.0625 | 81.4 | 89.6 | 97% (96% to 98%) |  |  |  |",
        "| linear | 1093 M | 1 | 8.7 | 9.1 | 95% (94% to 96%) |  | 1.7 x as fast as cp |  |",
        "| ties | 1093 M | 2.00 | 196.8 | 98.4 (97 to 99) | 23 | 3,578 |",
        "| linear | eager torch | 0.01 | 0.026 | 2.6 (2.5 to 2.7) |",
        "|  |  | 40 MB | 2,000 MB |",
        "| ties | GB/s | 17 | 34 |",
        "| ties, one by one | in memory: times one output |  | 8.1 (8.09 to 8.11) |",
        "| gram | % of the ceiling | 91 (90 to 92) | 91 (90 to 92) |",
        "| disk to disk | ties | mergekit 0.1.5 | 196.8 | 439 |",
        "| ties | one by one | 300 M | 0.0625 | 1.5 | 24 (23 to 25) | a merge to disk and back | 21.0 | 30.0 "
        "| 70% (69% to 71%) | 1.9 |",
        "| combine | svd, whole process | 51 M | 0.5 | PEFT 0.21.2 | 41 | 82 (81 to 83) | 31 | 1,415 |  |  |",
        "| extract | rank 16 | 303 M | 2.5 |  |  |  | 233 |  |  |  |",
    ],
)
def test_a_table_has_the_numbers(written: Path, line: str) -> None:
    assert line in (written / "README.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("mark", "standing"),
    [
        (
            "linear, task_arithmetic, slerp, passthrough: sweep",
            ["82 (81 to 83)", "task_arithmetic, mlp, at older", "2 of 28", "**missed**"],
        ),
        ("gram of 2 and 4 tensors", ["99 (98 to 100)", "2, mlp", "1 of 14", "met so far"]),
        (
            "1 B parameters: times as fast as `cat` and `cp`",
            ["1.7 (1.69 to 1.71)", "linear, 1093 M", "1 of 7", "met so far"],
        ),
        ("1 B parameters, linear", ["1.05 (1.04 to 1.06)", "linear, 1093 M", "1 of 5", "met so far"]),
        ("disk to disk, ties: times as fast as mergekit", ["98.4 (97 to 99)", "ties, 1093 M", "1", "met"]),
        ("8 outputs of one read", ["1.1 (1.09 to 1.11)", "ties, disk to disk, settings", "1 of 2", "**missed**"]),
        (
            "a tiny tensor's own cost",
            ["1.38", "merge of 256 elements, overhead per tensor, tensors", "1 of 10", "met so far"],
        ),
        ("a session's candidate", ["24 (23 to 25)", "ties, one", "1 of 3", "met so far"]),
        (
            "lora fuse, a whole process: times as fast as PEFT's load",
            ["3 (2 to 4)", "merge_and_unload, 303 M", "1", "**missed**"],
        ),
        (
            "lora fuse, a whole process: times as fast as PEFT's whole",
            ["16 (15 to 17)", "merge_and_unload, whole process, 303 M", "1", "met"],
        ),
        (
            "lora combine by svd, a whole process: times as fast as PEFT's add",
            ["64 (63 to 65)", "svd, 51 M", "1 of 4", "met so far"],
        ),
        ("lora fuse, combine, extract: anonymous memory", ["217", "rank 16, 303 M", "4 of 7", "**missed**"]),
        ("dare: times the sweep", ["", "", "0 of 14", "not measured: `make bench OP=merge,whole,gram`"]),
    ],
)
def test_a_mark_is_met_missed_or_not_measured(written: Path, mark: str, standing: list[str]) -> None:
    (line,) = (line for line in (written / "README.md").read_text().splitlines() if line.startswith(f"| {mark}"))
    assert [cell.strip() for cell in line.split("|")][3:-1] == standing


@pytest.mark.parametrize("case", ["mlp", "1M", "4M-shifted"])
def test_a_single_case_makes_a_mark_red(bench: ModuleType, page: ModuleType, case: str, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    for method, each in product(("2", "4"), importlib.import_module("host_marks").SIZES):
        share = bench.Ratio(0.89 if (method, each) == ("4", case) else 0.95, 0.8, 1)
        bench.append(path, bench.Row("gram", each, method, "BF16", 1.0, 1.0, 2.0, share), 2, "now")
    page.main(path, tmp_path)
    (line,) = (each for each in (tmp_path / "README.md").read_text().splitlines() if each.startswith("| gram of 2"))
    assert line.endswith(f"| 89 (80 to 100) | 4, {case} | 14 | **missed** |")


def test_what_is_older_or_of_another_provider_is_left_out(written: Path) -> None:
    text = (written / "README.md").read_text()
    assert "| 11.7 |" not in text
    assert "| 66.6 |" not in text


def test_the_same_csv_gives_the_same_bytes(page: ModuleType, history: Path, written: Path, tmp_path: Path) -> None:
    page.main(history, tmp_path)
    assert [path.name for path in written.iterdir() if path.read_bytes() != (tmp_path / path.name).read_bytes()] == []


def test_a_figure_without_rows_names_what_measures_it(
    bench: ModuleType, page: ModuleType, history: Path, tmp_path: Path
) -> None:
    path = tmp_path / "history.csv"
    bench.append(path, bench.Row("gram", "mlp", "2", "BF16", 1.0, 1.0, 2.0, bench.Ratio(0.5, 0.4, 0.6)), 2, "now")
    page.main(path, tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["README.md", "history.csv", "roofline.svg"]
    text = (tmp_path / "README.md").read_text()
    assert "## Threads\n\n" in text
    assert "Not measured: `make bench OP=scale CASE=threads`." in text


def test_without_a_peer_adapters_have_a_table_alone(bench: ModuleType, page: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    for op, dtype in (("combine", "F32"), ("extract", "BF16")):
        bench.append(path, bench.Row(op, "51 M", "svd", dtype, 0.5, 1.0, anonymous_mb=24), 2, "now")
    page.main(path, tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["README.md", "history.csv"]
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert [line for line in lines if "| svd |" in line] == [
        f"| {op} | svd | 51 M | 0.5 |  |  |  | 24 |  |  |  |" for op in ("combine", "extract")
    ]


def test_other_columns_are_not_appended_to(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("date,op\n")
    with pytest.raises(pytest.UsageError, match="other columns"):
        bench.append(path, bench.Row("gram", "mlp", "2", "BF16", 1.0, 1.0), 2, "now")
