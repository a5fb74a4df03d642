"""Tables and the HTML report of an evaluation."""

import html
from collections.abc import Sequence
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pera_fast.eval.run import Entry, Evaluation
from pera_fast.eval.tables import percent, words
from pera_fast.page import Section, grid, png, render

COLOURS = ("#0f766e", "#b45309", "#1d4ed8", "#9d174d", "#4d7c0f", "#6b7280")


def table(found: Evaluation, entries: Sequence[Entry] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table over networks, values in per cent; intervals stand in brackets."""
    entries = found.entries if entries is None else entries
    columns = list(dict.fromkeys(name for entry in entries for name in _columns(entry)))
    header = ["weights", "labels", *(f"{words(name)}, %" for name in columns)]
    rows = [
        [entry.weights, f"{100 * entry.share:g} % ({entry.labelled})", *(_cell(entry, name) for name in columns)]
        for entry in entries
    ]
    return header, rows


def text_table(found: Evaluation) -> str:
    """The table over networks for a terminal."""
    header, rows = table(found)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in [header, *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)


def report_html(found: Evaluation) -> str:
    """The report: table over networks, curve over shares of the labels, then the task's sections for each network."""
    headline = found.entries[0].result.headline
    cards = {
        f"{words(headline)}, {_short(e.weights)}": f"{percent(e.result.metrics[headline])} %" for e in found.largest
    }
    several = len(found.largest) > 1
    sections = [_side_by_side(found)]
    if len({entry.share for entry in found.entries}) > 1:
        sections.append(_over_labels(found, headline))
    for entry in found.largest:
        prefix = f"{_short(entry.weights)}: " if several else ""
        sections += [replace(section, title=f"{prefix}{section.title}") for section in entry.result.sections]
    if found.notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in found.notes)
        sections.append(Section("Notes", f"<ul>{items}</ul>"))
    return render(f"pera-fast eval: {found.task}", _lead(found), cards, sections, _numbers(found))


def _lead(found: Evaluation) -> str:
    told, classes = found.settings, len(found.classes)
    val = f", {told['val']} validation" if told["val"] else " (a fifth of them held out to choose settings)"
    of_classes = f" of {classes} classes" if classes else ""
    if "folds" in told:
        return (
            f"Frozen features on {told['data']}: cross-validation in {told['folds']} folds over"
            f" {len(found.samples)} samples{of_classes}. No weight of the networks was changed."
        )
    return (
        f"Frozen features on {told['data']}: {told['train']} training{val} and {told['test']} test samples{of_classes}."
        f" No weight of the networks was changed."
    )


def _side_by_side(found: Evaluation) -> Section:
    text = "Per cent on the test part; in brackets the 95 % interval over resamples of it, where there is one."
    return Section("Weights side by side", text, table=grid(*table(found)))


def _over_labels(found: Evaluation, headline: str) -> Section:
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    for number, name in enumerate(dict.fromkeys(entry.weights for entry in found.entries)):
        own = sorted((e.labelled, e.result.metrics[headline]) for e in found.entries if e.weights == name)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([n for n, _ in own], [100 * v for _, v in own], marker="o", color=colour, label=_short(name))
    axes.set_xscale("log")
    ticks = sorted({entry.labelled for entry in found.entries})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labelled samples")
    axes.set_ylabel(f"{words(headline)}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    text = "A smaller share's samples are among those of a larger one; the test part is the same."
    return Section("Fewer labels", text, png(figure))


def _numbers(found: Evaluation) -> dict[str, str]:
    rows = {name: str(value) for name, value in found.settings.items() if not isinstance(value, dict)}
    rows["size"] = str(found.settings["size"] or "each network's own")
    rows |= {f"version of {name}": version for name, version in found.settings["versions"].items()}
    for entry in found.entries:
        for name in entry.result.metrics:
            rows[f"{_short(entry.weights)}, {100 * entry.share:g} % of the labels: {words(name)}, %"] = _cell(
                entry, name
            )
        rows[f"{_short(entry.weights)}, {100 * entry.share:g} % of the labels: seconds"] = f"{entry.seconds:.1f}"
    return rows


def _columns(entry: Entry) -> tuple[str, ...]:
    return entry.result.columns or (entry.result.headline,)


def _cell(entry: Entry, name: str) -> str:
    value = entry.result.metrics.get(name)
    if value is None:
        return "-"
    bounds = entry.result.intervals.get(name)
    return percent(value) if bounds is None else f"{percent(value)} ({percent(bounds[0])} to {percent(bounds[1])})"


def _short(name: str, most: int = 40) -> str:
    """The end of a long name of weights, which tells more than its beginning."""
    return name if len(name) <= most else f"...{name[-most:]}"
