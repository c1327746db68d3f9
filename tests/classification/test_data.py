"""The embedded digits, their loaders and transforms."""

import argparse
import errno
import os
import re
import shutil
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from running import MICRO
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform

from classification.config import load_config
from classification.data import UnreadableImages, build_eval_loader, build_mixup, build_train_loader
from classification.data import images as images_module
from classification.data.build import eval_transform
from classification.data.digits import write_digits
from classification.data.images import (
    ImageFolder,
    UnreadableImageError,
    class_names,
    escaped,
    misread_samples,
    read_image,
)
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


# ----- what is read, and what is not


def test_sixteen_bits_are_scaled_and_unknown_ranges_refused(tmp_path):
    """By the mode's range: 65535 is 255, and what lies between keeps its place. Pillow's conversion makes it white."""
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.repeat((np.round(values / 257).astype(np.uint8))[..., None], 3, axis=2)
    for name in ("a.png", "a.tif", "a.pgm", "big_endian.tif"):
        Image.fromarray(values.astype(">u2" if "big" in name else "<u2")).save(tmp_path / name)
        assert np.array_equal(np.asarray(read_image(str(tmp_path / name))), expected), name
    white = values.max() - values  # stored so that zero is white, which Pillow leaves as it is in 16 bits
    Image.fromarray(white).save(tmp_path / "white.tif", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "white.tif"))), expected)
    for name, unknown in (("i.tif", values.astype(np.int32)), ("f.tif", values.astype(np.float32))):
        Image.fromarray(unknown).save(tmp_path / name)
        with pytest.raises(UnreadableImageError, match=rf"{name}.*mode {name[0].upper()}, whose range is not known"):
            read_image(str(tmp_path / name))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        picture = Image.fromarray(expected).convert(mode)
        picture.save(tmp_path / "m.tif")
        with Image.open(tmp_path / "m.tif") as stored:
            if stored.mode == "RGB" and mode == "YCbCr":  # before Pillow 13
                with pytest.raises(
                    UnreadableImageError, match="YCbCr without compression, which this Pillow reads as RGB"
                ):
                    read_image(str(tmp_path / "m.tif"))
                continue
        assert np.array_equal(np.asarray(read_image(str(tmp_path / "m.tif"))), np.asarray(picture.convert("RGB"))), mode


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.ELOOP, False), (errno.ENOTDIR, False), (errno.ESTALE, True), (errno.EIO, True)]
)
def test_a_folder_that_cannot_be_looked_at_is_no_file(number, refused):
    """Where entries have no type, as on some network file systems, a failure would leave out the class."""

    def is_dir(entry):
        raise OSError(number, os.strerror(number))

    entry = argparse.Namespace(path="data/train/3")
    with pytest.raises(UserError, match="data/train/3: cannot be looked at") if refused else nullcontext():
        assert not images_module._is(entry, is_dir)


