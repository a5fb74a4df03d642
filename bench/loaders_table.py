"""The README's table of loaders, from what `data.py` wrote."""

import json
from pathlib import Path

HEAD = """\
Loaders side by side, `python bench/data.py`: images/s per core (images/s), files in the page cache, on as many cores as threads.
Ours goes up to the normalised bf16 patch rows of student and teacher, the Pillow and PyTorch pipeline to its float views.
Per core means per second of processor time; where images/s are fewer than that, other work had the cores at the time.

| device | images | threads | Pillow, PyTorch | ours, folder | ours, shards | ratio per core | commit, date |
| --- | --- | --- | --- | --- | --- | --- | --- |""".splitlines()  # noqa: E501 - as it stands in the README


def loaders_table(folder: Path) -> list[str]:
    """One line a format, size and number of threads; none if nothing was measured."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        device = f"{record['device']}, {record['cpu_capability']}, torch {record['torch']}"
        when = f"{record['commit']}, {record['date']}"
        for row in record["rows"]:
            size = f"{row['format']}, {row['size']} px, {row['bytes'] / record['images'] / 1024:.0f} KiB"
            sides = row["sides"].values()
            cells = " | ".join(f"{side['images_per_core_s']:.1f} ({side['images_per_s']:.1f})" for side in sides)
            pillow, *ours = (side["images_per_core_s"] for side in sides)
            ratios = ", ".join(f"{side / pillow:.1f}" for side in ours)
            lines.append(f"| {device} | {record['recipe']}, {size} | {row['threads']} | {cells} | {ratios} | {when} |")
    return [*HEAD, *lines, ""] if lines else []
