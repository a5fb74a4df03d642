"""The tables that `pera-fast bench` prints."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from pera_bench.record import Change, Record, spread

NUMBERS = ("median", "spread", "GB/s", "of copy", "TFLOP/s", "of peak", "MiB", "error", "speed-up", "images/s")
QUIET = 0.9  # share of the time below which a measurement is not to be trusted
SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def make_console() -> Console:
    """On a terminal as wide as that, elsewhere as wide as the table is."""
    console = Console()
    return console if console.is_terminal else Console(width=170)


def show(record: Record, console: Console) -> None:
    """All rows by recipe, images and precision, and below them what was left out and why."""
    console.print(headline(record), soft_wrap=True)
    if record.undisturbed < QUIET and record.machine.get("clock") != "processor":
        console.print(f"other processes took {1 - record.undisturbed:.0%} of the time: measure again", style="yellow")
    for (recipe, images, precision), rows in groupby(record.rows, lambda r: (r["recipe"], r["images"], r["precision"])):
        table = _table(f"{recipe}, {images} images, {precision}", list(rows), record.ceilings)
        console.print(table)
    reasons: dict[tuple[str, str], int] = {}
    for entry in record.skipped:  # the same reason once for an implementation
        name = entry["bench"].split(",")[0].split()[-1]
        reasons[(name, entry["reason"])] = reasons.get((name, entry["reason"]), 0) + 1
    for (name, reason), count in reasons.items():
        console.print(f"left out: {name} ({count} benches): {reason}", style="dim", markup=False)
    for entry in record.failed:
        console.print(f"failed: {entry['bench']}: {entry['reason']}", style="red", markup=False)


def headline(record: Record) -> str:
    """Device, threads, versions, commit, ceilings in one paragraph."""
    m, c = record.machine, record.ceilings
    threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
    where = m["device"] if m["kind"] == "cuda" else f"{m['device']}, {threads}, {m['cpu_capability']}"
    where += ", processor time" if m.get("clock") == "processor" else ""
    versions = f"torch {m['torch']}, Python {m['python']}, commit {m['commit']}, {m['date']}"
    return f"{where}; {versions}\nceilings: copy {c['copy'] / 1e9:.1f} GB/s, products {c['matrix'] / 1e12:.3g} TFLOP/s"


def _table(title: str, rows: list[dict[str, Any]], ceilings: dict[str, float]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for name in ("bench", "", "implementation"):
        table.add_column(name, overflow="fold")
    for name in NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in rows:
        bench = f"{row['suite']}/{row['case']}", SHORT.get(row["direction"], row["direction"])
        table.add_row(*(bench if bench != before else ("", "")), *cells(row, ceilings))
        before = bench
    return table


def cells(row: dict[str, Any], ceilings: dict[str, float]) -> list[str]:
    """The row's implementation and numbers, as text; empty where there is none."""
    median = row["median_s"]
    speedup = row.get("speedup")
    return [
        row["implementation"],
        duration(median),
        f"{spread(row) / median:.0%}",
        f"{row['of_copy'] * ceilings['copy'] / 1e9:.1f}" if "of_copy" in row else "",
        f"{row['of_copy']:.0%}" if "of_copy" in row else "",
        f"{row['flops'] / median / 1e12:.3g}" if "of_matrix" in row else "",
        f"{row['of_matrix']:.0%}" if "of_matrix" in row else "",
        "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
        "" if row["error"] is None else f"{row['error']:.0e}",
        "" if speedup is None or row["implementation"] == "reference" else f"{speedup:.2f}x",
        f"{row['images'] / median:,.0f}" if row["images"] / median >= 100 else f"{row['images'] / median:.3g}",
    ]


def duration(seconds: float) -> str:
    """With its unit: 1.23 ms."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def show_changes(changes: list[Change], new: Record, old: Record, console: Console) -> None:
    """Print the changes larger than the spread of both runs."""
    for name in ("device", "threads", "clock", "torch"):
        if new.machine.get(name) != old.machine.get(name):
            console.print(
                f"not alike: {name} {old.machine.get(name)} then, {new.machine.get(name)} now", style="yellow"
            )
    moved = [change for change in changes if change.moved]
    console.print(f"\ncompared with {old.machine['commit']} of {old.machine['date']}:")
    console.print(f"{len(moved)} of {len(changes)} benches moved beyond the spread of both")
    table = Table("bench", "", "implementation", box=None, pad_edge=False, header_style="bold")
    for name in ("then", "now", "ratio"):
        table.add_column(name, justify="right")
    for change in sorted(moved, key=lambda c: c.ratio):
        row, style = change.row, "green" if change.ratio < 1 else "red"
        times = duration(change.old["median_s"]), duration(row["median_s"])
        what = f"{row['suite']}/{row['case']}", SHORT.get(row["direction"], row["direction"]), row["implementation"]
        table.add_row(*what, *times, f"[{style}]{change.ratio:.2f}[/]")
    if moved:
        console.print(table)
