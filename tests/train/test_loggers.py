"""Loggers: what they get, that none of them can end or change a run, and that a resumed run goes on in its curves."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from train_support import make_run, small_config

from pera_fast.errors import UserError
from pera_fast.train import loggers
from pera_fast.train.loggers import background, check_loggers, to_mlflow, to_wandb
from pera_fast.train.loggers.background import Background, finish
from pera_fast.train.loggers.base import About, Ending
from pera_fast.train.loop import fit
from pera_fast.train.metrics import MetricsWriter
from pera_fast.train.signals import StopRequest

SETTINGS = {"recipe": "tiny", "train.steps": 6, "optim.lr": 0.01, "optim.betas": [0.9, 0.999]}
STEPS = [{"step": 1, "loss": 2.0, "mfu": None}, {"step": 2, "loss": None, "nonfinite": ["loss"], "lr": 0.5}]


@pytest.fixture(autouse=True)
def no_variables_of_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that the loggers read, and those that they set, are as they were afterwards."""
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "WARNING")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that deliver at once."""
    monkeypatch.setattr(background, "PAUSE_SECONDS", 0.001)


class Kept:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.ended: tuple[Ending, Mapping[str, Any]] | None = None

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows += rows

    def finish(self, ending: Ending, final: Mapping[str, Any]) -> None:
        self.ended = ending, final


def write(out: Path, names: Sequence[str], rows: Sequence[dict[str, Any]] = STEPS, **changes: Any) -> None:
    """All of a process: rows are logged, and the writer is closed."""
    out.mkdir(exist_ok=True)
    writer = MetricsWriter(out / "metrics.jsonl", changes.get("done", 0), names, changes.get("settings", SETTINGS))
    for row in rows:
        writer.write(row)
    writer.close(changes.get("ending", "finished"))


# The run


def trained(out: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    run = make_run(small_config("train.steps=3", *overrides), out)
    assert fit(run, StopRequest())[0] == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "images_per_s", "data_wait", "mem")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows], run.pera.state_dict()


@pytest.mark.usefixtures("quick")
def test_training_is_the_same_with_and_without_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    kept = Kept()
    monkeypatch.setitem(loggers._START, "wandb", lambda about: kept)
    monkeypatch.setitem(loggers._START, "mlflow", lambda about: 1 / 0)
    rows, weights = trained(tmp_path / "none", "train.loggers=[]")
    logged, same = trained(tmp_path / "three", "train.loggers=[tensorboard,wandb,mlflow]")
    assert logged == rows
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert list((tmp_path / "three").glob("events.out.tfevents.*"))
    assert not list((tmp_path / "none").glob("events.out.tfevents.*"))
    assert [row["step"] for row in kept.rows] == [1, 2, 3]
    assert kept.ended is not None
    assert (kept.ended[0], kept.ended[1]["step"], kept.ended[1]["loss"]) == ("finished", 3, rows[-1]["loss"])
    assert caplog.text.count("mlflow: failed, training goes on without it: ZeroDivisionError") == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ending", ["stopped", "failed"])
def test_loggers_hear_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str):
    kept = Kept()
    monkeypatch.setitem(loggers._START, "wandb", lambda about: kept)
    run = make_run(small_config("train.loggers=[wandb]"), tmp_path)
    if ending == "stopped":
        with StopRequest() as stop:
            run.begin = lambda: os.kill(os.getpid(), signal.SIGTERM)  # in the first step
            assert fit(run, stop)[0] == 143
    else:
        batches = iter([next(run.batches)])
        monkeypatch.setattr(type(run.batches), "__next__", lambda self: next(batches))
        with pytest.raises((StopIteration, RuntimeError)):
            fit(run, StopRequest())
    assert kept.ended is not None
    assert kept.ended[0] == ending
    assert [row["step"] for row in kept.rows] == [1]


def test_other_ranks_start_no_logger(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(loggers._START, "wandb", lambda about: pytest.fail("started"))
    writer = MetricsWriter(None, 0, ["wandb"], SETTINGS)
    writer.write(STEPS[0])
    writer.close()


# The thread


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("when", ["start", "log", "finish"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SystemExit(1), ImportError("broken\npackage")]
)
def test_logger_that_fails_is_one_warning(when: str, error: BaseException, caplog):
    def fail(*_: object) -> Any:
        raise error

    logger = SimpleNamespace(**{name: lambda *_: None for name in ("log", "finish")})
    setattr(logger, when, fail)
    one = Background("wandb", fail if when == "start" else lambda about: logger, About(Path()))
    for _ in range(3):
        one.log(STEPS[0])
        time.sleep(0.01)
    finish([one], "finished", {})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("wandb: failed, training goes on without it: ")
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("when", ["start", "log", "finish"])
def test_logger_that_hangs_is_left_behind(when: str, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(background, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(background, "PATIENCE", {"stopped": 0.1})
    release = threading.Event()

    def hang(*_: object) -> Any:
        release.wait(30)
        return Kept()

    logger = Kept()
    if when != "start":
        setattr(logger, when, hang)
    one = Background("wandb", hang if when == "start" else lambda about: logger, About(Path()))
    began = time.monotonic()
    one.log(STEPS[0])
    finish([one], "stopped", {})
    assert time.monotonic() - began < 5
    release.set()
    assert "wandb: does not answer" in caplog.text


@pytest.mark.usefixtures("quick")
def test_slow_logger_drops_steps_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(background, "MOST_ROWS", 2)
    release, kept = threading.Event(), Kept()

    def start(about: About) -> Kept:
        release.wait(30)
        return kept

    one = Background("mlflow", start, About(Path()))
    for step in range(5):
        one.log({"step": step})
    release.set()
    finish([one], "finished", {})
    assert [row["step"] for row in kept.rows] == [0, 1]
    assert "mlflow: was too slow; 3 steps are in metrics.jsonl only" in caplog.text


def test_machine_that_starts_no_thread(monkeypatch: pytest.MonkeyPatch, caplog):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    one = Background("wandb", lambda about: Kept(), About(Path()))
    one.log(STEPS[0])
    finish([one], "finished", {})
    assert caplog.text.count("can't start new thread") == 1


def test_missing_package_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(loggers.sys.modules, "wandb", None)
    monkeypatch.delitem(loggers.sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(loggers.sys, "path", [str(tmp_path)])
    (tmp_path / "mlflow").mkdir()  # such as MLflow's own files in the folder where one works: no package
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError) as caught:
            check_loggers(["tensorboard", name])
        assert str(caught.value) == (
            f"train.loggers=[tensorboard,{name}]: {name} is not installed: pip install 'pera-fast[{name}]', or leave"
            f" {name} out"
        )
    check_loggers(["tensorboard"])


def test_missing_package_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from pera_fast import pretrain

    monkeypatch.setitem(loggers.sys.modules, "wandb", None)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"pip install 'pera-fast\[wandb\]'"):
        pretrain(tmp_path / "images", tmp_path / "run", "tiny", overrides=["train.loggers=[wandb]", "train.device=cpu"])
    assert not (tmp_path / "run").exists()


# TensorBoard


@pytest.mark.usefixtures("quick")
def test_tensorboard_has_curves_and_settings(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, ["tensorboard"])
    write(tmp_path, ["tensorboard"], [{"step": 2, "loss": 3.0}], done=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 3.0)]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| optim.betas | [0.9,0.999] |" in text


# Small stands-in for the packages, so that the adapters are tested where those are not installed


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    runs: list[Any] = []

    def init(**given: Any) -> Any:
        run = SimpleNamespace(
            given=given, id=given["id"] or f"id{len(runs)}", project=given["project"], url=None, dir="there",
            rows=[], summary={}, ended=None,
        )  # fmt: skip
        run.log = lambda values, step: run.rows.append((step, values))
        run.finish = lambda exit_code: setattr(run, "ended", exit_code)
        runs.append(run)
        return run

    module: Any = ModuleType("wandb")
    module.init, module.Settings = init, lambda **given: given
    monkeypatch.setitem(loggers.sys.modules, "wandb", module)
    return runs


@pytest.mark.usefixtures("quick")
def test_wandb_run_is_named_configured_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_wandb: list[Any]
):
    check_loggers(["wandb"])
    out = tmp_path / "vit_b16-a"
    write(out, ["wandb"], ending="stopped")
    monkeypatch.setenv("WANDB_PROJECT", "other")  # the run stays where it began
    write(out, ["wandb"], [{"step": 3, "loss": 1.0}], done=2)
    write(tmp_path / "b", ["wandb"])
    first, second, third = fake_wandb
    given = first.given
    assert (given["project"], given["name"], given["id"], given["dir"]) == ("pera-fast", "vit_b16-a", None, str(out))
    assert given["config"]["train"] == {"steps": 6}
    assert given["config"]["recipe"] == "tiny"
    assert first.rows == [(1, {"loss": 2.0}), (2, {"lr": 0.5})]
    assert (first.ended, first.summary["ending"]) == (1, "stopped")
    assert (second.given["id"], second.given["project"], second.given["resume"]) == ("id0", "pera-fast", "allow")
    assert (second.ended, second.summary) == (0, {"loss": 1.0, "ending": "finished"})
    assert (third.given["id"], third.given["project"]) == (None, "other")


class FakeStore:
    """Runs of a tracking server, in memory."""

    tracking_uri = "memory"

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.experiments: dict[str, str] = {}

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment: str, run_name: str) -> Any:
        info = SimpleNamespace(run_id=f"run{len(self.runs)}", lifecycle_stage="active")
        data = SimpleNamespace(params={}, metrics=[], tags={})
        run = SimpleNamespace(info=info, data=data, name=run_name, experiment=experiment, status="RUNNING")
        self.runs[info.run_id] = run
        return run

    def get_run(self, number: str) -> Any:
        if number not in self.runs:
            error: Any = RuntimeError(f"Run {number} not found")
            error.error_code = "RESOURCE_DOES_NOT_EXIST"
            raise error
        return self.runs[number]

    def update_run(self, number: str, status: str) -> None:
        self.runs[number].status = status

    set_terminated = update_run

    def log_batch(self, number: str, metrics: Sequence = (), params: Sequence = (), tags: Sequence = ()) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        data = self.runs[number].data
        data.metrics += metrics
        data.tags.update(tags)
        for key, value in params:
            assert data.params.setdefault(key, value) == value, "a parameter cannot change"


@pytest.fixture
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    store = FakeStore()
    entities: Any = ModuleType("mlflow.entities")
    tracking: Any = ModuleType("mlflow.tracking")
    entities.Metric = entities.Param = entities.RunTag = lambda *values: values
    tracking.MlflowClient = lambda: store
    for module in (ModuleType("mlflow"), entities, tracking):
        monkeypatch.setitem(loggers.sys.modules, module.__name__, module)
    return store


@pytest.mark.usefixtures("quick")
def test_mlflow_run_is_named_described_and_resumed(tmp_path: Path, fake_mlflow: FakeStore):
    check_loggers(["mlflow"])
    out = tmp_path / "vit_b16-a"
    settings = {**SETTINGS, **{f"data.x{number}": "y" * 600 for number in range(120)}}
    rows = [{"step": step, **{f"k{number}": float(step) for number in range(30)}} for step in range(1, 51)]
    write(out, ["mlflow"], rows, settings=settings, ending="stopped")
    run = fake_mlflow.runs["run0"]
    assert fake_mlflow.experiments == {"pera-fast": "0"}
    assert (run.name, run.status, len(run.data.metrics)) == ("vit_b16-a", "KILLED", 1500)
    assert [(key, value, step) for key, value, _, step in run.data.metrics[:2]] == [("k0", 1.0, 1), ("k1", 1.0, 1)]
    assert run.data.params["optim.betas"] == "[0.9,0.999]"
    assert len(run.data.params) == len(settings)
    write(out, ["mlflow"], [{"step": 51, "k0": 0.0}], done=50, settings={**settings, "train.steps": 9})
    assert list(fake_mlflow.runs) == ["run0"]
    assert (run.status, run.data.metrics[-1][3]) == ("FINISHED", 51)
    assert (run.data.params["train.steps"], run.data.tags) == ("6", {"train.steps": "9"})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("gone", ["another store", "deleted"])
def test_mlflow_run_that_is_gone_is_begun_anew(tmp_path: Path, fake_mlflow: FakeStore, gone: str):
    write(tmp_path, ["mlflow"])
    if gone == "deleted":
        fake_mlflow.runs["run0"].info.lifecycle_stage = "deleted"
    else:
        fake_mlflow.runs = {"another": fake_mlflow.runs["run0"]}
    write(tmp_path, ["mlflow"])
    assert len(fake_mlflow.runs) == 2
    assert json.loads((tmp_path / "loggers.json").read_text())["mlflow"]["id"] == "run1"


def test_names_of_two_loggers_and_a_damaged_file(tmp_path: Path):
    about = About(tmp_path)
    (tmp_path / "loggers.json").write_text('{"wandb": ')
    assert about.known("wandb") == {}
    about.keep("wandb", {"id": "a"})
    about.keep("mlflow", {"id": "b"})
    assert (about.known("wandb"), about.known("mlflow")) == ({"id": "a"}, {"id": "b"})


# The packages themselves, where they are installed


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for done in (0, 2):
        logger = to_wandb.start(About(tmp_path, done, SETTINGS))
        logger.log([{**row, "step": row["step"] + done} for row in STEPS])
        logger.finish("finished", STEPS[-1])
    (number,) = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert About(tmp_path).known("wandb") == {"id": number, "project": "pera-fast"}
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{number}.wandb"))
    until = time.monotonic() + 60
    while min(file.stat().st_size for file in files) < 1000 and time.monotonic() < until:
        time.sleep(0.1)  # wandb's own process writes them a little later
    assert min(file.stat().st_size for file in files) > 1000


def test_mlflow_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow", exc_type=ImportError)
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient  # type: ignore[import-not-found]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for done, settings in ((0, SETTINGS), (2, {**SETTINGS, "train.steps": 9})):
        logger = to_mlflow.start(About(tmp_path, done, settings))
        logger.log([{**row, "step": row["step"] + done} for row in STEPS])
        logger.finish("finished", {})
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("pera-fast").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert (run.data.params["train.steps"], run.data.tags["train.steps"]) == ("6", "9")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 3]