def test_jpeg_2000_of_other_bits_is_refused(tmp_path):
    """Pillow shifts samples of 4 bits to the left: 15 becomes 240. Colours of 16 bits wrap: 65535 becomes 0."""
    if "JPEG2000" not in images_module.image_formats():
        pytest.skip("this Pillow reads no JPEG 2000")
    for suffix in ("j2k", "jp2"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(path, irreversible=False)
        content = bytearray(path.read_bytes())
        assert np.asarray(read_image(str(path))).max() == 200
        second = content.index(b"\xff\x4f\xff\x51") + 2 + 40 + 3
        assert content[second] == 7
        content[second] = 3
        path.write_bytes(content)
        with pytest.raises(UnreadableImageError, match=r"cannot be read as an image \(its samples have 4 bits"):
            read_image(str(path))
        content[second] = 15
        path.write_bytes(content)
        with pytest.raises(UnreadableImageError, match=r"\(its colours have 16 bits, and Pillow reads white as black"):
            read_image(str(path))
    Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(tmp_path / "grey.jp2", irreversible=False)
    assert np.asarray(read_image(str(tmp_path / "grey.jp2"))).min() == 255


def test_tiffs_that_pillow_misreads_are_refused(tmp_path):
    """Signed samples: -1 is 255. Planes of 16 bits: noise. Planes in which 0 is white. Colour maps of 8 bits: black."""
    path, values = tmp_path / "a.tif", np.arange(16, dtype=np.uint8).reshape(4, 4)
    grey = Image.fromarray(values)
    grey.save(path, tiffinfo={339: 1, 284: 2})
    assert np.array_equal(np.asarray(read_image(str(path)))[..., 0], values)
    palette = grey.copy()
    palette.putpalette([i // 3 for i in range(768)])
    palette.save(path)
    assert np.array_equal(np.asarray(read_image(str(path))), np.asarray(palette.convert("RGB")))
    sixteen = Image.fromarray(values.astype(np.uint16))
    sixteen.save(path, tiffinfo={284: 2}, compression="tiff_deflate")
    assert not np.asarray(read_image(str(path))).any()
    for image, tags, fault in (
        (grey, {339: 2}, r"not unsigned numbers \(SampleFormat \(2,\)\)"),
        (grey, {339: 4}, ""),  # Pillow itself refuses it
        (sixteen, {284: 2}, r"one after another \(PlanarConfiguration 2\), of 16 bits"),
        (grey, {284: 2, 262: 0}, r"one after another \(PlanarConfiguration 2\), in which 0 is white"),
        (grey, {284: 2, 266: 2}, r"one after another \(PlanarConfiguration 2\), of 8 bits in reverse order"),
        (grey.convert("YCbCr"), {530: (2, 1)}, r"fewer pixels \(YCbCrSubSampling \(2, 1\)\) and no compression"),
    ):
        image.save(path, tiffinfo=tags)
        with pytest.raises(UnreadableImageError, match=r"a\.tif: cannot be read as an image.*" + fault):
            read_image(str(path))
    palette.save(path)
    stored = np.array(palette.getpalette(), dtype="<u2").reshape(-1, 3).T.tobytes()
    wide = (np.frombuffer(stored, "<u2") * 256).tobytes()
    assert path.read_bytes().count(wide) == 1
    path.write_bytes(path.read_bytes().replace(wide, stored))
    with pytest.raises(UnreadableImageError, match=r"colour map has 8 bits in place of 16"):
        read_image(str(path))
    with_alpha = Image.open(path)
    with_alpha._mode = "PA"  # with a sample of alpha, which Pillow does not write
    assert "colour map has 8 bits" in misread_samples(with_alpha)


def test_sixteen_bits_take_few_bytes_a_pixel(tmp_path):
    """Beside Pillow's own two of the file's image and four of the result."""
    values = np.arange(2000 * 2000, dtype=np.uint16).reshape(2000, 2000)
    Image.fromarray(values).save(tmp_path / "a.png")
    tracemalloc.start()
    found = read_image(str(tmp_path / "a.png"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / values.size < 3
    assert np.array_equal(np.asarray(found)[..., 1], np.round(values / 257))


def test_random_interpolation_is_of_training(few_digits):
    found = list(build_eval_loader(config(few_digits, "DATA.INTERPOLATION", "random", "DATA.IMG_SIZE", "48"), 0, 1))
    bilinear = build_eval_loader(config(few_digits, "DATA.INTERPOLATION", "bilinear", "DATA.IMG_SIZE", "48"), 0, 1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, bilinear, strict=True))


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """An EPS named .png has Pillow run Ghostscript, if it may open it."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=r"a\.png: cannot be read as an image"):
        read_image(str(tmp_path / "a.png"))
    assert not (tmp_path / "started").exists()


def test_each_name_once_and_what_is_left_out_is_counted(tmp_path):
    """Links to a folder's own folder, other suffixes, hidden names, what is no file; the order is torchvision's.

    Links to files are images by their own names, in two classes too, as where files are kept by their content.
    """
    root = tmp_path / "val"
    for label in ("a", "b"):
        (root / label / "deeper").mkdir(parents=True)
        for name in ("2.png", "deeper/1.JFIF", "deeper/0.gif"):
            Image.new("L", (4, 4)).save(root / label / name, format="GIF" if "gif" in name else "PNG")
        for i in range(3):
            (root / label / "deeper" / f"loop{i}").symlink_to(root / label)
    for label in ("a", "b"):
        (root / label / "again.png").symlink_to(root / "a" / "2.png")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "b" / "nowhere.png").symlink_to(tmp_path / "nothing")
    (root / "b" / "itself").symlink_to(root / "b" / "itself")
    for name in ("a/notes.txt", "a/without", "a/._2.png", "list.txt"):
        (root / name).write_text("")
    (root / ".ipynb_checkpoints").mkdir()
    folder = ImageFolder(str(tmp_path), "val", None)
    assert folder.classes == ["a", "b"]
    names = ["2.png", "again.png", "deeper/0.gif", "deeper/1.JFIF"]
    assert folder.samples == [(str(root / label / name), i) for i, label in enumerate("ab") for name in names]
    assert folder.left_out == (
        f"{root}: left out: 1 broken link(s), 1 file(s) beside the class folders, 1 file(s) ending in .txt, "
        "1 file(s) that are pipes, sockets or devices, 2 file(s) without a suffix, 1 hidden file(s), "
        "1 hidden folder(s), 6 link(s) to a folder that is there already"
    )
    (tmp_path / "train" / "b").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "train" / "b" / "2.png")
    (tmp_path / "train" / "a").symlink_to(root / "a")
    train = ImageFolder(str(tmp_path), "train", None)
    said = f"{root}: 2 of its 4 folders are folders of {tmp_path}/train, too, as {root}/a; accuracy on images that are"
    assert folder.shared_with(train).startswith(said)
    (tmp_path / "train" / "a").unlink()
    (tmp_path / "train" / "a").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "train" / "a" / "2.png")
    (root / "a" / "notes").mkdir()  # without images, so it may be in both
    (tmp_path / "train" / "a" / "notes").symlink_to(root / "a" / "notes")
    assert ImageFolder(str(tmp_path), "val", None).shared_with(ImageFolder(str(tmp_path), "train", None)) == ""
    (root / "b" / "of_a").symlink_to(root / "a" / "deeper")
    with pytest.raises(UserError, match=r"b/of_a: is the same folder as .*a/deeper, of another class"):
        ImageFolder(str(tmp_path), "val", None)


def test_links_to_files_are_not_followed_one_by_one(few_digits, tmp_path, monkeypatch):
    """A farm of links to a store; the paths of folders alone are resolved."""
    for file in few_digits.glob("val/*/*"):
        link = tmp_path / file.relative_to(few_digits)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    resolved, realpath = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: resolved.append(path) or realpath(path))
    assert len(ImageFolder(str(tmp_path), "val", None)) == 33
    assert len(resolved) == 10


def test_names_that_look_the_same_are_said_to(few_digits, tmp_path):
    """An accent as a letter of its own (NFD) or not (NFC)."""
    data = shutil.copytree(few_digits, tmp_path / "data")
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        (data / split / "3").rename(data / split / name)
    hint = re.escape("'caf\\xe9' and 'cafe\\u0301' look the same but are written otherwise (Unicode NFC and NFD)")
    with pytest.raises(UserError, match=f"only in one of them: .*{hint}; rename one of them"):
        build_train_loader(config(data, "DATA.BATCH_SIZE", "4"), 0, 1)
    names = [name if name != "3" else "caf\u00e9" for name in map(str, range(10))]
    with pytest.raises(UserError, match=rf"c\.pth: its classes are not those of .*{hint}"):
        build_eval_loader(config(data), 0, 1).renumber(names, "c.pth")


def test_a_name_does_not_depend_on_the_locale(monkeypatch):
    """Under an ASCII locale, Python reads names as ASCII and keeps other bytes as surrogates."""
    for locale in ("utf-8", "ascii", "latin-1"):
        monkeypatch.setattr(os, "fsencode", lambda name, locale=locale: name.encode(locale, "surrogateescape"))
        for name in ("3", "\u732b", "caf\u00e9", "a\\udcff"):
            assert escaped(name.encode().decode(locale, "surrogateescape")) == name
    assert escaped("a\udcff") == "a\\udcff"  # bytes that are no UTF-8 at all


def test_a_folder_that_may_not_be_entered_is_named(few_digits, monkeypatch):
    """The tests may run as one who may enter all."""
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("val/3"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"val/3: cannot be entered \(Permission denied\)"):
        build_eval_loader(config(few_digits), 0, 1)


def test_long_images_are_cut_before_they_are_resized(few_digits):
    """One pixel high, resized first it would take gigabytes; others are timm's to the bit."""
    transform = eval_transform(config(few_digits, "TEST.CROP_PCT", "0.875", "DATA.IMG_SIZE", "224"))
    row = np.arange(20000, dtype=np.uint16)[None] // 80
    for long in (row, row.T):
        image = transform(Image.fromarray(long.astype(np.uint8)).convert("RGB"))
        assert image.shape == (3, 224, 224)
        grey = image[0] * IMAGENET_DEFAULT_STD[0] + IMAGENET_DEFAULT_MEAN[0]
        torch.testing.assert_close(grey, torch.full_like(grey, 125 / 255), atol=2 / 255, rtol=0)  # its middle
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 400, 3), dtype=np.uint8))
    expected = create_transform(224, interpolation="bicubic", crop_pct=0.875)(picture)
    assert torch.equal(transform(picture), expected)
    odd = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 901, 3), dtype=np.uint8))  # 8:1 is 800
    torch.testing.assert_close(
        transform(odd), create_transform(224, interpolation="bicubic", crop_pct=0.875)(odd), atol=0.05, rtol=0
    )


