"""The files and tables of a profile: from known points, and from a real run of a tiny network on the CPU."""

import csv
import json
import re
from pathlib import Path

import pytest
from profile_support import GIB, SMALL, line, synthetic
from profile_support import SPARSE as VARIANT
from rich.console import Console

from pera_fast.errors import UserError
from pera_fast.profile import count
from pera_fast.profile import run as module
from pera_fast.profile.measure import measure
from pera_fast.profile.points import RATIOS, Point, Variant
from pera_fast.profile.run import profile, write
from pera_fast.profile.tables import PARTS, Profile, notes, show

PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize("device", ["simulate", "cuda", "cpu"])
def test_everything_is_written(device: str, tmp_path: Path) -> None:
    found = synthetic(device)
    write(found, tmp_path)
    pictures = {"memory", "breakdown"} if device == "simulate" else {"memory", "throughput"}
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.glob("*.png"))

    rows = list(csv.DictReader((tmp_path / "profile.csv").open(encoding="utf-8")))
    assert [row["batch_size"] for row in rows] == ["8", "16", "32"] * 2
    assert int(rows[0]["peak"]) == round(2.8 * GIB)
    assert rows[5]["status"] == "out of memory"
    assert (device == "simulate") == ("peak: student mlp" in rows[0])

    data = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert len(data["points"]) == 6
    assert data["fits"][0]["slope"] == pytest.approx(0.1 * GIB)
    assert data["sparse_against_dense"][0]["memory_ratio"] == pytest.approx(4.0)
    usable = 24e9 - 1e9 if device == "cuda" else 24e9 * 0.95 - 1e9
    largest = {} if device == "cpu" else {"24": int((usable / GIB - 2) / 0.1)}
    assert {card: n for card, n in data["fits"][0]["largest_batch"].items() if card == "24"} == largest

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/png;base64,', page)) == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert "4.00x less memory an image" in page
    assert "a &lt;test&gt; device" in page
    assert "tried to allocate 7 GiB" in page


def test_tables_are_shown_whole() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(synthetic("simulate"), console)
    text = console.export_text()
    for word in ("tiny 0.2/0.6 none", "tiny dense none", "out of memory", "102.4", "192 GB", "student mlp"):
        assert word in text
    assert "tried to allocate 7 GiB" in text


