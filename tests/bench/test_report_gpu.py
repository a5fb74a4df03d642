"""The GPU's part of the report: what it reads, what it says, what it leaves out."""

import json
from pathlib import Path

import pytest

import report_front
import report_gpu
from pera_bench import quick

COMMON = {"device": "H200", "torch": "2.11", "cudnn": "9", "commit": "abc", "date": "2026-11-26", "precision": "bf16"}


def line(part: str, batch: int, ms: float, **more):
    times = {"ms": ms, "ms_min": ms - 1, "ms_max": ms + 1, "images_per_s": 1000 * batch / ms}
    memory = {"peak_mib": 10, "reserved_mib": 20}
    what = {"part": part, "recipe": "vit_b16", "batch": batch, "settings": [], "backend": None, "mfu": 0.41}
    return {**COMMON, **what, **times, **memory, **more}


def made(tmp_path: Path) -> list[dict]:
    lines = [
        line("step", 64, 50.0),
        line("step", 64, 60.0, settings=["model.recompute=cheap"]),
        line("published", 64, 150.0, mfu=None, attention="xformers"),
        {**line("trace", 64, 1.0), "busy_ms": 1.0},
    ]
    run = {
        "part": "pretrain",
        "settings": ["data.decode_on=gpu"],
        "batch": 64,
        "images_per_s": 1205.0,
        "data_wait": 0.01,
    }
    file = report_gpu.from_quick([*lines, {**COMMON, **run}])
    (tmp_path / "k.csv").write_text('ms_per_step,launches_per_step,kernel\n3.5,2.0,"a, b|c"\n1.0,1.0,d\n')
    (tmp_path / "1.json").write_text(json.dumps({**file, "kernels": "k.csv"}))
    return report_gpu.load_gpu(tmp_path)


def test_ratio_is_of_the_same_batch_and_run(tmp_path: Path) -> None:
    text = "\n".join(report_gpu.gpu_summary(made(tmp_path)))
    assert "| 64 | 50.0 | 1280 | 41 % | 20 | 150.0 | 20 | 3.00 |" in text
    assert "60.0" not in text  # the summary shows what runs as it comes


def test_page_has_every_row_and_says_what_ran(tmp_path: Path) -> None:
    text = "\n".join(report_gpu.gpu_page(made(tmp_path)))
    assert "pera-fast, model.recompute=cheap | 60.0 (59.0 to 61.0)" in text
    assert "published (attention: xformers) | 150.0" in text
    assert "data.decode_on=gpu | 1205 | 1280 | 94 % | 1.0 %" in text
    assert "| 3.50 | 2 | `a, b c` |" in text
    assert "Together 4.5 ms and 3 launches." in text


def shares_page(tmp_path: Path, trace: dict) -> str:
    """The page's table of shares, for a trace of four kernels."""
    file = {**report_gpu.from_quick([line("step", 64, 50.0), trace]), "kernels": "k.csv"}
    rows = "1.0,2.0,one\n0.9,3.0,two\n0.8,1.0,unknown\n0.002,1.0,short\n"
    (tmp_path / "k.csv").write_text("ms_per_step,launches_per_step,kernel\n" + rows)
    (tmp_path / "1.json").write_text(json.dumps(file))
    text = "\n".join(report_gpu.gpu_page(report_gpu.load_gpu(tmp_path)))
    return text.partition("Our Triton kernels")[2]


COUNTED = {"one": (2, 3_000_000_000), "two": (9, 5), "short": (1, 8_000_000), "absent": (1, 1)}


def test_kernels_have_a_share_of_the_bandwidth(tmp_path: Path) -> None:
    """All that the count knows with the launches that the trace has, and their sum."""
    text = shares_page(tmp_path, line("trace", 64, 1.0, copy=4e12, counted=COUNTED))
    assert "a large copy (4.00 TB/s, measured after the trace; goal 85 %)" in text
    assert "| `one` | 1.000 | 2 | 3.000 | 3.00 | 75 % |" in text
    assert "| `short` | 0.002 | 1 | 0.008 | 4.00 | 100 % |" in text
    assert "| together | 1.002 | 3 | 3.008 | 3.00 | 75 % |" in text
    assert "Left out, as the count has other launches than the trace: two." in text
    assert not any(name in text for name in ("unknown", "absent"))


@pytest.mark.parametrize("more", [{}, {"uncounted": "TypeError: no"}, {"counted": {"absent": (1, 1)}}])
def test_a_trace_without_a_count_has_its_kernels(tmp_path: Path, more: dict) -> None:
    assert shares_page(tmp_path, line("trace", 64, 1.0, copy=4e12, **more)) == ""
    assert "| 0.90 | 3 | `two` |" in "\n".join(report_gpu.gpu_page(report_gpu.load_gpu(tmp_path)))


