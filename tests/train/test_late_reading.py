"""The loop as on a GPU, which reads a step's numbers late: by stand-ins for the device's clock and for other ranks."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_support import make_run, small_config

from pera_fast.train import loop
from pera_fast.train.distributed import World
from pera_fast.train.signals import STOPPING, StopRequest
from pera_fast.train.step import LOSSES, LaunchedStep

STEP_SECONDS, SAVE_SECONDS = 1.0, 100.0


class Device:
    """A rank of a run on a device whose clock stands still but for steps and checkpoints.

    Args:
        rank, size: of the run.
        due: steps after which rank 0's clock wants a checkpoint.
        stop_in: the step in which all ranks agree that SIGTERM came to one of them.
        nonfinite: steps whose loss is not finite.

    Attributes:
        launched: steps that this rank launched.
        saved: steps of its checkpoints.
        rows: its metrics.
    """

    def __init__(
        self, out: Path, patch: pytest.MonkeyPatch, *settings: str, rank: int = 0, size: int = 1,
        due: tuple[int, ...] = (), stop_in: int | None = None, nonfinite: tuple[int, ...] = (),
    ):  # fmt: skip
        self.now, self.stop_in, self.nonfinite = 0.0, stop_in, nonfinite
        self.launched: list[int] = []
        self.saved: list[int] = []
        self.rows: list[dict[str, Any]] = []
        cfg = small_config("train.steps=8", "train.checkpoint_every=100", "train.loggers=[]", *settings)
        self.run: Any = make_run(cfg, out)
        self.run.update, self.run.world = object(), World(rank, size, torch.device("cpu"))
        clock = SimpleNamespace(is_due=lambda: self.run.step in due, restart=lambda: None)
        patch.setattr(loop, "Clock", lambda minutes: clock)
        patch.setattr(loop, "launch_step", self._launch)
        patch.setattr(loop, "_save", self._save)
        patch.setattr(loop.MetricsWriter, "write", lambda _, metrics: self.rows.append(dict(metrics)))

    def _event(self) -> Any:
        time = self.now
        return SimpleNamespace(
            time=time, synchronize=lambda: None, elapsed_time=lambda other: 1000 * (other.time - time)
        )

    def _launch(self, model: Any, pera: Any, optimizer: Any, scaler: Any, batches: Any, *_: Any) -> LaunchedStep:
        next(batches)
        number = self.run.step + 1
        self.launched.append(number)
        came = [float(number == self.stop_in and one == signal.SIGTERM) for one in STOPPING]
        losses = [float("nan") if number in self.nonfinite else 1.0] * len(LOSSES)
        begin = self._event()
        self.now += STEP_SECONDS
        last = [1.0, float(number not in self.nonfinite), 0.0]
        return LaunchedStep(torch.tensor([*losses, *came, *last], dtype=torch.float64), begin, self._event())

    def _save(self, run: Any, must: bool) -> None:
        if run.world.main:
            self.saved.append(run.step)
            self.now += SAVE_SECONDS

    def fit(self) -> int:
        """The exit code."""
        return loop.fit(self.run, StopRequest())[0]


def test_a_checkpoint_is_no_time_of_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path, monkeypatch, "train.checkpoint_every=3", due=(5,))
    assert device.fit() == 0
    assert device.saved == [3, 5, 6, 8]
    assert [row["step"] for row in device.rows] == list(range(1, 9))
    assert [row["seconds"] for row in device.rows] == [STEP_SECONDS] * 8
    assert [row["data_wait"] for row in device.rows] == [0.0] * 8