@pytest.mark.parametrize("device", ["simulate", "cpu"])
def test_legends_lie_beside_the_curves_and_no_two_are_alike(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve variants: three recipes with four policies of recomputation or masks each."""
    from pera_fast.profile import plots

    settings = [("model.recompute=none",), ("model.recompute=cheap",), ("model.recompute=block",)]
    settings.append(("model.recompute=none", "model.masking=none"))
    variants = [Variant(recipe, more) for recipe in ("tiny", "vit_s16", "vit_b16") for more in settings]
    points = [p for number, variant in enumerate(variants) for p in line(variant, device, 1, 0.1 * (number + 1))]
    figures = []
    monkeypatch.setattr(plots, "png", figures.append)
    plots.memory(Profile({"device": device, "device_name": "d", "torch": "2"}, points, [8, 16, 32]))
    (axes,) = figures[0].axes
    figures[0].draw_without_rendering()
    legend = axes.get_legend()
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert [text.get_text() for text in legend.get_texts()] == [variant.label() for variant in variants]
    assert len({curve.get_color() for curve in legend.get_lines()}) == 12
    plots.plt.close(figures[0])


def test_parts_of_the_plots_are_all_that_there_are() -> None:
    from pera_fast.profile.plots import PART_COLOURS

    assert set(PART_COLOURS) == set(PARTS)


def test_real_steps_on_the_cpu(tmp_path: Path, capsys) -> None:
    settings = [*SMALL, "train.precision=fp32", "model.recompute=none"]
    found = profile(["tiny"], tmp_path, "cpu", "2", settings, dense=False, steps=2)
    assert [p.status for p in found.points] == ["ok"]
    for p in found.points:
        assert p.peak > 50 * 2**20
        assert p.images_per_s == pytest.approx(p.batch_size / p.step_seconds[0])
        median, least, most = p.step_seconds
        assert least <= median <= most
        assert p.mfu is None, "a CPU's peak is not known"
    assert "tiny 0.2/0.6 none" in capsys.readouterr().out
    assert (tmp_path / "throughput.png").exists()
    assert found.machine["threads"] >= 1


def test_a_simulated_profile_looks_further(tmp_path: Path, monkeypatch) -> None:
    asked: list[Point] = []

    def run_points(points, jobs, done):
        asked.extend(points)
        return line(VARIANT, "simulate", 2, 0.1, tuple(p.batch_size for p in points))

    monkeypatch.setattr(module, "run_points", run_points)
    found = profile(["tiny"], tmp_path, "simulate", "8,16", ["model.recompute=none"], dense=False)
    assert [p.batch_size for p in asked] == [8, 16, 64, 128]
    assert found.sizes == [8, 16]


def test_mask_ratios_have_a_picture_of_their_own(tmp_path: Path, monkeypatch) -> None:
    def run_points(points, jobs, done):
        seen = [p.variant.config(1).model.student_ratio for p in points]
        pairs = zip(points, seen, strict=True)
        return [line(p.variant, "simulate", 2, 0.1 + share, (p.batch_size,))[0] for p, share in pairs]

    monkeypatch.setattr(module, "run_points", run_points)
    found = profile(["tiny"], tmp_path, "simulate", "8,16", ["model.recompute=none"], dense=False, sweep_ratios=True)
    assert len(found.fits()) == len(RATIOS)
    assert {p.batch_size for p in found.points if p.variant.purpose == "ratios"} == {64, 128}
    assert (tmp_path / "ratios.png").read_bytes().startswith(PNG)
    assert "Mask ratios" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_measured_and_simulated_are_compared(tmp_path: Path, monkeypatch) -> None:
    def run_points(points, jobs, done):
        return line(VARIANT, points[0].device, 2, 0.1, tuple(p.batch_size for p in points))

    monkeypatch.setattr(module, "run_points", run_points)
    found = profile(["tiny"], tmp_path, "cpu", "8,16", ["model.recompute=none"], dense=False, compare=True)
    assert [c.ratio for c in found.comparisons] == [pytest.approx(1.0)]
    assert "Simulated against measured" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_point_that_ran_is_an_error(tmp_path: Path, monkeypatch) -> None:
    failed = [Point(VARIANT, 8, "cpu", status="failed", note="no such luck")]
    monkeypatch.setattr(module, "run_points", lambda *_: failed)
    with pytest.raises(UserError, match="no point could be run; the first: failed: no such luck"):
        profile(["tiny"], tmp_path, "cpu", "8", ["model.recompute=none"], dense=False)


def test_one_batch_size_gives_points_without_a_line(tmp_path: Path) -> None:
    found = Profile({"device": "simulate"}, line(VARIANT, "simulate", 2, 0.1, (8,)), [8])
    write(found, tmp_path)
    assert json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["fits"] == []


def test_a_simulated_profile_predicts_times_on_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work and times of each point in profile.json; GPUs that train together exchange gradients."""
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "FAR", ())
    one = measure(Point(Variant("tiny", (*SMALL, "model.recompute=none")), 2, "simulate")).to_json()
    profile(["tiny"], tmp_path, "simulate", "2", SMALL, policies="none", dense=False, jobs=1, world_size=2)
    two = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))["points"][0]
    for what in ("launches", "bytes", "flops"):
        assert one[what] > 0
        assert sum(part[what] for part in one["work"].values()) == pytest.approx(one[what])
    assert {"A100", "H100", "H200", "B200", "L40S", "RTX 4090"} == set(one["predicted"])
    assert one["predicted"]["H200"]["images_per_s"] == pytest.approx(2000 / one["predicted"]["H200"]["ms"])
    assert "exchange" not in one["work"]
    assert two["work"]["exchange"]["bytes"] > 0
    assert two["predicted"]["L40S"]["ms"] > one["predicted"]["L40S"]["ms"]
    row = next(csv.DictReader((tmp_path / "profile.csv").open(encoding="utf-8")))
    assert float(row["ms: H200"]) == two["predicted"]["H200"]["ms"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{two['predicted']['RTX 4090']['ms']:.1f}" in page
    assert f"{two['launches']} / {two['bytes'] / 1e9:.1f} / {two['flops'] / 1e12:.1f}" in page


def test_without_triton_the_profile_says_why_it_predicts_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count, "why_not", lambda: "there is no Triton")
    point = measure(Point(Variant("tiny", tuple(SMALL)), 2, "simulate"))
    assert point.ok
    assert point.predicted == {}
    assert notes(Profile({"device": "simulate"}, [point], [2])) == ["no predicted times: there is no Triton"]
