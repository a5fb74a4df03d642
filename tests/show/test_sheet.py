"""The contact sheet shows what training sees: the same crops, colours and masks, for any sample of any epoch."""

import numpy as np
import pytest
import torch
from data_support import small_config, write_scenes
from kept_workers import kept_workers  # noqa: F401 a fixture
from PIL import Image

from pera_fast import cli
from pera_fast.config import to_yaml
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.loading.loader import Loader
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.errors import UserError
from pera_fast.show.panels import HIDDEN, PREDICTED, STUDENT, TEACHER
from pera_fast.show.run import show
from pera_fast.show.sheet import _FADED, _outline, _Sheet, draw_sheet
from pera_fast.train.inputs import make_inputs
from pera_fast.train.redraw import redraw

COUNT, BATCH = 13, 3
CFG = small_config("model.patch_size=16")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder / "images", COUNT, 96, 80)
    manifest = build_index(folder / "images", out=folder / "index.parquet", workers=1, progress=False)
    return folder / "images", manifest


def batches(manifest, tmp_path, at):
    """(batch, inputs) of training at some micro-steps."""
    found = {}
    for step in at:
        with Loader(
            CFG,
            manifest,
            batch_size=BATCH,
            device=torch.device("cpu"),
            skipped=SkippedFiles(tmp_path / "skipped.csv"),
            start_micro_step=step,
            transform=lambda batch: (batch, make_inputs(batch, CFG)),
        ) as loader:
            found[step] = next(loader)
    return found


def tensors(inputs):
    return [value for group in (inputs.global_, inputs.local) for value in vars(group).values() if value is not None]


def of_sample(tensor, slot, batch):
    """One image's crops of a crop-major tensor."""
    return tensor.view(-1, batch, *tensor.shape[1:])[:, slot]


def test_redrawn_samples_are_those_of_training(data, tmp_path):
    _, manifest = data
    skipped = SkippedFiles(tmp_path / "skipped.csv")
    for step, (batch, inputs) in batches(manifest, tmp_path, (0, 9)).items():
        assert batch.epoch == step // (COUNT // BATCH)
        again = redraw(CFG, manifest, batch.epoch, batch.samples.tolist(), skipped)
        assert again.batch.samples.tolist() == batch.samples.tolist()
        assert len(tensors(inputs)) == 16
        assert all(torch.equal(a, b) for a, b in zip(tensors(inputs), tensors(again.inputs), strict=True))
        alone = redraw(CFG, manifest, batch.epoch, [int(batch.samples[1])], skipped)
        for together, single in zip(tensors(inputs), tensors(alone.inputs), strict=True):
            assert torch.equal(of_sample(together, 1, BATCH), of_sample(single, 0, 1))
        other = redraw(CFG, manifest, batch.epoch + 1, batch.samples.tolist(), skipped)
        assert not torch.equal(other.inputs.global_.crops, inputs.global_.crops)


def test_what_cannot_be_read_is_stood_in_for_as_in_training(tmp_path):
    root = tmp_path / "images"
    names = write_scenes(root, COUNT, 96, 80)
    manifest = build_index(root, out=tmp_path / "index.parquet", workers=1, progress=False)
    lost = int(SampleOrder(COUNT, seed=CFG.train.seed, batch_size=BATCH)(0)[1][1])
    (root / names[lost]).write_bytes(b"gone")
    ((batch, inputs),) = batches(manifest, tmp_path, (0,)).values()
    again = redraw(CFG, manifest, 0, [lost], SkippedFiles(tmp_path / "other.csv"))
    assert again.batch.samples[0] == batch.samples[1] != lost
    assert torch.equal(of_sample(inputs.global_.crops, 1, BATCH), again.inputs.global_.crops)
    assert draw_sheet(CFG, manifest, 0, [lost], again).height > 256


