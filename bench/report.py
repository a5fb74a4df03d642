"""Turns bench/results/*.json into the README's table of measurements.

python bench/report.py            writes the part of README.md between its two markers
python bench/report.py --check    exits with 1 if that part is not what the results give
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def load(folder: Path) -> list[dict[str, Any]]:
    """Records of whole training steps, in the order of their files."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("step-*.json"))]
    return sorted(records, key=lambda r: (r["device"], r["recipe"], r["precision"], r["batch_size"]))


def step_table(records: list[dict[str, Any]]) -> str:
    """One row a measured step: ours, the published implementation in the same run, their ratio."""
    lines = [
        "| device | step | images/s | s a step (min to max) | published images/s | ratio | commit, date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        ours, theirs = r["sides"]["pera-fast"], r["sides"].get("published")
        lines.append(
            f"| {r['device']}, {r['threads']} threads, {r['cpu_capability']}, torch {r['torch']} "
            f"| {r['recipe']}, batch {r['batch_size']}, {r['precision']}, recompute {r['recompute']} "
            f"| {ours['images_per_s']:.3f} | {ours['median_s']:.2f} ({ours['min_s']:.2f} to {ours['max_s']:.2f}) "
            + (f"| {theirs['images_per_s']:.3f} | {r['speedup']:.2f} " if theirs else "| | ")
            + f"| {r['commit']}, {r['date']} |"
        )
    return "\n".join(lines)


def section(folder: Path) -> str:
    """The text between the markers."""
    records = load(folder)
    gpus = sorted({r["device"] for r in records if "cpu" not in r["file_kind"]})
    missing = "" if gpus else "Nothing has been measured on a GPU yet.\n\n"
    how = (
        "Whole training steps (forward, backward, clipping, AdamW, center, EMA), both sides in one process, same sizes,"
        " batch and precision:\n`PERA_OFFICIAL=CHECKOUT python bench/step.py`.\n\n"
    )
    return f"{missing}{how}{step_table(records)}" if records else missing.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n{section(ROOT / 'bench' / 'results')}\n{END}{tail}"
    if args.check:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
