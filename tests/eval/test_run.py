"""The loop over weights and shares with a task of the tests' own, and everything that an evaluation refuses."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import rasterio
from eval_support import network, write_csv, write_scenes

from pera_fast import cli
from pera_fast.config import load_config, to_yaml
from pera_fast.errors import UserError
from pera_fast.eval import evaluate
from pera_fast.eval.report import text_table
from pera_fast.eval.task import TaskResult
from pera_fast.page import Section

MESSAGES = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")
WEIGHTS = ("--task", "scene", "--weights", "random:tiny", "--size", "16", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("run") / "data", {"field": 5, "town": 5})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A task in place of the scenes': counts how often features are taken; the metric is the share itself."""
    calls: list[str] = []

    def begin(parts, extractor, options):
        calls.append(extractor.backbone.source)
        return lambda share: TaskResult(
            "iou",
            {"iou": share / 2, "macro_f1": share},
            intervals={"iou": (share / 4, share)},
            sections=[Section("Pictures", f"at {share}")],
            notes=[f"note of {share}"],
        )

    module = types.ModuleType("pera_fast.eval.scene")
    module.begin = begin
    monkeypatch.setitem(sys.modules, "pera_fast.eval.scene", module)
    return calls


def test_features_are_taken_once_for_all_shares(data: Path, tmp_path: Path, counted: list[str]) -> None:
    networks = [network(source="one"), network(source="two")]
    found = evaluate("scene", data, networks, tmp_path / "out", labels=(0.5, 1, 0.25), progress=False)
    assert counted == ["one", "two"]
    assert [entry.share for entry in found.entries] == [1, 0.5, 0.25] * 2
    assert [entry.weights for entry in found.largest] == ["one", "two"]
    assert "one, 50 % of the labels: note of 0.5" in found.notes
    lines = text_table(found).splitlines()
    assert lines[0].split() == ["weights", "labels", "IoU,", "%"]
    assert lines[1].split() == ["one", "100", "%", "(8)", "50.0", "(25.0", "to", "100.0)"]
    assert found.report is not None
    page = found.report.read_text(encoding="utf-8")
    assert "one: Pictures" in page
    assert "at 1" in page
    assert "at 0.5" not in page, "sections are of the largest share"
    assert "note of 0.25" in page


