"""COCO annotation files: what mmdet and pycocotools would take for something else, pass over or fail on."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="make install-openmmlab")
from mmengine.config import Config
from mmengine.registry import METRICS
from pycocotools import mask as rle

from classification.errors import UserError
from classification.openmmlab import checks
from classification.openmmlab import coco as checks_of_coco


def image(i=1, **changed) -> dict:
    lists = [{"id": 7, "name": "outdoor"}]  # which the file's own list is not to be confused with
    return dict(id=i, file_name=f"{i}.png", width=40, height=64, categories=lists) | changed


def annotation(**changed) -> dict:
    return dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 9, 12], area=50, iscrowd=0) | changed


def triangle(x=1, y=1, width=9, height=12) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height]]


def compressed(height=64, width=40, counts=None) -> dict:
    """A mask as an RLE, of the pixels of the annotation's box unless others are given."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[1:13, 1:10] = 1
    found = rle.encode(mask)
    return {"size": found["size"], "counts": found["counts"].decode() if counts is None else counts}


def coco(*annotations: dict, **changed) -> dict:
    annotations = annotations or [annotation(segmentation=triangle())]
    annotations = [{**one, "id": i} for i, one in enumerate(annotations, 1)] if len(annotations) > 1 else annotations
    return (
        dict(images=[image(1), image(2)], annotations=list(annotations), categories=[dict(id=1, name="cat")]) | changed
    )


