"""The README says what was measured, and what its commands name exists."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_measurements_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "bench" / "report.py", "--check"], check=False)
    assert done.returncode == 0, "run python bench/report.py"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_operators_are_all_named() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for op in (ROOT / "kernels" / "pera_kernels").glob("*/op.py"):
        assert f"`{op.parent.name}`" in text