def test_random_takes_the_sizes_of_the_others(data: Path, counted: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(to_yaml(load_config("tiny", ["model.depth=2"])))
    found = evaluate("scene", data, ["random", network(source="given")], size=16, progress=False)
    assert counted == ["random", "given"]
    assert [entry.weights for entry in found.entries] == ["random", "given"]
    with pytest.raises(UserError, match="--weights random: of which sizes"):
        evaluate("scene", data, ["random", "random:tiny"], size=16, progress=False)
    found = evaluate("scene", data, f"random:{recipe}", size=16, progress=False)
    assert found.settings["weights"] == {f"random:{recipe}": f"random:{recipe}"}


def test_random_beside_a_file_is_of_that_file(data: Path, counted: list[str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    small = network()
    state = {name: value.clone() for name, value in small.model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors", metadata={"num_heads": "2"})
    evaluate("scene", data, [tmp_path / "w.safetensors", "random"], progress=False)
    assert counted == [str(tmp_path / "w.safetensors"), f"random:{tmp_path / 'w.safetensors'}"]


def told(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of an evaluation that is refused."""
    assert cli.run(["eval", *map(str, args)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error[len("error: ") : -1]


def test_output_that_cannot_be(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = told(capsys, *WEIGHTS, "--data", data, "--out", data / "out")
    assert inside.startswith(f"--out {data / 'out'}: lies in the folder of images {data}")
    (tmp_path / "file").touch()
    line = told(capsys, *WEIGHTS, "--data", data, "--out", tmp_path / "file")
    assert line == f"--out {tmp_path / 'file'}: is a file; give a folder"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").touch()
    line = told(capsys, *WEIGHTS, "--data", data, "--out", tmp_path / "old")
    assert line == (
        f"--out {tmp_path / 'old'}: holds report.json already; give another folder, or --overwrite to replace it"
    )
    line = told(capsys, *WEIGHTS, "--data", data, "--out", "/proc/out")
    assert line == "--out /proc/out: cannot write there (No such file or directory); give another folder"


OPTIONS = {
    "--labels 0": "--labels 0: wants shares above 0 and at most 1, such as 0.01,0.1,1",
    "--labels 1,x": "--labels 1,x: wants shares above 0 and at most 1, such as 0.01,0.1,1",
    "--pooling meen": "--pooling meen: wants some of cls, mean, both, separated by commas; did you mean mean?",
    "--precision half": "--precision half: wants one of bf16, fp16, fp32",
}


@pytest.mark.parametrize("args", OPTIONS)
def test_options(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: str) -> None:
    assert told(capsys, *WEIGHTS, "--data", data, "--out", tmp_path / "out", *args.split()) == OPTIONS[args]
    assert not (tmp_path / "out").exists()
    assert OPTIONS[args].partition(": ")[2] in MESSAGES


def test_other_options(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--data", data, "--out", tmp_path / "out")
    line = told(capsys, "--task", "scenes", "--weights", "random:tiny", *rest)
    assert line == "--task scenes: no such task; known: scene, segmentation, change; did you mean scene?"
    line = told(capsys, "--task", "scene", "--weights", "random:tiny", "--size", 20, *rest)
    assert line == "--size 20: must be a multiple of the patch size 8; nearest: 16"
    line = told(capsys, "--task", "scene", "--weights", "random:tiny", "--device", "gpu", *rest)
    assert line == "--device gpu: wants one of auto, cpu, cuda; did you mean cpu?"
    line = told(capsys, "--task", "scene", "--weights", "random:tiny", "--weights", "random:tiny", *rest)
    assert line == "--weights random:tiny: is given twice; give each once"
    line = told(capsys, "--task", "scene", "--weights", "random:tiny", "--weights", "no.pt", "--size", 16, *rest)
    assert line.startswith("--weights no.pt: no such file or folder")
    assert line in MESSAGES
    assert not (tmp_path / "out").exists(), "the last weights are looked at before the first take their time"


def test_data_that_cannot_be(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = (*WEIGHTS, "--root", data, "--out", tmp_path / "out", "--data")
    rows = [f"{name}/{n}.png,{name},{'train' if n < 3 else 'test'}" for name in ("field", "town") for n in range(5)]
    table = write_csv(tmp_path / "a.csv", "file,class,split", [row.replace("test", "train") for row in rows])
    line = told(capsys, *rest, table)
    assert line == f"{table}: has no sample of split test; splits: train 10"
    assert line.partition(": ")[2] in MESSAGES
    unknown = [*rows, "field/0.png,river,test", "field/1.png,river,test"]
    table = write_csv(tmp_path / "b.csv", "file,class,split", unknown)
    line = told(capsys, *rest, table)
    assert line == f"{table}: class river of split test is not in split train"
    assert line.partition(": ")[2] in MESSAGES
    table = write_csv(tmp_path / "c.csv", "file,class,split", [*rows, "field/0.png,river,train"])
    line = told(capsys, *rest, table)
    assert line == f"{table}: class river has one image; it wants one to learn from and one to test on"
    assert line.partition(": ")[2] in MESSAGES


def test_images_that_cannot_be(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_scenes(tmp_path / "broken", {"field": 3, "town": 3})
    bad = tmp_path / "broken" / "town" / "1.png"
    bad.write_bytes(b"no image at all")
    line = told(capsys, *WEIGHTS, "--data", tmp_path / "broken", "--out", tmp_path / "out")
    assert line == f"{bad}: cannot be read as an image for evaluation (not an image (begins with b'no image at '))"
    for name in ("field", "town"):
        for number in range(2):
            path = tmp_path / "bands" / name / f"{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(path, "w", driver="GTiff", count=6, height=16, width=16, dtype="uint16") as file:
                file.write(np.ones((6, 16, 16), np.uint16))
    first = tmp_path / "bands" / "field" / "0.tif"
    line = told(capsys, *WEIGHTS, "--data", tmp_path / "bands", "--out", tmp_path / "out2")
    assert line.startswith(f"--weights random:tiny: {first}: has 6 bands, and the weights are of 3 channels without")
    assert line.partition("0.tif: ")[2] in MESSAGES
    assert not caplog.records, "Pillow complains of bands"
    with pytest.raises(UserError, match=r"--weights small: .*0\.png: .*has 3 band\(s\), model\.in_chans is 4"):
        evaluate("scene", data, network(0, "small", "model.in_chans=4"), progress=False)


def test_command_prints_table_and_report(
    data: Path, tmp_path: Path, counted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["eval", *WEIGHTS, "--data", str(data), "--out", str(tmp_path / "out"), "--labels", "0.5,1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:2] == ["weights", "labels"]
    assert len(shown) == 1 + 2 + 2 + 1
    assert shown[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert cli.run(["eval", *WEIGHTS, "--data", str(data), "--out", str(tmp_path / "out"), "--overwrite"]) == 0
