"""Tables of GPU measurements: steps beside the published implementation, training from JPEG, kernels of a step.

python bench/report_gpu.py OUT --name 3-h200                 what bench/gpu/run_all.sh wrote to OUT
python bench/report_gpu.py LINES.jsonl --name 3-h200 [--kernels K.csv]

turns OUT/results.json, or what `python -m pera_bench.quick` printed, a JSON object a line, into
bench/results/gpu/NAME.json, with the kernels of the trace. The pages are written from there by report.py, in the order
of the files' names.
"""

import argparse
import csv
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report_text import heading, paragraph

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 24  # kernels of a step in the table; the file has all
KEPT = ("ms", "ms_min", "ms_max", "images_per_s", "mfu", "peak_mib", "reserved_mib", "attention")
PUBLISHED, OURS = "published", "pera-fast"
STEPS = """
`python -m pera_bench.quick` and, for commit fce4329, the script that came before it: medians of 8 to 20 steps on random
crops, forward to EMA; least to most in parentheses. Reserved is what the allocator held, a CUDA graph's pool included.
Published is the authors' code on the same machine; the ratio is over its row of the same batch in the same run.
"""
SUMMARY = """
**On a GPU**, a vit_b16 training step in bf16 with the exact method, beside the published implementation in the same run
on the same card ({device}, torch {torch}; {commit}, {date}). Ours runs as it comes; every row that was measured, the
slower ones too, is [below](#training-steps-on-a-gpu).
"""
PRETRAIN = """
Images/s of `pera-fast pretrain` from 512 px JPEG files, beside the step alone on random crops; device time that waited
for data; the host's time to launch a step, and what of that waited for the loader.
"""
SHARES = """
Our Triton kernels of that step, as a share of the bandwidth of a large copy ({copy:.2f} TB/s, {copy_of}; goal 85 %).
ms are measured; GB are counted, by `pera_fast.profile.count` at commit {commit}: each tensor that a launch reads once,
and each that it writes once. A tensor counts whole where a kernel skips rows of it, so the share of
`add_norm_bwd_kernel` is too large by less than a tenth, that of `sequence_norm_fwd_kernel` by less than a fifth, and
those of `mask_tokens_bwd_kernel` and `sequence_add_bwd_kernel` by more. Above 100 % a kernel found data in a cache, or
only reads. One of a few microseconds a launch waits for its launch, not for memory.
"""
KERNELS = """
Kernels of a step of batch 64, the {shown} that take longest; {path} has all of them.
"""
File = dict[str, Any]


def load_gpu(folder: Path) -> list[File]:
    """The files, oldest first; each knows its own name as ``file``."""
    return [{**json.loads(path.read_text(encoding="utf-8")), "file": path} for path in sorted(folder.glob("*.json"))]


def _key(row: File) -> tuple[str, int]:
    return row["recipe"], row["batch"]


def _published(file: File) -> dict[tuple[str, int], File]:
    return {_key(row): row for row in file["steps"] if row["what"] == PUBLISHED}


def _milliseconds(row: File) -> str:
    return f"{row['ms']:.1f} ({row['ms_min']:.1f} to {row['ms_max']:.1f})"


def _ratio(row: File, theirs: dict[tuple[str, int], File]) -> str:
    other = theirs.get(_key(row))
    return f"{other['ms'] / row['ms']:.2f}" if other and row["what"] != PUBLISHED else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def gpu_summary(files: list[File]) -> list[str]:
    """The summary's table: the newest run that has both sides."""
    with_both = [file for file in files if _published(file)]
    if not with_both:
        return []
    file = with_both[-1]
    theirs = _published(file)
    columns = "batch", "ms a step", "images/s", "MFU", "reserved MiB", "published ms", "published reserved MiB", "ratio"
    lines = [*paragraph(SUMMARY.format(**file)), *heading(*columns)]
    for row in sorted(file["steps"], key=lambda row: row["batch"]):
        if row["what"] == PUBLISHED or row["variant"] != "as it comes":
            continue
        other = theirs.get(_key(row))
        side = f"{other['ms']:.1f} | {other['reserved_mib']}" if other else " | "
        cells = f"{row['ms']:.1f} | {row['images_per_s']:.0f} | {_percent(row['mfu'])} | {row['reserved_mib']}"
        lines.append(f"| {row['batch']} | {cells} | {side} | {_ratio(row, theirs)} |")
    return [*lines, ""]


