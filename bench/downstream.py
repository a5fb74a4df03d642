"""Measures what pretraining gives a small network: probes of three tasks, against random weights, for several seeds.

python bench/downstream.py --data DATA --work W --json bench/results/downstream/FILE.json

DATA holds scenes.csv, roads.csv and changes.csv with their images. For each seed `tiny` is pretrained on the training
split of the scenes alone, then `pera-fast eval` compares it with random weights of that seed. What is in W already is
not made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pera_bench.machine import describe
from pera_fast import pretrain
from pera_fast.eval.run import evaluate
from pera_fast.features.samples import read_samples

TASKS = {"scene": ("scenes.csv", 0), "segmentation": ("roads.csv", 0), "change": ("changes.csv", 5)}  # and folds
METRICS = {
    "scene": ("accuracy", "knn20_accuracy"),
    "segmentation": ("miou",),
    "change": ("changed_f1", "all_changed_f1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and reports")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    images = link_training_images(args.data / TASKS["scene"][0], args.work / "train")
    runs = []
    for seed in range(args.seeds):
        run = args.work / f"run-{seed}"
        if not (run / "finished.json").exists():
            settings = [f"train.seed={seed}", f"train.epochs={args.epochs}"]
            pretrain(args.work / "train", run, "tiny", resume="auto", overrides=settings)
        reports = {task: report(task, args.data, run, seed, args.work / f"{task}-{seed}") for task in TASKS}
        runs.append({"seed": seed, **reports})
    machine = describe(torch.device("cpu"))
    record = {"machine": machine, "recipe": "tiny", "epochs": args.epochs, "images": images, "runs": runs}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def link_training_images(table: Path, folder: Path) -> int:
    """Links to the scenes of split `train`, so that the others are not pretrained on; returns their number."""
    samples = read_samples("scene", table).need("train")
    for (file,), labels in zip(samples.images, samples.labels, strict=True):
        link = folder / samples.classes[labels[0]] / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(file.resolve())
    return len(samples)


def report(task: str, data: Path, run: Path, seed: int, out: Path) -> dict[str, Any]:
    """{metric: {"pretrained": value, "random": value}} of one task and seed, with the size that the network saw."""
    table, folds = TASKS[task]
    if not (out / "report.json").exists():
        evaluate(task, data / table, [run, "random"], out, seed=seed, folds=folds)
    told = json.loads((out / "report.json").read_text(encoding="utf-8"))
    pretrained, random = (row["metrics"] for row in told["results"])
    return {name: {"pretrained": pretrained[name], "random": random[name]} for name in METRICS[task]}


if __name__ == "__main__":
    main()
