"""Measure what an FP8 teacher changes: `python -m pera_bench.fp8 ... --json FILE`.

    --work DIR                                          the demo's run in float32, in bfloat16 and with an FP8 teacher
    --checkpoint RUN/checkpoints/step_N.pt --data DIR   a trained checkpoint alone, on images of a folder

On a checkpoint (of the demo's run in bfloat16, if none is given): how far the teacher's distributions over the
prototypes move, FP8 from bfloat16 beside bfloat16 from float32. Of the demo's runs: their losses. Prints tables and
writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pera_bench.quick import machine
from pera_fast.config import Config, from_yaml
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import open_or_build
from pera_fast.data.loading.loader import Loader
from pera_fast.demo.run import STEPS, TEST_SCENES, TRAIN_SCENES
from pera_fast.demo.run import run as run_demo
from pera_fast.errors import UserError
from pera_fast.model.inputs import StepInputs
from pera_fast.train.api import make_model
from pera_fast.train.checkpoint import CheckpointState, find_checkpoints, load_checkpoint
from pera_fast.train.compute_copies import make_copies
from pera_fast.train.inputs import make_inputs
from pera_fast.train.teacher_precision import check_teacher_precision

PRECISIONS = {"fp32": ("fp32", "same"), "bf16": ("bf16", "same"), "fp8": ("bf16", "fp8")}  # train's, the teacher's
PAIRS = (("fp32", "bf16"), ("bf16", "fp8"), ("fp32", "fp8"))  # a distribution, and what stands for it
ROWS = 64  # distributions that are in memory at once


def batches(cfg: Config, data: Path, count: int, skipped: Path) -> list[StepInputs]:
    """The first batches of a run on the images below a folder."""
    plan = cfg.train.resolve_batch(1)
    loader = Loader(
        cfg, open_or_build(data, cfg, progress=False), batch_size=plan.per_device, device=torch.device("cpu"),
        skipped=SkippedFiles(skipped), transform=lambda batch: make_inputs(batch, cfg, 0),
    )  # fmt: skip
    with loader:
        return list(islice(loader, count))


def teacher_rows(state: CheckpointState, name: str, inputs: Sequence[StepInputs], device: torch.device) -> Tensor:
    """The teacher's unit rows [crops, bottleneck] in float64, as a run in that precision makes them."""
    precision, teacher = PRECISIONS[name]
    cfg = from_yaml(state["config"]).with_values({"train.precision": precision, "model.teacher_precision": teacher})
    check_teacher_precision(cfg, device)
    model = make_model(cfg)
    model.load_state_dict(state["model"])
    model.to(device)
    make_copies(model)
    return torch.cat([model.teacher_rows(batch.to(device)).cpu().double() for batch in inputs])


def distributions(state: CheckpointState) -> Callable[[Tensor], Tensor]:
    """A function from rows to log-probabilities over the prototypes: centred, at the last temperature, in float64."""
    weights = {name: state["model"][f"teacher.cls_head.last_layer.weight_{name}"].double() for name in ("g", "v")}
    prototypes = weights["g"] * weights["v"] / weights["v"].norm(dim=1, keepdim=True)
    center, temp = state["model"]["center"].double(), from_yaml(state["config"]).optim.teacher_temp
    return lambda rows: ((rows @ prototypes.t() - center) / temp).log_softmax(1)


def compare(state: CheckpointState, inputs: Sequence[StepInputs], device: torch.device) -> dict[str, Any]:
    """For each pair of precisions: divergences in nats, how often the most probable prototype stays, error of rows."""
    rows, log_probability = {n: teacher_rows(state, n, inputs, device) for n in PRECISIONS}, distributions(state)
    found: dict[str, Any] = {"rows": len(rows["fp32"]), "prototypes": state["model"]["center"].shape[1]}
    parts: dict[str, list[Tensor]] = {f"{a} to {b}": [] for a, b in PAIRS}
    same: dict[str, list[Tensor]] = {name: [] for name in parts}
    entropy = []
    for start in range(0, found["rows"], ROWS):
        logs = {name: log_probability(r[start : start + ROWS]) for name, r in rows.items()}
        entropy.append(-(logs["fp32"].exp() * logs["fp32"]).sum(1))
        for a, b in PAIRS:
            parts[f"{a} to {b}"].append((logs[a].exp() * (logs[a] - logs[b])).sum(1))
            same[f"{a} to {b}"].append(logs[a].argmax(1) == logs[b].argmax(1))
    found["entropy"] = torch.cat(entropy).mean().item()
    for a, b in PAIRS:
        name = f"{a} to {b}"
        divergence = torch.cat(parts[name])
        found[name] = {
            "kl_mean": divergence.mean().item(),
            "kl_median": divergence.median().item(),
            "kl_p99": divergence.quantile(0.99).item(),
            "kl_max": divergence.max().item(),
            "same_most_probable": torch.cat(same[name]).double().mean().item(),
            "row_error": ((rows[b] - rows[a]).norm() / rows[a].norm()).item(),
        }
    return found


