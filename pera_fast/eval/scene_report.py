"""Sections of the report on scenes: all probes, confusion matrix or average precision by class, frequent mistakes."""

import html
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from pera_fast.eval import kinds
from pera_fast.eval.probes import PROBES, Tried
from pera_fast.eval.tables import percent, words
from pera_fast.page import Section, grid, png

_NAMED, _COUNTED = 60, 30  # classes up to which a matrix has names, and numbers in its cells
_MISTAKES = 10
_BARS = 80  # classes of which average precision is drawn


def sections(
    kind: kinds.Kind,
    truth: Tensor,
    tried: Mapping[tuple[str, str], Tried],
    measured: Mapping[tuple[str, str], kinds.Measured],
    chosen: Mapping[str, str],
) -> list[Section]:
    """The report's sections on one network.

    Args:
        kind: of the labels.
        truth: targets of the test samples.
        tried, measured: of each probe and pooling.
        chosen: pooling of each probe.
    """
    pooling = chosen["linear"]
    best = tried["linear", pooling]
    found = [_all_probes(tried, measured, chosen)]
    name = f"logistic regression on {_features(pooling)}"
    if isinstance(kind, kinds.OneLabel):
        table = kinds.confusion(truth, best.scores, kind.classes)
        found += [_confusion(table, kind.classes, name), *_mistakes(table, kind.classes)]
    else:
        found.append(_by_class(kinds.average_precisions(truth, best.scores), truth, kind.classes, name))
    return found


def _features(pooling: str) -> str:
    return {"cls": "cls", "mean": "the mean of the patches", "both": "cls and the mean of the patches"}[pooling]


def _all_probes(
    tried: Mapping[tuple[str, str], Tried],
    measured: Mapping[tuple[str, str], kinds.Measured],
    chosen: Mapping[str, str],
) -> Section:
    names = list(next(iter(measured.values())))
    rows = []
    for (probe, pooling), found in measured.items():
        one = tried[probe, pooling]
        mark = " (chosen)" if chosen[probe] == pooling else ""
        cells = [f"{percent(value)} ({percent(low)} to {percent(high)})" for value, (low, high) in found.values()]
        strength = "" if one.strength is None else f"{one.strength:.2g}"
        rows.append([f"{PROBES[probe]} on {pooling}{mark}", *cells, percent(one.val), strength])
    order = {name: number for number, name in enumerate(PROBES.values())}
    rows.sort(key=lambda row: order[row[0].split(" on ")[0]])
    header = ["probe", *(f"{words(name)}, %" for name in names), "on validation, %", "C"]
    text = (
        "Each probe on each pooling of the features. The value on the validation part chooses C and the pooling; the"
        " other columns are of the test part, with the 95 % interval over 200 resamples of it."
    )
    return Section("Probes", text, table=grid(header, rows))


def _confusion(table: np.ndarray, classes: Sequence[str], probe: str) -> Section:
    count = len(classes)
    known = table.sum(1, keepdims=True)
    shares = table / np.maximum(known, 1)
    side = min(max(3.2, 0.36 * count + 1.6), 12)
    figure, axes = plt.subplots(figsize=(side, side))
    axes.imshow(shares, cmap="BuGn", vmin=0, vmax=1)
    if count <= _NAMED:
        small = 8 if count <= _COUNTED else 6
        axes.set_xticks(range(count), classes, rotation=90, fontsize=small)
        axes.set_yticks(range(count), classes, fontsize=small)
    if count <= _COUNTED:
        for row, column in zip(*np.nonzero(table), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "#1c2733"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.spines[:].set_visible(False)
    text = f"Test samples of each true class (rows) by predicted class (columns), by {probe}."
    caption = "The darker a cell, the larger its share of its row; a perfect classifier fills the diagonal alone."
    return Section("Confusion matrix", text, png(figure), caption)


def _mistakes(table: np.ndarray, classes: Sequence[str]) -> list[Section]:
    wrong = table * (1 - np.eye(len(classes), dtype=table.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MISTAKES]
    pairs = [divmod(int(at), len(classes)) for at in order if wrong.flat[at] > 0]
    if not pairs:
        return []
    rows = [
        [classes[true], classes[said], str(table[true, said]), percent(table[true, said] / table[true].sum())]
        for true, said in pairs
    ]
    header = ["true class", "predicted", "samples", "of the class, %"]
    return [Section("Most frequent mistakes", "The largest cells off the diagonal.", table=grid(header, rows))]


def _by_class(found: np.ndarray, truth: Tensor, classes: Sequence[str], probe: str) -> Section:
    order = [row for row in np.argsort(np.nan_to_num(found, nan=-1.0)) if not np.isnan(found[row])]
    shown = order[:_BARS]
    share = truth.mean(0).numpy()
    figure, axes = plt.subplots(figsize=(6.4, 0.24 * len(shown) + 1))
    axes.barh(range(len(shown)), [100 * found[row] for row in shown], color="#0f766e", height=0.7)
    axes.plot([100 * share[row] for row in shown], range(len(shown)), "|", color="#f59e0b", markersize=9, mew=2)
    axes.set_yticks(range(len(shown)), [str(classes[row]) for row in shown], fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("average precision, %")
    axes.spines[["top", "right"]].set_visible(False)
    less = f" The {len(shown)} worst of {len(order)} classes." if len(shown) < len(order) else ""
    text = html.escape(f"Average precision of each class on the test part, by {probe}.{less}")
    caption = "The mark is the share of the samples that have the class, which is what chance gives."
    return Section("Classes", text, png(figure), caption)
