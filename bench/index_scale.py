"""`data index` on a folder of very many tiny files: files a second and peak memory over all of its processes.

    python bench/index_scale.py --files 1000000 --folder SCRATCH [--no-verify] [--kill-after 600] [--again] [--startup]

Makes the files (1000 a folder; 8 x 8 pixel JPEG and PNG files, hard-linked from some different ones, and one that is no
image in every 1000) unless the folder holds them already, indexes them in a process of its own, and prints one line.
Memory is sampled every 20 ms: VmHWM of the main process, and the greatest sum of PSS over it and its workers.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FOLDER_FILES = 1000
ROOT = Path(__file__).resolve().parent.parent


def generate(folder: Path, files: int) -> None:
    """Folders of hard links: as many names as asked for, few bytes."""
    from PIL import Image

    done = folder / f".made-{files}"
    if done.exists():
        return
    originals = folder / ".originals"
    originals.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    sources = []
    for number in range(max(64, files // 20_000)):  # file systems bound the names of a file (ext4: 65,000)
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
        sources.append((originals / f"{number}.{suffix}-original", suffix))
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(sources[-1][0], kind)
    bad = originals / "bad.original"
    bad.write_bytes(b"not an image")
    for start in range(0, files, FOLDER_FILES):
        below = folder / "data" / f"scene-{start // FOLDER_FILES:05d}"
        below.mkdir(parents=True, exist_ok=True)
        for number in range(start, min(start + FOLDER_FILES, files)):
            source, suffix = (bad, "jpg") if number % FOLDER_FILES == 7 else sources[number % len(sources)]
            target = below / f"tile_{number:07d}.{suffix}"
            if not target.exists():
                os.link(source, target)
    done.touch()


def _status(pid: int, file: str, key: str) -> int:
    """kB of one line of /proc/PID/FILE; 0 if the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _family(pid: int) -> list[int]:
    try:
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:
        children = []
    return [pid, *(other for child in children for other in _family(int(child)))]


def measure(command: list[str], kill_after: float | None = None) -> tuple[float, float, float]:
    """(seconds, peak MiB of the main process, peak MiB of PSS over all processes) of a command.

    With `kill_after` the main process is killed after so many seconds, as the out-of-memory killer would.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    began = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    own = total = 0
    while process.poll() is None:
        own = max(own, _status(process.pid, "status", "VmHWM"))
        total = max(total, sum(_status(pid, "smaps_rollup", "Pss") for pid in _family(process.pid)))
        if kill_after is not None and time.monotonic() - began > kill_after:
            process.kill()
        time.sleep(0.02)
    if process.returncode and kill_after is None:
        sys.exit(process.returncode)
    return time.monotonic() - began, own / 1024, total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder for the files and the manifest")
    parser.add_argument("--no-verify", action="store_true", help="headers only")
    parser.add_argument("--only-make", action="store_true", help="make the files and stop")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-after", type=float, help="seconds; killed then, and started again")
    parser.add_argument("--again", action="store_true", help="also measure the index of a folder that did not change")
    parser.add_argument("--startup", action="store_true", help="also measure what a training does with the manifest")
    args = parser.parse_args()
    generate(args.folder, args.files)
    if args.only_make:
        return
    manifest = args.folder / "index.parquet"
    manifest.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pera_fast", "data", "index", str(args.folder / "data"), "--out", str(manifest)]
    command += ["--workers", str(args.workers), *(["--no-verify"] if args.no_verify else [])]
    what = "headers" if args.no_verify else "decoded"
    runs = {what: command}
    if args.kill_after:
        runs = {f"{what}, killed": command, f"{what}, the rest": command}
    if args.again:
        runs["unchanged"] = command
    if args.startup:
        runs["startup"] = [sys.executable, "-c", _STARTUP, str(manifest)]
    for name, line in runs.items():
        seconds, own, total = measure(line, args.kill_after if name.endswith("killed") else None)
        print(
            f"{args.files} files, {name}: {seconds:.1f} s;"
            f" peak {own:.0f} MiB in the main process, {total:.0f} MiB in all ({args.workers} workers)",
            flush=True,
        )


_STARTUP = """
import sys
from pera_fast.data.files.manifest import Manifest
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.train.api import _digest
manifest = Manifest.load(sys.argv[1])
order = SampleOrder(len(manifest.readable), seed=0, batch_size=64)
print(_digest(manifest)[:12], order(0)[1][:3], manifest.table.nbytes // 2**20, "MiB of rows")
"""

if __name__ == "__main__":
    main()