def demo_run(work: Path, name: str, steps: int, scenes: tuple[int, int], seed: int) -> dict[str, Any]:
    """The demo's run in a precision: its losses, and kNN (k = 20) on the teacher's features before and after."""
    train, teacher = PRECISIONS[name]
    settings = (f"train.precision={train}", f"model.teacher_precision={teacher}")
    result = run_demo(work / name, seed=seed, steps=steps, scenes=scenes, overrides=settings)
    lines = (work / name / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    scenes_report = json.loads((result.compared[0].report.parent / "report.json").read_text(encoding="utf-8"))
    before, after = (row["metrics"]["knn20_accuracy"] for row in scenes_report["results"])
    distilled = [m["global_cls_loss"] + m["local_cls_loss"] for m in metrics]
    return {
        "settings": list(settings),
        "seed": seed,
        "loss": [round(m["loss"], 4) for m in metrics],
        "cls_loss": [round(value, 4) for value in distilled],
        "last_tenth": {"loss": result.last_loss, "cls_loss": statistics.fmean(distilled[-max(steps // 10, 1) :])},
        "knn": {"before": before, "after": after, "note": result.note},
    }


def markdown(found: dict[str, Any]) -> str:
    """The tables that docs/fp8.md quotes."""
    checkpoint = found["checkpoint"]
    head = ("from, to", "KL: mean", "median", "99 %", "largest", "same most probable prototype", "error of the rows")
    rows = [head, ("---",) * len(head)]
    for a, b in PAIRS:
        f = checkpoint[f"{a} to {b}"]
        numbers = [f"{f[key]:.2g}" for key in ("kl_mean", "kl_median", "kl_p99", "kl_max")]
        rows.append((f"{a}, {b}", *numbers, f"{f['same_most_probable']:.1%}", f"{f['row_error']:.2%}"))
    tables = [rows]
    if "runs" in found:
        runs = found["runs"]
        marks = _marks(len(runs["fp32"]["loss"]))
        head = ("run", *(f"loss, steps {a + 1} to {b}" for a, b in marks), "kNN before", "after")
        rows = [head, ("---",) * len(head)]
        for name, run in runs.items():
            means = [f"{statistics.fmean(run['loss'][a:b]):.3f}" for a, b in marks]
            knn = [f"{run['knn'][key]:.1%}" for key in ("before", "after")]
            rows.append((name, *means, *knn))
        tables.append(rows)
    return "\n\n".join("\n".join("| " + " | ".join(row) + " |" for row in table) for table in tables) + "\n"


def _marks(steps: int) -> list[tuple[int, int]]:
    """Four parts of a run's steps and its last tenth."""
    quarter = max(steps // 4, 1)
    parts = [(start, min(start + quarter, steps)) for start in range(0, 4 * quarter, quarter) if start < steps]
    return [*parts, (steps - max(steps // 10, 1), steps)]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="pera_bench.fp8", description="Measure what an FP8 teacher changes.")
    parser.add_argument("--json", type=Path, required=True, help="result")
    parser.add_argument("--work", type=Path, help="folder for the demo's runs")
    parser.add_argument("--checkpoint", type=Path, help="of a trained run, instead of the demo's")
    parser.add_argument("--data", type=Path, help="folder of images, with --checkpoint")
    parser.add_argument("--device", default="cpu", help="where the checkpoint's teachers run")
    parser.add_argument("--batches", type=int, default=8, help="for the distributions, of the checkpoint's batch size")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each of the demo's runs")
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=(TRAIN_SCENES, TEST_SCENES), help="a class, and held out"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    if (args.checkpoint is None) == (args.work is None) or (args.checkpoint is None) != (args.data is None):
        parser.error("give --work, or --checkpoint and --data")
    found: dict[str, Any] = machine(device)
    try:
        if args.checkpoint is None:
            scenes = args.scenes[0], args.scenes[1]
            found["runs"] = {name: demo_run(args.work, name, args.steps, scenes, args.seed) for name in PRECISIONS}
            args.checkpoint = find_checkpoints(args.work / "bf16" / "run" / "checkpoints")[-1]
            args.data = args.work / "bf16" / f"scenes-{args.seed}-{scenes[0]}-{scenes[1]}" / "test"
        state = load_checkpoint(args.checkpoint)
        inputs = batches(from_yaml(state["config"]), args.data, args.batches, args.json.with_suffix(".skipped.csv"))
        found["checkpoint"] = {"recipe": state["recipe"], "step": state["step"], **compare(state, inputs, device)}
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
