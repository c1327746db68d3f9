"""The embedded digits, their loaders and transforms."""

import numpy as np
import pytest
import torch
from PIL import Image
from running import MICRO
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from classification.config import load_config
from classification.data import build_eval_loader, build_mixup, build_train_loader
from classification.data.digits import write_digits


def config(data_path, *opts):
    return load_config(str(MICRO), {"DATA.DATA_PATH": str(data_path)}, list(opts))


def test_digits_are_all_there_once_and_stratified(digits):
    source = load_digits()
    files = sorted(digits.glob("*/*/*.png"))
    assert sorted(int(f.stem) for f in files) == list(range(1797))
    for file in files:
        assert int(file.parent.name) == source.target[int(file.stem)]
    counts = {s: [len(list((digits / s / str(c)).iterdir())) for c in range(10)] for s in ("train", "val")}
    assert (sum(counts["train"]), sum(counts["val"])) == (1437, 360)
    share = np.array(counts["val"]) / np.bincount(source.target)
    assert np.all(np.abs(share - 360 / 1797) < 0.005)


def test_digits_are_the_pictures(digits):
    file = next((digits / "val" / "3").iterdir())
    with Image.open(file) as image:
        assert image.size == (32, 32)
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
    original = load_digits().images[int(file.stem)] * 255 / 16
    assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.98


def test_digits_are_written_once(digits, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in digits.rglob("*.png")}
    assert write_digits(digits) is False
    assert {f: f.stat().st_mtime_ns for f in digits.rglob("*.png")} == before
    again = tmp_path / "again"
    assert write_digits(again) is True
    names = [sorted(str(f.relative_to(r)) for f in r.rglob("*.png")) for r in (digits, again)]
    assert names[0] == names[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_shares_cover_every_image_once(few_digits, world_size):
    loaders = [build_eval_loader(config(few_digits, "DATA.BATCH_SIZE", "4"), r, world_size) for r in range(world_size)]
    seen = torch.cat([images for loader in loaders for images, _ in loader])
    everything = torch.cat([images for images, _ in build_eval_loader(config(few_digits), 0, 1)])
    assert len(seen) == len(everything) == 33
    rows = lambda t: sorted(map(tuple, t.flatten(1).tolist()))  # noqa: E731
    assert rows(seen) == rows(everything)


def test_training_shares_are_disjoint_and_reshuffled(few_digits):
    indices = []
    for epoch in (0, 1):
        loaders = [build_train_loader(config(few_digits, "DATA.BATCH_SIZE", "4"), rank, 2) for rank in (0, 1)]
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        shares = [list(loader.sampler) for loader in loaders]
        assert sorted(shares[0] + shares[1]) == list(range(40))
        indices.append(shares[0])
    assert indices[0] != indices[1]


def test_evaluation_transform_resizes_crops_and_normalises(tmp_path):
    """A 64x40 picture, black but for its centre, as IMG_SIZE / CROP_PCT = 32 / 0.5 = 64 pixels on the short side."""
    for label in "ab":
        (tmp_path / "val" / label).mkdir(parents=True)
        picture = np.zeros((40, 64, 3), dtype=np.uint8)
        picture[5:35, 10:54] = 255
        Image.fromarray(picture).save(tmp_path / "val" / label / "x.png")
    images, targets = next(iter(build_eval_loader(config(tmp_path, "TEST.CROP_PCT", "0.5"), 0, 1)))
    assert targets.tolist() == [0, 1]
    white = (1 - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, white[None, :, None, None].expand_as(images))


def test_mixup_is_off_when_both_are_zero(few_digits):
    assert build_mixup(config(few_digits, "AUG.MIXUP", "0.0"), 10) is None
    _, targets = build_mixup(config(few_digits), 10)(torch.zeros(4, 3, 8, 8), torch.tensor([1, 2, 3, 4]))
    assert targets.shape == (4, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
