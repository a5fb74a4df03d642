"""The README's three numbers, each with its device and day. All tables are on docs/results.md."""

from pathlib import Path

from report_gpu import File, load_gpu, step_alone, steps_of_both
from report_loaders import load_loaders, ratio_range
from report_text import item

NOTHING = "Nothing has been measured yet."
STEP = """
**{ratio:.2f} times as fast** as the published implementation: a {recipe} training step in {precision} at batch {batch}
takes {ms:.1f} ms ({images_per_s:.0f} images/s) and {reserved_mib} MiB of GPU memory; theirs takes {their_ms:.1f} ms
and {their_mib} MiB in the same run on the same {device} ({commit}, {date}).
"""
FILES = """
**{images_per_s:.0f} images/s** when it trains from 512 px JPEG files at batch {batch}: {share:.0f} % of what the step
makes alone ({device}; {commit}, {date}).
"""
LOADER = """
**{ratio} times as many JPEG images** for each second of processor time as a Pillow and PyTorch pipeline
({device}; {commit}, {date}).
"""


def front(folder: Path) -> str:
    """The list between the README's markers: of each kind the newest number.

    Args:
        folder: bench/results, or one like it.
    """
    gpu = load_gpu(folder / "gpu")
    items = [*_steps(gpu)[-1:], *_from_files(gpu)[-1:], *_loaders(folder / "loaders")[-1:]]
    return "\n".join(line for text in items for line in item(text)) or NOTHING


def _steps(files: list[File]) -> list[str]:
    """One sentence a run with both sides, of the largest batch that both ran."""
    found = []
    for file in files:
        pairs = sorted(steps_of_both(file), key=lambda pair: pair[0]["batch"])
        for ours, theirs in pairs[-1:]:
            other = {"their_ms": theirs["ms"], "their_mib": theirs["reserved_mib"], "ratio": theirs["ms"] / ours["ms"]}
            found.append(STEP.format(**{**file, **ours, **other}))
    return found


def _from_files(files: list[File]) -> list[str]:
    found = []
    for file in files:
        for row in file.get("pretrain", ()):
            alone = step_alone(file, row)
            if alone and not row["settings"]:
                found.append(FILES.format(**{**file, **row, "share": 100 * row["images_per_s"] / alone}))
    return found


def _loaders(folder: Path) -> list[str]:
    found = []
    for record in load_loaders(folder):
        if any(row["format"] == "jpeg" for row in record["rows"]):
            machine = {**record["machine"], "date": record["machine"]["date"].split()[0]}
            found.append(LOADER.format(ratio=ratio_range(record, "jpeg"), **machine))
    return found
