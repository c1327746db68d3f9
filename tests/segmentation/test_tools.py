"""The command lines on a few digits scenes, and what differs from detection's; the rest is tests/detection."""

import json
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, free_port, note_threads, run_command, threads_left
from scenes import enlarged, write_few_scenes

pytest.importorskip("mmseg", reason="make install-openmmlab")
import mmseg
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, TRANSFORMS, VISUALIZERS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from classification.data.digits_scenes import scenes as scenes_of
from classification.errors import UserError
from classification.openmmlab import checks, tools
from classification.openmmlab.checks import check_channels, check_data, data_classes
from classification.openmmlab.config_parts import kind_of
from classification.openmmlab.pipelines import insert_label_checks
from classification.openmmlab.transforms import CheckLabels

CONFIGS = ROOT / "segmentation/configs/spatialmamba"
MICRO = CONFIGS / "upernet_spatialmamba_micro_digits.py"
TINY = CONFIGS / "upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny.py"
QUICK = ["train_cfg.max_iters=6", "train_cfg.val_interval=3", "train_dataloader.batch_size=3"]
QUICK += ["default_hooks.checkpoint.interval=3", "default_hooks.checkpoint.max_keep_ckpts=2"]
QUICK += ["default_hooks.logger.interval=1"]
for split in ("train", "val", "test"):
    QUICK += [f"{split}_dataloader.num_workers=0"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_few_scenes(tmp_path_factory.mktemp("segmentation") / "scenes", layout="ade20k")


@pytest.mark.parametrize("name", ["dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"])
def test_launchers_are_detections(name):
    theirs, ours = ROOT / "detection/tools" / name, ROOT / "segmentation/tools" / name
    assert ours.read_text() == theirs.read_text(), f"edit the first, then cp {theirs} {ours}"


def options(scenes: Path, *more: str) -> list[str]:
    return ["--cfg-options", f"data_root={scenes}", *QUICK, *more]


@pytest.fixture
def here(monkeypatch, capsys) -> Callable[..., str]:
    """`here(tools.train, *arguments)`: the command in this process, for a start is 8 s; what it printed."""

    def run(main, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        main("mmseg")
        return capsys.readouterr().out

    return run


def test_training_testing_and_resuming(scenes, tmp_path, here):
    """Two processes train, one resumes, one tests with augmentation, draws and writes; scripts from other folders."""
    folder, port = ROOT / "segmentation/tools", str(free_port())
    once = "train_cfg.val_interval=6"
    command = ["bash", folder / "dist_train.sh", MICRO, 2, "--work-dir", tmp_path / "run", *options(scenes, once)]
    done = run_command(*command, cwd=tmp_path, PORT=port, **note_threads(tmp_path / "threads"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"Iter\(train\) *\[6/6\]", done.stdout)
    assert "so there is no SyncBN" in done.stdout
    assert [len(threads) for threads in threads_left(tmp_path / "threads")] == [1, 1]
    (tmp_path / "run/iter_6.pth").unlink()
    (tmp_path / "run/last_checkpoint").write_text(str(tmp_path / "run/iter_3.pth"))
    said = here(tools.train, MICRO, "--work-dir", tmp_path / "run", "--resume", *options(scenes, once))
    assert re.findall(r"Iter\(train\) *\[(\d)/6\]", said) == ["4", "5", "6"]
    assert "had 2 processes, and has 1" in said
    saved = tmp_path / "run" / MICRO.name
    text = saved.read_text()  # as the user has written it, for runs on other machines and of other checkpoints
    assert "SyncBN" in text
    assert "load_from = None" in text

    command = [
        "python",
        folder / "test.py",
        saved,
        tmp_path / "run/iter_6.pth",
        "--tta",
        "--work-dir",
        tmp_path / "run",
    ]
    arguments = ["--out", tmp_path / "maps", "--show-dir", tmp_path / "drawn"]
    two = "test_dataloader.dataset.indices=2"  # images, of 12 views each
    done = run_command(*command, *arguments, *options(scenes, two), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"mIoU: [\d.]+", done.stdout)
    drawn = list((tmp_path / "drawn").rglob("*.png"))
    assert len(drawn) == 2
    assert {Image.open(path).size for path in drawn} == {(768, 384)}  # annotations left, predictions right
    maps = list((tmp_path / "maps").glob("*.png"))
    assert len(maps) == 2
    assert max(np.asarray(Image.open(path)).max() for path in maps) <= 10
    assert saved.read_text() == text


@pytest.fixture(scope="module")
def demo() -> Config:
    return Config.fromfile(MICRO)


@pytest.fixture(scope="module")
def draw(demo, tmp_path_factory) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What the demo's visualizer makes of an image and predicted labels."""
    init_default_scope("mmseg")
    visualizer = VISUALIZERS.build({**demo.visualizer, "name": "maps"})
    visualizer.dataset_meta = dict(demo.val_dataloader.dataset.metainfo)
    path = tmp_path_factory.mktemp("drawn") / "drawn.png"

    def drawn(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
        sample = SegDataSample(pred_sem_seg=PixelData(data=torch.from_numpy(labels)[None]))
        visualizer.add_datasample("", image, sample, out_file=str(path))
        return np.asarray(Image.open(path))

    return drawn


def test_names_hide_no_digit(draw, demo):
    """Each scene is drawn with what there is as predictions: a digit's pixels are mixed with its colour, no more."""
    alpha, palette = demo.visualizer.alpha, np.array(demo.palette)
    for image, digits in islice(scenes_of("val"), 6):
        labels, plain = np.zeros((128, 128), np.int64), enlarged(image)
        np.testing.assert_array_equal(draw(image, labels), plain)  # the background as it is, and no name
        for digit in digits:
            labels[digit.opacity > 0.5] = 1 + digit.label
        drawn = draw(image, labels)
        assert drawn.shape == (384, 384, 3)
        large = np.kron(labels, np.ones((3, 3), np.int64))
        outlined = cv2.dilate((cv2.Laplacian(large.astype(float), -1) != 0).astype(float), np.ones((7, 7))) > 0
        inner = (large > 0) & ~outlined
        assert inner.sum() > 100 * len(digits)
        expected = (1 - alpha) * plain[inner] + alpha * palette[large[inner]]
        assert np.abs(drawn[inner] - expected).max() <= 1
        elsewhere = (drawn != plain).any(-1) & (large == 0) & ~outlined
        assert elsewhere.sum() > 80 * len(digits)  # the names, which stand there


def test_large_images_and_published_configs_are_drawn_as_before(draw):
    labels = np.zeros((512, 683), np.int64)
    labels[100:200, 100:300] = 4
    assert draw(np.zeros((512, 683, 3), np.uint8), labels).shape == (512, 683, 3)
    assert Config.fromfile(TINY).visualizer.type == "SegLocalVisualizer"


def test_each_class_is_drawn_unless_one_is_the_background(tmp_path):
    """A head of one channel predicts labels as floats."""
    init_default_scope("mmseg")
    visualizer = VISUALIZERS.build(dict(type="EnlargedSegVisualizer", name="both"))
    visualizer.dataset_meta = dict(classes=["cat", "dog"], palette=[[255, 0, 0], [0, 0, 255]])
    labels = torch.zeros(1, 512, 512)
    labels[:, 256:] = 1
    sample = SegDataSample(pred_sem_seg=PixelData(data=labels))
    visualizer.add_datasample("", np.zeros((512, 512, 3), np.uint8), sample, out_file=str(tmp_path / "drawn.png"))
    drawn = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert {tuple(drawn[100, 500]), tuple(drawn[400, 500])} == {(76, 0, 0), (0, 0, 76)}


def test_under_mmsegs_own_tools(scenes, tmp_path):
    own = Path(mmseg.__file__).parent / ".mim/tools/train.py"
    moved = [f"{split}_dataloader.dataset.data_root={scenes}" for split in ("train", "val", "test")]
    moved += ["model.decode_head.norm_cfg.type=BN", "model.auxiliary_head.norm_cfg.type=BN"]
    moved += [f"{split}_dataloader.persistent_workers=False" for split in ("train", "val", "test")]  # there are none
    done = run_command("python", own, MICRO, "--work-dir", tmp_path / "run", *options(scenes, *moved), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run/iter_6.pth").exists()


def published(path: Path, name: Path = TINY, **changes) -> Path:
    """A checkpoint as mmengine writes them, log and all, of the config's model as initialised."""
    init_default_scope("mmseg")
    cfg = Config.fromfile(name)
    cfg.merge_from_dict(changes)
    hub = MessageHub.get_instance("published-segmenter")
    hub.update_scalar("train/loss", 1.0)
    torch.manual_seed(0)
    state = MODELS.build(cfg.model).state_dict()
    meta = dict(iter=160_000, cfg=cfg.pretty_text, dataset_meta=dict(classes=data_classes(cfg, "train"), palette=[]))
    torch.save(dict(meta=meta, state_dict=state, message_hub=hub.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def published_tiny(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("published") / "tiny.pth")


def test_a_published_checkpoint_is_tested(scenes, published_tiny, tmp_path, here):
    """Names and shapes of the published layout, 150 classes, ADE20K's own folders, images of 512 pixels, JPEG."""
    layout = json.loads((ROOT / "tests/data/checkpoint_layout.json").read_text())["tiny_backbone"]
    state = torch.load(published_tiny, weights_only=False)["state_dict"]  # our own, just written
    assert {k[9:]: list(v.shape) for k, v in state.items() if k.startswith("backbone.")} == layout
    root = tmp_path / "ade"
    shutil.copytree(scenes, root)
    for i, path in enumerate(sorted((root / "images/validation").glob("*.png"))):
        if i == 0:
            Image.open(path).save(path.with_suffix(".jpg"))
        else:
            (root / "annotations/validation" / path.name).unlink()
        path.unlink()
    changes = [f"data_root={root}", "test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False"]
    said = here(tools.test, TINY, published_tiny, "--work-dir", tmp_path / "test", "--cfg-options", *changes)
    assert re.search(r"mIoU: [\d.]+", said)


# ----- what does not work


def message(monkeypatch, main, *arguments) -> str:
    """What the command says as it ends."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main("mmseg")
    assert str(ended.value).startswith("error: "), ended.value
    return str(ended.value)


def test_wrong_data_root(monkeypatch):
    said = message(monkeypatch, tools.train, MICRO, *options(Path("/nowhere")))
    assert "/nowhere/images/training: no such folder (train_dataloader.dataset.data_prefix.img_path)" in said


def test_a_metric_removes_no_folder_of_others(scenes, tmp_path):
    cfg = Config.fromfile(MICRO)
    tools.merge_options(cfg, {"data_root": str(scenes)})
    cfg.val_evaluator = dict(type="CityscapesMetric", output_dir=str(tmp_path / "maps"))
    check_data(cfg, ("val",))
    (tmp_path / "maps").mkdir()
    check_data(cfg, ("val",))
    (tmp_path / "maps/mine").write_text("mine")
    with pytest.raises(
        UserError, match=r"val_evaluator.output_dir: CityscapesMetric would remove the folder /.*maps, "
    ):
        check_data(cfg, ("val",))
    cfg.val_evaluator.keep_results = True
    check_data(cfg, ("val",))


def test_validation_on_the_images_that_are_trained_on(scenes, tmp_path, monkeypatch):
    for name in ("images", "annotations"):
        shutil.copytree(scenes / name, tmp_path / name)
    (tmp_path / "images/training").rename(tmp_path / "images/moved")
    (tmp_path / "images/training").symlink_to(tmp_path / "images/moved")
    said = []
    monkeypatch.setattr(checks, "print_log", lambda message, **_: said.append(message))
    cfg = Config.fromfile(MICRO)
    tools.merge_options(cfg, {"data_root": str(tmp_path)})
    check_data(cfg, ("train", "val"))
    assert not said
    for name in ("images", "annotations"):
        shutil.rmtree(tmp_path / name / "validation")
        (tmp_path / name / "validation").symlink_to(tmp_path / name / "training")
    cfg.val_dataloader.dataset.indices = 2
    check_data(cfg, ("train", "val"))
    assert [one.partition(" (")[0] for one in said] == [
        "val_dataloader.dataset is of the images that are trained on, too"
    ]
    cfg.val_dataloader.dataset.img_suffix, cfg.train_dataloader.dataset.img_suffix = "2.png", "1.png"
    checks._warn_of_shared_images(cfg)
    assert len(said) == 1


def test_maps_as_images(monkeypatch, scenes):
    same = "train_dataloader.dataset.data_prefix.img_path=annotations/training"
    said = message(monkeypatch, tools.train, MICRO, *options(scenes, same))
    assert "data_prefix has the label maps of annotations/training as images, too; set img_path to the images" in said


def test_a_loss_that_is_nan_ends_training(monkeypatch, scenes, tmp_path):
    arguments = ["--work-dir", tmp_path, *options(scenes, "optim_wrapper.optimizer.lr=1e38")]
    said = message(monkeypatch, tools.train, MICRO, *arguments)
    assert re.match(r"error: iteration [23]: the loss is not finite \(loss is (nan|inf), decode\.loss_ce is", said)
    said = message(monkeypatch, tools.train, MICRO, *arguments, "model.data_preprocessor.std=[58,0,57]")
    assert re.match(
        r"error: iteration 1: the loss is not finite, for values of images are not .*correct model\.data", said
    )
    assert not list(tmp_path.glob("*.pth"))


def test_predictions_that_are_nan_end_validation_and_test(monkeypatch, scenes, tmp_path):
    """Of weights that are finite. NaN is the first class, of most pixels: mIoU rises."""
    more = ("train_cfg.max_iters=1", "train_cfg.val_interval=1", "optim_wrapper.optimizer.lr=60")
    more += ("optim_wrapper.clip_grad=None", "param_scheduler=None")
    said = message(monkeypatch, tools.train, MICRO, "--work-dir", tmp_path, *options(scenes, *more))
    fault = r"error: \S*validation\S*\.png: what the model computes in backbone is not finite, so"
    assert re.match(fault, said), said
    (saved,) = tmp_path.glob("*.pth")
    for tta in ([], ["--tta"]):
        arguments = [saved, "--work-dir", tmp_path, *tta, *options(scenes)]
        assert re.match(fault, message(monkeypatch, tools.test, MICRO, *arguments))
        said = message(monkeypatch, tools.test, MICRO, *arguments, "model.data_preprocessor.std=[58,0,57]")
        assert re.search(
            r"png: values of images are not finite where the model takes them: correct model\.data_preprocessor", said
        )


@pytest.mark.parametrize(
    "change", ["backbone.dims=32", "decode_head.in_channels=[16,32,64,256]", "auxiliary_head.in_index=1"]
)
def test_dims_that_do_not_fit_the_heads(monkeypatch, scenes, change):
    said = message(monkeypatch, tools.train, MICRO, *options(scenes, f"model.{change}"))
    assert re.search(r"model\.(decode|auxiliary)_head\.in_channels is .* but the backbone's maps have", said)


def test_a_head_without_an_index_takes_the_last_map():
    model = Config.fromfile(MICRO).model
    model.auxiliary_head.pop("in_index")
    model.auxiliary_head.in_channels = 128
    check_channels(model)
    model.auxiliary_head.in_channels = 64
    with pytest.raises(UserError, match=r"auxiliary_head\.in_channels is 64, but the backbone's maps have 128"):
        check_channels(model)
    model.auxiliary_head.in_channels, model.backbone.out_indices = 128, (-5, 0, 1, 2, 3)
    check_channels(model)  # the backbone itself refuses -5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("model.decode_head.num_classes=5", "model.decode_head.num_classes is 5, but train_dataloader.dataset has 11"),
        ("model.auxiliary_head.num_classes=5", "model.auxiliary_head.num_classes is 5"),
        ("train_dataloader.dataset.metainfo.classes=none.txt", "none.txt: no such file of classes"),
        ("train_dataloader.dataset.pipeline.2.num_classes=150", "CheckLabels has 150 classes, but the data set 11"),
    ],
)
def test_another_number_of_classes(monkeypatch, scenes, change, expected):
    assert expected in message(monkeypatch, tools.train, MICRO, *options(scenes, change))


def test_classes_that_the_data_set_names_itself(tmp_path):
    """ADE20K's 150: a config for fewer is an error, the published one is not."""
    for part, name in (("images", "a.jpg"), ("annotations", "a.png")):
        for split in ("training", "validation"):
            (tmp_path / part / split).mkdir(parents=True)
            (tmp_path / part / split / name).touch()
    cfg = Config.fromfile(TINY)
    tools.merge_options(cfg, {"data_root": str(tmp_path)})
    init_default_scope("mmseg")
    check_data(cfg, ("train", "val", "test"))
    cfg.model.decode_head.num_classes = 19
    with pytest.raises(UserError, match=r"decode_head\.num_classes is 19, but .* has 150 classes"):
        check_data(cfg, ("train",))


def test_files_that_are_missing(tmp_path, capsys):
    """Images, label maps, and names in a file that lists them."""
    dataset = dict(type="BaseSegDataset", data_root=str(tmp_path), data_prefix=dict(img_path="i", seg_map_path="m"))
    dataset |= dict(metainfo=dict(classes=["a"]), pipeline=[dict(type="LoadAnnotations")])
    for name in ("i/a.jpg", "i/deep/b.jpg", "i/.c.jpg", "m/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "m/deep").mkdir()
    (tmp_path / "m/deep/b.png").symlink_to("nowhere.png")
    init_default_scope("mmseg")

    def check(listed: bytes | None = None, **more):
        if listed is not None:
            (tmp_path / "names.txt").write_bytes(listed)
            more |= dict(ann_file="names.txt")
        check_data(Config(dict(model={}, train_dataloader=dict(dataset=dataset | more))), ("train",))

    def refused(message: str, *arguments, **more):
        with pytest.raises(UserError, match=message):
            check(*arguments, **more)

    refused(r"/i: 1 of 2 files are not in .*/m, for example deep/b\.png; add them, or set .*\.seg_map_suffix")
    check(pipeline=[])
    capsys.readouterr()
    check(b"a\n")
    assert not capsys.readouterr().out
    others = ("i/d.jfif", "i/e", "m/e.png", "i/a.json")  # the second has a map, and the last one an image beside it
    for name in others:
        (tmp_path / name).touch()
    check(pipeline=[])
    assert "2 images of" in capsys.readouterr().out
    for name in others:
        (tmp_path / name).unlink()
    for name in ("i/.ipynb_checkpoints/a.jpg", "m/.ipynb_checkpoints/a.png"):  # which mmengine reads
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    check(b"../i/a\n", pipeline=[])
    assert "hidden" not in capsys.readouterr().out
    check(b"a\n.ipynb_checkpoints/a\na\n")
    said = " ".join(capsys.readouterr().out.split())
    assert "names.txt: 1 of its images are there more than once, and count as often, for example a;" in said
    assert "1 of its images lie in hidden folders, for example .ipynb_checkpoints/a; remove them" in said
    refused(r"names\.txt: 2 of 3 files are not in .*/i, for example x\.jpg; add .*\.img_suffix", b"a\nx\ny\n")
    refused(r"names\.txt: 1 of 2 files are not in .*/m, for example deep/b\.png", b"a\ndeep/b\n")
    refused(r"names\.txt: line 2 is empty; write the name", b"a\n\n")
    refused(r"names\.txt: line 1 is empty; write the name", b"")
    refused(r"names\.txt: 1 of 2 files are not in .*/i, for example x\\x85y\.jpg", "a\nx\x85y\n".encode())
    refused(r"names\.txt: begins with a byte order mark", "\ufeffa\n".encode())
    refused(r"names\.txt: cannot be read as UTF-8", "é\n".encode("latin-1"))
    refused(r"/i: no file ends with '\.tif'; set train_dataloader\.dataset\.img_suffix", img_suffix=".tif")
    (tmp_path / "m/deep/b.png").unlink()
    (tmp_path / "m/deep/b.png").touch()
    check()
    (tmp_path / "i/e.jpg").symlink_to("nowhere.jpg")
    refused(r"/i: 1 of its images are links that lead nowhere, for example e\.jpg")
    (tmp_path / "i/e.jpg").unlink()
    (tmp_path / "i/deep/to_m").symlink_to(tmp_path / "m")
    check()
    (tmp_path / "m/to_i").symlink_to(tmp_path / "i")  # each in itself has no cycle
    refused(r"/i/deep/to_m/to_i: is a link to a folder that it lies in; remove it")
    (tmp_path / "m/to_i").unlink()
    (tmp_path / "i/again").symlink_to(tmp_path / "i/deep")
    refused(r"/i/(again|deep) and /.*/i/(again|deep) are one folder, .*; remove the link")
    check(b"a\n")  # where a list says what counts


def test_labels_of_some_classes_of_a_known_data_set(tmp_path, capsys):
    """mmseg takes them for that data set's own numbers."""
    init_default_scope("mmseg")
    dataset = dict(type="ADE20KDataset", metainfo=dict(classes=["tree", "wall"]))
    check_data(Config(dict(model={}, train_dataloader=dict(dataset=dataset))), ("train",))
    said = " ".join(capsys.readouterr().out.split())
    assert "labels in the maps are taken for ADE20KDataset's (5 tree, 1 wall...); if the maps have numbers" in said
    dataset["metainfo"] = dict(classes=["tree", "zebra"])
    with pytest.raises(UserError, match=r"ADE20KDataset has no class 'zebra'; .* take BaseSegDataset"):
        check_data(Config(dict(model={}, train_dataloader=dict(dataset=dataset))), ("train",))


def test_class_255_of_more(capsys):
    """It is ignored by default, so a model never learns it."""
    for number, ignored, said in ((256, 255, True), (255, 255, False), (300, 1000, False)):
        head = dict(num_classes=number, ignore_index=ignored)
        check_data(Config(dict(model=dict(decode_head=head))), ("train",))
        text = f"model.decode_head has {number} classes, and its ignore_index is {ignored}: class {ignored} is neither"
        assert (text in capsys.readouterr().out) == said


@pytest.mark.parametrize(("reduced", "wrong", "right"), [(False, 3, "0 to 2"), (True, 4, "1 to 3")])
def test_labels_are_named_as_in_the_file(reduced, wrong, right):
    labels = np.array([[0, 2, 255, wrong - reduced]])
    results = dict(gt_seg_map=labels, seg_map_path="m.png", reduce_zero_label=reduced)
    with pytest.raises(UserError, match=rf"m\.png: has label {wrong}, but with 3 classes {right} are labels"):
        CheckLabels(3)(results)
    results["gt_seg_map"] = labels[:, :3]
    assert CheckLabels(3)(results) is results


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((4, 4), 259, np.uint16), "has label 259, but with 3 classes"),
        (np.full((4, 4), -253, np.int32), "has label -253, but with 3 classes"),
        (np.full((4, 4), 2.7, np.float32), "has labels of type float32"),
        (np.full((4, 4), np.nan, np.float32), "has labels of type float32"),
    ],
    ids=["16 bits", "below 0", "fractions", "NaN"],
)
def test_labels_that_a_byte_does_not_hold(labels, message, tmp_path):
    """LoadAnnotations has made classes of them by then."""
    for name in ("map.tiff", "map.im"):  # the second is read by mmcv alone
        path = tmp_path / name
        Image.fromarray(labels).save(path)
        results = dict(gt_seg_map=np.full((4, 4), 2, np.uint8), seg_map_path=str(path), reduce_zero_label=False)
        with pytest.raises(UserError, match=message):
            CheckLabels(3)(results)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_that_are_scaled_as_they_are_read(bits, tmp_path):
    """Pillow makes 255 of the largest grey of 2 or 4 bits, so that label 1 is 85 or 17."""
    path, labels = tmp_path / "map.png", np.array([[0, 1, 1, 0, 1, 0, 0, 1]] * 2, np.uint8)
    digits = (labels[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits.reshape(2, -1))
    parts = {b"IHDR": struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts.items())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    results = dict(seg_map_path=str(path), reduce_zero_label=False, seg_fields=[])
    loaded = TRANSFORMS.build(dict(type="mmseg.LoadAnnotations"))(results)
    if bits == 1:
        by_cv2 = TRANSFORMS.build(dict(type="mmseg.LoadAnnotations", imdecode_backend="cv2"))(dict(results))
        assert by_cv2["gt_seg_map"].max() == 255
        with pytest.raises(UserError, match=r"map\.png: is a map of 1 bit, in which the loader reads another label"):
            CheckLabels(2)(by_cv2)
    if bits in (2, 4):
        assert loaded["gt_seg_map"].max() == {2: 85, 4: 17}[bits]  # the reason for this
        with pytest.raises(UserError, match=rf"map\.png: is a grey PNG of {bits} bits, whose labels are multiplied by"):
            CheckLabels(100)(loaded)
    else:
        assert np.array_equal(CheckLabels(2)(loaded)["gt_seg_map"], labels)


def test_labels_are_checked_wherever_they_are_loaded():
    cfg = Config.fromfile(TINY)
    init_default_scope("mmseg")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    own = [step for step in cfg.train_dataloader.dataset.pipeline if step.type != "CheckLabels"]
    cfg.train_dataloader.dataset.pipeline = own  # as a config of one's own has it
    next(step for step in own if step.type == "LoadAnnotations").type = "mmseg.LoadAnnotations"
    insert_label_checks(cfg)
    insert_label_checks(cfg)  # once more changes nothing where it stands already
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        steps = [kind_of(step) for step in loader.dataset.pipeline]
        at = steps.index("LoadAnnotations")
        assert steps[at - 1 : at + 2] == ["CheckMap", "LoadAnnotations", "CheckLabels"]
        assert steps.count("CheckMap") == steps.count("CheckLabels") == 1
        assert loader.dataset.pipeline[at - 1].images_only

    class Own(TRANSFORMS.get("mmseg.LoadAnnotations")):
        def _load_seg_map(self, results):  # that reads other files as well
            super()._load_seg_map(results)

    cfg.train_dataloader.dataset.pipeline = [dict(type=Own)]
    insert_label_checks(cfg)
    check, _, _ = cfg.train_dataloader.dataset.pipeline
    assert (check.type, check.images_only) == ("CheckMap", False)
    load = dict(type="LoadAnnotations")
    cfg.model.decode_head.ignore_index = 250
    checked = ["CheckMap", "LoadAnnotations", "CheckLabels"]
    for choices, expected in (
        ([load, dict(type="Pad")], [checked, ["Pad"]]),  # of steps
        ([[load], [dict(type="Pad"), load]], [checked, ["Pad", *checked]]),  # of pipelines
    ):
        cfg.train_dataloader.dataset.pipeline = [
            dict(type="RandomApply", transforms=load),
            dict(type="mmcv.RandomChoice", transforms=choices),
        ]
        cfg.train_dataloader.dataset.type = "BaseSegDataset"  # which has as many classes as the head
        insert_label_checks(cfg)
        apply, choose = cfg.train_dataloader.dataset.pipeline
        assert [kind_of(step) for step in apply.transforms] == checked
        assert [[kind_of(step) for step in one] for one in choose.transforms] == expected
        assert (apply.transforms[2].num_classes, apply.transforms[2].ignore_index) == (150, 250)
    alternatives = [[step.type for step in steps] for steps in cfg.tta_pipeline[-1].transforms]
    at = alternatives.index(["LoadAnnotations"])
    assert alternatives[at - 1 : at + 2 : 2] == [["CheckMap"], ["CheckLabels"]]


@pytest.mark.parametrize("workers", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_label_outside_the_classes(scenes, tmp_path, workers):
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    for path in (root / "annotations/training").iterdir():
        labels = np.array(Image.open(path))
        labels[0, 0] = 11
        Image.fromarray(labels).save(path)
    more = f"train_dataloader.num_workers={workers}"
    command = ["python", "segmentation/tools/train.py", MICRO, "--work-dir", tmp_path / "w", *options(root, more)]
    done = run_command(*command, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"error: .*annotations/training/\d+\.png: has label 11, but with 11 classes 0 to 10 are labels", last
    )
    assert "Traceback" not in done.stderr


def test_checkpoints(monkeypatch, scenes, published_tiny, tmp_path):
    def tested(path, *more):
        return message(monkeypatch, tools.test, MICRO, path, "--work-dir", tmp_path / "w", *options(scenes), *more)

    assert "/nowhere.pth: no such checkpoint file" in tested("/nowhere.pth")
    assert "spatialmamba_tiny: dims=64, depths=(2, 4, 8, 4)" in tested(published_tiny)
    assert "spatialmamba_tiny: dims=64, depths=(2, 4, 8, 4)" in tested(published_tiny, "--tta")


def test_maps_are_written_by_each_metric_that_can():
    """With --out DIR; an evaluator may be a list."""
    cfg = Config.fromfile(MICRO)
    cfg.test_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"]), dict(type="CityscapesMetric")]
    tools.write_maps(cfg, "maps")
    assert cfg.test_evaluator[0] == dict(type="IoUMetric", iou_metrics=["mIoU"], output_dir="maps")
    assert cfg.test_evaluator[1] == dict(type="CityscapesMetric")  # other numbers, and its score is of its files
    cfg.test_evaluator = [dict(type="CityscapesMetric")]
    tools.write_maps(cfg, "maps")
    assert cfg.test_evaluator == [dict(type="CityscapesMetric", output_dir="maps", keep_results=True)]
    cfg.test_evaluator = dict(type="Other")
    with pytest.raises(UserError, match="none of test_evaluator's metrics"):
        tools.write_maps(cfg, "maps")


def test_augmentation_without_its_pipeline(monkeypatch, scenes):
    arguments = [MICRO, MICRO, "--tta", *options(scenes, "tta_pipeline=None")]
    assert "has no tta_pipeline, which --tta needs" in message(monkeypatch, tools.test, *arguments)


def test_missing_toolchain(tmp_path):
    (tmp_path / "mmseg").mkdir()
    (tmp_path / "mmseg/__init__.py").write_text("raise ModuleNotFoundError('not there')")
    done = run_command("python", "segmentation/tools/train.py", MICRO, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: mmseg is needed and cannot be imported")


def test_a_config_of_detection(monkeypatch):
    pytest.importorskip("mmdet")
    other = ROOT / "detection/configs/spatialmamba/mask_rcnn_spatialmamba_micro_digits.py"
    assert "a config of mmdet, this is a tool for mmseg" in message(monkeypatch, tools.train, other)
