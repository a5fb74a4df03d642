"""Pictures of the report, as PNG: masks, losses, kNN, PCA maps."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from pera_fast.demo.found import METRICS, SUBJECTS, Compared
from pera_fast.model.inputs import GroupInputs, StepInputs
from pera_fast.model.pera import PerA
from pera_fast.page import png
from pera_fast.show.panels import HIDDEN, PREDICTED, STUDENT, TEACHER, colored_view, keep_only, unpatch

LINE = "#1c2733"
LOSSES = {
    "loss": "total",
    "global_cls_loss": "distillation, global crops",
    "local_cls_loss": "distillation, local crops",
    "koleo_loss": "KoLeo",
    "pixel_loss": "pixel / 100",
}


def _mark(axes: plt.Axes, index: np.ndarray, patch: int, grid: int, color: str, fill: bool = True) -> None:
    for number in index:
        y, x = divmod(int(number), grid)
        corner = (x * patch - 0.5, y * patch - 0.5)
        axes.add_patch(
            plt.Rectangle(corner, patch, patch, facecolor=color if fill else "none", edgecolor=color, linewidth=0.8)
        )


@torch.no_grad()
def _predictions(model: PerA, inputs: StepInputs) -> np.ndarray:
    """The student's view with its predicted pixels in place of the predicted patches: [N, H, W, 3] in [0, 1]."""
    caught: list[Tensor] = []
    hook = model.pred_head.register_forward_hook(lambda _module, _args, out: caught.append(out))
    try:
        model.student_rows(inputs)
    finally:
        hook.remove()
    group, patch = inputs.global_, model.cfg.model.patch_size
    n, size, _, channels = group.crops.shape
    grid = size // patch
    pixels = caught[0].float().view(n, -1, patch, patch, channels)
    pixels = pixels * torch.tensor(model.cfg.views.std) + torch.tensor(model.cfg.views.mean)
    shown = torch.full((n, grid * grid, patch, patch, channels), HIDDEN)
    whole = torch.from_numpy(colored_view(group, "student", patch))
    whole = whole.view(n, grid, patch, grid, patch, channels).transpose(2, 3).reshape_as(shown)
    rows = torch.arange(n)[:, None]
    shown[rows, group.student_index.long()] = whole[rows, group.student_index.long()]
    shown[rows, group.predicted_index.long()] = pixels
    return unpatch(shown, grid).clamp(0, 1).numpy()