def gpu_page(files: list[File]) -> list[str]:
    """The page's section: every row of every run, training from JPEG, the kernels of the newest trace."""
    if not files:
        return []
    columns = "device", "step", "runs", "ms a step", "images/s", "MFU", "peak MiB", "reserved MiB", "ratio", "commit"
    lines = ["## Training steps on a GPU", "", *paragraph(STEPS), *heading(*columns)]
    for file in files:
        theirs = _published(file)
        for row in sorted(file["steps"], key=lambda row: (row["recipe"], row["batch"], row["what"], row["variant"])):
            runs = row["what"] if row["what"] == row["variant"] else f"{row['what']}, {row['variant']}"
            runs += f" (attention: {row['attention']})" if row.get("attention") else ""
            speed = f"{_milliseconds(row)} | {row['images_per_s']:.0f} | {_percent(row.get('mfu'))}"
            memory = f"{row['peak_mib']} | {row['reserved_mib']} | {_ratio(row, theirs)}"
            at = f"{file['device']}, torch {file['torch']} | {row['recipe']}, batch {row['batch']}, {file['precision']}"
            lines.append(f"| {at} | {runs} | {speed} | {memory} | {file['commit']}, {file['date']} |")
    return [*lines, "", *_pretrain(files), *_kernels(files)]


def step_alone(file: File, row: File) -> float | None:
    """Images/s of the default step in the same run at the batch of a training from files; None: not measured."""
    steps = [s for s in file["steps"] if (s["what"], s["variant"], s["batch"]) == (OURS, "as it comes", row["batch"])]
    return steps[0]["images_per_s"] if steps else None


def steps_of_both(file: File) -> list[tuple[File, File]]:
    """(default step, published step) of each recipe and batch that both sides ran in a run."""
    theirs = _published(file)
    ours = [row for row in file["steps"] if (row["what"], row["variant"]) == (OURS, "as it comes")]
    return [(row, theirs[_key(row)]) for row in ours if _key(row) in theirs]


def _pretrain(files: list[File]) -> list[str]:
    rows = [(file, row) for file in files for row in file.get("pretrain", ())]
    if not rows:
        return []
    columns = "device", "settings", "images/s", "step alone, images/s", "share", "waited for data"
    columns += "host ms a step", "of which for data", "commit"
    lines = ["### Training from files", "", *paragraph(PRETRAIN), *heading(*columns)]
    for file, row in rows:
        alone = step_alone(file, row)
        share = f"{alone:.0f} | {_percent(row['images_per_s'] / alone)}" if alone else " | "
        settings = ", ".join(row["settings"]) or "as it comes"
        cells = (
            f"batch {row['batch']}, {settings} | {row['images_per_s']:.0f} | {share} | {100 * row['data_wait']:.1f} %"
        )
        host = " | ".join(f"{row[key]:.1f}" if key in row else "" for key in ("host_ms", "host_waited_ms"))
        lines.append(f"| {file['device']} | {cells} | {host} | {file['commit']}, {file['date']} |")
    return [*lines, ""]


def _kernels(files: list[File]) -> list[str]:
    traced = [file for file in files if file.get("kernels")]
    if not traced:
        return []
    file = traced[-1]
    path = file["file"].with_name(file["kernels"])
    rows = read_kernels(path)
    total = f"Together {sum(ms for ms, _, _ in rows):.1f} ms and {sum(count for _, count, _ in rows):.0f} launches."
    at = f"{file['device']}, {file['commit']}, {file['date']}. {total}"
    where = f"[{path.name}](../bench/results/gpu/{path.name})"
    lines = ["### Kernels of a step", "", *paragraph(KERNELS.format(shown=SHOWN, path=where) + at)]
    lines += heading("ms a step", "launches", "kernel")
    lines += [f"| {ms:.2f} | {count:.0f} | `{name[:100].replace('|', ' ')}` |" for ms, count, name in rows[:SHOWN]]
    return [*lines, "", *_shares(file, rows)]


