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
KERNELS = "reference,pera-fast,triton,chunked,eager,xformers,varlen,sdpa"
GRAPHS = "no graph"
ATTENTION = "attention=triton,attention=xformers,attention=varlen,attention=sdpa"


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
    """In order of importance: the run has an end, and the last ones may not get their turn."""
    middle, largest, many = str(images[len(images) // 2]), str(images[-1]), ",".join(map(str, images))
    few = f"{images[0]},{middle}"

    def bench(name: str, limit: float, *args: str, seconds: float = 0.3, needs: str | None = None) -> Part:
        options = ["--device", device, "--recipe", recipe, "--passes", "1", "--seconds", str(seconds), "--out", "{out}"]
        return Part(name, [sys.executable, "-m", "pera_fast", "bench", *args, *options], limit, needs)

    ceilings = [sys.executable, "-m", "pera_bench.ceilings", device, "{out}/ceilings.json"]
    memory = [sys.executable, "-m", "pera_bench.memory", device, recipe, few, "{out}/memory.json"]
    options = "-m", "gpu", "-o", "addopts=", "--continue-on-collection-errors"
    tests = [sys.executable, "-m", "pytest", "-q", *options, "tests"]
    ours = "--only", "pera-fast"
    return [
        Part("tests", tests, 90),
        Part("ceilings", ceilings, 40),
        bench("steps", 130, *STEPS, "--images", many, *ours, seconds=2),
        bench("published", 80, "step/cheap", "--images", few, "--only", "pera-fast,published", needs="PERA_OFFICIAL"),
        bench("ops", 150, *OPS, "--images", middle, "--only", KERNELS),
        bench("attention", 60, "step/cheap", "--images", middle, "--only", ATTENTION),
        Part("memory", memory, 80),
        bench("loader", 50, "data/jpeg", "--images", largest, seconds=3),
        bench("compiled", 90, "step/cheap", "--images", middle, "--only", f"pera-fast,compiled,{GRAPHS}"),
        bench("compiled_ops", 60, *OPS, "--images", middle, "--only", "compiled"),
    ]


def quick_parts(device: str, recipe: str) -> list[Part]:
    """Four minutes: correctness, the step beside the published one, the kernels of a step, the loader."""
    python, options = (
        sys.executable,
        ["-m", "gpu", "-o", "addopts=", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"],
    )
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", "8"]

    def quick(name: str, limit: float, part: str, batch: int, *args: str, needs: str | None = None) -> Part:
        given = [part, "--batch", str(batch), "--device", device, "--recipe", recipe, "--json", f"{{out}}/{name}.json"]
        once = ["--rounds", "1", "--steps", "1"] if device == "cpu" else []  # there it is only tried out
        return Part(name, [python, "-m", "pera_bench.quick", *given, *args, *once], limit, needs)

    def published(batch: int) -> Part:
        checkout = "--checkout", os.environ.get("PERA_OFFICIAL", "")
        return quick(f"published-{batch}", 35, "published", batch, *checkout, "--rounds", "3", needs="PERA_OFFICIAL")

    long = "--steps", "12", "--rounds", "3"  # the host waits after each round, which a run never does
    tests = ["tests/test_official_parity.py", "tests/kernels", "tests/train", "tests/data/test_streams.py"]
    loader = ["bench", "data/jpeg", "--images", "64", "--device", device, "--recipe", recipe, "--passes", "1"]
    return [
        Part("tests", [python, "-m", "pytest", *options, *tests], 90),
        quick("step-64", 45, "step", 64, *long),
        quick("step-16", 30, "step", 16, *long),
        quick("step-64-fp8", 45, "step", 64, "--set", "model.teacher_precision=fp8", *long),
        published(64),
        published(16),
        quick("step-256", 40, "step", 256, "--rounds", "3"),
        quick("trace-64", 30, "trace", 64, "--csv", "{out}/kernels.csv"),
        Part("loader", [python, "-m", "pera_fast", *loader, "--seconds", "3", "--out", "{out}"], 40),
    ]


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
