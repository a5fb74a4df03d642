"""Results of the demo: evaluations of the random and the pretrained network, and the verdict."""

from dataclasses import dataclass
from pathlib import Path

from pera_fast.features.samples import Samples

SUBJECTS = {"scene": "scenes", "segmentation": "roads", "change": "changes"}
METRICS = {"accuracy": "accuracy", "map": "mean average precision", "miou": "mIoU", "changed_f1": "F1"}


@dataclass(frozen=True)
class Compared:
    """A task's headline metric on frozen features of the random and of the pretrained network.

    Attributes:
        task: scene, segmentation or change.
        metric: name of the metric, of `METRICS`.
        before, after: its value with random and with pretrained weights, in [0, 1].
        level: value of an answer that looks at no image: one class at random, or every pixel changed. None: not known.
        report: HTML file of the evaluation.
    """

    task: str
    metric: str
    before: float
    after: float
    level: float | None
    report: Path

    def __str__(self) -> str:
        rose = "rose" if self.after > self.before else "did not rise"
        name = METRICS.get(self.metric, self.metric)
        return f"{name} of {SUBJECTS[self.task]} {rose} ({self.before:.1%} to {self.after:.1%})"


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        report: the HTML file.
        first_loss, last_loss: means of the total loss over the first five steps and the last tenth of all.
        compared: the random against the pretrained network, a task each.
        note: what the tasks' images are, or why one was left out.
        seconds: of the whole demo.
    """

    report: Path
    first_loss: float
    last_loss: float
    compared: tuple[Compared, ...]
    note: str
    seconds: float


@dataclass(frozen=True)
class Images:
    """Images to pretrain on, and labelled samples to evaluate with.

    Attributes:
        folder: images to pretrain on.
        samples: of each task, with splits; no scenes where the images have no labels.
        note: what they are, in words.
    """

    folder: Path
    samples: dict[str, Samples]
    note: str


def verdict(found: DemoResult) -> str:
    """One or two sentences that say plainly what happened."""
    loss = "fell" if found.last_loss < found.first_loss else "did not fall"
    text = f"The loss {loss} ({found.first_loss:.2f} to {found.last_loss:.2f})."
    if not found.compared:
        return text
    return f"{text} With frozen features, random against pretrained: {', '.join(map(str, found.compared))}."
