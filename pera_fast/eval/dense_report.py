"""Sections of the report on masks: scores of each class, and pictures of image, truth and prediction."""

from collections.abc import Mapping

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import color_sequences
from matplotlib.patches import Patch

from pera_fast.eval import pixels
from pera_fast.eval.dense import Dense
from pera_fast.eval.tables import percent
from pera_fast.features.masks import IGNORED
from pera_fast.page import Section, grid, png

_SIDE = 384  # pixels of a picture, at most
_IGNORED_GRAY = 128
_LEGEND = 20  # classes up to which a picture has a legend


def by_class(table: np.ndarray, classes: tuple[str, ...]) -> Section:
    """IoU, F1 and share of the pixels of each class.

    Args:
        table: int [K, K], pixels by true and predicted class.
        classes: their names.
    """
    iou, f1, known, said = pixels.ious(table), pixels.f1s(table), table.sum(1), table.sum(0)
    total = max(table.sum(), 1)
    rows = [
        [
            name,
            _percent(iou[number]),
            _percent(f1[number]),
            percent(known[number] / total),
            percent(said[number] / total),
        ]
        for number, name in enumerate(classes)
    ]
    header = ["class", "IoU, %", "F1, %", "of the pixels, %", "predicted, %"]
    text = "From one confusion matrix over all test pixels that have a label. A dash: neither in truth nor predicted."
    return Section("Classes", text, table=grid(header, rows))


def pictures(dense: Dense, masks: Mapping[int, np.ndarray]) -> Section:
    """Images, truth and prediction of some test samples.

    Args:
        dense: the samples.
        masks: predicted class numbers [H, W] by sample.
    """
    colours = class_colours(len(dense.classes))
    names = ("image",) if dense.pieces.samples.task == "segmentation" else ("before", "after")
    titles = [*names, "truth", "prediction"]
    figure, axes = plt.subplots(
        len(masks), len(titles), figsize=(2.5 * len(titles), 2.5 * len(masks)), squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for line, (row, predicted) in zip(axes, masks.items(), strict=True):
        images = dense.pieces.images(row)
        truth = dense.pieces.masks.read(dense.pieces.samples.masks[row])
        step = max(-(-max(truth.shape) // _SIDE), 1)
        shown = [picture(pixels_[::step, ::step], dense.rgb) for pixels_ in images]
        shown += [colours[mask[::step, ::step]] for mask in (truth, predicted)]
        for axis, array in zip(line, shown, strict=True):
            axis.imshow(array, interpolation="nearest")
            axis.set_axis_off()
    if len(dense.classes) <= _LEGEND:
        patches = [Patch(color=colours[n] / 255, label=name) for n, name in enumerate(dense.classes)]
        patches.append(Patch(color=colours[IGNORED] / 255, label="ignored"))
        figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return Section("Predictions", "Test samples; none of them was learned from.", png(figure))


def picture(image: np.ndarray, rgb: list[int] | None) -> np.ndarray:
    """An image as uint8 [H, W, 3] to look at; more than 8 bits, or other bands than colours, are stretched.

    Args:
        image: uint8 or uint16 [H, W, C].
        rgb: numbers of the red, green and blue channel; None: the first three of three or more, else the first.
    """
    channels = rgb or ([0, 1, 2] if image.shape[2] >= 3 else [0, 0, 0])
    shown = image[..., channels]
    if shown.dtype == np.uint8 and image.shape[2] in (1, 3):
        return shown
    low, high = np.percentile(shown, [2, 98], axis=(0, 1))
    return ((shown - low) / np.maximum(high - low, 1) * 255).clip(0, 255).astype(np.uint8)


def class_colours(count: int) -> np.ndarray:
    """uint8 [K + 1, 3]: a colour for each class; the last, which is number -1, is the gray of ignored pixels."""
    listed = [*color_sequences["tab10"][:7], *color_sequences["tab10"][8:], *color_sequences["tab20b"]]
    if count > len(listed):
        listed = list(plt.get_cmap("hsv")(np.linspace(0, 1, count, endpoint=False))[:, :3])
    colours = [np.round(255 * np.array(colour)) for colour in listed[:count]]
    return np.array([*colours, [_IGNORED_GRAY] * 3], np.uint8)


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else percent(value)
