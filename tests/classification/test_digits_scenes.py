"""The digits scenes: what is written is what is seen."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from classification.data import digits_scenes
from classification.data.digits import split_digits, write_digits
from classification.data.digits_scenes import ANNOTATIONS, SIZE, scenes, write_digits_scenes
from classification.errors import UserError


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(digits_scenes, "SCENES", {"train": 6, "val": 4})


def test_polygons_are_the_digits(few):
    """Filled, they cover what is half opaque, and the holes in it."""
    for image, digits in scenes("train"):
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == np.uint8
        for digit in digits:
            canvas = Image.new("L", (4 * SIZE, 4 * SIZE))
            for polygon in digit.polygons:
                ImageDraw.Draw(canvas).polygon([tuple(4 * p) for p in polygon], fill=255)
            filled = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255
            inked = digit.opacity > 0.5
            assert filled[inked].mean() > 0.95
            assert filled[digit.opacity == 0].mean() < 0.01
            assert filled.sum() == pytest.approx(digit.area(), rel=0.05, abs=4)
            x, y, width, height = digit.box()
            rows, columns = np.nonzero(filled > 0.5)
            np.testing.assert_allclose([x, y], [columns.min(), rows.min()], atol=1.01)
            np.testing.assert_allclose([x + width, y + height], [columns.max() + 1, rows.max() + 1], atol=1.01)


def test_digits_do_not_overlap_and_stand_out(few):
    for image, digits in scenes("val"):
        assert digits
        inked = [digit.opacity > 0.5 for digit in digits]
        assert np.sum(inked, axis=0).max() == 1
        grey = image.mean(axis=2)
        for ink, digit in zip(inked, digits, strict=True):
            around = (digit.opacity == 0) & ~np.any(inked, axis=0)
            assert abs(grey[ink].mean() - grey[around].mean()) > 20


def test_splits_share_no_digit():
    train, val = split_digits()
    assert not set(train) & set(val)


def test_files(few, tmp_path):
    """COCO's format, the same each time."""
    root = tmp_path / "scenes"
    assert write_digits_scenes(root)
    assert not write_digits_scenes(root)
    coco = json.loads((root / ANNOTATIONS.format("val")).read_text())
    assert [c["name"] for c in coco["categories"]] == [str(i) for i in range(10)]
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"]) > 4
    for info in coco["images"]:
        assert Image.open(root / "val" / info["file_name"]).size == (info["width"], info["height"])
    assert {a["image_id"] for a in coco["annotations"]} == {info["id"] for info in coco["images"]}
    write_digits_scenes(tmp_path / "again")
    assert digest(root) == digest(tmp_path / "again")


def test_maps_for_segmentation(few, tmp_path):
    root = tmp_path / "scenes"
    assert write_digits_scenes(root, "ade20k")
    assert not write_digits_scenes(root, "ade20k")
    for number, (image, digits) in enumerate(scenes("val"), start=1):
        np.testing.assert_array_equal(np.asarray(Image.open(root / f"images/validation/{number:04d}.png")), image)
        labels = np.asarray(Image.open(root / f"annotations/validation/{number:04d}.png"))
        assert set(np.unique(labels)) == {0, *(1 + digit.label for digit in digits)}
        for digit in digits:
            assert (labels[digit.opacity > 0.5] == 1 + digit.label).all()
        assert (labels[np.all([digit.opacity <= 0.5 for digit in digits], axis=0)] == 0).all()
    with pytest.raises(UserError, match="as for coco"):
        write_digits_scenes(root, "coco")


@pytest.mark.parametrize("write", [write_digits, write_digits_scenes])
def test_a_full_disk(write, few, tmp_path, full_disk):
    with full_disk(200), pytest.raises(UserError, match=r"data: cannot be written \(.*File too large"):
        write(tmp_path / "data")
    assert not list(tmp_path.iterdir())


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_a_folder_with_something_else(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not the digits scenes data set"):
        write_digits_scenes(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
