"""Runs every check and benchmark that needs a GPU, part by part: `bench/gpu/run_all.sh OUT`.

Each part is a process with a time limit; one that fails, hangs or runs out of memory is reported and the rest goes on.
The results are written anew after every part, so a machine that goes away leaves what was done. Only the standard
library is imported here: what a part lacks is that part's own failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {
    **{"torch": "everything", "triton": "the GPU kernels", "omegaconf": "recipes", "numpy": "recipes"},
    **{"pytest": "tests and benches", "pytest_benchmark": "benches", "hypothesis": "some of the tests"},
    **{"typer": "the command line", "rich": "tables", "matplotlib": "pictures", "xformers": "attention=xformers"},
    **{"nvidia.dali": "the loader", "pyarrow": "the loader", "PIL": "the loader"},
}
STEPS = "step/none", "step/cheap", "step/block"
OPS = (
    *("contrast_mean", "visible_patches", "embed_tokens", "sequence_norm", "attention", "sequence_add", "add_norm"),
    *("gelu", "linear_gelu", "query_attention", "cls_attention", "mask_tokens"),
    *("add_norm_fp8", "gelu_fp8", "quantize_rows", "column_sums", "unit_rows"),
    *("distillation_loss", "koleo", "prototype_losses", "pixel_loss", "block", "update"),
)
KERNELS = "reference,pera-fast,triton,chunked,eager,cudnn,xformers,varlen,sdpa"
ATTENTION = "attention=triton,attention=cudnn,attention=xformers,attention=varlen,attention=sdpa,no graph,compiled"
# Correctness, what a step needs first. Files and folders with tests marked `gpu`.
TESTS = (
    *("tests/test_official_parity.py", "tests/model/test_precision.py", "tests/kernels", "tests/train"),
    "tests/data/loading",
)
# Rounds of many steps: the host waits after each round, which a run never does.
LONG = "--steps", "12", "--rounds", "3"


@dataclass
class Part:
    """One part of the run, and what came of it.

    Attributes:
        name: names its folder in OUT.
        command: what to run; it writes to ``{out}``, its folder.
        limit: seconds.
        needs: an environment variable without which there is nothing to do.
        status: "ok", "failed", "too long", "left out"; `reason` says why.
        results: the JSON files that it wrote, by name.
    """

    name: str
    command: Sequence[str]
    limit: float
    needs: str | None = None
    status: str = ""
    reason: str = ""
    seconds: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)


def parts(device: str, recipe: str, images: Sequence[int]) -> list[Part]:
    """Eight minutes, ``quick_parts`` first; in order of importance, as one that fails to start costs its time too."""
    middle, many = str(images[len(images) // 2]), ",".join(map(str, images))

    def bench(name: str, limit: float, *args: str, seconds: float = 0.3) -> Part:
        options = ["--device", device, "--recipe", recipe, "--passes", "1", "--seconds", str(seconds), "--out", "{out}"]
        return Part(name, [sys.executable, "-m", "pera_fast", "bench", *args, *options], limit)

    ceilings = [sys.executable, "-m", "pera_bench.ceilings", device, "{out}/ceilings.json"]
    memory = [sys.executable, "-m", "pera_bench.memory", device, recipe, f"{images[0]},{middle}", "{out}/memory.json"]
    return [
        *quick_parts(device, recipe),
        _quick("pretrain", 45, "pretrain", 64, device, recipe),
        _quick("step-64-fp8", 20, "step", 64, device, recipe, "--set", "model.teacher_precision=fp8", *LONG),
        Part("ceilings", ceilings, 15),
        bench("ops", 60, *OPS, "--images", middle, "--only", KERNELS, seconds=0.1),
        Part("memory", memory, 30),
        bench("attention", 30, "step/cheap", "--images", middle, "--only", ATTENTION),
        bench("steps", 40, *STEPS, "--images", many, "--only", "pera-fast"),
    ]


def quick_parts(device: str, recipe: str) -> list[Part]:
    """Four minutes: correctness, the step beside the published one, the kernels of a step, the loader."""
    options = ["-m", "gpu", "-o", "addopts=", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", "8"]

    def published(batch: int, limit: float) -> Part:
        checkout = "--checkout", os.environ.get("PERA_OFFICIAL", ""), "--rounds", "3", "--steps", "2"
        needs = "PERA_OFFICIAL"
        return _quick(f"published-{batch}", limit, "published", batch, device, recipe, *checkout, needs=needs)

    loader = ["bench", "data/jpeg", "--images", "64", "--device", device, "--recipe", recipe, "--passes", "1"]
    return [
        Part("tests", [sys.executable, "-m", "pytest", *options, *TESTS], 65),
        _quick("step-64", 40, "step", 64, device, recipe, *LONG),
        published(64, 20),
        _quick("step-16", 15, "step", 16, device, recipe, *LONG),
        _quick("step-256", 20, "step", 256, device, recipe, "--rounds", "3"),
        _quick("trace-64", 20, "trace", 64, device, recipe, "--csv", "{out}/kernels.csv"),
        published(256, 20),
        published(16, 15),
        Part("loader", [sys.executable, "-m", "pera_fast", *loader, "--seconds", "2", "--out", "{out}"], 25),
    ]


def _quick(
    name: str, limit: float, part: str, batch: int, device: str, recipe: str, *args: str, needs: str | None = None
) -> Part:
    given = [part, "--batch", str(batch), "--device", device, "--recipe", recipe, "--json", f"{{out}}/{name}.json"]
    once = ["--rounds", "1", "--steps", "1"] if device == "cpu" else []  # there it is only tried out
    return Part(name, [sys.executable, "-m", "pera_bench.quick", *given, *args, *once], limit, needs)


def table(parts: Sequence[Part]) -> str:
    """One line a part: how it ended, and what it measured."""
    lines = [f"{'part':<14} {'status':<9} {'s':>4} {'ms':>8} {'images/s':>9} {'MFU':>5} {'reserved MiB':>13}"]
    for part in parts:
        found = next((r for r in part.results.values() if isinstance(r, dict) and "part" in r), {})
        cells = [f"{found[key]:.1f}" if key in found else "" for key in ("ms", "images_per_s")]
        mfu = f"{100 * found['mfu']:.0f} %" if found.get("mfu") else ""
        reserved = str(found.get("reserved_mib", ""))
        more = f"  {found['launches']:.0f} launches, busy {found['busy_ms']:.1f} ms" if "launches" in found else ""
        line = (
            f"{part.name:<14} {part.status:<9} {part.seconds:>4.0f} {cells[0]:>8} {cells[1]:>9} {mfu:>5} {reserved:>13}"
        )
        lines.append(line.rstrip() + more)
    return "\n".join(lines)


def run(part: Part, out: Path, seconds: float) -> None:
    """Runs a part, at most so many seconds, and fills in what came of it."""
    folder = out / part.name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):  # of an earlier run
        path.unlink()
    command = [word.replace("{out}", str(folder)) for word in part.command]
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        late = not _ended(process, min(part.limit, seconds))
        if late:
            _end(process)
    part.seconds = time.monotonic() - start
    for path in sorted(folder.glob("*.json")):
        try:
            part.results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            part.reason = f"{path.name}: {error}"
    lines = [line.strip() for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    part.status = "too long" if late else "failed" if process.returncode else "ok"
    part.reason = part.reason or ("" if part.status == "ok" and part.results else " / ".join(lines[-2:])[-400:])


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """First as Ctrl-C does, so that what was measured is written; then for good."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if _ended(process, 15):
            break


