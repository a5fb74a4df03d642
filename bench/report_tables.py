"""The full tables of docs/results.md: whole steps, ops, memory on a GPU."""

import json
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

from pera_bench.record import REFERENCE, spread
from pera_bench.work import COMPILED
from report_text import heading, paragraph

STEPS = """
Forward, backward, clipping, AdamW, center, EMA. Where there is a ratio, the published implementation ran in the same
process at the same sizes, batch and precision: `PERA_OFFICIAL=CHECKOUT pera-fast bench step`. "Of products": the
method's FLOPs over the time, as a share of what large products reach (in brackets the published implementation's); with
* of products made between the steps, else of the fastest in another minute.
"""
SHARES = ("of copy", "of products")
POINT = ("recipe", "images", "precision")
Record = dict[str, Any]
Row = dict[str, Any]


def where(machine: dict[str, Any]) -> str:
    """Device, and on a CPU how much of it."""
    if machine["kind"] == "cuda":
        return f"{machine['device']}, torch {machine['torch']}"
    clock = "processor time, " if machine.get("clock") == "processor" else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}, {clock}"
    return f"{machine['device']}, {threads}{machine['cpu_capability']}, torch {machine['torch']}"


def when(machine: dict[str, Any]) -> str:
    """Commit and day."""
    return f"{machine['commit']}, {machine['date'].split()[0]}"


def step_table(records: list[Record]) -> list[str]:
    """One line for each measured step: ours, the published implementation in the same run, their ratio."""
    lines = []
    for record in records:
        steps = [row for row in record["rows"] if row["suite"] == "step"]
        theirs = {(row["case"], *point(row)): row for row in steps if published(row)}
        for row in steps:
            if row["implementation"] == "reference" or published(row):
                continue
            other = theirs.get((row["case"], *point(row)))
            step = f"{row['recipe']}, batch {row['images']}, {row['precision']}, recompute {row['case']}"
            step += "" if row["implementation"] == "pera-fast" else f", {row['implementation']}"
            times = f"{speed(row)} | {row['median_s']:.3g} ({row['min_s']:.3g} to {row['max_s']:.3g})"
            against, share = " | | ", _share(row)
            if other:
                share += f" ({_share(other)})" if share else ""
                how = other["implementation"].removeprefix("published")
                against = f"{speed(other)}{how} | {other['median_s'] / row['median_s']:.2f} | {peak(other)}"
            machine, memory = record["machine"], peak(row)
            lines.append(f"| {where(machine)} | {step} | {times} | {share} | {memory} | {against} | {when(machine)} |")
    if not lines:
        return []
    columns = "device", "step", "images/s", "s a step (min to max)", "of products", "peak MiB"
    columns += "published images/s", "ratio", "published peak MiB", "commit, date"
    return ["## Whole training steps", "", *paragraph(STEPS), *heading(*columns), *lines, ""]


def peak(row: Row) -> str:
    """MiB at most, where that was measured."""
    return "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"


def published(row: Row) -> bool:
    """Whether it is the other side; "published, sdpa" on a GPU where xFormers does not run."""
    return row["implementation"].startswith("published")


def loader_lines(records: list[Record]) -> list[str]:
    """The loader alone."""
    lines = []
    for record in records:
        for row in record["rows"]:
            if row["suite"] == "data":
                lines.append(
                    f"The loader alone, JPEG files of 512 px, {row['recipe']}: {speed(row)} images/s"
                    f" ({where(record['machine'])}; {when(record['machine'])})."
                )
    return [*lines, ""] if lines else []


def memory_table(folder: Path) -> list[str]:
    """Memory that an image adds to a step: measured on a GPU, and by `pera-fast profile --device simulate`."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        for part in file.get("parts", []):
            for entry in part["results"].get("memory", []):
                measured, simulated = (
                    entry.get(name, {}).get("mib_per_image") for name in (file["device"], "simulate")
                )
                if measured and simulated:
                    ratio = simulated / measured
                    lines.append(
                        f"| {path.stem} | {entry['policy']} | {measured:.1f} | {simulated:.1f} | {ratio:.3f} |"
                    )
    if not lines:
        return []
    title = "## Memory on a GPU, measured and simulated"
    head = [
        title,
        "",
        "| results | recompute | MiB an image, measured | simulated | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    return [*head, *lines, ""]


def _share(row: Row) -> str:
    if "of_matrix" not in row:
        return ""
    return f"{row['of_matrix']:.0%}{' *' if 'matrix_meanwhile' in row else ''}"


def point(row: Row) -> tuple[Any, ...]:
    """Recipe, images, precision."""
    return tuple(row[name] for name in POINT)


def speed(row: Row) -> str:
    """Images per second."""
    return f"{row['images'] / row['median_s']:.3g}"


def op_tables(record: Record) -> list[str]:
    """A table for each recipe, number of images and precision: what runs by default, and under torch.compile."""
    lines = []
    rows = [row for row in record["rows"] if row["suite"] not in ("step", "data")]
    for (recipe, images, precision), some in groupby(rows, point):
        ceilings = record["ceilings"]
        lines += [
            f"### {recipe}, {images} images, {precision}",
            "",
            f"{where(record['machine'])}; {when(record['machine'])}.",
            *([f"Other processes took {1 - alone:.0%} of the time."] if (alone := undisturbed(record)) < 0.9 else []),
            f"Ceilings: copy {ceilings['copy'] / 1e9:.3g} GB/s, products {ceilings['matrix'] / 1e12:.3g} TFLOP/s.",
            "",
            *heading("op", "", "runs", "median ms (spread)", "eager ms", "times as fast", *SHARES, "error"),
        ]
        rows = list(some)
        shown = fastest(rows)
        lines += [op_line(row) for row in rows if row in shown or row["implementation"] == COMPILED]
        lines.append("")
    return lines


def undisturbed(record: Record) -> float:
    """Share of the time in which a bench's own thread ran, the median over the benches; 1 where that is no matter."""
    if record["machine"].get("clock") == "processor":
        return 1.0
    shares = [row["busy"] for row in record["rows"] if row["busy"] is not None and row["suite"] != "data"]
    return statistics.median(shares) if shares else 1.0


def fastest(rows: list[Row]) -> list[Row]:
    """Row of the implementation that runs by default, of each benchmark: the first after the definition's."""
    chosen = []
    for _, some in groupby(rows, lambda r: (r["suite"], r["case"], r["direction"])):
        others = [row for row in some if row["implementation"] not in (REFERENCE, COMPILED)]
        chosen += others[:1]
    return chosen


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def op_line(row: Row) -> str:
    """One row of the ops' table."""
    faster = row.get("speedup")
    shares = " | ".join(f"{row[name]:.0%}" if name in row else "" for name in ("of_copy", "of_matrix"))
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    eager = f"{milliseconds(faster * row['median_s'])} | {faster:.2f}" if faster else "|"
    return (
        f"| {row['suite']}, {row['case']} | {row['direction']} | {row['implementation']} "
        f"| {milliseconds(row['median_s'])} ({spread(row) / row['median_s']:.0%}) | {eager} | {shares} | {error} |"
    )
