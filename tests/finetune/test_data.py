"""Training samples: image and mask are changed alike, draws are keyed, and what cannot be read is replaced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_support import masks, small_config
from PIL import Image

from pera_fast.config import Config
from pera_fast.config.finetune import load_finetune
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.errors import UserError
from pera_fast.features.masks import IGNORED, Masks
from pera_fast.features.samples import Samples, read_samples
from pera_fast.finetune.data import LabelledData, Length, length_of, micro_batches


def _config(task: str, *more: str) -> Config:
    settings = ["train.precision=fp32", "data.loader_threads=1", "train.batch_size=4", *more]
    return load_finetune(small_config(), task, "finetune", settings)


def _dense(root: Path, cfg: Config, shape: tuple[int, int] = (23, 31), views: int = 1) -> LabelledData:
    """One image whose red says the class of each pixel."""
    mask = np.random.default_rng(0).integers(0, 5, shape, dtype=np.uint8)
    paths = tuple(root / f"{view}.png" for view in range(views))
    for path in paths:
        Image.fromarray(np.repeat(mask[..., None] * 50, 3, 2)).save(path)
    Image.fromarray(mask).save(root / "mask.png")
    task = "segmentation" if views == 1 else "change"
    samples = Samples(task, (paths,), (), (root / "mask.png",), ("train",), (), "here")
    return LabelledData(cfg, samples, 5, False, Masks(tuple("01234")), SkippedFiles(root / "skipped.csv"))


def _scenes(root: Path, cfg: Config, count: int) -> LabelledData:
    paths = tuple((root / f"{number}.png",) for number in range(count))
    for number, (path,) in enumerate(paths):
        Image.fromarray(np.full((16, 16, 3), 10 * number, np.uint8)).save(path)
    labels = tuple((number % 2,) for number in range(count))
    samples = Samples("scene", paths, labels, (), ("train",) * count, ("a", "b"), "here")
    return LabelledData(cfg, samples, 2, False, None, SkippedFiles(root / "skipped.csv"))


def test_images_and_masks_are_cut_flipped_and_turned_alike(tmp_path: Path) -> None:
    data = _dense(tmp_path, _config("change"), views=2)
    seen = set()
    for epoch in range(20):
        images, target = data.training(epoch, 0)
        assert images.shape == (2, 16, 16, 3)
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0, :, :, 0].long(), target * 50)
        seen.add(tuple(target.flatten().tolist()))
        again = data.training(epoch, 0)
        assert torch.equal(again.images, images)
    assert len(seen) > 15


def test_all_turns_and_flips_occur(tmp_path: Path) -> None:
    data = _dense(tmp_path, _config("segmentation"), shape=(16, 16))
    found = {data.training(epoch, 0).target.numpy().tobytes() for epoch in range(80)}
    assert len(found) == 8  # the symmetries of a square
    plain = _config("segmentation", "views.hflip=0", "views.vflip=0", "finetune.rotate=false")
    data = _dense(tmp_path, plain, shape=(16, 16))
    assert len({data.training(epoch, 0).target.numpy().tobytes() for epoch in range(20)}) == 1


def test_small_images_are_reflected_and_their_masks_say_nothing_there(tmp_path: Path) -> None:
    cfg = _config("segmentation", "views.hflip=0", "views.vflip=0", "finetune.rotate=false")
    images, target = _dense(tmp_path, cfg, shape=(9, 30)).training(0, 0)
    assert (target[9:] == IGNORED).all()
    assert (target[:9] != IGNORED).all()
    assert torch.equal(images[0, 9], images[0, 7])


def test_crops_of_an_epoch_differ(tmp_path: Path) -> None:
    data = _dense(tmp_path, _config("segmentation", "finetune.crops=6"))
    assert data.crops == 6
    batches = list(micro_batches(data, length_of(data.cfg, data.crops), 0, 1))
    assert len({tuple(target.flatten().tolist()) for target in batches[0].targets}) == 4


def test_scenes_are_cropped_to_the_area_that_is_asked_for(tmp_path: Path) -> None:
    cfg = _config("scene", "finetune.crop_scale=[0.2,0.3]", "finetune.rotate=false")
    paths = ((tmp_path / "0.png",),)
    gradient = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    Image.fromarray(gradient).save(paths[0][0])
    samples = Samples("scene", paths, ((0,),), (), ("train",), ("a", "b"), "here")
    data = LabelledData(cfg, samples, 2, False, None, SkippedFiles(tmp_path / "skipped.csv"))
    widths = []
    for epoch in range(20):
        values = data.training(epoch, 0).images[0, 0, :, 0].float()
        widths.append(float(values.max() - values.min()) + 12)
    assert 60 < min(widths)
    assert max(widths) < 140
    assert np.std(widths) > 3


def test_batches_go_on_where_they_stopped(tmp_path: Path) -> None:
    data = _scenes(tmp_path, _config("scene"), 10)
    length = length_of(data.cfg, 10)
    assert length == Length(4, 1, 2)
    whole = list(micro_batches(data, length, 0, 6))
    rest = list(micro_batches(data, length, 3, 6))
    assert len(whole) == 6
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[3:], rest, strict=True))
    epoch = [int(image[0, 0, 0, 0]) for batch in whole[:2] for image in batch.images]
    assert len(set(epoch)) == 8
    assert length_of(_config("scene", "train.accumulate=5"), 10) == Length(4, 2, 1)
    assert length_of(_config("scene"), 3) == Length(3, 1, 1)


def test_what_cannot_be_read_is_replaced_and_listed(tmp_path: Path) -> None:
    data = _scenes(tmp_path, _config("scene"), 4)
    data.samples.images[1][0].write_bytes(b"no image")
    sample = data.training(0, 1)
    assert torch.equal(sample.images, data.training(0, 1).images)
    assert "1.png" in (tmp_path / "skipped.csv").read_text()
    assert data.try_whole(1) is None
    for (path,) in data.samples.images:
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png and 16 others drawn for it cannot be read"):
        data.training(0, 1)


def test_pairs_of_two_sizes_and_masks_of_another_get_one_line(tmp_path: Path) -> None:
    data = _dense(tmp_path, _config("change"), views=2)
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1\.png: is 20 x 20 px, .*0\.png is 31 x 23 px; the images of a pair"):
        data.whole(0)
    data = _dense(tmp_path, _config("segmentation"))
    Image.new("L", (20, 20)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: is 20 x 20 px, and its image .* is 31 x 23 px"):
        data.whole(0)


def test_what_is_wrong_with_all_samples_is_said_before_the_run(tmp_path: Path) -> None:
    root = masks(tmp_path / "set", count=6)
    samples = read_samples("segmentation", root)

    def data() -> LabelledData:
        return LabelledData(
            small_config(), samples, 2, False, Masks(("0", "1")), SkippedFiles(tmp_path / "skipped.csv")
        )

    data().check_some()
    for number in range(6):
        Image.fromarray(np.zeros((9, 8), np.uint8)).save(root / "masks" / f"{number}.png")
    with pytest.raises(UserError, match=r"0\.png: is 8 x 9 px, and its image .* none of the first 6 sample"):
        data().check_some()
    Image.fromarray(np.zeros((28, 24), np.uint8)).save(root / "masks" / "5.png")
    data().check_some()  # one that can be used: the others are left out one by one
    assert not (tmp_path / "skipped.csv").exists()