def without(key: str, entry: dict) -> dict:
    return {name: value for name, value in entry.items() if name != key}


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Warnings."""
    said = []
    for module in (checks, checks_of_coco):
        monkeypatch.setattr(module, "print_log", lambda message, level: said.append(message))
    return said


@pytest.fixture
def check(tmp_path, said):
    """Check what a config does with an annotation file of that content, and return the warnings."""

    def run(
        content: dict | bytes, split: str = "train", compared: bool = False, kind="CocoMetric", **dataset
    ) -> list[str]:
        path = tmp_path / "a.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        dataset = dict(type="CocoDataset", ann_file=str(path), metainfo=dict(classes=("cat",))) | dataset
        dataset.setdefault("pipeline", [dict(type="mmdet.LoadAnnotations", with_mask=True)])
        cfg = Config({"model": {}, f"{split}_dataloader": dict(dataset=dataset)})
        if compared:
            cfg[f"{split}_evaluator"] = dict(type=kind, ann_file=str(path), metric=["bbox", "segm"])
        said.clear()
        checks.check_data(cfg, (split,))
        return [one.removeprefix(f"{path}: ") for one in said]

    return run


TWO = dict(categories=[dict(id=1, name="cat"), dict(id=2, name="dog")])
BAD = {
    # the file
    "byte order mark": ("\ufeff{}".encode(), "a.json: cannot be read as JSON in UTF-8 (Unexpected UTF-8 BOM"),
    "UTF-16": (json.dumps(coco()).encode("utf-16"), "a.json: cannot be read as JSON in UTF-8 ('utf-8' codec can't"),
    "Latin-1": (json.dumps(coco(info="é"), ensure_ascii=False).encode("latin-1"), "cannot be read as JSON in UTF-8"),
    "cut off": (json.dumps(coco()).encode()[:-9], "a.json: cannot be read as JSON in UTF-8"),
    "a list twice": (
        b'{"annotations": [], ' + json.dumps(coco()).encode()[1:],
        "a.json: has the key 'annotations' twice in one object",
    ),
    "list": ([], "a.json: is no COCO annotation file, an object of images"),
    "names": (coco(categories=[{"id": 1}]), 'it has no "categories" list'),
    "no name": (coco(categories=[{"id": 1, "name": None}]), 'it has no "categories" list'),
    "other": (coco(categories=[dict(id=1, name="dog")]), "has no category 'cat' of the config's classes; its own"),
    "a name twice": (coco(categories=[dict(id=i, name="cat") for i in (1, 2)]), "has more than one category 'cat'"),
    "no annotation": (coco(annotations=[]), "has no annotations, so there is nothing to train on"),
    "no image": (coco(images=[]), "has no images, so there is nothing to train on"),
    "null": (coco(annotations=None), "a.json: its annotations are no list of objects"),
    "numbers": (coco(images=[1]), "a.json: its images are no list of objects"),
    # keys and values
    **{f"image without {key}": (coco(images=[without(key, image())]), f"a.json: images[0] has no '{key}'")
       for key in ("id", "file_name", "width", "height")},
    **{f"annotation without {key}": (coco(without(key, annotation())), f"a.json: annotations[0] has no '{key}'")
       for key in ("id", "image_id", "category_id", "bbox", "area")},
    "no mask": (coco(annotation()), "a.json: annotations[0] has no segmentation, and train_dataloader"),
    **{f"file name {name!r}": (coco(images=[image(file_name=name)]), f"images[0].file_name is {name!r}; write")
       for name in (3, "", "folder/", ".")},
    "some ids as texts": (coco(images=[image(1), image("2")]), "some ids of its images are texts, others numbers"),
    "iscrowd as text": (coco(annotation(iscrowd="0")), "a.json: annotations[0].iscrowd is '0'; write 0 or 1"),
    "width": (coco(images=[image(width=None)]), "a.json: images[0].width is None; write a number of pixels"),
    "area": (coco(annotation(area="9")), "a.json: annotations[0].area is '9'; write a number of pixels"),
    **{f"bbox {box}": (coco(annotation(bbox=box)), f"a.json: annotations[0].bbox is {box!r}; write [x, y, width,")
       for box in ([], ["0", "0", "9", "9"], None, [0, 0, float("nan"), 9], [0, 0, 9, float("inf")])},
    "ids of images": (coco(images=[image(1)] * 2), "2 of its images have the id 1; give each its own"),
    "ids of annotations": (coco(annotations=[annotation()] * 2), "2 of its annotations have the id 1; give each its"),
    "list as image_id": (coco(annotation(image_id=[1])), "a.json: annotations[0].image_id is [1]; write a number"),
    "no id": (coco(images=[image(1), image(None)]), "a.json: images[1].id is None; write a number"),
    "list as id": (coco(images=[image(1), image([1])]), "a.json: images[1].id is [1]; write a number"),
    "list of a category": (coco(categories=[dict(id=[1], name="cat")]), "a.json: categories[0].id is [1]; write a"),
    "category_id": (coco(annotation(category_id=0)), "annotations have a category_id, for example 0, that none"),
    # what mmdet passes over
    "thin": (coco(annotation(bbox=[0, 0, 0.5, 0.3])), "1 because their boxes, [x, y, width, height]"),
    "two points": (coco(annotation(segmentation=[[1, 1, 9, 9], [1] * 7])), "because their segmentation is no polygon"),
    "no counts": (coco(annotation(segmentation={"size": [64, 40]})), "because their segmentation is no polygon"),
    "no area": (coco(annotation(area=0)), "pass over all of its 1 annotations, over 1 because their area is"),
    "ignored": (coco(annotation(ignore=1, bbox=[])), 'because they are marked "ignore" or "iscrowd"'),
    "crowd": (coco(annotation(iscrowd=1)), 'because they are marked "ignore" or "iscrowd"'),
    "elsewhere": (coco(annotation(image_id=9)), "because they are of images that it does not have"),
    "other category": (coco(annotation(category_id=2), **TWO), "because their categories are none of metainfo.classes"),
    "empty image": (coco(images=[image(width=0)]), "are outside their images' width and height"),
    "outside": (coco(annotation(bbox=[40, 0, 9, 9])), "are outside their images' width and height"),
    "corners": (
        coco(annotation(bbox=[20, 30, 30, 60])),
        "1 of its 1 boxes reach beyond their images, and all would fit if they were [x1, y1, x2, y2]? Write",
    ),
    "a tenth are corners": (
        coco(annotation(bbox=[20, 30, 30, 60]), *[annotation(bbox=[1, 1, 9, 9])] * 9),
        "1 of its 10 boxes reach beyond their images, and all would fit if they were [x1, y1, x2, y2]? Write",
    ),
    "small": (
        coco(images=[image(width=31)]),
        "filter_cfg leaves out 1 of its 1 images: 1 are narrower or lower than 32 pixels (min_size), so there",
    ),
    # masks and images
    "RLE [width, height]": (
        coco(annotation(segmentation=compressed(40, 64))),
        "a.json: annotations[0].segmentation.size is [40, 64], but its image is 64 pixels high and 40 wide; write",
    ),
    "RLE of another size": (
        coco(annotation(segmentation={"size": [6, 4], "counts": [0, 24]})),
        "a.json: annotations[0].segmentation.size is [6, 4], but its image is 64 pixels high",
    ),
    "counts of other pixels": (
        coco(annotation(segmentation={"size": [64, 40], "counts": [0, 24]})),
        "a.json: annotations[0].segmentation cannot be read (its counts are not of 2560 pixels)",
    ),
    "RLE along rows": (
        coco(annotation(segmentation={"size": [64, 40], "counts": [41, 9, *[31, 9] * 11, 2070]})),
        "a.json: 1 of its 1 masks are elsewhere than their boxes, for example annotations[0], whose mask",
    ),
    **{f"{what} counts": (
        coco(annotation(segmentation=compressed(counts=counts))),
        f"a.json: annotations[0].segmentation cannot be read (its counts are {said}",
    ) for what, counts, said in (
        ("cut", compressed()["counts"][:-4], "not of 2560"), ("more", compressed()["counts"] + "1", "not of 2560"),
        ("odd", "~~", "damaged)"), ("endless", "o" * 40, "damaged)"),
    )},
    "a number as size": (
        coco(annotation(segmentation={"size": 64, "counts": "a"})), "annotations[0].segmentation.size is 64, but its"
    ),
    "points in points": (coco(annotation(segmentation=[[[1, 1], [9, 1], [9, 9]] * 2])), "(a polygon is no plain"),
    "far points": (coco(annotation(segmentation=[[1, 1, 1e9, 1, 9, 12]])), "cannot be read (a point is far from"),
    "texts as points": (coco(annotation(segmentation=[["a"] * 6])), "a.json: annotations[0].segmentation cannot be"),
    "points between 0 and 1": (
        coco(annotation(segmentation=triangle(0.02, 0.02, 0.2, 0.2))),
        "1 of its 1 masks are elsewhere than their boxes, for example annotations[0], whose mask takes up [0.0, 0.0, "
        "0.2, 0.2] and whose bbox is [1, 1, 9, 12]; write both in pixels",
    ),
    "points at twice the size": (coco(annotation(segmentation=triangle(20, 20, 18, 24))), "1 of its 1 masks are else"),
    "an image twice": (
        coco(annotation(), annotation(image_id=2, bbox=[9, 9, 9, 9]), images=[image(1), image(2, file_name="./1.png")]),
        "a.json: the images of the ids 1 and 2 are both 1.png, with other annotations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_refused(kind, check):
    content, message = BAD[kind]
    pipeline = {} if "segmentation" in str(content) or kind == "no mask" else {"pipeline": []}
    with pytest.raises(UserError, match=re.escape(message)):
        check(content, filter_cfg=dict(filter_empty_gt=True, min_size=32), **pipeline)


def test_valid_files(check):
    assert check(coco()) == []
    for kind in ("no annotation", "small"):  # as of unlabelled images, in semi-supervised training
        assert check(BAD[kind][0]) == []
    assert check(without("annotations", coco()), "test") == []  # as COCO's own image_info_test-dev2017
    masks = [compressed(), {"size": [64, 40], "counts": [65, 12, *[52, 12] * 8, 1971]}, triangle(1.4, 0.8, 8.2, 12.3)]
    floats = coco(annotation(segmentation=masks[1] | {"size": [64.0, 40.0]}), images=[image(width=40.0, height=64.0)])
    assert check(floats) == []
    crowd = annotation(iscrowd=1, segmentation=compressed())
    objects = [annotation(segmentation=mask) for mask in masks]
    for split in ("train", "val"):
        assert check(coco(*objects, crowd), split, split == "val") == []
        (said,) = check(coco(*objects, crowd, crowd), split, split == "val")  # as some tools mark all brush masks
        assert said.startswith('2 of its 5 annotations are marked "iscrowd", so they are left out in training, and')
    # An image that is seen twice as often.
    twice = coco(annotation(), annotation(image_id=2), images=[image(1), image(2, file_name="1.png")])
    assert check(twice, pipeline=[]) == []
    objects = [annotation(segmentation=triangle(), id=i, image_id=i) for i in (1, 2)]
    (said,) = check({**twice, "annotations": objects}, "val", compared=True)
    assert said == "1 images are listed more than once, for example 1.png 2 times, and count as often"
    # Without masks, they do not matter; nor does what only pycocotools reads.
    assert check(coco(annotation(segmentation=compressed(40, 64))), pipeline=[]) == []
    assert check(coco(without("iscrowd", annotation())), pipeline=[]) == []
    assert check(coco(annotation(id=0)), pipeline=[]) == []
    # A box at the border that its mask shows to be [x, y, width, height].
    border = annotation(bbox=[3, 5, 39, 60], segmentation=triangle(3, 5, 39, 60))
    assert check(coco(border)) == ["1 of its 1 boxes reach beyond their images by more than a pixel; they are clipped"]
    # What is left out needs less.
    left_out = [annotation(ignore=1, iscrowd=1, bbox=None, area=None), without("bbox", annotation(image_id=9))]
    left_out += [annotation(category_id=2, iscrowd=1)]
    assert [one[:34] for one in check(coco(annotation(segmentation=triangle()), *left_out, **TWO))] == [
        "1 of its annotations are of images",
        "2 of its 4 annotations are marked ",
    ]


def test_what_pycocotools_compares(check):
    """COCOeval takes the id 0 for "not matched", and looks up `iscrowd`."""
    with pytest.raises(
        UserError, match=r"classes has 0, which is no text, as the names in .*a\.json are; write it with"
    ):
        check(coco(), metainfo=dict(classes=(0, 1)))
    with pytest.raises(UserError, match="has no annotations, so there is nothing to test; to write predictions alone"):
        check(coco(annotations=[]), "val", compared=True)
    check(coco(annotations=[]), "val")
    (said,) = check(coco(annotation(id=0, segmentation=triangle())), "val", compared=True)
    assert said.startswith("an annotation has the id 0. pycocotools counts its object as missed")
    with pytest.raises(UserError, match=r"a\.json: annotations\[0\] has no 'iscrowd'; write 0, or 1 for a crowd"):
        check(coco(without("iscrowd", annotation())), "val", compared=True)
    assert check(coco(annotation(), without("iscrowd", annotation(category_id=2)), **TWO), "val", pipeline=[]) == []
    for change, message in {
        "id": (dict(id="a"), r"annotations\[1\].id is 'a', which pycocotools needs as a number"),
        "polygon": (dict(segmentation=[*triangle(), [1, 1, 2, 2]]), "a polygon is no list of x and y of three points"),
        "thin": (dict(bbox=[1, 1, 0.5, 9], segmentation=[[1, 1, 2, 2]]), "a polygon is no list of x and y of three"),
    }.values():
        both = [annotation(segmentation=triangle()), annotation(**{"id": 2, **change})]
        with pytest.raises(UserError, match=message):
            check(coco(annotations=both), "val", compared=True)
    with pytest.raises(UserError, match=r"annotations\[0\].segmentation.size is \[40, 64\]"):
        check(coco(annotation(segmentation=compressed(40, 64))), "val", compared=True, pipeline=[])
    ignored = [annotation(ignore=1, segmentation=triangle()), annotation(ignore=1, iscrowd=1, segmentation=triangle())]
    said = check(coco(annotation(segmentation=triangle()), *ignored), "val", compared=True)
    assert sum('1 annotations are marked "ignore", but not "iscrowd"' in text for text in said) == 1
    odd = [annotation(area=area, iscrowd=crowd, segmentation=triangle()) for area, crowd in ((1, 0), (500, 0), (1, 1))]
    for areas, found in ((odd, 1), ([*odd[:1], annotation(segmentation=triangle())], 0)):
        said = check(coco(*areas), "val", compared=True, pipeline=[])
        fitting = (
            "the area of 2 of its 2 objects does not fit the box, for example 1 in a box of 108 pixels; AP of small"
        )
        assert [text.partition(",")[0] for text in said if "area" in text] == [fitting.partition(",")[0]] * found

    class Mine(METRICS.get("mmdet.CocoMetric")):
        pass

    with pytest.raises(UserError, match=r"annotations\[0\].segmentation.size is \[40, 64\]"):
        check(coco(annotation(segmentation=compressed(40, 64))), "val", compared=True, pipeline=[], kind=Mine)


def test_missing_images(check, tmp_path):
    (tmp_path / "images/deeper").mkdir(parents=True)
    (tmp_path / "images/1.png").touch()
    there = coco(images=[image(1), image(2, file_name="deeper/2.png")])
    for split, filters in (("test", {}), ("train", {})):
        with pytest.raises(
            UserError, match=r"a\.json: 1 of its 2 images are not there, for example .*deeper/2\.png; set"
        ):
            check(there, split, data_prefix=dict(img="images"), data_root=str(tmp_path), filter_cfg=filters)
    more = dict(data_prefix=dict(img="images"), data_root=str(tmp_path))
    check(there, **more, filter_cfg=dict(filter_empty_gt=True))  # without an object, it is not read
    check(there, **more, indices=1)
    (tmp_path / "images/deeper/2.png").touch()
    check(there, **more)


def test_what_mmdet_passes_over_is_counted(check):
    lost = coco(*(annotation(image_id=i) for i in (1, 8, 9)))
    (said,) = check(lost, pipeline=[])
    assert (
        said == "2 of its annotations are of images, for example image_id 8, that it does not have; they are left out"
    )
    some = [
        annotation(**change, segmentation=triangle())
        for change in (
            {},
            {"area": 0, "bbox": [1, 2, 9, 12]},
            {"area": 0, "bbox": [2, 1, 9, 12]},
            {"bbox": [0, 0, 0, 9]},
            {"iscrowd": 1},
        )
    ]
    some += [annotation(segmentation=compressed())]
    for polygons, number in ((None, 3), (dict(type="LoadAnnotations", with_mask=True, poly2mask=False), 4)):
        said = check(coco(*some), "val", compared=True, pipeline=[polygons] if polygons else [])  # the same file: once
        assert said == [f"mmdet passes over {number} of its 6 annotations, over 2 because their area is not above 0"]
    twice = [annotation(), annotation(), annotation(bbox=[5, 5, 9, 9])]
    (said,) = check(coco(*twice), pipeline=[])
    assert said.startswith(
        "1 of its annotations repeat another one's image, category, bbox and segmentation, as [1, 1,"
    )
    apart = [annotation(segmentation=triangle(20, 20, 5, 5), area=9 + i, bbox=[1, 1, 9, 12 - i / 9]) for i in range(3)]
    for one in apart[1:]:
        one["segmentation"] = triangle()
    (said,) = check(coco(*apart))
    assert said.startswith(
        "1 of its 3 masks are elsewhere than their boxes, for example annotations[0], whose mask takes up [20.0,"
    )


def test_filtered_images_are_counted(check):
    boxes = [[0, 0, 9, 9], [60, 60, 9, 9], [-9, 0, 9, 60], [9, 9, 60, 60]]
    objects = [annotation(image_id=i, bbox=box) for i, box in enumerate(boxes)]
    images = [image(i, width=64, height=height) for i, height in enumerate((32, 64, 64, 64, 64, 20))]
    content = coco(*objects, annotation(image_id=5), images=images)
    for test_mode in (False, True):
        said = check(content, pipeline=[], filter_cfg=dict(filter_empty_gt=True, min_size=32), test_mode=test_mode)
        assert said[0] == "3 of its 5 boxes reach beyond their images by more than a pixel; they are clipped"
        assert [text for text in said if "filter_cfg" in text] == [
            "filter_cfg leaves out 2 of its 6 images: 1 have no annotation of the data set's classes (filter_empty_gt) "
            "and 1 are narrower or lower than 32 pixels (min_size)"
        ] * (not test_mode)


def test_images_of_joined_data_sets_have_their_own_ids(tmp_path, monkeypatch):
    """CocoMetric would compare one's predictions with the other's boxes; and it counts objects of all images it has."""
    said = []
    monkeypatch.setattr(checks, "print_log", lambda message, **_: said.append(message))

    def written(name, ids):
        content = coco()
        content["images"] = [image(i) for i in ids]
        content["annotations"] = [{**content["annotations"][0], "image_id": ids[0]}]
        (tmp_path / name).write_text(json.dumps(content))
        return dict(type="CocoDataset", data_root=str(tmp_path), ann_file=name, metainfo=dict(classes=("cat",)))

    parts = {
        name: written(f"{name}.json", ids)
        for name, ids in dict(a=[1, 2], b=[3], c=[9, 2], all=[1, 2, 3], more=range(1, 6)).items()
    }

    def checked(first, second, compared, kind="CocoMetric", **more):
        dataset = dict(type="ConcatDataset", datasets=[{**parts[one], **more} for one in (first, second)])
        metric = dict(type=kind, ann_file=compared and str(tmp_path / f"{compared}.json"))
        evaluator = dict(type="MultiDatasetsEvaluator", metrics=[metric, metric]) if kind is None else metric
        checks.check_data(
            Config(dict(model={}, val_dataloader=dict(dataset=dataset), val_evaluator=evaluator)), ("val",)
        )

    checked("a", "b", "all")
    checked("a", "b", None)
    assert said == []
    checked("a", "b", "more")
    assert "more.json: has 2 images, for example of the id 4, in none of the files of val_dataloader.dataset" in said[0]
    checked("a", "c", "all", kind=None)
    checked("a", "c", "all", backend_args=dict(backend="petrel"))
    for pair, compared in ((("a", "c"), "all"), (("a", "c"), None), (("a", "a"), "a")):
        with pytest.raises(UserError, match=r"^val_dataloader\.dataset joins .*a\.json and .*, which both .* id [12]:"):
            checked(*pair, compared)
    with pytest.raises(UserError, match=r"a\.json: has no image of the id 3, which .*b\.json has, so"):
        checked("a", "b", "a")


def test_labels_of_data_sets_of_any_type(tmp_path):
    """A type that reads its file in a way of its own may number categories otherwise than its classes."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco(**TWO)))

    def dataset(labels, classes=("cat", "dog"), **more) -> SimpleNamespace:
        return SimpleNamespace(cat2label=labels, metainfo=dict(classes=classes), ann_file=str(path), **more)

    for labels in ({1: 0, 2: 1}, {2: 1}, {1: 0, 9: 0}, {1: 7}, None):
        checks_of_coco.check_labels(dataset(labels))
    checks_of_coco.check_labels(dataset({1: 0, 2: 0}, ("cat",)))  # joined
    checks_of_coco.check_labels(SimpleNamespace())
    (tmp_path / "names.txt").write_text("0001\n0002\n")  # as of VOC, whose labels are by name
    voc = SimpleNamespace(cat2label={"cat": 0}, metainfo=dict(classes=("cat",)), ann_file=str(tmp_path / "names.txt"))
    checks_of_coco.check_labels(voc)
    cats = {7: dict(name="dog"), 9: dict(name="cat")}
    of_metric = SimpleNamespace(_coco_api=SimpleNamespace(cats=cats, get_cat_ids=lambda cat_names: [*cats]))
    for metric, classes in ((of_metric, ("dog", "cat")), (of_metric, ("bird",)), (SimpleNamespace(), ())):
        checks_of_coco.check_order(metric, classes)
    with pytest.raises(
        UserError, match=r"SimpleNamespace numbers labels in the order dog, cat, .* classes are cat, dog"
    ):
        checks_of_coco.check_order(of_metric, ("cat", "dog"))
    wrong = dataset({1: 1, 2: 0})
    for one in (wrong, SimpleNamespace(dataset=wrong), SimpleNamespace(datasets=[SimpleNamespace(dataset=wrong)])):
        with pytest.raises(
            UserError, match=r"a\.json: its category 'cat' has the label 1 in SimpleNamespace, but that"
        ):
            checks_of_coco.check_labels(one)


@pytest.mark.parametrize("kind", ["CocoMetric", "mmdet.LVISMetric"])
def test_some_images_are_not_compared_with_the_file_of_all(kind, tmp_path):
    """All objects of the others would count as missed."""
    (tmp_path / "a.json").write_text(json.dumps(coco()))
    dataset = dict(type="CocoDataset", ann_file=str(tmp_path / "a.json"), metainfo=dict(classes=("cat",)), indices=1)
    metric = dict(type=kind, ann_file=dataset["ann_file"])
    cfg = Config(dict(model={}, test_dataloader=dict(dataset=dataset), test_evaluator=[metric]))
    with pytest.raises(
        UserError, match=r"^test_dataloader\.dataset\.indices has only some images .* leave indices out"
    ):
        checks.check_data(cfg, ("test",))
    cfg.test_evaluator[0].ann_file = None
    checks.check_data(cfg, ("test",))
