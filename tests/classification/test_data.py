"""The embedded digits, their loaders and transforms."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from running import MICRO
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment

from classification.config import load_config
from classification.data import UnreadableImages, build_eval_loader, build_mixup, build_train_loader
from classification.data.digits import write_digits
from classification.errors import UserError


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
    seen = torch.cat([images for loader in loaders for images, *_ in loader])
    everything = torch.cat([images for images, *_ in build_eval_loader(config(few_digits), 0, 1)])
    assert len(seen) == len(everything) == 33
    rows = lambda t: sorted(map(tuple, t.flatten(1).tolist()))  # noqa: E731
    assert rows(seen) == rows(everything)


def test_training_shares_are_disjoint_and_reshuffled(few_digits):
    indices = []
    for epoch in (0, 1):
        loaders = [build_train_loader(config(few_digits, "DATA.BATCH_SIZE", "4"), rank, 2) for rank in (0, 1)]
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        shares = [[index for _, index in loader.sampler] for loader in loaders]
        assert {e for loader in loaders for e, _ in loader.sampler} == {epoch}
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
    images, targets, _ = next(iter(build_eval_loader(config(tmp_path, "TEST.CROP_PCT", "0.5"), 0, 1)))
    assert targets.tolist() == [0, 1]
    white = (1 - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, white[None, :, None, None].expand_as(images))


AUGMENTED = ["AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.COLOR_JITTER", "0.4", "AUG.REPROB", "0.5"]


def batches_of(data_path, *opts, epoch=3, start=0, rank=0, world_size=1):
    loader = build_train_loader(config(data_path, "DATA.BATCH_SIZE", "4", *AUGMENTED, *opts), rank, world_size)
    loader.sampler.set_epoch(epoch)
    loader.sampler.start = start
    return list(loader)


def test_augmentation_depends_on_seed_epoch_and_image_alone(few_digits):
    """Not on workers, on what was drawn before, on where the epoch is begun, or on the processes."""
    whole = batches_of(few_digits)
    torch.rand(3), np.random.rand(3)
    workers = batches_of(few_digits, "DATA.NUM_WORKERS", "2")
    rest = batches_of(few_digits, start=12)
    assert len(whole) == len(workers) == len(rest) + 3 == 10
    for a, b in zip([*whole, *whole[3:]], [*workers, *rest], strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    shared = torch.cat([images for r in (0, 1) for images, *_ in batches_of(few_digits, rank=r, world_size=2)])
    rows = lambda t: sorted(map(tuple, t.flatten(1).tolist()))  # noqa: E731
    assert rows(shared) == rows(torch.cat([images for images, *_ in whole]))
    for other in (batches_of(few_digits, epoch=4), batches_of(few_digits, "SEED", "1")):
        assert rows(torch.cat([images for images, *_ in other])) != rows(torch.cat([images for images, *_ in whole]))


def test_loading_leaves_the_generators_alone(few_digits):
    torch.manual_seed(5)
    np.random.seed(5)
    batches_of(few_digits)
    drawn = torch.rand(2), np.random.rand(2)
    torch.manual_seed(5)
    np.random.seed(5)
    batches_of(few_digits, epoch=9)
    assert torch.equal(drawn[0], torch.rand(2))
    assert np.array_equal(drawn[1], np.random.rand(2))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_images_are_replaced_and_named(few_digits, tmp_path, workers):
    data = shutil.copytree(few_digits, tmp_path / "data")
    victims = sorted((data / "train/4").iterdir())[:2] + sorted((data / "val/2").iterdir())[:1]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:60])
    batches = batches_of(data, "DATA.NUM_WORKERS", workers)
    messages = [m for *_, batch in batches for m in batch]
    # The first of the two is met again when it would stand in for itself.
    assert {m.split(": ")[0] for m in messages} == {str(v) for v in victims[:2]}
    assert sum(len(targets) for _, targets, _ in batches) == 40
    targets = torch.cat([t for _, t, _ in batches])
    assert (targets == 4).sum() == 4  # the next ones are of the same class

    evaluated = list(build_eval_loader(config(data), 0, 1))
    targets = torch.cat([t for _, t, _ in evaluated])
    assert (targets == -1).sum() == 1
    assert [m.split(": ")[0] for *_, batch in evaluated for m in batch] == [str(victims[2])]


def test_more_unreadable_images_than_allowed_are_an_error(caplog):
    counter = UnreadableImages(limit=2)
    counter.add(["a: cannot be read"])
    counter.add([])
    counter.add(["b: cannot be read", "a: cannot be read"])  # the same in another epoch
    assert "a: cannot be read; another takes its place (1 of 2 allowed)" in caplog.text
    with pytest.raises(UserError, match=r"c: cannot be read; it is number 3, and DATA.MAX_UNREADABLE allows 2"):
        counter.add(["c: cannot be read"])


def test_policies_that_posterize_to_nothing(few_digits):
    """The recipe's magnitude 9, spread by 0.5, reaches 10 now and then, which is 0 bits: Pillow 13 refuses those."""
    batches_of(few_digits, "AUG.AUTO_AUGMENT", "rand-m10-n12-inc1")
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    assert not np.asarray(auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)(picture)).any()
    kept = np.asarray(auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=6)(picture))
    assert np.array_equal(kept, np.asarray(picture) & 0b11000000)


def test_mixup_is_off_when_both_are_zero(few_digits):
    assert build_mixup(config(few_digits, "AUG.MIXUP", "0.0"), 10) is None
    _, targets = build_mixup(config(few_digits), 10)(torch.zeros(4, 3, 8, 8), torch.tensor([1, 2, 3, 4]))
    assert targets.shape == (4, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
