"""Two processes over gloo do what one does with twice the batch, and always agree on what happens."""

import json
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from train_support import EXACT, environment, make_run, small_config

from pera_fast import pretrain
from pera_fast.errors import UserError
from pera_fast.train.checkpoint import find_checkpoints
from pera_fast.train.distributed import choose_device, collective_timeout, world
from pera_fast.train.loop import fit
from pera_fast.train.signals import StopRequest


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(folder, results of rank 0 and 1) of distributed_driver.py, started as torchrun starts processes."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    driver = str(Path(__file__).parent / "distributed_driver.py")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, driver, str(out)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_are_one_with_twice_the_batch(two, tmp_path: Path):
    out, results = two
    cfg = small_config(*EXACT, "optim.lr=0.001", "train.batch_size=8", "train.steps=4")
    run = make_run(cfg, tmp_path, images=16)
    fit(run, StopRequest())
    one, both = rows(tmp_path), rows(out / "exact")
    assert len(both) == 4  # rank 0 alone writes
    for a, b in zip(one, both, strict=True):
        for key in ("loss", "global_cls_loss", "local_cls_loss", "pixel_loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-4), (a["step"], key)
    assert one[0]["loss"] == pytest.approx(both[0]["loss"], rel=1e-6)
    assert run.pera.center.norm().item() == pytest.approx(results[0]["exact"]["center"], rel=1e-3)


def test_ranks_log_the_same(two):
    _, (zero, one) = two
    measured = {"seconds", "images_per_s", "data_wait", "mem"}
    same = [{k: v for k, v in r["exact"]["metrics"].items() if k not in measured} for r in (zero, one)]
    assert same[0] == same[1]
    assert zero["exact"]["center"] == one["exact"]["center"]


def test_nan_on_one_rank_skips_the_step_on_all(two):
    out, (zero, one) = two
    assert zero["nonfinite"] == one["nonfinite"]  # weights, center and teacher included
    assert zero["nonfinite"]["counts"] == {"total": 1, "row": 0}
    assert rows(out / "nonfinite")[1]["nonfinite"] == ["loss"]


def test_signal_to_one_rank_stops_all_after_the_same_step(two):
    out, results = two
    assert [r["stopped"] for r in results] == [{"code": 143, "steps": 2}] * 2
    assert [p.name for p in find_checkpoints(out / "stopped" / "checkpoints")] == ["step_00000002.pt"]


def test_clock_of_rank_0_decides_on_checkpoints(two):
    out, results = two
    assert [r["clocked"] for r in results] == [{"code": 0, "steps": 3}] * 2
    saved = [path.name for path in find_checkpoints(out / "clocked" / "checkpoints")]
    assert saved == [f"step_{step:08d}.pt" for step in (1, 2, 3)]


def test_copies_of_the_weights_are_up_to_date_when_a_run_begins(two):
    """DDP has sent rank 0's weights to all by then, which makes copies stale that were made before."""
    for result in two[1]:
        assert result["set_up"]["parallel"]
        assert result["set_up"]["copies"] > 20
        assert (result["set_up"]["stale"], result["set_up"]["wrong"]) == (0, 0)


def test_rank_0_speaks_for_all(two):
    assert [r["agreed"]["value"] for r in two[1]] == [0, None]
    assert [r["agreed"]["error"] for r in two[1]] == ["only rank 0 looked"] * 2


@pytest.mark.parametrize(("storage_timeout", "minutes"), [(600, 30), (0, 30), (1200, 40), (7200, 140), (1e300, 525620)])
def test_a_collective_outlasts_the_wait_for_the_storage(
    monkeypatch: pytest.MonkeyPatch, storage_timeout: float, minutes: int
) -> None:
    """And, by 20 minutes, the checkpoint and the probe of rank 0; NCCL's own limit is 10 minutes in all."""
    told: dict[str, Any] = {}
    monkeypatch.setattr("pera_fast.train.distributed.dist.init_process_group", lambda _, **given: told.update(given))
    monkeypatch.setattr("pera_fast.train.distributed.dist.new_group", lambda **_: None)
    monkeypatch.setattr("pera_fast.train.distributed.dist.destroy_process_group", lambda: None)
    for name in ("rank", "world_size"):
        monkeypatch.setattr(f"pera_fast.train.distributed.dist.get_{name}", lambda: 0)
        monkeypatch.setenv(name.upper(), "0")
    monkeypatch.setattr("pera_fast.train.distributed.meet", lambda: (None, 0, 1))
    cfg = small_config(f"data.storage_timeout={storage_timeout}")
    with world("cpu", collective_timeout(cfg)):
        pass
    assert told["timeout"] == timedelta(minutes=minutes)


def test_pretrain_gives_its_settings_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SeenError(Exception):
        """Ends the run where it joins the others."""

    def joined(device: str, timeout: timedelta) -> None:
        raise SeenError(device, timeout)

    monkeypatch.setattr("pera_fast.train.api.world", joined)
    (tmp_path / "images").mkdir()
    with pytest.raises(SeenError) as seen:
        pretrain(tmp_path / "images", tmp_path / "run", "tiny", overrides=["data.storage_timeout=3000"])
    assert seen.value.args[1] == timedelta(minutes=70)


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with world("cpu") as here:
        assert (here.rank, here.size, here.main) == (0, 1, True)
        assert here.on_main(lambda: 5) == 5
        assert torch.equal(here.mean(torch.ones(2)), torch.ones(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_amds_gpus_are_refused_by_name(monkeypatch):
    """PyTorch for ROCm calls them cuda; auto takes the CPU."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match=r"train\.device=cuda: this PyTorch is for AMD's GPUs \(ROCm\)"):
        choose_device("cuda")


def test_cuda_without_a_gpu():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match=r"train\.device=cuda") as error:
        choose_device("cuda")
    assert "\n" not in str(error.value)