def pairs(model: PerA, inputs: StepInputs, images: int) -> bytes:
    """Student and teacher views of the same crops through their disjoint masks.

    The same picture with more words: docs/method.md section 1.

    Args:
        model: the trained model, for what it predicts.
        inputs: a batch as the trainer gets it.
        images: rows of the picture, at most the batch size; each row shows a global and a local crop of one image.
    """
    patch, batch = model.cfg.model.patch_size, inputs.global_.crops.shape[0] // model.cfg.views.num_global
    images = min(images, batch)
    locals_ = inputs.local if inputs.local.crops.shape[0] else None
    predicted = _predictions(model, inputs)
    titles = ["global crop", "student sees", "teacher sees", "who sees what", "student predicts"]
    titles += ["local crop", "student sees", "teacher sees"] if locals_ else []
    figure, grid_axes = plt.subplots(images, len(titles), figsize=(1.75 * len(titles), 1.85 * images), squeeze=False)
    for axes, title in zip(grid_axes[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    views = {who: colored_view(inputs.global_, who, patch) for who in ("student", "teacher")}
    small = {who: colored_view(locals_, who, patch) for who in ("student", "teacher")} if locals_ else {}
    for i, row in enumerate(grid_axes):
        _draw_global(row[:5], inputs.global_, views, predicted, i, patch)
        if locals_:
            _draw_seen(row[5:], locals_, small, i, patch)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    figure.tight_layout(pad=0.4)
    return png(figure)


def _draw_seen(row: Sequence[plt.Axes], group: GroupInputs, views: dict[str, np.ndarray], i: int, patch: int) -> None:
    row[0].imshow(_unit(group.crops[i]))
    row[1].imshow(keep_only(views["student"][i], group.student_index[i].numpy(), patch))
    row[2].imshow(keep_only(views["teacher"][i], group.teacher_index[i].numpy(), patch))


def _draw_global(
    row: Sequence[plt.Axes],
    group: GroupInputs,
    views: dict[str, np.ndarray],
    predicted: np.ndarray,
    i: int,
    patch: int,
) -> None:
    grid = group.crops.shape[1] // patch
    _draw_seen(row, group, views, i, patch)
    _mark(row[1], group.predicted_index[i].numpy(), patch, grid, PREDICTED, fill=False)
    row[3].imshow(np.full_like(views["student"][i], HIDDEN))
    for who, color in (("student", STUDENT), ("predicted", PREDICTED), ("teacher", TEACHER)):
        _mark(row[3], getattr(group, f"{who}_index")[i].numpy(), patch, grid, color)
    row[4].imshow(predicted[i])


def losses(metrics: Sequence[dict]) -> bytes:
    """Loss parts over steps, each on its own axis, with a running mean."""
    figure, all_axes = plt.subplots(1, len(LOSSES), figsize=(2.7 * len(LOSSES), 2.3))
    steps = [m["step"] for m in metrics]
    for axes, (key, title) in zip(all_axes, LOSSES.items(), strict=True):
        values = np.array([m[key] for m in metrics], dtype=float)
        axes.plot(steps, values, color=TEACHER, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(values), color=TEACHER, linewidth=1.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return png(figure)


def running_mean(values: np.ndarray, share: float = 0.08) -> np.ndarray:
    """Mean over a window of a share of the values, shorter at the ends."""
    half = max(int(len(values) * share / 2), 0)
    padded = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)


def task_bars(tasks: Sequence[Compared]) -> bytes:
    """Each task's metric with the random and the pretrained network, and that of an answer that looks at nothing."""
    figure, all_axes = plt.subplots(1, len(tasks), figsize=(3.1 * len(tasks), 2.4), squeeze=False)
    for axes, task in zip(all_axes[0], tasks, strict=True):
        heights = [100 * task.before, 100 * task.after]
        bars = axes.bar(["random", "pretrained"], heights, color=["#b8c4cc", TEACHER], width=0.6)
        axes.bar_label(bars, fmt="%.1f %%", fontsize=9)
        level = None if task.level is None else 100 * task.level
        if level is not None:
            axes.axhline(level, color="white", linewidth=3)  # under the dashes, which then are seen on the bars too
            axes.axhline(level, color=LINE, linewidth=1, linestyle="--")
            words = "chance" if task.task == "scene" else "all changed"
            beside = axes.get_yaxis_transform()
            axes.text(1.02, level, f"{words}\n{level:.1f} %", fontsize=8, color=LINE, va="center", transform=beside)
        axes.set_title(f"{SUBJECTS[task.task]}: {METRICS.get(task.metric, task.metric)}, %", fontsize=9)
        axes.set_ylim(0, max(*heights, level or 0.0, 1.0) * 1.18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    return png(figure)


def pca_maps(images: Tensor, before: Tensor, after: Tensor) -> bytes:
    """The first three principal components of each image's patch features as colours, under the image.

    Args:
        images: uint8 or uint16 [N, H, W, 3].
        before, after: patch features [N, L, D] of the untrained and the pretrained network.
    """
    n = images.shape[0]
    figure, rows = plt.subplots(3, n, figsize=(1.35 * n, 4.2), squeeze=False)
    maps = [_unit(images), _components(before), _components(after)]
    for row, pictures, label in zip(rows, maps, ("image", "untrained", "pretrained"), strict=True):
        row[0].set_ylabel(label, fontsize=9)
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
    figure.tight_layout(pad=0.3)
    return png(figure)


def _unit(pixels: Tensor) -> np.ndarray:
    """uint8 or uint16 to [0, 1]."""
    array = pixels.numpy()
    return array / np.iinfo(array.dtype).max


def _components(features: Tensor) -> np.ndarray:
    """[N, L, D] -> [N, g, g, 3] in [0, 1]: three principal components of each image's own patches, robustly scaled.

    Over the patches of all images they would tell the images apart, and each image would be of one colour.
    """
    n, length, _ = features.shape
    grid = round(length**0.5)
    rows = features.float() - features.float().mean(1, keepdim=True)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)  # [N, min(L, D), D]
    axes = axes[:, :3]
    largest = axes.gather(2, axes.abs().argmax(2, keepdim=True))
    scores = rows @ (axes * largest.sign()).transpose(1, 2)  # the sign of a component means nothing: fixed
    low, high = scores.quantile(0.02, dim=1, keepdim=True), scores.quantile(0.98, dim=1, keepdim=True)
    return ((scores - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).view(n, grid, grid, 3).numpy()
