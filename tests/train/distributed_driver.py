"""The two processes of test_distributed.py: short runs on random crops, results as JSON per rank."""

import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from train_support import EXACT, RandomCrops, make_run, small_config

from pera_fast.errors import UserError
from pera_fast.train import api, compute_copies
from pera_fast.train.compute_copies import copy_of
from pera_fast.train.distributed import World, world
from pera_fast.train.loop import fit
from pera_fast.train.run_folder import RunFolder
from pera_fast.train.signals import StopRequest
from pera_kernels.products import in_dtype


def exact(out: Path, here: World) -> dict[str, Any]:
    """Two ranks of batch 2, accumulated twice: steps of 8 images."""
    cfg = small_config(*EXACT, "optim.lr=0.001", "train.batch_size=2", "train.accumulate=2", "train.steps=4")
    run = make_run(cfg, out / "exact", here=here, images=16)
    code, metrics = fit(run, StopRequest())
    return {"code": code, "metrics": metrics, "center": run.pera.center.norm().item()}


def nonfinite(out: Path, here: World) -> dict[str, Any]:
    """Rank 1 alone meets a NaN in its second step."""
    run = make_run(small_config("train.batch_size=2", "train.steps=3"), out / "nonfinite", here=here)

    def poison(module: Any, args: Any, output: dict[str, Any]) -> dict[str, Any]:
        if here.rank == 1 and run.step == 1:
            output["loss"] = output["loss"] * math.nan
        return output

    run.pera.register_forward_hook(poison)
    code, _ = fit(run, StopRequest())
    weights = [p.double().sum().item() for p in run.pera.state_dict().values()]
    return {"code": code, "counts": run.nonfinite, "weights": weights}


def stopped(out: Path, here: World) -> dict[str, Any]:
    """A signal reaches rank 1 alone, in its second step."""
    run, stop = make_run(small_config("train.batch_size=2"), out / "stopped", here=here), StopRequest()

    def request(module: Any, args: Any) -> None:
        if here.rank == 1 and run.step == 1:
            stop.signal = signal.SIGTERM

    run.pera.register_forward_pre_hook(request)
    return {"code": fit(run, stop)[0], "steps": run.step}


def clocked(out: Path, here: World) -> dict[str, Any]:
    """A checkpoint after every step, by the clock of rank 0 alone."""
    settings = ["train.batch_size=2", "train.steps=3", "train.checkpoint_minutes=1e-9", "train.checkpoint_every=100"]
    run = make_run(small_config(*settings), out / "clocked", here=here)
    return {"code": fit(run, StopRequest())[0], "steps": run.step}


def set_up(out: Path, here: World) -> dict[str, Any]:
    """Weights that have a compute copy after the set-up of a run, and those whose copy is out of date.

    Copies are made on a GPU only, so that is what the weights of this CPU are taken for while they are made.
    """
    cfg = small_config("train.batch_size=2", "train.precision=bf16")
    manifest = SimpleNamespace(readable=Readable())
    start: Any = SimpleNamespace(cfg=cfg, checkpoint=None, asked=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_copies, "_wants_copy", lambda parameter: True)
        loader: Any = RandomCrops(cfg, 16, here.rank, here.size)
        run = api._build(RunFolder(out / "set_up"), start, here, manifest, loader)  # pyright: ignore[reportArgumentType]
    have = [p for p in run.pera.parameters() if copy_of(p) is not None]
    stale = [p for p in have if in_dtype(p, torch.bfloat16) is not copy_of(p)]
    wrong = [p for p in have if not torch.equal(p.bfloat16(), copy_of(p))]
    parallel = isinstance(run.model, torch.nn.parallel.DistributedDataParallel)
    return {"parallel": parallel, "copies": len(have), "stale": len(stale), "wrong": len(wrong)}


class Readable:
    """Stands for the manifest's images."""

    paths = pa.chunked_array([[f"{number}.jpg" for number in range(16)]])

    def __len__(self) -> int:
        return 16


def agreed(here: World) -> dict[str, Any]:
    """What rank 0 alone does, with its errors."""

    def fail() -> None:
        raise UserError("only rank 0 looked")

    try:
        here.on_main(fail)
        message = ""
    except UserError as error:
        message = str(error)
    return {"value": here.on_main(lambda: here.rank), "error": message}


def main(out: Path) -> None:
    with world("cpu") as here:
        results = {"exact": exact(out, here), "nonfinite": nonfinite(out, here), "stopped": stopped(out, here)}
        results["clocked"], results["agreed"] = clocked(out, here), agreed(here)
        results["set_up"] = set_up(out, here)
        here.barrier()
        (out / f"rank{here.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
