"""The first section of docs/results.md: a step, each op, the loader and memory in few lines."""

import json
from pathlib import Path

from pera_bench.record import REFERENCE
from pera_bench.work import COMPILED
from report_gpu import gpu_summary, load_gpu
from report_learning import learning_summary
from report_loaders import load_loaders, ratio_range
from report_tables import Record, Row, fastest, point, published, speed, when, where
from report_text import heading, paragraph

RECIPE = "vit_b16"
POLICY = "cheap"  # the default of model.recompute
BUSY = 0.9  # share of its cores that the busiest side has to itself on a quiet machine
FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
NO_GPU = """
**Nothing has been measured on a GPU yet**: no step, no op, no loader, no memory. The Triton kernels are compiled for
A100, H100 and B200 without spills ([resources](kernel_resources.md)) and tested in Triton's interpreter, which
says nothing of their speed.
"""
STEPS = """
**A training step on a CPU** beside the published implementation, in one process at the same sizes, batch and
precision. Ours begins at uint8 crops, theirs at float views that are ready; both end with AdamW, center and EMA.
"""
# What a reader of a ratio from a CPU has to know: pera_kernels/products.py, pera_bench/published.py.
ON_CPU = """
Theirs has PyTorch's attention in place of xFormers' on a CPU.
"""
HALF_ON_CPU = """
Much of the ratio in bf16 is bf16 itself on a CPU without instructions for it, such as Ice Lake: theirs emulates bf16
products and ours makes them in float32.
"""
FULL = " In fp32 both make them in float32."
NO_FULL = " A step in float32 is not recorded yet."
OPS = """
**Ops**: how many times as fast as the definition in eager PyTorch is what runs by default, from the slowest to the
fastest case. A definition is written to be read: that of `contrast_mean`, `visible_patches` and `pixel_loss` colours
whole crops, one by one.
"""
WAYS = "forward", "forward and backward"
NOT_COMPILED = "The definitions under torch.compile (`pera-fast bench --all`) are not recorded yet."
LOADERS = """
**The loader**, images for each second of processor time, over those of a Pillow and PyTorch pipeline, from folder and
shards, threads {threads}: {ratios} ({recipe}, images of {sizes} px; {device}, torch {torch}; {commit}, {date}).
"""
BUSY_LOADERS = " Other work had part of the cores: take these ratios as rough."
MEMORY = """
**Memory**, simulated, not measured (`pera-fast profile --recipe {recipe} --device simulate --batch-sizes {sizes}
--out P`; {commit}, {date}): what an image adds to the peak of a {recipe} step, and the largest batch predicted for a
card of 80 GB.
"""


def summary(records: list[Record], folder: Path) -> str:
    """Lines of the section, in one text."""
    gpu = load_gpu(folder / "gpu")
    on_gpu = gpu or any(record["machine"]["kind"] == "cuda" for record in records)
    lines = gpu_summary(gpu) if on_gpu else paragraph(NO_GPU)
    lines += (
        steps(records)
        + learning_summary(folder / "learning")
        + ops(records)
        + loaders(folder / "loaders")
        + memory(folder / "memory")
    )
    return "\n".join(lines).strip()


def steps(records: list[Record]) -> list[str]:
    """One line a device and precision: the largest batch that both sides ran with the default policy."""
    found = {}
    for record in records:
        rows = [row for row in record["rows"] if row["suite"] == "step" and row["case"] == POLICY]
        theirs = {point(row): row for row in rows if published(row)}
        for row in rows:
            if row["implementation"] != "pera-fast" or point(row) not in theirs:
                continue
            key = record["machine"]["device"], row["recipe"], row["precision"]
            if key not in found or found[key][1]["images"] <= row["images"]:
                found[key] = record["machine"], row, theirs[point(row)]
    if not found:
        return []
    head = heading("step", "images/s", "published", "ratio", "peak MiB", "published", "ratio")
    lines = [*paragraph(STEPS), *head, *(_step_line(*sides) for sides in found.values()), ""]
    places = dict.fromkeys(f"{where(machine)}; {when(machine)}" for machine, *_ in found.values())
    lines += paragraph(". ".join(places) + ".")
    on_cpu = [(row["precision"], machine) for machine, row, _ in found.values() if machine["kind"] == "cpu"]
    notes = ON_CPU if on_cpu else ""
    if any(precision == "bf16" and " with " not in machine["cpu_capability"] for precision, machine in on_cpu):
        notes += HALF_ON_CPU + (FULL if "fp32" in [precision for precision, _ in on_cpu] else NO_FULL)
    return lines + (paragraph(notes) if notes else [])


def _step_line(machine: Record, row: Row, other: Row) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    device = f", {machine['device']}" if machine["kind"] == "cuda" else f", {machine['cpu_capability']}, {threads}"
    step = f"{row['recipe']}, batch {row['images']}, {row['precision']}{device}"
    memory = " | | "
    if row["peak_mib"] and other["peak_mib"]:
        memory = f"{row['peak_mib']:.0f} | {other['peak_mib']:.0f} | {row['peak_mib'] / other['peak_mib']:.2f}"
    ratio = other["median_s"] / row["median_s"]
    return f"| {step} | {speed(row)} | {speed(other)} | {ratio:.2f} | {memory} |"