def test_what_was_not_counted_there_is_counted_here(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """At the commit that was measured alone."""
    monkeypatch.setattr(quick, "machine", lambda _: COMMON)
    monkeypatch.setattr(quick, "count_traced", lambda row: {"counted": {"one": (1, row["batch"])}})
    trace = line("trace", 64, 1.0, copy=4e12, uncounted="TypeError: no")
    assert report_gpu.with_count(trace)["counted"] == {"one": (1, 64)}
    assert "counted" not in report_gpu.with_count({**trace, "commit": "def"})
    assert "TypeError: no; git checkout def" in capsys.readouterr().out
    for row in (line("step", 64, 1.0), {**trace, "counted": COUNTED}):
        assert report_gpu.with_count(row) is row


def test_lines_of_two_commits_are_refused() -> None:
    with pytest.raises(SystemExit, match="one file for each"):
        report_gpu.from_quick([line("step", 16, 20.0), line("step", 64, 50.0, commit="def")])


def test_a_folder_of_the_whole_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts' results, some without a measurement, and the trace's kernels."""
    out, folder = tmp_path / "out", tmp_path / "gpu"
    (out / "trace-64").mkdir(parents=True)
    folder.mkdir()
    (out / "trace-64" / "kernels.csv").write_text("ms_per_step,launches_per_step,kernel\n3.5,2.0,a\n")
    parts = [
        {"name": "tests", "results": {}},
        {"name": "step-64", "results": {"step-64": line("step", 64, 50.0)}},
        {"name": "ops", "results": {"record": {"rows": []}, "list": [1]}},
        {"name": "trace-64", "results": {"trace-64": {**line("trace", 64, 1.0), "busy_ms": 1.0}}},
    ]
    (out / "results.json").write_text(json.dumps({"parts": parts}))
    monkeypatch.setattr("sys.argv", ["report_gpu.py", str(out), "--name", "3-x", "--folder", str(folder)])
    report_gpu.main()
    (file,) = report_gpu.load_gpu(folder)
    assert [row["ms"] for row in file["steps"]] == [50.0]
    assert "| 3.50 | 2 | `a` |" in "\n".join(report_gpu.gpu_page([file]))


def test_nothing_measured_gives_nothing(tmp_path: Path) -> None:
    assert report_gpu.gpu_summary(report_gpu.load_gpu(tmp_path)) == []
    assert report_gpu.gpu_page(report_gpu.load_gpu(tmp_path)) == []


def test_training_from_files_has_a_row_for_each_decoder(tmp_path: Path) -> None:
    run = {"part": "pretrain", "settings": [], "batch": 64, "images_per_s": 900.0, "data_wait": 0.0}
    decoders = {"cpu": {"images_per_s": 1000.0, "data_wait": 0.5, "host_ms": 40.0, "host_waited_ms": 30.0}}
    file = report_gpu.from_quick([line("step", 64, 64.0), {**COMMON, **run, "decoders": decoders}])
    assert [row["settings"] for row in file["pretrain"]] == [[], ["data.decode_on=cpu"]]
    (tmp_path / "1.json").write_text(json.dumps(file))
    text = "\n".join(report_gpu.gpu_page(report_gpu.load_gpu(tmp_path)))
    assert "batch 64, as it comes | 900 | 1000 | 90 % | 0.0 % |  |  |" in text
    assert "batch 64, data.decode_on=cpu | 1000 | 1000 | 100 % | 50.0 % | 40.0 | 30.0 |" in text


def test_front_has_a_number_of_each_kind_with_its_device(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    made(tmp_path / "gpu")
    text = " ".join(report_front.front(tmp_path).split())
    assert text.startswith("- **3.00 times as fast** as the published implementation: a vit_b16 training step in bf16")
    assert "50.0 ms (1280 images/s) and 20 MiB of GPU memory; theirs takes 150.0 ms" in text
    assert "H200 (abc, 2026-11-26)" in text
    assert "JPEG" not in text  # training from files was measured with a setting, not as it comes
    file = json.loads((tmp_path / "gpu" / "1.json").read_text())
    file["pretrain"][0]["settings"] = []
    (tmp_path / "gpu" / "1.json").write_text(json.dumps(file))
    text = " ".join(report_front.front(tmp_path).split())
    assert "- **1205 images/s** when it trains from 512 px JPEG files at batch 64: 94 % of what" in text
    assert report_front.front(tmp_path / "none") == report_front.NOTHING
