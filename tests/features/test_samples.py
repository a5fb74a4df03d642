"""Labelled samples of the three tasks, from CSVs and folders, and what is wrong with some."""

from pathlib import Path

import pytest

from pera_fast.errors import UserError
from pera_fast.features.samples import read_samples


def touched(root: Path, *names: str) -> Path:
    """Empty files: nothing here decodes them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_class_folders(tmp_path: Path) -> None:
    touched(tmp_path, "town/a.png", "town/deep/b.tif", "field/c.jpg", "field/d.jpg", "field/notes.txt", ".git/x/e.png")
    found = read_samples("scene", tmp_path)
    assert found.classes == ("field", "town")
    assert [path.name for (path,) in found.images] == ["c.jpg", "d.jpg", "a.png", "b.tif"]
    assert found.labels == ((0,), (0,), (1,), (1,))
    assert set(found.splits) == {""}
    assert not found.several


def test_class_folders_in_folders_of_splits(tmp_path: Path) -> None:
    names = [f"{split}/{kind}/{n}.png" for split in ("train", "val", "test") for kind in "ab" for n in range(2)]
    found = read_samples("scene", touched(tmp_path, *names))
    assert [len(found.part(split)) for split in ("train", "val", "test")] == [4, 4, 4]
    assert found.classes == ("a", "b")


@pytest.mark.parametrize("names", [("images", "masks"), ("img", "gt")])
def test_folders_of_stems(tmp_path: Path, names: tuple[str, str]) -> None:
    found = read_samples("segmentation", touched(tmp_path, f"{names[0]}/1.jpg", f"{names[1]}/1.png"))
    assert found.images == ((tmp_path / names[0] / "1.jpg",),)
    assert found.masks == (tmp_path / names[1] / "1.png",)
    with pytest.raises(UserError, match=r"2\.jpg: has no file of the same stem in masks"):
        read_samples("segmentation", touched(tmp_path, f"{names[0]}/2.jpg"))


def test_folders_of_changes(tmp_path: Path) -> None:
    found = read_samples("change", touched(tmp_path, "A/1.png", "B/1.png", "label/1.png"))
    assert [[path.parent.name for path in paths] for paths in found.images] == [["A", "B"]]


def test_csv_beside_its_images_or_their_folder(tmp_path: Path) -> None:
    rows = ["file,class,split", "a.png,x,train", "b.png,y,training", "c.png,x,valid", "d.png,y,test"]
    touched(tmp_path / "scenes", "a.png", "b.png", "c.png", "d.png")
    found = read_samples("scene", table(tmp_path / "scenes.csv", *rows))
    assert found.splits == ("train", "train", "val", "test")
    assert found.images[0] == (tmp_path / "scenes" / "a.png",)
    other = table(tmp_path / "other.csv", *rows)
    assert read_samples("scene", other, tmp_path / "scenes").images == found.images
    with pytest.raises(UserError, match=r"other\.csv: .*a\.png: no such file; is --root right\?"):
        read_samples("scene", other)


def test_several_labels(tmp_path: Path) -> None:
    touched(tmp_path, "a.png", "b.png", "c.png")
    rows = "file,class", "a.png,sea|beach", "b.png,beach| town|beach", "c.png,town|sea"
    found = read_samples("scene", table(tmp_path / "t.csv", *rows))
    assert found.classes == ("beach", "sea", "town")
    assert found.labels == ((0, 1), (0, 2), (1, 2))
    assert found.several


def test_dividing_keeps_every_class_on_both_sides(tmp_path: Path) -> None:
    names = [f"{kind}/{n}.png" for kind, count in (("many", 20), ("few", 2)) for n in range(count)]
    found = read_samples("scene", touched(tmp_path, *names))
    first, second = found.divided(0.2, seed=3)
    assert not set(first.images) & set(second.images)
    assert len(first) + len(second) == 22
    assert sorted(second.labels) == [(0,), *[(1,)] * 4]
    assert found.divided(0.2, seed=3)[1] == second
    assert found.divided(0.2, seed=4)[1] != second


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "has no column file"),
        ("file,class\n", "has no rows below its header"),
        ("path,class\na.png,x\n", "has no column file; columns must be file,class,split"),
        ("file,class\na.png,\nb.png,y\n", "line 2 has no class"),
        ("file,class,split\na.png,x,train\nb.png,y,held\n", "line 3: split held: wants one of train, val, test"),
        ("file,class,split\na.png,x,train\nb.png,y,\n", "line 3 has no split, while others have"),
        ("file,class\na.png,x\nb.png,x\n", "has one class only, x; a classification wants two"),
        ("file,class\na.png,x\nb.png,x\nc.png,y\n", "class y has one image"),
        (
            "file,class,split\na.png,river,train\nb.png,river,train\nc.png,road,train\nd.png,rivr,test\na.png,rivr,test\n"
            "b.png,road,test\n",
            "class rivr of split test is not in split train; did you mean river",
        ),
        ('file,class\n"a\nb.png",x\nb.png,y\n', "a b.png: no such file"),
        ("file,class\n" + 300 * "a" + ".png,x\nb.png,y\n", r"no such file"),
    ],
)
def test_wrong_tables(tmp_path: Path, rows: str, message: str) -> None:
    touched(tmp_path, "a.png", "b.png", "c.png", "d.png")
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(UserError) as error:
        read_samples("scene", tmp_path / "t.csv")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_folders(tmp_path: Path) -> None:
    touched(tmp_path, "one/a.png")
    for task, message in (
        ("scene", "wants one folder a class"),
        ("change", "has no folder before"),
        ("seen", "scene?"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            read_samples(task, tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        read_samples("scene", tmp_path / "none")
    with pytest.raises(UserError, match="is for a CSV"):
        read_samples("scene", tmp_path, tmp_path)


def test_a_split_that_is_empty(tmp_path: Path) -> None:
    touched(tmp_path, "a.png", "b.png")
    found = read_samples(
        "scene", table(tmp_path / "t.csv", "file,class,split", *[f"{n}.png,{n},train" for n in "abab"])
    )
    with pytest.raises(UserError, match="has no sample of split test; splits: train 4"):
        found.need("test")