def test_shared_memory_too_small_for_the_workers(few_digits, monkeypatch):
    real = os.statvfs("/")
    small = os.statvfs_result((*real[:3], 64 * 2**20 // real.f_frsize, 64 * 2**20 // real.f_frsize, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    build_eval_loader(config(few_digits, "DATA.NUM_WORKERS", "2"), 0, 1)
    with pytest.raises(UserError, match=r"/dev/shm: has 64 MiB.*--shm-size=16g or --ipc=host"):
        build_eval_loader(config(few_digits, "DATA.NUM_WORKERS", "2", "DATA.IMG_SIZE", "384"), 0, 1)


def test_labels_follow_the_names_of_a_checkpoint(few_digits):
    loader = build_eval_loader(config(few_digits), 0, 1)
    plain = torch.cat([targets for _, targets, _ in loader])
    names = [str(i) for i in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    loader.renumber(names, "c.pth")
    renumbered = torch.cat([targets for _, targets, _ in loader])
    assert [names[i] for i in renumbered] == [loader.dataset.folder.classes[i] for i in plain]
    for other, difference in (
        ([*names[:9], "seven"], "it has 'seven', the folder has '7' (10 and 10 classes)"),
        (names[:9], "the folder has '7' (9 and 10 classes)"),
    ):
        with pytest.raises(UserError, match=rf"c\.pth: its classes are not those of .*val: {re.escape(difference)}"):
            loader.renumber(other, "c.pth")


def test_names_of_classes_take_no_look_into_their_folders(tmp_path, monkeypatch):
    """ImageNet has a million files, each start asks for the names several times, and the disk may be far away."""
    for name in ("b", "a"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "train" / name / "a.png")
    looked, entries = [], images_module._entries
    monkeypatch.setattr(images_module, "_entries", lambda folder: looked.append(folder) or entries(folder))
    assert class_names(str(tmp_path), "train") == ["a", "b"]
    assert looked == [str(tmp_path / "train")]
