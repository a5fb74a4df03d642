"""Scene classification on frozen features: k nearest neighbours and logistic regression.

Three poolings of the features (cls, mean of the patches, both) by three probes: kNN with 20 neighbours by cosine and
temperature .07, kNN with 5 by Euclidean distance, and logistic regression over 40 values of C. C and the pooling of
each probe are chosen on the validation part; then the probe learns from all labelled samples.
"""

from typing import Any

from torch import Tensor

from pera_fast.eval import kinds, logistic
from pera_fast.eval.probes import FIRST_C, PROBES, Tried, attempt
from pera_fast.eval.scores import resamples
from pera_fast.eval.task import Options, Parts, Probe, Rows, TaskResult
from pera_fast.features.extract import Extractor, pool


def begin(parts: Parts, extractor: Extractor, options: Options) -> Probe:
    """Extract features of all scenes, once for every pooling, probe and share of the labels."""
    files = [paths[0] for paths in (*parts.labelled.images, *parts.test.images)]
    found = extractor.pooled(files, "features", options.progress)
    features = {name: pool(found, name).to(options.device) for name in options.poolings}
    kind = kinds.kind_of(parts.labelled)
    return lambda share: _result(parts, features, kind, share, options)


def _result(parts: Parts, features: dict[str, Tensor], kind: kinds.Kind, share: float, options: Options) -> TaskResult:
    from pera_fast.eval import scene_report

    rows = parts.rows(share)
    labelled, truth = kind.targets(parts.labelled), kind.targets(parts.test)
    tried = {
        (probe, pooling): attempt(probe, found, labelled, rows, len(labelled), kind)
        for pooling, found in features.items()
        for probe in PROBES
    }
    counts = resamples(len(truth), options.seed)
    measured = {key: kind.measure(truth, one.scores, one.threshold, counts) for key, one in tried.items()}
    # The first of equals is kept: a tie says that the shorter features are enough.
    chosen = {probe: max(features, key=lambda name, probe=probe: tried[probe, name].val) for probe in PROBES}
    metrics, intervals = {}, {}
    for probe, pooling in chosen.items():
        for name, (value, bounds) in measured[probe, pooling].items():
            key = name if probe == "linear" else f"{probe}_{name}"
            metrics[key], intervals[key] = value, bounds
    columns = (*measured["linear", chosen["linear"]], f"knn20_{kind.headline}", f"knn5_{kind.headline}")
    for (probe, pooling), found in measured.items():
        for name, (value, bounds) in found.items():
            metrics[f"{probe}.{pooling}.{name}"], intervals[f"{probe}.{pooling}.{name}"] = value, bounds
    best = tried["linear", chosen["linear"]]
    return TaskResult(
        kind.headline,
        metrics,
        columns,
        intervals,
        scene_report.sections(kind, truth, tried, measured, chosen),
        _notes(parts, rows, tried, kind),
        _details(kind, truth, best, tried, chosen),
    )


def _notes(parts: Parts, rows: Rows, tried: dict[tuple[str, str], Tried], kind: kinds.Kind) -> list[str]:
    notes = []
    if not len(rows.val):
        notes.append(
            f"no validation sample is left of {len(rows.fit)}: C is {FIRST_C:g}, and the first pooling is taken"
        )
    edges = (float(logistic.STRENGTHS[0]), float(logistic.STRENGTHS[-1]))
    for (probe, pooling), one in tried.items():
        if one.strength in edges:
            notes.append(f"C of logistic regression on {pooling} is {one.strength:g}, at the end of its range")
        if not one.converged:
            notes.append(f"{PROBES[probe]} on {pooling}: a search for the minimum stopped at its most iterations")
    learned = {label for row in rows.all for label in parts.labelled.labels[row]}
    tested = {label for labels in parts.test.labels for label in labels}
    for lacking, where in ((tested - learned, "labelled"), (set(range(len(kind.classes))) - tested, "test")):
        if lacking:
            names = ", ".join(kind.classes[label] for label in sorted(lacking)[:3])
            notes.append(f"{len(lacking)} class(es) without a {where} sample: {names}")
    return notes


def _details(
    kind: kinds.Kind, truth: Tensor, best: Tried, tried: dict[tuple[str, str], Tried], chosen: dict[str, str]
) -> dict[str, Any]:
    details: dict[str, Any] = {
        "pooling": chosen,
        "C": {pooling: one.strength for (probe, pooling), one in tried.items() if probe == "linear"},
    }
    if isinstance(kind, kinds.OneLabel):
        details["confusion"] = kinds.confusion(truth, best.scores, kind.classes).tolist()
    return details
