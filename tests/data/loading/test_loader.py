"""The loader: the same bits whatever the threads, ranks and restarts, and files that go bad under it."""

import dataclasses
import gc
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from data_support import bad_files, encoded, good_files, scene, shared_data, small_config, write_scenes
from loader_support import COUNT, check_against, index, same, skipped_rows, take
from PIL import Image

from pera_fast.data.decoding import decode
from pera_fast.data.files.skipped import SkippedFiles
from pera_fast.data.index.build import build_index
from pera_fast.data.loading.loader import Loader
from pera_fast.data.sampling.order import SampleOrder
from pera_fast.data.sampling.views import draw_colors
from pera_fast.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of 24 scenes and its index; read only."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, COUNT)
    return index(folder, tmp_path_factory.mktemp("index"))


@pytest.fixture
def own(tmp_path, scenes):
    """A copy of the folder to spoil, with its index."""
    folder = tmp_path / "data"
    shutil.copytree(scenes.root, folder)  # with sizes and times, so the index holds
    return dataclasses.replace(scenes, root=folder)


@pytest.fixture
def load(tmp_path):
    """Opens loaders and closes them at the end."""
    opened = []

    def open_(manifest, *overrides, batch_size=4, **options):
        skipped = options.pop("skipped", None) or SkippedFiles(tmp_path / "skipped.csv")
        cfg = small_config(*overrides)
        opened.append(Loader(cfg, manifest, batch_size=batch_size, device=CPU, skipped=skipped, **options))
        return opened[-1]

    yield open_
    for loader in opened:
        loader.close()


def test_shapes_types_and_positions(scenes, load):
    loader = load(scenes)
    assert loader.steps_per_epoch == 6
    batches = take(loader, 8)
    assert [batch.micro_step for batch in batches] == list(range(8))
    assert [batch.epoch for batch in batches] == [0] * 6 + [1] * 2
    for batch in batches:
        assert batch.samples.dtype == np.int64
        assert batch.global_.pixels.shape == (8, 48, 48, 3)
        assert batch.local.pixels.shape == (12, 32, 32, 3)
        for group, crops in ((batch.global_, 8), (batch.local, 12)):
            assert group.pixels.dtype == torch.uint8
            for view in (group.student, group.teacher):
                assert (view.order.shape, view.order.dtype) == ((crops, 4), torch.int32)
                assert (view.factors.shape, view.factors.dtype) == ((crops, 4), torch.float32)
    assert np.array_equal(np.sort(np.concatenate([batch.samples for batch in batches[:6]])), np.arange(COUNT))
    assert loader.wait_seconds >= 0


def test_the_order_and_the_draws_are_the_keyed_ones(scenes, load):
    loader = load(scenes, "train.seed=5")
    order = SampleOrder(COUNT, seed=5, batch_size=4)
    for step, batch in enumerate(take(loader, 7)):
        epoch, samples = order(step)
        assert np.array_equal(batch.samples, samples)
        (student, factors), _ = draw_colors(small_config().views, 5, epoch, samples)
        assert np.array_equal(batch.global_.student.order.numpy(), student[:2].reshape(-1, 4))
        assert np.array_equal(batch.local.student.factors.numpy(), factors[2:].reshape(-1, 4))


def test_threads_and_restarts_change_no_bit(scenes, load):
    reference = take(load(scenes), 14)
    other = take(load(scenes, "data.loader_threads=1", "data.prefetch=1"), 14)
    assert all(map(same, reference, other))
    for start in (1, 5, 13):
        assert same(next(load(scenes, start_micro_step=start)), reference[start])
    assert not same(next(load(scenes, "train.seed=1")), reference[0])


def test_two_ranks_are_one_rank_with_twice_the_batch(scenes, load):
    whole = take(load(scenes, batch_size=4, accumulate=2), 7)
    parts = [take(load(scenes, batch_size=2, accumulate=2, rank=rank, world_size=2), 7) for rank in (0, 1)]
    for one, first, second in zip(whole, *parts, strict=True):
        assert np.array_equal(one.samples, np.concatenate([first.samples, second.samples]))
        for name, crops in (("global_", 2), ("local", 3)):
            joined = [getattr(part, name).pixels.unflatten(0, (crops, 2)) for part in (first, second)]
            assert torch.equal(getattr(one, name).pixels, torch.cat(joined, 1).flatten(0, 1))