def _shares(file: File, rows: list[tuple[float, float, str]]) -> list[str]:
    """Share of the copy bandwidth of each Triton kernel whose launches in the trace are those that were counted."""
    counted = file.get("counted", {})
    known = [(ms, n, name, counted[name][1]) for ms, n, name in rows if counted.get(name, [0])[0] == round(n) > 0]
    if not known:
        return []
    lines = paragraph(SHARES.format(copy=file["copy"] / 1e12, copy_of=file["copy_of"], commit=file["counted_at"]))
    lines += heading("kernel", "ms", "launches", "GB", "TB/s", "share")
    for ms, launches, name, moved in known:
        lines.append(f"| `{name}` | {ms:.3f} | {launches:.0f} | {_rate(moved, ms, file['copy'])} |")
    ms, launches, moved = (sum(row[i] for row in known) for i in (0, 1, 3))
    lines.append(f"| together | {ms:.3f} | {launches:.0f} | {_rate(moved, ms, file['copy'])} |")
    left = sorted(name for _, _, name in rows if name in counted and name not in {row[2] for row in known})
    more = f"Left out, as the count has other launches than the trace: {', '.join(left)}." if left else ""
    return [*lines, "", *(paragraph(more) if left else [])]


def _rate(moved: float, ms: float, copy: float) -> str:
    rate = moved / (ms / 1000)
    return f"{moved / 1e9:.3f} | {rate / 1e12:.2f} | {_percent(rate / copy)}"


def read_kernels(path: Path) -> list[tuple[float, float, str]]:
    """(ms a step, launches a step, name) of each kernel, with or without a first line of column names."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(float(ms), float(count), name) for ms, count, name in csv.reader(file) if ms[:1].isdigit()]


def from_quick(lines: Iterable[File]) -> File:
    """One file of what `pera_bench.quick` printed."""
    lines = list(lines)
    rows = [row for row in lines if row["part"] in ("step", "published", "pretrain")]
    if not rows:
        raise SystemExit("no step was measured: nothing to keep")
    first = rows[0]
    file = {key: first[key] for key in ("device", "torch", "cudnn", "commit", "date", "precision")}
    if any(row[key] != file[key] for row in rows for key in file):
        raise SystemExit("the lines are of several devices, versions, commits, days or precisions: one file for each")
    file["steps"] = [
        {
            "what": PUBLISHED if row["part"] == PUBLISHED else OURS,
            "variant": PUBLISHED if row["part"] == PUBLISHED else _variant(row),
            "recipe": row["recipe"],
            "batch": row["batch"],
            **{key: row[key] for key in KEPT if key in row},
        }
        for row in rows
        if row["part"] != "pretrain"
    ]
    for row in lines:
        if row["part"] == "trace" and "counted" in row:
            file |= {"copy": row["copy"], "copy_of": "measured after the trace"}
            file |= {"counted": row["counted"], "counted_at": row["commit"]}
    file["pretrain"] = [run for row in rows if row["part"] == "pretrain" for run in _runs(row)]
    return file


def _runs(row: File) -> list[File]:
    """A run from files as it came, and those with a decoder by name."""
    runs = [row]
    for decoder, found in row.get("decoders", {}).items():
        runs.append({**row, "settings": [*row["settings"], f"data.decode_on={decoder}"], **found})
    kept = "settings", "batch", "images_per_s", "data_wait", "host_ms", "host_waited_ms"
    return [{key: run[key] for key in kept if key in run} for run in runs]


def _variant(row: File) -> str:
    settings = [*row["settings"], *([f"implementation {row['backend']}"] if row["backend"] else [])]
    return ", ".join(settings) or "as it comes"


def read_lines(path: Path) -> list[File]:
    """Measurements in a folder of bench/gpu/run_all.sh, or in a file of one JSON object a line."""
    if not path.is_dir():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    parts = json.loads((path / "results.json").read_text(encoding="utf-8"))["parts"]
    results = [result for part in parts for result in part["results"].values()]
    return [result for result in results if isinstance(result, dict) and "part" in result]


def with_count(row: File) -> File:
    """A trace's line with launches and bytes of its kernels, which are counted now if that failed where it was made."""
    if row["part"] != "trace" or "counted" in row or "copy" not in row:
        return row
    import torch

    from pera_bench.quick import count_traced, machine

    here = machine(torch.device("cpu"))["commit"]
    if here != row["commit"]:
        why = row.get("uncounted", "the bytes were not counted")
        print(f"no shares of the copy bandwidth: {why}; git checkout {row['commit']}, and try again there")
        return row
    return {**row, **count_traced(row)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, metavar="OUT")
    parser.add_argument("--name", required=True)
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "bench" / "results" / "gpu")
    args = parser.parse_args()
    file = from_quick(with_count(row) for row in read_lines(args.lines))
    kernels = args.kernels or args.lines / "trace-64" / "kernels.csv"
    if kernels.exists():
        file["kernels"] = f"{args.name}-kernels.csv"
        shutil.copyfile(kernels, args.folder / file["kernels"])
    (args.folder / f"{args.name}.json").write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
