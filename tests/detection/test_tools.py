"""The command lines, as users run them, on a few digits scenes; and each bad input's one clear message."""

import copy
import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, free_port, note_threads, run_command, threads_left
from scenes import enlarged, write_coco, write_few_scenes

pytest.importorskip("mmdet", reason="make install-openmmlab")
import mmdet.datasets
import mmdet.evaluation
from mmdet.models.dense_heads.gfl_head import Integral
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from mmengine.structures import InstanceData

from classification.data.digits_scenes import scenes as scenes_of
from classification.errors import UserError
from classification.openmmlab import tools
from classification.openmmlab.checks import check_channels, check_data, data_classes
from classification.openmmlab.hooks import CheckPredictions

CONFIGS = ROOT / "detection/configs/spatialmamba"
MICRO = CONFIGS / "mask_rcnn_spatialmamba_micro_digits.py"
TINY = CONFIGS / "mask_rcnn_spatialmamba_fpn_coco_tiny.py"
QUICK = ["train_cfg.max_epochs=2", "train_cfg.val_interval=2", "train_dataloader.batch_size=4"]
QUICK += ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"]
QUICK += ["val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False", "default_hooks.logger.interval=1"]
PERSISTENT = "persistent_workers=True"
TEST_HERE = ["test_dataloader.num_workers=0", "test_dataloader.persistent_workers=False"]  # or workers stay behind


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_few_scenes(tmp_path_factory.mktemp("detection") / "scenes")


def options(scenes: Path, *more: str) -> list[str]:
    return ["--cfg-options", f"data_root={scenes}", *QUICK, *more]


def train(work_dir: Path, scenes: Path, *more: str) -> list:
    return ["python", "detection/tools/train.py", MICRO, "--work-dir", work_dir, *options(scenes), *more]