def test_transform_runs_in_the_loaders_thread(scenes, load):
    threads = []
    loader = load(scenes, transform=lambda batch: threads.append(threading.current_thread()) or batch.micro_step)
    assert take(loader, 5) == [0, 1, 2, 3, 4]
    assert threading.main_thread() not in threads


def test_every_unusual_file_is_used_and_every_broken_one_listed(tmp_path, load):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in good_files().items():
        (folder / name).write_bytes(data)
    for name, (data, _) in bad_files().items():
        (folder / name).write_bytes(data)
    manifest = index(folder, tmp_path)
    loader = load(manifest, batch_size=len(good_files()))
    for batch in take(loader, 2):
        assert np.array_equal(np.sort(batch.samples), np.arange(len(good_files())))
        flat = batch.global_.pixels.float().flatten(1).std(1)
        names = manifest.readable.paths.take(np.tile(batch.samples, 2)).to_pylist()
        assert {name for name, spread in zip(names, flat, strict=True) if spread < 1} <= {"one-pixel.png"}
    assert set(skipped_rows(tmp_path)) == set(bad_files())


def test_a_fallback_decoder_feeds_the_same_pipeline(tmp_path, load):
    """A lossless picture gives the same crops whether DALI decodes it or Pillow does (GIF, which DALI does not)."""
    crops = []
    picture = Image.fromarray(scene(1)).convert("P")
    for kind in ("PNG", "GIF"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / f"a.{kind.lower()}").write_bytes(encoded(picture, kind))
        manifest = index(folder, folder)
        assert manifest.readable.decoder[0].as_py() == {"PNG": "dali", "GIF": "pillow"}[kind]
        crops.append(next(load(manifest, batch_size=1)).global_.pixels)
    assert torch.equal(*crops)


def spoil_garbage(path):
    path.write_bytes(b"garbage now")


def spoil_truncated(path):
    path.write_bytes(path.read_bytes()[:60])


def spoil_deleted(path):
    path.unlink()


def spoil_unnoticed(path):
    """Same size, same time: only DALI's exception tells."""
    state = path.stat()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(state.st_size - 8))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def spoil_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [spoil_garbage, spoil_truncated, spoil_deleted, spoil_unnoticed, spoil_pipe])
def test_files_that_go_bad_are_replaced_and_nothing_else_changes(own, load, tmp_path, spoil):
    reference = take(load(own), 12)
    unusable = {3, 17}
    for row in unusable:
        spoil(own.root / f"{row:03d}.png")
    loader = load(own)
    check_against(reference, take(loader, 12), unusable)
    assert set(skipped_rows(tmp_path)) == {"003.png", "017.png"}


def test_a_file_replaced_mid_run_is_noticed_when_it_comes_round_again(own, load, tmp_path):
    loader = load(own)
    first = take(loader, 2)
    time.sleep(0.3)  # let it fill its queues
    for row in range(4):
        spoil_garbage(own.root / f"{row:03d}.png")
    batches = take(loader, 20)
    # Under way at the time: 2 in the queue, 1 waiting for a place, 2 in the pipeline, 3 being read.
    late = {sample for batch in batches[8:] for sample in batch.samples.tolist()}
    assert late.isdisjoint(range(4))
    assert len(first[0].samples) == len(batches[-1].samples) == 4
    assert set(skipped_rows(tmp_path)) == {f"{row:03d}.png" for row in range(4)}


def test_a_changed_file_that_decodes_is_used_with_its_new_size(own, load, tmp_path):
    Image.fromarray(scene(77, 300, 200)).save(own.root / "005.png")
    fresh = build_index(own.root, out=tmp_path / "fresh.parquet", workers=1, progress=False)
    assert fresh.readable.height[5] == 300
    assert all(map(same, take(load(own), 8), take(load(fresh), 8)))
    assert skipped_rows(tmp_path) == {}


def test_files_that_were_never_verified_are_checked_when_read(scenes, own, load, tmp_path):
    spoil_garbage(own.root / "003.png")
    (own.root / "003.png").write_bytes(good_files()["plain.jpg"][:1000])  # its header is fine
    manifest = index(own.root, tmp_path / "unverified", verify=False)
    assert len(manifest.readable) == COUNT
    batches = take(load(manifest), 6)
    check_against(take(load(scenes), 6), batches, {3})
    assert set(skipped_rows(tmp_path)) == {"003.png"}


