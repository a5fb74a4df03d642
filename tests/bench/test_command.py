"""`pera-fast bench`: what it makes of wrong input, as docs/messages.md has it, and of a run that ends early."""

import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from pera_bench import command
from pera_bench.command import Wish
from pera_fast import cli

ROOT = Path(__file__).resolve().parents[2]
WRONG = {
    "bench atention": "atention: no such bench; known: contrast_mean, visible_patches, embed_tokens, sequence_norm,"
    " attention, sequence_add, add_norm, gelu, linear_gelu, query_attention, cls_attention, add_norm_fp8,"
    " gelu_fp8, quantize_rows, mask_tokens, column_sums, transposed, unit_rows, distillation_loss,"
    " koleo, prototype_losses, pixel_loss, block, update,"
    " step, crop_resize, data; did you mean attention?",
    "bench step/all": "step/all: no such case; step has none, cheap, block",
    "bench koleo --device gpu": "--device gpu: wants cpu or cuda",
    "bench koleo --precision half": "--precision half: wants bf16, fp16 or fp32",
    "bench koleo --images 0": "--images 0: wants whole numbers from 1 on, separated by commas",
    "bench koleo --compare old.json": "old.json: cannot be read (No such file or directory); give a file that --json"
    " wrote",
    "bench koleo --compare notes.txt": "notes.txt: is not a file that pera-fast bench --json wrote",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line_and_2(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    assert cli.run(line.split()) == 2
    assert capsys.readouterr().err == f"error: {WRONG[line]}\n"
    assert WRONG[line] in (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")


def test_no_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.run(["bench", "koleo", "--device", "cuda"]) == 2
    assert_documented(capsys.readouterr().err, "--device cuda: torch sees no GPU")


def test_no_pytest_benchmark_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.run(["bench", "koleo"]) == 2
    assert_documented(capsys.readouterr().err, "pip install 'pera-fast[bench]'")


def assert_documented(said: str, part: str) -> None:
    assert part in said
    assert said.count("\n") == 1
    assert said.removeprefix("error: ").strip() in (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")


def runner(monkeypatch, code: str) -> None:
    """Stands in for the process that measures."""
    monkeypatch.setattr(command, "check", lambda wish: None)
    monkeypatch.setattr(
        command, "command", lambda wish, rows: [command.sys.executable, "-c", f"rows = {str(rows)!r}\n{code}"]
    )


HEAD = '{"machine": {"device": "Chip"}, "ceilings": {}}'


def test_what_was_measured_before_a_crash_is_kept(monkeypatch):
    runner(monkeypatch, f"open(rows, 'w').write('{HEAD}\\n'); import os; os.abort()")
    record = command.measure(Wish(device="cpu"), Console(quiet=True))
    assert record.machine == {"device": "Chip"}
    assert record.failed == [{"bench": "the run", "reason": f"ended with status {-signal.SIGABRT}"}]


def test_what_was_measured_before_sigterm_is_kept(monkeypatch):
    runner(monkeypatch, f"open(rows, 'w').write('{HEAD}\\n'); import time; time.sleep(60)")

    def follow(process, rows, console):
        while not rows.exists() or not rows.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(command, "_follow", follow)
    record = command.measure(Wish(device="cpu"), Console(quiet=True))
    assert record.machine == {"device": "Chip"}
    assert record.failed == [{"bench": "the run", "reason": f"ended with status {-signal.SIGTERM}"}]


def test_a_runner_that_does_not_start_is_a_bug_that_says_why(monkeypatch):
    runner(monkeypatch, "raise SystemExit('no module')")
    with pytest.raises(RuntimeError, match="did not start: no module"):
        command.measure(Wish(device="cpu"), Console(quiet=True))


def test_options_of_the_runner():
    made = command.command(Wish(device="cuda", sweep=True, only="all", threads=3), Path("R"))
    assert {"--recipes=vit_s16,vit_b16,vit_g16", "--images=4,16,64", "--precision=bf16", "--only=all"} <= set(made)
    made = command.command(
        Wish(benches=["koleo", "block"], device="cpu", recipes="tiny", images="3", remeasure=True), Path("R")
    )
    assert "--remeasure" in made
    assert "--processor-time" not in made
    assert {"--suites=koleo,block", "--recipes=tiny", "--images=3", "--precision=fp32", "--rows=R"} <= set(made)
    assert command.environment(Wish(threads=3))["OMP_NUM_THREADS"] == "3"