def why_not(device: str) -> str:
    """Why nothing can run on the device; "" if it can."""
    if device != "cuda":
        return ""
    code = "import torch; print('' if torch.cuda.is_available() else 'needs a GPU: torch sees none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "needs a GPU, and a torch that can be imported"


def lacking() -> dict[str, str]:
    """Packages that are not installed, and what is missed without them."""

    def missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ImportError:  # of the package that it is in
            return True

    return {name: what for name, what in OPTIONAL.items() if missing(name)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts. Returns 0 if none failed."""
    parser = argparse.ArgumentParser(prog="run_all.sh", description="All that needs a GPU, in OUT.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the parts out")
    parser.add_argument("--recipe", default="vit_b16")
    parser.add_argument("--images", default="16,32,64,128", help="numbers of images of a step")
    parser.add_argument("--minutes", type=float, help="for all parts together (8; --quick: 4)")
    parser.add_argument("--quick", action="store_true", help="correctness, the step, its kernels and the loader alone")
    parser.add_argument("--parts", default="", help="only these, with commas")
    args = parser.parse_args(arguments)
    minutes = (4 if args.quick else 8) if args.minutes is None else args.minutes
    out, end = args.out.resolve(), time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        every = quick_parts(args.device, args.recipe)
    else:
        every = parts(args.device, args.recipe, [int(n) for n in args.images.split(",")])
    chosen = [part for part in every if not args.parts or part.name in args.parts.split(",")]
    blocked = why_not(args.device)
    head = {"python": platform.python_version(), "device": args.device, "lacking": lacking(), "parts": []}
    for name, what in head["lacking"].items():
        print(f"not installed: {name}, for {what}")
    for number, part in enumerate(chosen):
        left = end - time.monotonic()
        if blocked:
            part.status, part.reason = "left out", blocked
        elif part.needs and not os.environ.get(part.needs):
            part.status, part.reason = "left out", f"{part.needs} is not set"
        elif left < 5:
            part.status, part.reason = "left out", f"no time left of {minutes:g} minutes"
        else:
            run(part, out, left)
        print(f"{part.name}: {part.status}, {part.seconds:.0f} s{': ' if part.reason else ''}{part.reason}", flush=True)
        head["parts"] = [{**asdict(one), "command": list(one.command)} for one in chosen[: number + 1]]
        (out / "results.json").write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
    summary = table(chosen)
    (out / "table.txt").write_text(summary + "\n", encoding="utf-8")
    print(summary, out / "results.json", sep="\n")
    return int(any(part.status in ("failed", "too long") for part in chosen))


if __name__ == "__main__":
    sys.exit(main())