def ops(records: list[Record]) -> list[str]:
    """For each device a table of ops, blocks and the update at the published sizes: of the record with most of them."""
    lines = []
    devices = dict.fromkeys(record["machine"]["device"] for record in records)
    for some in ([record for record in records if record["machine"]["device"] == device] for device in devices):
        of_device = sorted(some, key=lambda record: len(record["rows"]), reverse=True)
        for record in of_device:
            rows = [r for r in record["rows"] if r["recipe"] == RECIPE and r["suite"] not in ("step", "data")]
            rows = [row for row in rows if point(row) == point(rows[0])]
            ours = [row for row in fastest(rows) if row.get("speedup")]
            if not ours:
                continue
            compiled = compiled_rows(of_device, rows)
            at = f"{RECIPE}, {rows[0]['images']} images, {rows[0]['precision']}; {where(record['machine'])};"
            at += f" {when(record['machine'])}. {'' if compiled else NOT_COMPILED}"
            apart = {when(r["machine"]): None for r in of_device if r is not record and has_compiled(r)}
            at += f" Under torch.compile: {'; '.join(apart)}." if compiled and apart else ""
            lines += [*([] if lines else paragraph(OPS)), *_op_table(ours, compiled), "", *paragraph(at)]
            break
    return lines


def compiled_rows(records: list[Record], rows: list[Row]) -> list[Row]:
    """The definitions under torch.compile at the point of `rows`, of any record, with their speed-ups.

    Where their own record has no definition, the speed-up is over that of `rows`.
    """
    definition = {bench_of(row): row["median_s"] for row in rows if row["implementation"] == REFERENCE}
    found = {}
    for row in (row for record in records for row in record["rows"] if row["implementation"] == COMPILED):
        if point(row) == point(rows[0]) and bench_of(row) in definition:
            speedup = row.get("speedup") or definition[bench_of(row)] / row["median_s"]
            found.setdefault(bench_of(row), {**row, "speedup": speedup})
    return list(found.values())


def has_compiled(record: Record) -> bool:
    """Whether definitions ran under torch.compile."""
    return any(row["implementation"] == COMPILED for row in record["rows"])


def bench_of(row: Row) -> tuple[str, str, str]:
    """Suite, case, direction."""
    return row["suite"], row["case"], row["direction"]


def _op_table(ours: list[Row], compiled: list[Row]) -> list[str]:
    lines = heading("op", "runs", *WAYS, *(f"{way}, torch.compile" for way in WAYS if compiled))
    for suite in dict.fromkeys(row["suite"] for row in ours):
        runs = ", ".join(dict.fromkeys(row["implementation"] for row in ours if row["suite"] == suite))
        cells = [suite, runs]
        for rows in (ours, compiled) if compiled else (ours,):
            own = [row for row in rows if row["suite"] == suite]
            cells += [_range([row for row in own if row["direction"] in names]) for names in ((FORWARD,), (BOTH, STEP))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _range(rows: list[Row]) -> str:
    ratios = sorted(row["speedup"] for row in rows)
    ends = [f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}" for ratio in (ratios[:1] + ratios[-1:])]
    return " to ".join(dict.fromkeys(ends))


def loaders(folder: Path) -> list[str]:
    """One paragraph a record."""
    lines = []
    for record in load_loaders(folder):
        rows = record["rows"]
        kinds, sizes, threads = (
            dict.fromkeys(str(row[name]) for row in rows) for name in ("format", "size", "threads")
        )
        found = {
            "ratios": "; ".join(f"{kind} {ratio_range(record, kind)}" for kind in kinds),
            "sizes": ", ".join(sizes),
            "threads": ", ".join(threads),
        }
        busy = any(max(side["cores"] for side in row["sides"].values()) < BUSY * row["threads"] for row in rows)
        machine = record["machine"]
        facts = {**machine, "recipe": record["recipe"], **found, "date": machine["date"].split()[0]}
        lines += paragraph(LOADERS.format(**facts) + (BUSY_LOADERS if busy else ""))
    return lines


def memory(folder: Path) -> list[str]:
    """Lines of each simulated profile: one for each policy, and one without masks."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        profile = json.loads(path.read_text(encoding="utf-8"))
        flops = {str(p["variant"]): p["flops_per_image"] for p in profile["points"]}
        sizes = ",".join(map(str, profile["batch_sizes"]))
        lines += paragraph(MEMORY.format(**profile["machine"], recipe=profile["fits"][0]["recipe"], sizes=sizes))
        lines += heading("masks", "recompute", "MiB an image", "GFLOP an image", "batch on 80 GB")
        for fit in profile["fits"]:
            policy = dict(text.split("=") for text in fit["overrides"])["model.recompute"]
            masks = "none" if fit["purpose"] == "dense" else "the method's"
            work = flops[str({name: fit[name] for name in ("recipe", "overrides", "purpose")})] / 1e9
            batch = fit["largest_batch"]["80"]
            lines.append(f"| {masks} | {policy} | {fit['slope'] / 2**20:.1f} | {work:.0f} | {batch} |")
        lines.append("")
    return lines
