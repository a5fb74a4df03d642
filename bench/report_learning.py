"""Table of accuracies of the published implementation's teacher and ours, from the records of bench/learning.py."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report_text import heading, paragraph

NAMES = {
    "random": "random weights",
    "published": "published code",
    "ours": "ours",
    "longer": "ours, for as many minutes",
    "pixels": "ours, pixel loss alone",
    "dense": "ours, without masks",
}
PROBES = {
    "knn_cls": "kNN, cls",
    "knn_mean": "kNN, mean",
    "linear_cls": "linear, cls",
    "linear_mean": "linear, mean",
}
LOSSES = {
    "loss": "total",
    "global_cls_loss": "distillation, global",
    "local_cls_loss": "distillation, local",
    "koleo_loss": "KoLeo",
    "pixel_loss": "pixel / 100",
}
CLOCKS = {"processor": "minutes of processor time", "wall": "minutes by the clock"}
TEXT = """
`bench/learning.py`: the published implementation with its own loader, transforms, network and loss, and ours, both
from scratch on the same {train} images ({data}, {classes} classes, train split), with the same sizes, schedules and
batch ({recipe}, batch {batch}{settings}; {length}), {seeds} seeds each. The probes are the same for all: kNN (k = 20,
temperature .07) and logistic regression (C chosen on a fifth of the train split) on the frozen teacher's cls token or
the mean of its patches; accuracy in % on the {test} images of the test split, median (least to most) over the seeds.
Time is {clock}{threads}, from the end of the first step on. {device}, torch {torch}; published code at
{published:.7}; {commit}, {date}.
"""
SHORT = """
**What it learns**, beside the published code from the same {train} images ({data}, {recipe}, {length}, {seeds} seeds):
{probes}. {verdict} The same images cost {share:.0f} % of its {clock} ({device}; {commit}, {date};
[more](#learning)).
"""
DIFFERENCE = """
Ours minus published after as many images, in points, and in parentheses the larger of the two sides' spreads over
seeds: {differences}.
"""
LOSS_TEXT = """
Losses over the last tenth of the steps, as both log them: median (least to most) over the seeds.
"""
MINUTES = """
With `--minutes` each side has a schedule of as many steps as it makes in that time.
"""
CUT = """
By the time that ours ends, the published code is in the middle of its schedule: `--sides` with `longer` gives ours as
many minutes as the published code takes instead.
"""
PICTURE = """
![kNN accuracy against images seen and against minutes](images/learning.svg)
"""
NOTHING = """
Not recorded yet; `bench/learning.py` measures it.
"""
Record = dict[str, Any]


def load_learning(folder: Path) -> list[Record]:
    """The records, by the names of their files."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def sides(record: Record) -> list[str]:
    """Sides of a record in the order of the table."""
    there = {run["side"] for run in record["runs"]}
    return [side for side in NAMES if side in there]


def last_values(record: Record, side: str, value: Callable[[Record], float]) -> list[float]:
    """A value of the last checkpoint of each seed."""
    return [value(run["points"][-1]) for run in record["runs"] if run["side"] == side]


def minutes_of(record: Record) -> Callable[[Record], float]:
    """Gives the minutes of a checkpoint, by the clock that counts."""
    return lambda point: point[f"{record['clock']}_s"] / 60


def learning_page(folder: Path) -> list[str]:
    """Section of the page of results."""
    records = load_learning(folder)
    if not records:
        return ["## Learning", "", *paragraph(NOTHING)]
    lines = ["## Learning", ""]
    for number, record in enumerate(records):
        lines += paragraph(TEXT.format(**_facts(record)))
        lines += paragraph(MINUTES) if record["minutes"] else []
        lines += [*_table(record), ""]
        lines += paragraph(CUT) if _by_the_end_of_ours(record) else []
        if {"published", "ours"} <= set(sides(record)):
            lines += [*paragraph(DIFFERENCE.format(differences=_differences(record))), *_losses(record), ""]
        lines += paragraph(PICTURE) if not number else []
    return lines


def learning_summary(folder: Path) -> list[str]:
    """One paragraph a record that has both implementations."""
    lines = []
    for record in load_learning(folder):
        if not {"published", "ours"} <= set(sides(record)) or record["minutes"]:
            continue
        both = {
            side: statistics.median(last_values(record, side, minutes_of(record))) for side in ("published", "ours")
        }
        found = []
        for probe in PROBES:
            ours, theirs = (_middle(record, side, probe) for side in ("ours", "published"))
            found.append(f"{PROBES[probe]} {ours} against {theirs}")
        share = 100 * both["ours"] / both["published"]
        lines += paragraph(
            SHORT.format(**_facts(record), probes="; ".join(found), share=share, verdict=_verdict(record))
        )
    return lines


def _facts(record: Record) -> Record:
    machine = record["machine"]
    threads = f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''} a side"
    length = f"{record['minutes']:g} minutes each" if record["minutes"] else f"{record['epochs']} epochs"
    return {
        **machine,
        **{key: record[key] for key in ("data", "classes", "recipe", "batch", "published")},
        **record["images"],
        "settings": "".join(f", {text}" for text in record["settings"]),
        "length": length,
        "seeds": len({run["seed"] for run in record["runs"]}),
        "clock": "processor time" if record["clock"] == "processor" else "the wall clock",
        "threads": threads if record["clock"] == "processor" else "",
        "commit": ", ".join(sorted({run["commit"] for run in record["runs"] if "commit" in run})),
        "date": machine["date"].split()[0],
    }


def _table(record: Record) -> list[str]:
    lines = heading("teacher of", "images seen", CLOCKS[record["clock"]], *PROBES.values())
    for side in sides(record):
        points = [run["points"][-1] for run in record["runs"] if run["side"] == side]
        lines.append(_line(record, NAMES[side], points))
        if side == "published" and (early := _by_the_end_of_ours(record)):
            lines.append(_line(record, "published code, by the time that ours ends", early))
    return lines


def _line(record: Record, name: str, points: list[Record]) -> str:
    """A row of the table, of one checkpoint a seed; cells are empty where a probe was not made."""
    seen = statistics.median(point["images"] for point in points)
    minutes = _spread([minutes_of(record)(point) for point in points], "{:.2f}") if seen else ""
    cells = []
    for probe in PROBES:
        there = all(probe in point for point in points)
        cells.append(_spread([100 * point[probe] for point in points], "{:.1f}") if there else "")
    return f"| {name} | {seen:.0f} | {minutes} | {' | '.join(cells)} |"


def _by_the_end_of_ours(record: Record) -> list[Record]:
    """Published checkpoints of equal steps, the last ones within the minutes of our whole run; none if all are."""
    if record["minutes"] or not {"published", "ours"} <= set(sides(record)):
        return []
    minutes = minutes_of(record)
    end = statistics.median(last_values(record, "ours", minutes))
    runs = [run["points"] for run in record["runs"] if run["side"] == "published"]
    reached = min(len([point for point in points if minutes(point) <= end]) for points in runs)
    return [points[reached - 1] for points in runs] if 0 < reached < min(map(len, runs)) else []


def _percent(record: Record, side: str, probe: str) -> list[float]:
    return [100 * value for value in last_values(record, side, lambda point: point[probe])]


def _middle(record: Record, side: str, probe: str) -> str:
    return f"{statistics.median(_percent(record, side, probe)):.1f} %"


def _spread(values: list[float], form: str) -> str:
    ends = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
    return form.format(statistics.median(values)) + ends


def _compared(record: Record) -> dict[str, tuple[float, float]]:
    """Points of ours above the published code by probe, and the larger of the two spreads over the seeds."""
    found = {}
    for probe in PROBES:
        ours, theirs = (_percent(record, side, probe) for side in ("ours", "published"))
        spread = max(max(values) - min(values) for values in (ours, theirs))
        found[probe] = statistics.median(ours) - statistics.median(theirs), spread
    return found


def _differences(record: Record) -> str:
    return "; ".join(
        f"{PROBES[probe]} {above:+.1f} ({spread:.1f})" for probe, (above, spread) in _compared(record).items()
    )


def _verdict(record: Record) -> str:
    beyond = [PROBES[probe] for probe, (above, spread) in _compared(record).items() if abs(above) > spread]
    if beyond:
        return f"Beyond the spread over seeds: {'; '.join(beyond)}."
    return "None of these differences is larger than the spread over seeds."


def _losses(record: Record) -> list[str]:
    lines = [*paragraph(LOSS_TEXT), *heading("", *LOSSES.values())]
    for side in sides(record):
        runs = [run["losses"] for run in record["runs"] if run["side"] == side and "losses" in run]
        if runs and side in ("published", "ours", "longer"):  # the others minimise other sums
            cells = [_spread([losses[name] for losses in runs], "{:.3f}") for name in LOSSES]
            lines.append(f"| {NAMES[side]} | {' | '.join(cells)} |")
    return lines