@pytest.fixture
def here(monkeypatch, capsys) -> Callable[..., str]:
    """`here(tools.train, *arguments)`: the command in this process, for a start is 8 s; what it printed."""

    def run(main, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        main("mmdet")
        return capsys.readouterr().out

    return run


# ----- what works


def test_interrupted_training_resumes(scenes, tmp_path, here, monkeypatch):
    """Killed somewhere after its first epoch, in a folder that is then moved; done, it is not overwritten."""
    folder = tmp_path / "before"
    command = [sys.executable, *map(str, train(folder, scenes, "train_cfg.max_epochs=3")[1:])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    with (tmp_path / "first.txt").open("w") as out:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        deadline = time.monotonic() + 300
        noted = folder / "last_checkpoint"  # empty for a moment
        while not (noted.exists() and noted.read_text()) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (folder / "epoch_1.pth").exists(), (tmp_path / "first.txt").read_text()[-2000:]
    assert not (folder / "epoch_3.pth").exists()
    done_before = int(re.search(r"epoch_(\d)", (folder / "last_checkpoint").read_text()).group(1))

    folder = folder.rename(tmp_path / "after")
    said = here(tools.train, *train(folder, scenes, "train_cfg.max_epochs=3")[2:], "--resume")
    assert f"resumed epoch: {done_before}, iter: {4 * done_before}" in said
    assert "a tool has changed" not in said
    expected = [(str(epoch), str(i)) for epoch in range(done_before + 1, 4) for i in range(1, 5)]
    assert re.findall(r"Epoch\(train\) *\[(\d)\]\[(\d)/4\]", said) == expected
    last = torch.load(folder / "epoch_3.pth", weights_only=False)  # our own, just written
    assert (last["meta"]["epoch"], last["meta"]["iter"]) == (3, 12)
    loss = last["message_hub"]["log_scalars"]["train/loss"]
    assert len(loss.data[0]) == 12  # of both runs
    assert last["optimizer"]["state"][0]["step"] == 12
    last["optimizer"]["state"][0]["exp_avg"] *= 2
    torch.save(last, folder / "epoch_3.pth")

    written = (folder / "epoch_3.pth").stat().st_mtime_ns
    said = message(monkeypatch, tools.train, *train(folder, scenes, "train_cfg.max_epochs=3")[2:])
    assert f"{folder}: holds epoch_3.pth of an earlier run" in said
    assert "--resume, or name another --work-dir" in said
    said = here(tools.train, *train(folder, scenes, "train_cfg.max_epochs=3")[2:], "--resume")  # as the demo does
    assert "Epoch(train)" not in said
    assert "epoch_3.pth: a tool has changed what was saved in it (optimizer), so numbers may be others" in said
    assert (folder / "epoch_3.pth").stat().st_mtime_ns == written


def test_two_processes(scenes, tmp_path):
    """Through dist_train.sh and dist_test.sh, from another folder, with a wrapper of the config's own."""
    tools_folder = ROOT / "detection/tools"
    port = str(free_port())
    command = ["bash", tools_folder / "dist_train.sh", MICRO, 2, "--work-dir", tmp_path / "run"]
    wrapper = "model_wrapper_cfg.type=MMDistributedDataParallel"
    one_epoch = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    workers = [f"{split}_dataloader.{key}" for split in ("train", "val") for key in ("num_workers=1", PERSISTENT)]
    command += options(scenes, "train_dataloader.batch_size=2", wrapper, *one_epoch, *workers)
    done = run_command(*command, cwd=tmp_path, PORT=port, **note_threads(tmp_path / "threads"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr  # of a queue whose files were closed twice
    assert [len(threads) for threads in threads_left(tmp_path / "threads")] == [1, 1]
    assert "no GPU: 2 processes on the CPU" in done.stdout + done.stderr
    assert re.search(r"Epoch\(train\) *\[1\]\[4/4\]", done.stdout)  # 16 scenes by 2 processes of 2
    command = ["bash", tools_folder / "dist_test.sh", MICRO, tmp_path / "run/epoch_1.pth", 2]
    arguments = ["--work-dir", tmp_path / "test", "--out", tmp_path / "found.pkl", "--show-dir", "drawn"]
    command += [*arguments, *options(scenes)]
    done = run_command(*command, cwd=tmp_path, PORT=port, **note_threads(tmp_path / "threads_of_test"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert [len(threads) for threads in threads_left(tmp_path / "threads_of_test")] == [1, 1]
    drawn = list((tmp_path / "test").glob("*/drawn/*.png"))
    assert len(drawn) == 2  # mmengine draws the first process's share
    assert {Image.open(path).size for path in drawn} == {(768, 384)}  # annotations left, predictions right
    with (tmp_path / "found.pkl").open("rb") as file:
        assert len(pickle.load(file)) == 4  # our own, just written


def test_under_mmdets_own_tools(scenes, tmp_path):
    """`custom_imports` is all they need."""
    own = Path(mmdet.__file__).parent / ".mim/tools"
    command = ["python", own / "train.py", MICRO, "--work-dir", tmp_path / "run"]
    paths = [f"{key}={value}" for key, value in moved(scenes).items()]
    done = run_command(*command, *options(scenes, "train_cfg.max_epochs=1", *paths), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = ["python", own / "test.py", MICRO, tmp_path / "run/epoch_1.pth", "--work-dir", tmp_path / "test"]
    done = run_command(*command, *options(scenes, *paths), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "coco/bbox_mAP_50" in done.stdout


def moved(scenes: Path) -> dict[str, str]:
    """What `data_root` alone does with our tools."""
    keys = {f"{split}_dataloader.dataset.data_root": f"{scenes}/" for split in ("train", "val", "test")}
    return keys | {f"{e}_evaluator.ann_file": f"{scenes}/annotations/instances_val.json" for e in ("val", "test")}


@functools.cache
def read_once(name: Path) -> Config:
    return Config.fromfile(name)


def published(path: Path, name: Path = TINY, **changes) -> Path:
    """A checkpoint as mmengine writes them, log and all, of the config's model as initialised."""
    init_default_scope("mmdet")
    cfg = copy.deepcopy(read_once(name))
    cfg.merge_from_dict(changes)
    hub = MessageHub.get_instance("published")
    hub.update_scalar("train/loss", 1.0)
    hub.update_info("iter", 7)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    torch.nn.init.constant_(model.roi_head.bbox_head.fc_cls.bias[:1], 5.0)  # so that something is found
    meta = dict(
        epoch=12,
        iter=7,
        cfg=cfg.pretty_text,
        mmengine_version="0.8.4",
        dataset_meta=dict(classes=data_classes(cfg, "train")),
    )
    state = model.state_dict()
    torch.save(dict(meta=meta, state_dict=state, message_hub=hub.state_dict(), param_schedulers=[]), path)
    return path


@pytest.fixture(scope="module")
def published_tiny(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("published") / "tiny.pth")


def test_a_published_checkpoint_is_tested(published_tiny, tmp_path, here):
    """Names and shapes of the published layout, 80 classes, COCO's own folders, at 1333x800."""
    layout = json.loads((ROOT / "tests/data/checkpoint_layout.json").read_text())["tiny_backbone"]
    state = torch.load(published_tiny, weights_only=False)["state_dict"]  # our own, just written
    assert {k[9:]: list(v.shape) for k, v in state.items() if k.startswith("backbone.")} == layout

    root = write_coco(tmp_path / "coco", mmdet.datasets.CocoDataset.METAINFO["classes"], train=1, val=1)
    changes = [f"data_root={root}", *TEST_HERE]
    said = here(tools.test, TINY, published_tiny, "--work-dir", tmp_path / "test", "--cfg-options", *changes)
    assert "coco/segm_mAP_50" in said


@pytest.fixture(scope="module")
def draw(tmp_path_factory) -> Callable[[np.ndarray, InstanceData], np.ndarray]:
    """What the demo's visualizer makes of an image and predictions."""
    init_default_scope("mmdet")
    visualizer = VISUALIZERS.build({**Config.fromfile(MICRO).visualizer, "name": "detections"})
    visualizer.dataset_meta = dict(classes=tuple("0123456789"))
    path = tmp_path_factory.mktemp("drawn") / "drawn.png"

    def drawn(image: np.ndarray, found: InstanceData) -> np.ndarray:
        visualizer.add_datasample("", image, DetDataSample(pred_instances=found), draw_gt=False, out_file=str(path))
        return np.asarray(Image.open(path))

    return drawn


def test_more_classes_than_colours():
    """The demo's config has ten colours: further classes get others, and the ten keep theirs. A "$" is text."""
    init_default_scope("mmdet")
    visualizer = VISUALIZERS.build({**Config.fromfile(MICRO).visualizer, "name": "more"})
    visualizer.dataset_meta = dict(classes=(*map(str, range(13)), r"$\frac{$"))

    def edge(label: int) -> tuple[int, ...]:
        """The colour of the upper edge of a box, on black."""
        found = InstanceData(bboxes=torch.tensor([[20.0, 20, 100, 100]]), labels=torch.tensor([label]))
        found.scores = torch.ones(1)
        drawn = visualizer._draw_instances(
            np.zeros((128, 128, 3), np.uint8), found, visualizer.dataset_meta["classes"], None
        )
        return tuple(drawn[60, 300])

    colors = [edge(label) for label in (0, 3, 9, 10, 11, 12, 13)]
    assert len(set(colors)) == len(colors)
    for label, color in zip((0, 3, 9), colors, strict=False):
        np.testing.assert_allclose(color, 0.8 * np.array(visualizer.bbox_color[label]), atol=2)


def test_labels_hide_no_digit(draw):
    """Each scene is drawn with what there is as predictions: pixels of digits are the image's, labels lie elsewhere."""
    for image, digits in islice(scenes_of("val"), 6):
        masks = np.stack([digit.opacity > 0.5 for digit in digits])
        boxes = torch.tensor([digit.box() for digit in digits])
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([digit.label for digit in digits])
        found = InstanceData(bboxes=boxes, labels=labels, scores=torch.full((len(digits),), 0.87), masks=masks)
        drawn = draw(image, found[:0])
        plain = enlarged(image)
        np.testing.assert_array_equal(drawn, plain)  # nothing found, nothing drawn

        drawn = draw(image, found)
        assert drawn.shape == (384, 384, 3)
        changed = (drawn != plain).any(-1)
        for box, mask in zip(boxes.numpy() * 3, masks, strict=True):
            inner = cv2.erode(np.kron(mask, np.ones((3, 3))), np.ones((9, 9))) > 0  # without outline and frame
            left, top, right, bottom = box.astype(int)
            inner[: top + 4], inner[bottom - 4 :], inner[:, : left + 4], inner[:, right - 4 :] = (False,) * 4
            for other in boxes.numpy() * 3:  # whose frame may cross it
                x, y = np.mgrid[:384, :384][::-1]
                far = np.maximum.reduce([other[0] - x, x - other[2], other[1] - y, y - other[3]])
                inner &= np.abs(far) > 4
            assert inner.sum() > 100
            assert not (changed & inner).any()
        assert changed.mean() > 0.02  # what is drawn is beside them


def test_large_images_and_published_configs_are_drawn_as_before(draw):
    image = np.zeros((427, 640, 3), np.uint8)
    box = torch.tensor([[100.0, 100, 300, 200]])
    found = InstanceData(bboxes=box, labels=torch.tensor([7]), scores=torch.tensor([0.9]))
    assert draw(image, found).shape == (427, 640, 3)
    assert Config.fromfile(TINY).visualizer.type == "DetLocalVisualizer"


def test_get_flops():
    done = run_command("python", "tools/get_flops.py", MICRO, "--shape", 128, 128, cwd=ROOT / "detection")
    assert done.returncode == 0, done.stderr
    rows = {row.split("|")[1].strip(): row.split("|")[2:4] for row in done.stdout.splitlines() if row.count("|") == 4}
    parts = [float(rows[name][1]) for name in ("backbone", "neck", "rpn_head", "roi_head")]
    assert sum(parts) == pytest.approx(float(rows["all"][1]), abs=0.2)
    assert all(flops > 0 for flops in parts)


def test_data_root_moves_all_paths():
    cfg = Config.fromfile(MICRO)
    tools.merge_options(cfg, {"data_root": "/elsewhere"})
    assert cfg.val_evaluator.ann_file == "/elsewhere/annotations/instances_val.json"
    assert cfg.train_dataloader.dataset.data_root == cfg.test_dataloader.dataset.data_root == "/elsewhere/"
    assert "data/digits_scenes" not in cfg.pretty_text
    tools.merge_options(cfg, {"data_root": "/elsewhere/below", "val_evaluator.ann_file": "/elsewhere/mine.json"})
    assert (cfg.val_evaluator.ann_file, cfg.data_root) == ("/elsewhere/mine.json", "/elsewhere/below/")
    assert cfg.test_evaluator.ann_file == "/elsewhere/below/annotations/instances_val.json"
    cfg.work_dir, cfg.other, cfg.load_from = "/elsewhere/below/w", "/elsewhere/below_too", "/elsewhere/below/c.pth"
    tools.merge_options(cfg, {"data_root": "/third/"})
    assert (cfg.work_dir, cfg.other, cfg.load_from) == (
        "/elsewhere/below/w",
        "/elsewhere/below_too",
        "/elsewhere/below/c.pth",
    )


def checked(scenes: Path, **changes) -> None:
    """No error from what looks at a config."""
    cfg = copy.deepcopy(read_once(MICRO))
    tools.merge_options(cfg, {"data_root": str(scenes)})
    cfg.merge_from_dict(changes)
    init_default_scope("mmdet")
    check_channels(cfg.model)
    check_data(cfg, ("train", "val", "test"))


def test_strides_follow_the_maps():
    """Of anchors and regions: mmdet compares their number alone."""
    model = copy.deepcopy(read_once(MICRO)).model
    model.backbone.out_indices, model.neck.in_channels = (1, 2, 3), [32, 64, 128]
    strides, regions = [8, 16, 32, 64], [8, 16, 32]
    for part, name, right in (
        (model.rpn_head.anchor_generator, "rpn_head.anchor_generator.strides", strides),
        (model.roi_head.bbox_roi_extractor, "roi_head.bbox_roi_extractor.featmap_strides", regions),
        (model.roi_head.mask_roi_extractor, "roi_head.mask_roi_extractor.featmap_strides", regions),
    ):
        with pytest.raises(
            UserError, match=rf"model\.{name} begins with 4, but the neck's first map has a stride of 8"
        ):
            check_channels(model)
        part[name.rpartition(".")[2]] = right
    check_channels(model)
    model.backbone.out_indices, model.neck.in_channels, model.neck.start_level = (0, 1, 2, 3), [16, 32, 64, 128], 1
    check_channels(model)
    single = dict(type="FCOSHead", strides=[4, 8, 16, 32, 64])
    with pytest.raises(
        UserError, match=r"model\.bbox_head\.strides begins with 4, .* set it to \[8, 16, 32, 64, 128\]"
    ):
        check_channels(Config(dict(backbone=model.backbone, neck=[model.neck], bbox_head=single)))
    backwards = dict(type="YOLOV3Neck", num_scales=3, in_channels=[128, 64, 32], out_channels=[64, 32, 16])
    check_channels(Config(dict(backbone=dict(model.backbone, out_indices=(1, 2, 3)), neck=backwards)))
    single["strides"] = [16]  # of one map of the neck
    check_channels(Config(dict(backbone=model.backbone, neck=[model.neck], bbox_head=single)))


def test_masks_are_compared_where_there_are_some(scenes):
    boxes = {f"{split}_evaluator.metric": "bbox" for split in ("val", "test")}
    with pytest.raises(UserError, match=r"val_evaluator compares masks, but model\.roi_head has no mask_head"):
        checked(scenes, **{"model.roi_head.mask_head": None})
    checked(scenes, **boxes, **{"model.roi_head.mask_head": None})


def test_valid_configs_pass(scenes, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join("0123456789"))
    checked(scenes, **{"train_dataloader.dataset.metainfo.classes": str(names)})
    neck = dict(type="FPN", in_channels=[16, 32, 64, 128])
    checked(scenes, **{"model.neck": [neck, dict(type="BFP", in_channels=64)]})
    checked(scenes, **{"model.neck": None})
    checked(scenes, **{"model.backbone": None})
    there = dict(backend="petrel", _delete_=True)
    elsewhere = {"val_evaluator.ann_file": "s3/val.json", "val_evaluator.backend_args": there}
    checked(scenes, **elsewhere)
    here = {"val_evaluator.ann_file": "s3/val.json", "val_evaluator.backend_args": {**there, "backend": "local"}}
    with pytest.raises(UserError, match=r"s3/val\.json: no such annotation file"):
        checked(scenes, **here)
    key = "train_dataloader.dataset"
    with pytest.raises(UserError, match=r"no\.json: no such annotation file"):
        checked(scenes, **{f"{key}.ann_file": "no.json", f"{key}.backend_args": here["val_evaluator.backend_args"]})
    checked(scenes, **{f"{key}.ann_file": "s3://no.json", f"{key}.data_root": ""})
    plain = dict(type="CocoDataset", data_root=f"{scenes}/", ann_file="annotations/instances_train.json")
    plain |= dict(data_prefix=dict(img="train/"), metainfo=dict(classes=tuple("0123456789")), _delete_=True)
    repeated = dict(type="RepeatDataset", times=2, dataset=plain, _delete_=True)
    checked(scenes, **{"train_dataloader.dataset": repeated})
    checked(scenes, val_evaluator=[dict(type="CocoMetric", ann_file=f"{scenes}/annotations/instances_val.json")])


@pytest.mark.parametrize("where", ["info", "images"])
def test_other_lists_of_categories(scenes, tmp_path, where):
    coco = json.loads((scenes / "annotations/instances_train.json").read_text())
    if where == "info":
        coco = {"info": {"categories": 10}, **coco}
    else:
        coco["images"] = [{**image, "categories": ["3"]} for image in coco["images"]]
        coco = {"images": coco.pop("images"), "categories": coco.pop("categories"), **coco, "more": {"categories": []}}
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco))
    checked(scenes, **{"train_dataloader.dataset.ann_file": str(path)})


def test_a_config_for_mixed_precision_is_tested(scenes, tmp_path, here):
    """On a CPU, where it could not be trained."""
    path = published(tmp_path / "c.pth", MICRO)
    amp = ["optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.loss_scale=dynamic"]
    said = here(tools.test, MICRO, path, "--work-dir", tmp_path / "w", *options(scenes, *amp, *TEST_HERE))
    assert "coco/segm_mAP_50" in said


# ----- what does not


def message(monkeypatch, main, *arguments) -> str:
    """What the command says as it ends."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main("mmdet")
    assert str(ended.value).startswith("error: "), ended.value
    return str(ended.value)


def test_wrong_data_root(monkeypatch, tmp_path):
    said = message(monkeypatch, tools.train, MICRO, "--work-dir", tmp_path / "w", *options(Path("/nowhere")))
    assert "/nowhere/train/: no such folder (train_dataloader.dataset.data_prefix.img)" in said
    assert "data_root=/path/to/data/" in said
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda coco: coco.pop("categories"), 'has no "categories" list'),
        (lambda coco: coco.update(categories=3), 'has no "categories" list'),
        (lambda coco: coco["categories"].pop(), "has no category '9'"),
        (lambda coco: coco["categories"].reverse(), "must be in the order of"),
        (lambda coco: [c.update(name=f"n{c['name']}") for c in coco["categories"]], "'0' and 9 more.*are n0, n1"),
        (lambda coco: coco.clear(), 'has no "categories" list'),
    ],
    ids=["none", "a number", "one less", "another order", "other names", "empty"],
)
def test_annotations(monkeypatch, scenes, tmp_path, change, expected):
    coco = json.loads((scenes / "annotations/instances_train.json").read_text())
    change(coco)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(coco))
    said = message(monkeypatch, tools.train, MICRO, *options(scenes, f"train_dataloader.dataset.ann_file={path}"))
    assert re.search(rf"changed\.json.*{expected}|{expected} .*changed\.json", said), said


def test_predictions_are_compared_with_the_file_that_is_loaded(scenes, tmp_path, capsys):
    """CocoMetric numbers labels by its own file: with categories in another order, what is right counts as wrong."""
    coco = json.loads((scenes / "annotations/instances_val.json").read_text())
    coco["categories"].reverse()
    path = tmp_path / "reversed.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(
        UserError, match=r"must be in the order of .*reversed\.json|reversed\.json.*must be in the order"
    ):
        checked(
            scenes, **{"val_dataloader.dataset.ann_file": str(path), "val_dataloader.dataset.type": "CityscapesDataset"}
        )

    class Mine(mmdet.datasets.CocoDataset):
        def parse_data_info(self, raw):
            return {**super().parse_data_info(raw), "more": 1}

    class Other(mmdet.datasets.CocoDataset):
        def load_data_list(self):
            return []

    for kind, checked_as_coco in ((Mine, True), (Other, False)):
        changes = {"val_dataloader.dataset.ann_file": str(path), "val_dataloader.dataset.type": kind}
        changes["val_evaluator.format_only"] = True  # which reads another file
        with pytest.raises(UserError, match="must be in the order of") if checked_as_coco else nullcontext():
            checked(scenes, **changes, **{"val_evaluator.ann_file": None})
    metric = dict(type="CocoMetric", ann_file=str(path))
    for evaluator in (dict(type="Evaluator", metrics=metric), dict(type="MultiDatasetsEvaluator", metrics=[metric])):
        cfg = copy.deepcopy(read_once(MICRO))
        tools.merge_options(cfg, {"data_root": str(scenes)})
        cfg.val_evaluator = evaluator
        with pytest.raises(UserError, match=r"must be in the order of .*reversed\.json"):
            check_data(cfg, ("val",))
    for kind in ("CocoMetric", "mmdet.CocoMetric", mmdet.evaluation.CocoMetric):
        with pytest.raises(UserError, match=r"must be in the order of .*reversed\.json"):
            checked(scenes, **{"val_evaluator.ann_file": str(path), "val_evaluator.type": kind})
    other = {"val_evaluator.ann_file": f"{scenes}/annotations/instances_train.json"}
    checked(scenes)
    assert "are compared with another file" not in capsys.readouterr().out
    checked(scenes, **other)
    assert "val_evaluator.ann_file is" in capsys.readouterr().out


def test_objects_of_voc_that_are_no_class(tmp_path, capsys):
    """XMLDataset leaves them out."""
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "list.txt").write_text("a\nb\n")
    dataset = dict(type="VOCDataset", data_root=f"{tmp_path}/", ann_file="list.txt", data_prefix=dict(sub_data_root=""))
    dataset["metainfo"] = dict(classes=("cat", "dog"))
    cfg = Config(dict(default_scope="mmdet", model={}, train_dataloader=dict(dataset=dataset)))

    init_default_scope("mmdet")

    def check(*names):
        for image, name in zip("ab", names, strict=True):
            objects = f"<object><name>{name}</name></object>" if name else ""
            (tmp_path / "Annotations" / f"{image}.xml").write_text(f"<annotation>{objects}</annotation>")
        check_data(cfg, ("train",))
        return capsys.readouterr().out

    with pytest.raises(
        UserError, match=r"b\.xml: cannot be read .*; it is the annotation of an image of train_dataloader"
    ):
        check("cat", "<")
    with pytest.raises(
        UserError, match=r"2 of 2 objects have a name that is no class, for example 'Cat' \(1\), 'Dog' \(1\); set"
    ):
        check("Cat", "Dog")
    said = check("cat", "Dog").replace("\n", " ")
    assert "1 of 2 objects have a name that is no class, for example 'Dog' (1): they are left out" in said
    assert "background; no object is called 'dog' (train_dataloader.dataset)" in said
    assert "no class" not in check("cat", None)
    dataset = cfg.train_dataloader.dataset
    dataset.metainfo.classes = (0, 1)
    with pytest.raises(UserError, match=r"classes has 0, which is no text, as the names in .*Annotations are"):
        check("0", "1")
    dataset.metainfo.classes = ("cat", "dog")
    dataset.filter_cfg = dict(filter_empty_gt=True)
    assert "filter_cfg leaves out 1 of its 2 images: 1 have no annotation" in check("cat", None).replace("\n", " ")
    assert "more than once" not in check("cat", "dog")
    (tmp_path / "list.txt").write_text("a\nb\n./b\n")
    assert "1 images are there more than once, and count as often, for example b" in check("cat", "dog").replace(
        "\n", " "
    )
    (tmp_path / "list.txt").write_text("a\nb\n")
    dataset.filter_cfg = dict(min_size=32)
    xml = tmp_path / "Annotations" / "a.xml"
    xml.write_text("<annotation><size><width>0</width><height>0</height></size></annotation>")
    check_data(cfg, ("train",))
    assert "1 of its 2 images: 1 are narrower or lower than 32 pixels" in capsys.readouterr().out.replace("\n", " ")

    def boxed(*boxes) -> str:
        for image, box in zip("ab", boxes, strict=True):
            sides = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
            text = f"<object><name>cat</name><bndbox>{sides}</bndbox></object>"
            size = "<size><height>40</height><width>60</width><depth>Unspecified</depth></size>"
            (tmp_path / "Annotations" / f"{image}.xml").write_text(f"<annotation>{size}{text}</annotation>")
        check_data(cfg, ("train",))
        return capsys.readouterr().out.replace("\n", " ")

    assert "outside its image" not in boxed((1, 1, 60, 40), (50, 30, 59.5, 40))
    assert "a box that is empty or outside its image, as 1 of 2 images" in boxed((1, 1, 60, 40), (50, 30, 9, 9))
    for wrong in ((0.1, 0.2, 0.3, 0.4), (70, 1, 90, 9)):  # fractions of the image; of a larger one
        with pytest.raises(UserError, match=r"a\.xml: has a box .* as 2 of 2 images; boxes must be xmin, ymin, xmax"):
            boxed(wrong, wrong)


@pytest.mark.parametrize("what", ["images", "categories"])
def test_ids_that_two_share(scenes, tmp_path, what):
    """pycocotools keeps the last, and gives it what belongs to both."""
    coco = json.loads((scenes / "annotations/instances_train.json").read_text())
    coco[what][1]["id"] = coco[what][0]["id"]
    path = tmp_path / "merged.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(UserError, match=rf"merged\.json: 2 of its {what} have the id \d+; give each its own"):
        checked(scenes, **{"train_dataloader.dataset.ann_file": str(path)})


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b'{"categories": [{"name": '])
def test_annotations_that_are_no_json(monkeypatch, scenes, tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    said = message(monkeypatch, tools.train, MICRO, *options(scenes, f"train_dataloader.dataset.ann_file={path}"))
    assert "broken.json" in said


def test_another_number_of_classes(monkeypatch, scenes):
    said = message(monkeypatch, tools.train, MICRO, *options(scenes, "model.roi_head.bbox_head.num_classes=80"))
    assert "bbox_head.num_classes is 80, but train_dataloader.dataset has 10 classes" in said


def test_dims_that_do_not_fit_the_neck(monkeypatch, scenes):
    said = message(monkeypatch, tools.train, MICRO, *options(scenes, "model.backbone.dims=32"))
    assert "model.neck.in_channels is [16, 32, 64, 128]" in said
    assert "[32, 64, 128, 256] channels" in said


def test_checkpoints(monkeypatch, scenes, tmp_path):
    def tested(path, *more):
        return message(monkeypatch, tools.test, MICRO, path, "--work-dir", tmp_path / "w", *options(scenes, *more))

    assert "/nowhere.pth: no such checkpoint file" in tested("/nowhere.pth")
    assert not (tmp_path / "w").exists()
    sizes = {"model.backbone.depths": (1, 1, 1, 1)}
    path = published(tmp_path / "other.pth", MICRO, **sizes)
    assert "other.pth: its weights are of another model: " in tested(path)
    content = torch.load(published(tmp_path / "large.pth", MICRO), weights_only=False)  # our own, just written
    content["state_dict"]["roi_head.bbox_head.fc_cls.weight"].fill_(1e38)  # mmdet drops scores of NaN
    torch.save(content, tmp_path / "large.pth")
    assert re.search(
        r"png or another image of its batch: what the model computes in roi_head\.bbox_head\.fc_cls is not finite, so",
        tested(tmp_path / "large.pth", *TEST_HERE),
    )
    path = published(tmp_path / "classes.pth", MICRO, **{"model.roi_head.bbox_head.num_classes": 3})
    assert "bbox_head.fc_cls.weight is (4, 256), not (11, 256)" in tested(path)
    backbone = MODELS.build(dict(type="MM_SpatialMamba", dims=16, depths=(1, 1, 2, 1)))
    torch.save({"model": backbone.state_dict()}, tmp_path / "classifier.pth")
    assert "holds no weights under 'state_dict'" in tested(tmp_path / "classifier.pth")
    whole = published(tmp_path / "whole.pth", MICRO)
    whole.write_bytes(whole.read_bytes()[:-1000])
    assert "whole.pth: is not a checkpoint" in tested(whole)


@pytest.mark.parametrize("key", ["load_from", "model.backbone.pretrained"])
def test_weights_to_start_from(monkeypatch, scenes, published_tiny, tmp_path, key):
    def trained(path, *more):
        arguments = [MICRO, "--work-dir", tmp_path / "w", *options(scenes, f"{key}={path}", *more)]
        return message(monkeypatch, tools.train, *arguments)

    assert "/nowhere.pth: no such checkpoint file" in trained("/nowhere.pth")
    assert not (tmp_path / "w").exists()
    assert "spatialmamba_tiny: dims=64, depths=(2, 4, 8, 4)" in trained(published_tiny)


def test_fine_tuning_for_other_classes(scenes, tmp_path, here):
    """Heads may differ from a checkpoint's: mmengine says which do."""
    path = published(tmp_path / "three.pth", MICRO, **{"model.roi_head.bbox_head.num_classes": 3})
    one_iteration = ["train_cfg.max_epochs=1", "train_dataloader.dataset.indices=4"]
    said = here(tools.train, *train(tmp_path / "w", scenes, f"load_from={path}", *one_iteration)[2:])
    assert f"Load checkpoint from {path}" in said
    assert "size mismatch for roi_head.bbox_head.fc_cls.weight" in said
    assert "from scratch" not in said
    assert re.search(r"Epoch\(train\) *\[1\]\[1/1\]", said)


def test_mixed_precision_without_a_gpu(monkeypatch, scenes, tmp_path):
    said = message(monkeypatch, tools.train, MICRO, "--amp", "--work-dir", tmp_path / "w", *options(scenes))
    assert "mixed precision (--amp, or AmpOptimWrapper) needs a GPU, and there is none" in said


def test_an_optimizer_wrapper_without_a_type(monkeypatch, scenes, tmp_path):
    """It is mmengine's OptimWrapper by default; the tool looks at the type before the runner is built."""

    def built(cfg: Config, as_read: Config) -> None:
        raise UserError(f"built with {dict(cfg.optim_wrapper.optimizer)}")

    monkeypatch.setattr(tools, "_build", built)
    own = "optim_wrapper = dict(_delete_=True, optimizer=dict(type='SGD', lr=0.1))"
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = '{MICRO}'\n{own}\n")
    said = message(monkeypatch, tools.train, config, "--work-dir", tmp_path / "w", *options(scenes))
    assert said == "error: built with {'type': 'SGD', 'lr': 0.1}"


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        ("pytorch", dict(RANK="8", WORLD_SIZE="16", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8")),
        ("slurm", dict(SLURM_PROCID="8", SLURM_NTASKS="16", SLURM_LOCALID="0", SLURM_NTASKS_PER_NODE="8")),
        (
            "mpi",
            {f"OMPI_COMM_WORLD_{k}": v for k, v in dict(RANK="8", SIZE="16", LOCAL_RANK="0", LOCAL_SIZE="8").items()},
        ),
    ],
)
def test_more_gpus_than_there_are(monkeypatch, scenes, launcher, environment):
    """The first process of each machine says so at once, the others if nobody has ended them by then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # put back after the test
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = message(monkeypatch, tools.train, MICRO, "--launcher", launcher, *options(scenes))
    assert said == "error: 8 GPUs were asked for, but there are 2 here; ask for 2"
    local_rank = next(name for name in environment if name.endswith(("LOCAL_RANK", "LOCALID")))
    monkeypatch.setenv(local_rank, "1")
    waits = []
    monkeypatch.setattr("classification.errors.time.sleep", waits.append)
    with pytest.raises(SystemExit) as ended:
        tools.train("mmdet")
    assert (ended.value.code, waits) == (said, [20])


@pytest.mark.parametrize(("launcher", "name"), [("pytorch", "RANK"), ("slurm", "SLURM_PROCID"), ("mpi", "OMPI")])
def test_a_launcher_that_did_not_start_it(monkeypatch, scenes, launcher, name):
    said = message(monkeypatch, tools.test, MICRO, "c.pth", "--launcher", launcher, *options(scenes))
    assert f"--launcher {launcher}: {name}" in said


def test_missing_parts_of_a_config(monkeypatch, scenes, tmp_path):
    path = published(tmp_path / "c.pth", MICRO)
    assert "has no tta_model" in message(monkeypatch, tools.test, MICRO, path, "--tta", *options(scenes))
    arguments = [path, "--show-dir", "drawn", *options(scenes, "default_hooks.visualization=None")]
    assert "has no default_hooks.visualization" in message(monkeypatch, tools.test, MICRO, *arguments)


def test_distances_of_a_distribution_are_finite():
    """mmdet drops boxes of NaN: a detector whose distances are infinite would find nothing, without a word."""
    model, hook = torch.nn.ModuleDict(dict(bbox_head=torch.nn.Module())), CheckPredictions()
    model.bbox_head.integral = Integral(8)
    model.forward = lambda distances: [model.bbox_head.integral(distances)][:0]
    hook.before_test_epoch(Namespace(model=model))
    model(torch.zeros(2, 36))
    with pytest.raises(UserError, match=r"what the model computes in bbox_head\.integral is not finite"):
        model(torch.full((2, 36), torch.inf))


def test_arguments(monkeypatch, scenes, tmp_path):
    assert "no.py: no such config file" in message(monkeypatch, tools.train, "no.py")
    said = message(monkeypatch, tools.test, MICRO, "c.pth", "--out", "found.json", *options(scenes))
    assert "found.json: predictions are written as a pickle; name a .pkl file" in said
    (tmp_path / "seg.py").write_text("default_scope = 'mmseg'\nmodel = dict(backbone=dict(type='ResNet'))\n")
    assert "a config of mmseg, this is a tool for mmdet" in message(monkeypatch, tools.train, tmp_path / "seg.py")
    for value, expected in (
        ("None", "has no auto_scale_lr.base_batch_size, which --auto-scale-lr needs"),
        ("3", "not a"),
    ):
        said = message(monkeypatch, tools.train, MICRO, "--auto-scale-lr", *options(scenes, f"auto_scale_lr={value}"))
        assert expected in said


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("mmengine/__init__.py", "error: mmengine is needed and cannot be imported"),
        ("mmdet/__init__.py", "error: mmdet is needed and cannot be imported"),
        ("mmcv/ops/__init__.py", "error: this mmcv has no operators"),
    ],
)
def test_what_is_not_installed(missing, expected, tmp_path):
    module = tmp_path / missing
    module.parent.mkdir(parents=True)
    for folder in module.parents:
        if folder != tmp_path and tmp_path in folder.parents:
            (folder / "__init__.py").write_text("")
    module.write_text("raise ModuleNotFoundError('not there')")
    done = run_command("python", "detection/tools/train.py", MICRO, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(expected)
    assert "requirements-openmmlab.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_shell_arguments():
    done = run_command("bash", "detection/tools/dist_train.sh", MICRO, cwd=ROOT)
    assert (done.returncode, done.stderr.startswith("usage: ")) == (2, True)
    done = run_command("bash", "detection/tools/dist_test.sh", MICRO, "c.pth", "two", cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: GPUS is a number of processes, got 'two'\n")


@pytest.mark.parametrize("folder", ["detection", "segmentation"])
@pytest.mark.parametrize("name", ["train", "test"])
def test_slurm(folder, name, tmp_path):
    """With a stand-in for srun that prints what it was asked."""
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = ROOT / f"{folder}/tools/slurm_{name}.sh"
    done = subprocess.run(
        ["bash", script, "part", "job", MICRO, "last"], env={**os.environ, "PATH": path, "GPUS": "16"}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert {"--partition=part", "--job-name=job", "--ntasks=16", "--gres=gpu:8", "--ntasks-per-node=8"} <= set(said)
    tail = [str(ROOT / f"{folder}/tools/{name}.py"), str(MICRO)]
    assert said[-len(tail) - (2 if name == "train" else 1) :][: len(tail)] == tail
    assert said[-2 if name == "train" else -1 :] == (["--work-dir", "last"] if name == "train" else ["last"])
    assert 'exec python -u "$@" --launcher slurm' in done.stdout
