"""Table of probes on frozen features, pretrained against random, from the records of bench/downstream.py."""

import json
import statistics
from pathlib import Path
from typing import Any

from report_text import heading, paragraph

TEXT = """
`bench/downstream.py`: {recipe}, pretrained for {epochs} epochs on the {images} training scenes of UC Merced without
their labels, then frozen; probes by `pera-fast eval` with its defaults, beside random weights of the same seed. Scenes:
test split of UC Merced, features of cls and patches. Roads: 20 test tiles, linear head. Changes: five folds over 21
pairs, linear head; calling every pixel changed gives an F1 of {all_changed:.3f}. {device}; {commit}, {date}.
"""
ROWS = (
    ("scene", "accuracy", "Scenes, linear probe: accuracy"),
    ("scene", "knn20_accuracy", "Scenes, kNN (k = 20): accuracy"),
    ("segmentation", "miou", "Roads: mIoU"),
    ("change", "changed_f1", "Changes: F1"),
)
Record = dict[str, Any]


def downstream_page(folder: Path) -> list[str]:
    """Section of the page of results; nothing where nothing was measured."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        machine, runs = record["machine"], record["runs"]
        level = statistics.fmean(run["change"]["all_changed_f1"]["random"] for run in runs)
        facts = {**record, "all_changed": level, "device": machine["device"]}
        lines += paragraph(TEXT.format(**facts, commit=machine["commit"], date=machine["date"][:10]))
        lines += [*heading("probe", "pretrained, by seed", "random, by seed", "smallest gain of a seed")]
        lines += [_row(runs, *row) for row in ROWS] + [""]
    return ["## Probes after pretraining", "", *lines] if lines else []


def _row(runs: list[Record], task: str, metric: str, name: str) -> str:
    pretrained, random = ([run[task][metric][side] for run in runs] for side in ("pretrained", "random"))
    gain = min(a - b for a, b in zip(pretrained, random, strict=True))
    return f"| {name} | {_numbers(pretrained)} | {_numbers(random)} | {gain:+.3f} |"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
