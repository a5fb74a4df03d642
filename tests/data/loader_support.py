"""Helpers of tests that run a loader: an index, batches, and comparisons of them."""

import csv

import numpy as np
import torch

from pera_fast.data.index.build import build_index
from pera_fast.keyed import Purpose, generator

COUNT = 24  # scenes of a folder


def index(folder, out, **options):
    return build_index(folder, out=out / "index.parquet", workers=1, progress=False, **options)


def tensors(batch):
    for group in (batch.global_, batch.local):
        yield group.pixels
        for view in (group.student, group.teacher):
            yield from (view.order, view.factors)


def same(a, b):
    return (
        (a.micro_step, a.epoch) == (b.micro_step, b.epoch)
        and np.array_equal(a.samples, b.samples)
        and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    )


def take(loader, count):
    return [next(loader) for _ in range(count)]


def skipped_rows(tmp_path):
    path = tmp_path / "skipped.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert len({name for name, _ in rows}) == len(rows), "a file is listed once"
    return dict(rows)


def substitute(rows, epoch, sample, unusable):
    """The keyed draws, restated."""
    for row in [sample, *generator(0, Purpose.SUBSTITUTE, epoch, sample).integers(rows, size=64)]:
        if row not in unusable:
            return int(row)
    raise AssertionError("64 draws hit unusable rows only")


def check_against(reference, batches, unusable):
    """Slots of usable samples are what they were; the others hold their substitutes."""
    for before, after in zip(reference, batches, strict=True):
        expected = [substitute(COUNT, before.epoch, int(sample), unusable) for sample in before.samples]
        assert after.samples.tolist() == expected
        keep = torch.tensor([sample not in unusable for sample in before.samples])
        for one, other, crops in (
            (before.global_.pixels, after.global_.pixels, 2),
            (before.local.pixels, after.local.pixels, 3),
        ):
            assert torch.equal(one.unflatten(0, (crops, -1))[:, keep], other.unflatten(0, (crops, -1))[:, keep])
    assert any(sample in unusable for batch in reference for sample in batch.samples)
