"""Results of the demo: probes before and after pretraining, and the verdict."""

from dataclasses import dataclass
from pathlib import Path

from pera_fast.features.samples import Samples


@dataclass(frozen=True)
class Probe:
    """kNN accuracy on held-out images, or why there is none.

    Attributes:
        before, after: share right with the untrained and the pretrained network; None without labels.
        chance: one over the number of classes.
        note: what was compared, or why nothing was.
    """

    before: float | None
    after: float | None
    chance: float
    note: str


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Attributes:
        report: the HTML file.
        first_loss, last_loss: means of the total loss over the first five steps and the last tenth of all.
        probe: kNN before and after.
        seconds: of the whole demo.
    """

    report: Path
    first_loss: float
    last_loss: float
    probe: Probe
    seconds: float


@dataclass(frozen=True)
class Images:
    """Images to pretrain on, and images to probe with.

    Attributes:
        folder: images to pretrain on.
        train, test: labelled images for the probe; None without labels.
        note: what they are, in words.
    """

    folder: Path
    train: Samples | None
    test: Samples | None
    note: str


def verdict(found: DemoResult) -> str:
    """One sentence that says plainly what happened."""
    loss = "fell" if found.last_loss < found.first_loss else "did not fall"
    text = f"The loss {loss} ({found.first_loss:.2f} to {found.last_loss:.2f})"
    probe = found.probe
    if probe.before is None or probe.after is None:
        return f"{text}; kNN was skipped: {probe.note}."
    rose = "rose" if probe.after > probe.before else "did not rise"
    return f"{text}; kNN accuracy on held-out images {rose} ({probe.before:.1%} to {probe.after:.1%})."
