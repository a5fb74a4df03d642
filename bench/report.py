"""Writes docs/results.md and the three numbers in README.md from the records in bench/results/ (docs/bench.md).

python bench/report.py            writes the list between the README's two markers, and the page
python bench/report.py --check    names what is not what the results give, and exits with 1
"""

import argparse
import json
import sys
from pathlib import Path

from report_downstream import downstream_page
from report_front import front
from report_gpu import gpu_page, load_gpu
from report_learning import learning_page
from report_loaders import loaders_table
from report_summary import summary
from report_tables import Record, loader_lines, memory_table, op_tables, step_table
from report_text import paragraph

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
HEAD = """
`python bench/report.py` writes this page from [bench/results](../bench/results); do not edit it. [bench.md](bench.md)
says how things are measured and how to take the numbers again.
"""
NOTHING = """
Nothing has been measured on a GPU yet: no step, no op, no loader, no memory. Every number here is of a CPU.
"""
OPS = """
`pera-fast bench`: median and interquartile range of the time; eager is the definition in plain PyTorch, timed in the
same run. Shares are of what this machine was measured to do; the error is the largest difference from float64 over
the largest value. A share of the copy bandwidth over 100% means that the data stayed in a cache, or is updated in
place: a copy also reads what it overwrites.
"""


def load(folder: Path) -> list[Record]:
    """The records: of GPUs first, then by the names of their files."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    records = [record for file in files for record in (whole_run(file) if "parts" in file else [file])]
    return sorted(records, key=lambda record: record["machine"]["kind"] != "cuda")


def whole_run(results: Record) -> list[Record]:
    """The records of `bench/gpu/run_all.sh`, which has one for each part that ran benches."""
    return [found for part in results["parts"] for found in part["results"].values() if "rows" in found]


def page(folder: Path) -> str:
    """docs/results.md: everything."""
    records = load(folder)
    gpu = load_gpu(folder / "gpu")
    on_gpu = gpu or any(record["machine"]["kind"] == "cuda" for record in records)
    lines = ["# What has been measured", "", *paragraph(HEAD), *([] if on_gpu else paragraph(NOTHING))]
    lines += ["## In short", "", summary(records, folder), ""]
    lines += gpu_page(gpu) + step_table(records)
    lines += loader_lines(records) + loaders_table(folder / "loaders") + memory_table(folder)
    lines += learning_page(folder / "learning") + downstream_page(folder / "downstream")
    tables = [line for record in records for line in op_tables(record)]
    lines += ["## Ops and blocks", "", *paragraph(OPS), *tables] if tables else ["The ops have not been measured yet."]
    return "\n".join(lines).strip() + "\n"


def wanted(root: Path) -> dict[Path, str]:
    """Contents that the two files are to have. Raises SystemExit where the README has no markers."""
    readme, results = root / "README.md", root / "bench" / "results"
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme}: lacks {BEGIN} or, behind it, {END}")
    part = f"{head}{BEGIN}\n{front(results)}\n{END}{tail}"
    return {readme: part, root / "docs" / "results.md": page(results)}


def main(root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = 0
    for path, text in wanted(root).items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        changed = 1
        if check:
            print(
                f"{path.relative_to(root)} is not what bench/results gives: run python bench/report.py", file=sys.stderr
            )
        else:
            path.write_text(text, encoding="utf-8")
    return changed if check else 0


if __name__ == "__main__":
    sys.exit(main())
