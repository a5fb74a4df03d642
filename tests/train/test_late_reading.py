"""The loop as on a GPU, which reads a step's numbers late: by stand-ins for the device's clock and for other ranks."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_support import make_run, small_config

from pera_fast.errors import UserError
from pera_fast.storage import MachineError
from pera_fast.train import loop
from pera_fast.train.distributed import World
from pera_fast.train.signals import STOPPING, StopRequest
from pera_fast.train.step import LOSSES, LaunchedStep

STEP_SECONDS, SAVE_SECONDS = 1.0, 100.0


class Device:
    """A rank of a run on a device whose clock stands still but for steps and checkpoints.

    Args:
        rank, size: of the run.
        settings: beside those of ``small_config``.
        due: steps after which the clock wants a checkpoint.
        probed: step after which rank 0 probes.
        stop_in: the step in which all ranks agree that SIGTERM came to one of them.
        nonfinite: steps whose loss is not finite.

    Attributes:
        launched: steps that this rank launched.
        saved: steps of its checkpoints.
        rows: its metrics.
    """

    def __init__(
        self, out: Path, patch: pytest.MonkeyPatch, settings: tuple[str, ...] = (), *, rank: int = 0, size: int = 1,
        due: tuple[int, ...] = (), probed: int | None = None, stop_in: int | None = None,
        nonfinite: tuple[int, ...] = (),
    ):  # fmt: skip
        self.now, self.stop_in, self.nonfinite = 0.0, stop_in, nonfinite
        self.launched: list[int] = []
        self.saved: list[int] = []
        self.rows: list[dict[str, Any]] = []
        cfg = small_config("train.steps=8", "train.checkpoint_every=100", "train.loggers=[]", *settings)
        self.run: Any = make_run(cfg, out)
        self.run.update, self.run.world = object(), World(rank, size, torch.device("cpu"))
        if probed is not None and rank == 0:
            self.run.probe = SimpleNamespace(
                is_due=lambda step: step == probed, run=lambda step: 0.5, begin=lambda: None
            )
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
    device = Device(tmp_path, monkeypatch, ("train.checkpoint_every=3",), due=(5,))
    assert device.fit() == 0
    assert device.saved == [3, 5, 6, 8]
    assert [row["step"] for row in device.rows] == list(range(1, 9))
    assert [row["seconds"] for row in device.rows] == [STEP_SECONDS] * 8
    assert [row["data_wait"] for row in device.rows] == [0.0] * 8


def ranks(out: Path, patch: pytest.MonkeyPatch, **told: Any) -> tuple[Device, Device, list[int | str]]:
    """Ranks 0 and 1 of a run, one after the other, and how each ended: its exit code or its error."""
    found: list[Device] = []
    ends: list[int | str] = []
    for rank in range(2):
        with patch.context() as own:
            device = Device(out / str(rank), own, rank=rank, size=2, **told)
            try:
                ends.append(device.fit())
            except UserError as error:
                ends.append(str(error))
            found.append(device)
    return found[0], found[1], ends


@pytest.mark.parametrize("due", range(9))
def test_ranks_stop_after_the_same_step_when_rank_0_reads_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: int
) -> None:
    """By its clock's checkpoint: a rank that goes on alone waits for the others for ever."""
    main, other, ends = ranks(tmp_path, monkeypatch, due=(due,), stop_in=4)
    assert ends == [143, 143]
    assert main.launched == other.launched == [1, 2, 3, 4, 5]
    assert main.saved == ([due] if due in (1, 2, 3, 4) else []) + [5]
    assert [row["step"] for row in main.rows] == main.launched


@pytest.mark.parametrize("probed", [4, 5])
def test_ranks_stop_after_the_same_step_when_rank_0_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: int
) -> None:
    main, other, ends = ranks(tmp_path, monkeypatch, probed=probed, stop_in=4)
    assert ends == [143, 143]
    assert main.launched == other.launched == [1, 2, 3, 4, 5]


def test_one_process_stops_after_the_step_in_which_the_signal_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although that step had asked for signals before, and is read late otherwise."""
    device, stop = Device(tmp_path, monkeypatch), StopRequest()
    monkeypatch.setattr(device, "_event", lambda event=device._event: came(event()))

    def came(event: Any) -> Any:
        if device.launched[-1] == 3:
            stop.signal = signal.SIGTERM
        return event

    assert loop.fit(device.run, stop)[0] == 143
    assert device.launched == [row["step"] for row in device.rows] == [1, 2, 3]
    assert device.saved == [3]


def test_ranks_stop_at_once_where_all_read_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other, ends = ranks(tmp_path, monkeypatch, settings=("train.checkpoint_every=4",), stop_in=4)
    assert ends == [143, 143]
    assert main.launched == other.launched == [1, 2, 3, 4]


@pytest.mark.parametrize("due", [3, 4, 5])
def test_ranks_fail_after_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: int) -> None:
    """And no checkpoint is written of a run that has failed."""
    settings = ("train.max_nonfinite=2",)
    main, other, (one, two) = ranks(tmp_path, monkeypatch, settings=settings, due=(due,), nonfinite=(3, 4))
    assert one == two
    assert "step 4: loss" in str(one)
    assert main.launched == other.launched == [1, 2, 3, 4, 5]
    assert main.saved == [3] * (due == 3)


class Broken:
    """A loader that gives so many batches and then fails."""

    def __init__(self, batches: Any, good: int, error: Exception):
        self._batches, self._left, self._error = batches, good, error
        self.wait_seconds, self.steps_per_epoch = 0.0, batches.steps_per_epoch

    def __next__(self) -> Any:
        if not self._left:
            raise self._error
        self._left -= 1
        return next(self._batches)


ERRORS = [RuntimeError("DALI failed"), UserError("no image is left"), MachineError("the storage is away")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_loader_that_fails_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    device = Device(tmp_path, monkeypatch, nonfinite=(3,))
    device.run.batches = Broken(device.run.batches, 3, error)
    with pytest.raises(type(error), match=str(error)):
        device.fit()
    assert [row["step"] for row in device.rows] == device.launched == [1, 2, 3]
    assert device.run.nonfinite == {"total": 1, "row": 1}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_last_step_before_a_loader_fails_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It was one step too many that was not finite: that is what ends the run."""
    device = Device(tmp_path, monkeypatch, ("train.max_nonfinite=2",), nonfinite=(2, 3))
    device.run.batches = Broken(device.run.batches, 3, error)
    with pytest.raises(UserError, match=r"step 3: .* not finite in 2 steps in a row"):
        device.fit()
    assert device.saved == []


def test_a_stop_that_was_agreed_before_the_loader_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path, monkeypatch, size=2, stop_in=3)
    device.run.batches = Broken(device.run.batches, 3, MachineError("the storage is away"))
    assert device.fit() == 143
    assert device.saved == [3]