def test_a_view_shows_what_is_seen_as_it_is_and_fades_the_rest(data, tmp_path):
    _, manifest = data
    drawn = redraw(CFG, manifest, 0, [0], SkippedFiles(tmp_path / "skipped.csv"))
    sheet = _Sheet(CFG, drawn)
    group = drawn.inputs.global_
    size, patch = group.crops.shape[1], CFG.model.patch_size
    marks = [(group.student_index[0].numpy(), STUDENT), (group.predicted_index[0].numpy(), PREDICTED)]
    view = sheet._groups[0].student[0]
    picture = np.asarray(sheet._seen(view, marks, size)).astype(int)
    faded = view * (1 - _FADED) + HIDDEN * _FADED
    for number in range((size // patch) ** 2):
        y, x = divmod(number, size // patch)
        inside = np.s_[y * patch + 3 : (y + 1) * patch - 3, x * patch + 3 : (x + 1) * patch - 3]
        expected = view if number in marks[0][0] else faded
        assert np.abs(picture[inside] - expected[inside].clip(0, 1) * 255).max() <= 1
    seen, teacher = set(marks[0][0].tolist()), set(group.teacher_index[0].tolist())
    assert seen.isdisjoint(teacher)
    colors = {tuple(color) for color in picture.reshape(-1, 3)}
    for color in (STUDENT, PREDICTED):
        assert tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) in colors


def test_an_outline_goes_around_a_region_and_not_through_it():
    image = Image.new("RGB", (80, 80), "#ffffff")
    region = np.zeros((4, 4), bool)
    region[1:3, 1:3] = True
    _outline(image, region, TEACHER)
    pixels = np.asarray(image)
    drawn = (pixels != 255).any(-1)
    assert drawn[20:22, 20:60].all()
    assert drawn[20:60, 58:60].all()
    assert not drawn[24:56, 24:56].any()
    assert not drawn[:20].any()
    assert not drawn[60:].any()


@pytest.mark.parametrize("overrides", [[], ["views.num_global=1", "views.num_local=0", "model.masking=none"]])
def test_the_sheet_of_any_recipe(data, tmp_path, overrides):
    root, manifest = data
    out = tmp_path / "sheet.png"
    said = show(root, out, recipe="tiny", count=2, overrides=[*overrides, f"data.index={manifest.path}"])
    with Image.open(out) as opened:
        assert said == f"{out}: 2 sample(s) of epoch 0, {opened.width} x {opened.height} pixels"
        assert opened.height > 2 * 256
        assert len(opened.getcolors(2**24) or []) > 1000


def test_a_runs_own_settings_and_numbers(data, tmp_path, capsys):
    root, manifest = data
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(CFG))
    manifest.save(run / "index.parquet")
    out = tmp_path / "sheet.png"
    line = ["data", "show", str(root), "--run", str(run), "--sample", "3", "--epoch", "2", "--out", str(out)]
    assert cli.run(line) == 0
    first = out.read_bytes()
    capsys.readouterr()
    line[line.index("2")] = "1"
    assert cli.run(line) == 2
    assert capsys.readouterr().err == (
        f"error: --out {out}: exists already; give another name, or --overwrite to replace it\n"
    )
    assert out.read_bytes() == first
    assert cli.run([*line, "--overwrite"]) == 0
    assert out.read_bytes() != first
    out = tmp_path / "other.png"
    with pytest.raises(UserError, match=r"train.seed=1: --run takes the run's own settings; leave one of the two out"):
        show(root, out, run=run, overrides=["train.seed=1"])
    with pytest.raises(UserError, match=r"--run .*none: holds no run \(config.yaml and index.parquet\)"):
        show(root, out, run=tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"samples": [13]}, "--sample 13: there are 13 samples, 0 to 12"),
        ({"epoch": -1}, "--epoch -1: epochs are counted from 0"),
        ({"count": 65}, "a sheet shows 1 to 64 samples"),
        ({"out": "sheet.jpg"}, "--out sheet.jpg: give the name of a .png file in a folder that exists"),
    ],
)
def test_wrong_use_is_one_line(data, tmp_path, options, line):
    given = {"out": tmp_path / "sheet.png", "recipe": "tiny", "overrides": [f"data.index={data[1].path}"], **options}
    with pytest.raises(UserError) as caught:
        show(data[0], **given)
    assert str(caught.value) == line


def test_many_deep_bands_are_shown_by_their_colours(tmp_path):
    from data_support import raster

    root = tmp_path / "data"
    root.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        bands = rng.uniform(100, 3000, (6, 4, 4)).repeat(16, 1).repeat(16, 2).astype(np.uint16)
        (root / f"{number}.tif").write_bytes(raster(bands))
    given = ["model.in_chans=6", "views.rgb_bands=[4,3,2]", f"data.index={tmp_path / 'i.parquet'}"]
    out = tmp_path / "sheet.png"
    show(root, out, recipe="tiny", count=2, overrides=given)
    with Image.open(out) as opened:
        whole = np.asarray(opened.crop((8, 58, 264, 314)).convert("RGB"))
    assert whole.std() > 20
    assert len(np.unique(whole.reshape(-1, 3), axis=0)) > 14
