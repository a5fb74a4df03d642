"""The notebooks run from top to bottom with small settings, and show what they say."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SMALL = {"masks": {"SAMPLES": [0, 3]}, "features": {"STEPS": 2, "BATCH": 8, "COUNT": 3}}


def run(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The names that a notebook's cells leave; `parameters` replace those of its cell with the tag parameters."""
    found: dict[str, Any] = {"__name__": "__main__"}
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"{name}.ipynb, code cell {number}", "exec"), found)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= found.keys()
            found.update(parameters)
    return found


@pytest.fixture(autouse=True)
def drawn(monkeypatch, tmp_path):
    """Figures that are shown are counted, not opened; temporary folders are the test's."""
    matplotlib.use("Agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.gcf().axes)))
    yield shown
    plt.close("all")


def test_every_notebook_is_run() -> None:
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == SMALL.keys()


def test_masks(drawn, capsys) -> None:
    found = run("masks", SMALL["masks"])
    assert "patches with two roles: 0" in capsys.readouterr().out
    assert found["group"].crops.shape[0] == 2 * found["cfg"].views.num_global
    assert drawn == [6]


def test_features(drawn, capsys) -> None:
    found = run("features", SMALL["features"])
    out = capsys.readouterr().out
    assert "exit code 0" in out
    assert "width 128" in out
    assert found["patches"].shape[::2] == (3, found["cfg"].model.embed_dim)
    assert 0 <= found["maps"].min() < found["maps"].max() <= 1
    assert drawn == [6]


def test_notebooks_are_kept_without_output() -> None:
    for file in FOLDER.glob("*.ipynb"):
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"{file.name}: clear the outputs"