def test_a_file_that_kills_its_decoder_mid_run(own, load, tmp_path):
    odd = shared_data() / "odd" / "openjpeg-data__26ccf3651020967f7778238ef5af08af.SIGFPE.d25.527.jp2"
    reference = take(load(own), 6)
    shutil.copyfile(odd, own.root / "009.png")
    check_against(reference, take(load(own), 6), {9})
    assert "DALI: killed by SIGFPE" in skipped_rows(tmp_path)["009.png"]


def test_dali_refusing_what_another_decoder_made_costs_the_file_only(own, load, tmp_path, monkeypatch):
    """Pillow decodes it, DALI cannot take the result: no third decoder is left to ask."""
    (own.root / "024.gif").write_bytes(encoded(Image.fromarray(scene(30, 21, 33)), "GIF"))
    manifest = index(own.root, tmp_path)
    assert manifest.readable.decoder[24].as_py() == "pillow"
    as_pnm = decode.as_pnm
    monkeypatch.setattr(decode, "as_pnm", lambda image: as_pnm(image)[:9])
    batches = take(load(manifest, batch_size=5), 10)  # two epochs
    assert {sample for batch in batches for sample in batch.samples.tolist()} == set(range(COUNT))
    ((name, reason),) = skipped_rows(tmp_path).items()
    assert name == "024.gif"
    assert reason.startswith("DALI: ")


def test_nothing_left_is_one_clear_line(own, load):
    for row in range(COUNT):
        spoil_garbage(own.root / f"{row:03d}.png")
    loader = load(own)
    with pytest.raises(UserError, match=r"no readable image is left in .*: all 24 have become unreadable"):
        next(loader)
    with pytest.raises(UserError):
        next(loader)


def test_a_data_folder_that_goes_away_is_named(own, load):
    shutil.rmtree(own.root)
    with pytest.raises(UserError, match=r"the data folder .*data is gone"):
        next(load(own))


def test_one_image_left_fills_whole_batches(own, load):
    for row in range(COUNT):
        if row != 11:
            spoil_deleted(own.root / f"{row:03d}.png")
    assert next(load(own)).samples.tolist() == [11] * 4


def test_too_few_images(scenes, load):
    with pytest.raises(UserError, match=r"24 readable image\(s\) are fewer than the 32 of one step"):
        load(scenes, batch_size=16, accumulate=2)


def test_an_error_in_a_thread_comes_out_of_next(scenes, load):
    def transform(batch):
        if batch.micro_step == 2:
            raise ZeroDivisionError("in transform")
        return batch

    loader = load(scenes, transform=transform)
    take(loader, 2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in transform"):
            next(loader)


def our_threads(before):
    """Threads that were not there before: other tests of this process may still be ending theirs."""
    return [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("pera-")]


def test_close_ends_all_threads_soon(scenes, load):
    before = set(threading.enumerate())
    for taken in (0, 3):
        loader = load(scenes)
        take(loader, taken)
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 10
        assert our_threads(before) == []
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)


def test_a_forgotten_loader_ends_its_threads(scenes, tmp_path):
    before = set(threading.enumerate())
    loader = Loader(small_config(), scenes, batch_size=4, device=CPU, skipped=SkippedFiles(tmp_path / "skipped.csv"))
    next(loader)
    assert our_threads(before)
    del loader
    gc.collect()
    assert our_threads(before) == []


def test_gray_and_many_bands(scenes, tmp_path, load):
    gray = index(scenes.root, tmp_path, channels=1)
    batch = next(load(gray, "model.in_chans=1", "views.mean=[0.5]", "views.std=[0.2]"))
    assert batch.global_.pixels.shape == (8, 48, 48, 1)
    folder = tmp_path / "alpha"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.dstack([scene(number), scene(number + 9)[..., 0]])).save(folder / f"{number}.png")
    bands = index(folder, folder, channels=4)
    batch = next(load(bands, "model.in_chans=4", "views.mean=[0,0,0,0]", "views.std=[1,1,1,1]"))
    assert batch.global_.pixels.shape == (8, 48, 48, 4)
    assert set(batch.global_.student.order.unique().tolist()) <= {-1, 0, 1}
