"""Tables of the loader comparison, from the records of `pera-fast bench data`."""

import json
from pathlib import Path
from typing import Any

from report_text import heading, paragraph

TEXT = """
Side by side, `pera-fast bench data`: images/s per core (images/s), files in the page cache, on as many cores as
threads. Ours goes up to the normalised bf16 patch rows of student and teacher, the Pillow and PyTorch pipeline to its
float views. Per core means per second of processor time; where images/s are fewer than that times the threads, a side
left its cores idle for a part of the time, or other work had them.
"""
NOTHING = """
Not recorded yet; `pera-fast bench data` measures it.
"""
COLUMNS = (
    "device",
    "images",
    "threads",
    "Pillow, PyTorch",
    "ours, folder",
    "ours, shards",
    "ratio per core",
    "commit, date",
)
Loaders = dict[str, Any]


def load_loaders(folder: Path) -> list[Loaders]:
    """The records, by the names of their files."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def loaders_table(folder: Path) -> list[str]:
    """One line a format, size and number of threads."""
    lines = []
    for record in load_loaders(folder):
        m = record["machine"]
        device = f"{m['device']}, {m['cpu_capability']}, torch {m['torch']}"
        when = f"{m['commit']}, {m['date'].split()[0]}"
        for row in record["rows"]:
            size = f"{row['format']}, {row['size']} px, {row['bytes'] / row['images'] / 1024:.0f} KiB"
            sides = row["sides"].values()
            cells = " | ".join(f"{side['images_per_core_s']:.1f} ({side['images_per_s']:.1f})" for side in sides)
            ratios = ", ".join(f"{ratio:.1f}" for ratio in _ratios(row))
            if "gpu" in row["sides"]:
                size += "; on the GPU, and on the CPU for it, instead of folder and shards"
            lines.append(f"| {device} | {record['recipe']}, {size} | {row['threads']} | {cells} | {ratios} | {when} |")
    if not lines:
        return ["## Loaders", "", *paragraph(NOTHING)]
    return ["## Loaders", "", *paragraph(TEXT), *heading(*COLUMNS), *lines, ""]


def ratio_range(record: Loaders, kind: str) -> str:
    """Least and most of a format's ratios per core, over sizes, threads, folder and shards."""
    ratios = [ratio for row in record["rows"] if row["format"] == kind for ratio in _ratios(row)]
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def _ratios(row: dict[str, Any]) -> list[float]:
    """Speed-up of folder and shards over Pillow, per second of processor time."""
    pillow, *ours = (side["images_per_core_s"] for side in row["sides"].values())
    return [side / pillow for side in ours]
