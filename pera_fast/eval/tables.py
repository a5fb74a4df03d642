"""Words and numbers of an evaluation's tables."""

import re


def percent(value: float) -> str:
    """A share as per cent with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def words(metric: str) -> str:
    """The name of a metric as a reader says it: `macro_f1` -> `macro F1`."""
    text = metric.replace("mean_average_precision", "mAP").replace("_", " ").replace(".", ", ").replace("knn", "kNN k=")
    return re.sub(r"\bf1\b", "F1", re.sub(r"\b(m?)iou\b", r"\1IoU", text))
