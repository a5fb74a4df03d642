"""Exported folders: timm and onnxruntime give the same features, and the way back is exact."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm_support import import_timm

from pera_fast import cli
from pera_fast.config import Config, load_config
from pera_fast.errors import UserError
from pera_fast.features.dense import features
from pera_fast.interop import onnx as onnx_module
from pera_fast.interop.export import Exported, export
from pera_fast.interop.graph import PlainTransformer
from pera_fast.weights.backbone import Backbone, random_backbone
from pera_fast.weights.load import load_backbone

TWELVE = [
    "model.in_chans=12", "data.bands=[1,2,3,4,5,6,7,8,9,10,11,12]", "data.depth=16", "data.band_scale=given",
    "data.band_range=" + str([[10 * i, 3000 + i] for i in range(12)]).replace(" ", ""),
]  # fmt: skip


def backbone(*overrides: str) -> Backbone:
    small = ["model.embed_dim=32", "model.depth=2", "model.num_heads=4", "views.global_size=48"]
    made = random_backbone(load_config("tiny", [*small, *overrides]), "random:tiny")
    with torch.no_grad():
        for p in made.model.parameters():  # initial biases are zero, and hide what does not add them
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Exported]:
    made = backbone()
    has_onnx = not onnx_module.missing()
    return made, export(made, tmp_path_factory.mktemp("export") / "model", ["timm", "onnx"] if has_onnx else ["timm"])


def pixels(cfg: Config, size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, cfg.model.in_chans, size, size, generator=torch.Generator().manual_seed(0))


def want(made: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    views = made.cfg.views
    shape = (1, -1, 1, 1)
    normalised = (images - torch.tensor(views.mean).view(shape)) / torch.tensor(views.std).view(shape)
    return features(made.model, normalised, views.mean, views.std)


def test_timm_loads_the_folder_with_nothing_else_said(exported: tuple[Backbone, Exported]) -> None:
    import_timm()
    import timm

    made, found = exported
    vit = timm.create_model(f"local-dir:{found.folder}", pretrained=True).eval()
    cfg = made.cfg
    images, views = pixels(cfg, cfg.views.global_size), cfg.views
    normalised = (images - torch.tensor(views.mean).view(1, 3, 1, 1)) / torch.tensor(views.std).view(1, 3, 1, 1)
    cls, patches = want(made, images)
    with torch.no_grad():
        tokens, pooled = vit.forward_features(normalised), vit(normalised)
    assert (pooled - cls).abs().max() < 1e-5
    assert (tokens[:, 1:] - patches).abs().max() < 1e-5
    told = vit.pretrained_cfg
    assert (list(told["mean"]), list(told["std"])) == (views.mean, views.std)
    assert tuple(told["input_size"]) == (3, 48, 48)
    assert "pera_fast" in json.loads((found.folder / "config.json").read_text())


@pytest.mark.parametrize("size", [48, 40, 72])
def test_the_plain_network_is_ours_at_every_size(exported: tuple[Backbone, Exported], size: int) -> None:
    made, _ = exported
    images = pixels(made.cfg, size)
    with torch.no_grad():
        got = PlainTransformer(made)(images)
    for one, other in zip(got, want(made, images), strict=True):
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("size", [48, 56])
def test_onnxruntime_gives_the_same_features(exported: tuple[Backbone, Exported], size: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    made, found = exported
    if found.onnx_error is None:
        pytest.skip("onnx is not installed")
    assert found.onnx_error < 1e-4
    session = onnxruntime.InferenceSession(found.folder / "model.onnx")
    images = pixels(made.cfg, size, 3)
    got = session.run(["cls", "patches"], {"pixels": images.numpy()})
    for one, other in zip(got, want(made, images), strict=True):
        assert np.abs(one - other.numpy()).max() < 1e-4
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == made.cfg.views.mean
    assert "not normalised" in metadata["input"]


@pytest.mark.parametrize("overrides", [[], TWELVE], ids=["rgb", "12 bands"])
def test_the_folder_loads_back(overrides: list[str], tmp_path: Path) -> None:
    made = backbone(*overrides)
    export(made, tmp_path / "model", ["timm"], license_="cc-by-4.0")
    again = load_backbone(tmp_path / "model")
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in made.model.state_dict().items())
    for name in ("bands", "band_scale", "band_range", "depth"):
        assert getattr(again.cfg.data, name) == getattr(made.cfg.data, name), name
    assert again.cfg.views.mean == made.cfg.views.mean
    assert again.cfg.views.global_size == 48
    card = (tmp_path / "model" / "README.md").read_text()
    assert "cc-by-4.0" in card
    if overrides:
        assert "110 to 3011" in card
        assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12" in card


def test_the_card_has_the_numbers_of_run_and_evaluation(tmp_path: Path) -> None:
    made = backbone()
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 1, "epoch": 0, "loss": 5.0}, {"step": 2, "epoch": 0, "loss": 4.25, "probe_knn": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ep')
    report = {"task": "scene", "results": [{"weights": "run", "metrics": {"accuracy": 0.625}}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    named = Backbone(made.model, made.cfg, str(run))
    export(named, tmp_path / "model", ["timm"], evaluation=tmp_path / "report.json")
    card = (tmp_path / "model" / "README.md").read_text()
    for told in ("| last loss | 4.25 |", "50.0% at step 2", "| run | scene | accuracy 0.6250 |"):
        assert told in card
    assert str(tmp_path) not in card


def test_wrong_uses_get_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = backbone()
    export(made, tmp_path / "model", ["timm"])
    (tmp_path / "file").write_text("")
    (tmp_path / "report.json").write_text("{}")
    cases = [
        ({"out": tmp_path / "model", "formats": ["timm"]}, "exists already"),
        ({"out": tmp_path / "new", "formats": ["onxn"]}, "did you mean onnx?"),
        ({"out": tmp_path / "file", "formats": ["timm"]}, "is a file; give a folder"),
        ({"out": tmp_path / "new", "formats": ["timm"], "evaluation": tmp_path / "report.json"}, "holds no results"),
    ]
    for given, told in cases:
        with pytest.raises(UserError) as caught:
            export(made, **given)
        assert told in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert cli.run(["export", "--weights", str(tmp_path / "nothing"), "--out", str(tmp_path / "new")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert (
        cli.run(["export", "--weights", str(tmp_path / "model"), "--out", str(tmp_path / "b"), "--formats", "timm"])
        == 0
    )


def test_without_onnx_there_is_a_note_or_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_module, "missing", lambda: ["onnxscript"])
    made = backbone()
    with pytest.raises(UserError, match=r"onnxscript is missing: pip install 'pera-fast\[onnx\]'"):
        export(made, tmp_path / "a", ["onnx"])
    found = export(made, tmp_path / "b")
    assert "no model.onnx" in found.summary
    assert not (found.folder / "model.onnx").exists()


def test_a_wrong_graph_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_module, "missing", lambda: [])
    monkeypatch.setattr(onnx_module, "_export", lambda model, pixels, patch, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx_module, "_describe", lambda *_: None)
    monkeypatch.setattr(onnx_module, "_difference", lambda *_: 0.01)
    with pytest.raises(UserError, match="differ from PyTorch's by"):
        export(backbone(), tmp_path / "model", ["onnx"])
    assert not (tmp_path / "model" / "model.onnx").exists()
