"""Names the files of an index that cannot be read: the first on the terminal, all in a CSV file beside the index."""

import csv
from pathlib import Path

from pera_fast.data.files.manifest import Manifest
from pera_fast.durable import whole_file

FIRST = 5


def name_unreadable(manifest: Manifest) -> list[str]:
    """Lines for the terminal about the files that cannot be read; none where all can. Writes the list of all."""
    target = unreadable_path(manifest.path) if manifest.path is not None else None
    files = manifest.unreadable()
    if not files:
        if target is not None:
            target.unlink(missing_ok=True)  # of an index before
        return []
    lines = [f"  {path}: {' '.join(reason.split())}" for path, reason in files[:FIRST]]
    if target is None:
        return lines
    try:
        with (
            whole_file(target) as partial,
            open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("file", "reason"))
            writer.writerows(files)
    except OSError as error:
        return [*lines, f"the list of all {len(files)} cannot be written: {target} ({error.strerror or error})"]
    return [*lines, f"unreadable files with their reasons, all {len(files)}: {target}"]


def unreadable_path(manifest: Path) -> Path:
    """The CSV file beside a manifest, columns file and reason."""
    return manifest.with_name(f"{manifest.stem}.unreadable.csv")
