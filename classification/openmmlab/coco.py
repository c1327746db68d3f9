"""Early checks of COCO annotation files: mmdet and pycocotools pass over many mistakes, or end in a traceback."""

import json
import logging
import mmap
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from classification.errors import UserError
from classification.openmmlab.messages import print_log

CHUNK = 2**24  # bytes; a list of categories fits into them
SMALL = 2**27  # bytes of the largest file that is read whole; COCO's own, half a gigabyte, is known to be sound
NAMED = 10  # classes
LARGEST = 2**31  # pixels; NaN is not below it either
FARTHEST = 10  # sides of its image that a mask's point may be away
SURE = 0.8  # intersection over union of a box and its mask's extent that shows that both are in the same place
SAME_PLACE = 0.3  # intersection over union of a mask's extent and its box, at least

MANY_CROWDS = 0.25  # of all annotations; in COCO's own files, 1.3 % are crowds

# Reasons why mmdet passes over an annotation. The first three are only named if mmdet keeps no annotation.
MARKED = 'they are marked "ignore" or "iscrowd"'
OTHER_CATEGORY = "their categories are none of metainfo.classes"
NO_IMAGE = "they are of images that it does not have"
THIN = "their boxes, [x, y, width, height] in pixels, are not a pixel wide and high"
OUTSIDE = "their boxes, [x, y, width, height] in pixels, are outside their images' width and height"
NO_AREA = "their area is not above 0"
NO_MASK = "their segmentation is no polygon of three points or more, and no RLE of counts and size"
POLYGONS = "their segmentation is an RLE, which LoadAnnotations does not take with poly2mask=False"


@dataclass
class Use:
    """What a config does with an annotation file.

    Args:
        key: the data set's key in the config, for messages.
        trains: training, which needs annotations if images without boxes are left out.
        compared: whether a metric of pycocotools reads the file.
        scored: whether such a metric compares predictions with its annotations, and so needs some.
        masks: whether masks are read.
        polygons: whether masks must be polygons (`LoadAnnotations(poly2mask=False)`).
        filters: the data set's filter_cfg, which leaves out images.
        folder: the folder of images; None if the images are not looked for.
    """

    key: str
    trains: bool = False
    compared: bool = False
    scored: bool = False
    masks: bool = False
    polygons: bool = False
    filters: dict = field(default_factory=dict)
    folder: str | None = None


def check_annotations(path: str, classes: list[str], use: Use) -> None:
    """Check a COCO annotation file. Above 128 MiB, only its categories, and whether it has images and annotations.

    Raises:
        UserError: mmdet or pycocotools would fail on the file, or would silently take it for something else.
    """
    content = _content(path)
    # Unlabelled data sets for training keep all images.
    annotated = use.scored or (use.trains and bool(use.filters.get("filter_empty_gt")))
    _check_classes(path, [*_categories(path, content).values()], classes, use.key)
    if content is None:
        print_log(
            f"{path}: is larger than {SMALL // 2**20} MiB, so only its categories are checked, not its images and "
            "annotations",
            level=logging.INFO,
        )
        if annotated:
            _check_annotated(path)
        return
    images, annotations = (_entries(path, content, key) for key in ("images", "annotations"))
    for what, there in {"images": images, "annotations": annotations if annotated else True}.items():
        if not there:
            advice = (
                "; to write predictions alone, set format_only=True and outfile_prefix in the metric"
                if use.scored
                else ""
            )
            purpose = "train on" if use.trains else "test"
            raise UserError(f"{path}: has no {what}, so there is nothing to {purpose}{advice}")
    _check_entries(path, classes, images, annotations, content["categories"], use)


def check_labels(dataset: object) -> None:
    """Check how a data set of any type numbers a COCO file's categories, once it is built.

    Raises:
        UserError: a category has another label than its name has in the data set's classes. The checkpoint's classes
            and the metric then mean other objects.
    """
    for inner in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if inner is not None:
            check_labels(inner)
    labels, path = getattr(dataset, "cat2label", None), getattr(dataset, "ann_file", None)
    classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
    if not (isinstance(labels, dict) and isinstance(path, str) and os.path.isfile(path) and classes):
        return
    try:
        names = _categories(path, None)
    except UserError:  # a file of another kind: VOC's data sets number names, too, and read a list of images
        return
    for number, label in labels.items():
        name = names.get(number)
        if name in classes and isinstance(label, int) and label < len(classes) and classes[label] != name:
            raise UserError(
                f"{path}: its category {name!r} has the label {label} in {type(dataset).__name__}, but that is "
                f"{classes[label]!r} of its classes; put metainfo.classes into the order of the file's categories"
            )


def check_order(metric: object, classes: Sequence[str]) -> None:
    """Check how a metric of any type that has loaded a COCO file numbers labels.

    Raises:
        UserError: it numbers them in another order than the data set's classes.
    """
    loaded = getattr(metric, "_coco_api", None)
    if loaded is None:
        return
    names = {number: category["name"] for number, category in loaded.cats.items()}
    if not set(classes) <= set(names.values()):
        return  # it knows the classes by other names
    order = [names[number] for number in loaded.get_cat_ids(cat_names=list(classes))]
    if order != list(classes):
        raise UserError(
            f"{type(metric).__name__} numbers labels in the order {', '.join(order[:NAMED])}, ..., but the data set's "
            f"classes are {', '.join(classes[:NAMED])}, ...; make them equal (of mmdet's data sets, only "
            "Objects365V1Dataset needs sort_categories=True)"
        )


def image_ids(path: str) -> set:
    """Return a COCO file's image ids. The set is empty for large files, and for other files, which others report."""
    with suppress(AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        if os.path.getsize(path) <= SMALL:
            return {image["id"] for image in json.loads(Path(path).read_bytes())["images"]}
    return set()


# ----- the file


def _content(path: str) -> dict | None:
    """Return what a file holds; None for a large file."""
    if os.path.getsize(path) > SMALL:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
        # Looking at the keys of each object takes ten times as long.
        repeats = any(len(re.findall(rf'"{key}"\s*:', text)) > 1 for key in ("images", "annotations", "categories"))
        content = json.loads(text, object_pairs_hook=partial(_once, path) if repeats else None)
    except UserError:
        raise
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON in UTF-8 ({error}); write it anew, without a byte order mark"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no COCO annotation file, an object of images, annotations and categories")
    return content


def _once(path: str, pairs: list[tuple[str, object]]) -> dict:
    """Return the object of these pairs. JSON would take the last value of a key that is there twice."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"{path}: has the key {twice!r} twice in one object, and the first would be lost; join them")
    return entry


def _entries(path: str, content: dict, key: str) -> list[dict]:
    entries = content.get(key, [])
    if not (isinstance(entries, list) and all(isinstance(one, dict) for one in entries)):
        raise UserError(f"{path}: its {key} are no list of objects; write [{{...}}, ...]")
    return entries


def _categories(path: str, content: dict | None) -> dict[object, str]:
    """Return the ids and names of a COCO file's categories, if possible without parsing all of half a gigabyte."""
    readers = (_categories_at_an_end, _categories_in_all) if content is None else (lambda _: content["categories"],)
    for read in readers:
        with suppress(KeyError, RecursionError, TypeError, ValueError):
            categories = read(path)
            names, ids = ([category[key] for category in categories] for key in ("name", "id"))
            if all(isinstance(name, str) for name in names):
                break
    else:
        raise UserError(
            f'{path}: is no COCO annotation file: it has no "categories" list of {{"id": ..., "name": ...}}; add one'
        )
    _check_ids(path, "categories", ids)
    return dict(zip(ids, names, strict=True))


def _categories_at_an_end(path: str) -> list[dict]:
    """Return the file's list of categories.

    Raises:
        ValueError: the name is missing, or occurs more than once, as where images have such lists too.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = text.find(b'"categories"')
        if at < 0 or text.rfind(b'"categories"') != at:
            raise ValueError("no list of that name, or more than one")
        chunk = text[at : at + CHUNK].decode(errors="ignore")
        start = re.match(r'"categories"\s*:\s*(?=\[\s*\{)', chunk)
        if not start:
            raise ValueError("no list of categories")
        return json.JSONDecoder().raw_decode(chunk, start.end())[0]


def _categories_in_all(path: str) -> list[dict]:
    return json.loads(Path(path).read_bytes())["categories"]


def _check_annotated(path: str) -> None:
    """Raise a UserError if a large file has no image or no annotation, on which mmdet's sampler fails."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for key in ("images", "annotations"):
            at = text.find(f'"{key}"'.encode())
            alone = text.rfind(f'"{key}"'.encode()) == at
            if at < 0 or (alone and re.match(rb'"\w+"\s*:\s*\[\s*\]', text[at : at + 1000])):
                raise UserError(f"{path}: has no {key}, so there is nothing to train on")


def check_names(path: str, classes: Sequence[str], key: str) -> None:
    """Raise a UserError if the name of a class is no text, and so equals none of an annotation file."""
    if others := [name for name in classes if not isinstance(name, str)]:
        raise UserError(
            f"{key}.metainfo.classes has {others[0]!r}, which is no text, as the names in {path} are; write it with "
            "quotes in the config (--cfg-options makes numbers of such texts)"
        )


def _check_classes(path: str, names: list[str], classes: list[str], key: str) -> None:
    check_names(path, classes, key)
    absent = [name for name in classes if name not in names]
    if absent:
        raise UserError(
            f"{path}: has no category {absent[0]!r}{f' and {len(absent) - 1} more' if absent[1:] else ''} of the "
            f"config's classes; its own are {', '.join(names[:10])}{', ...' if names[10:] else ''}. Name these in "
            f"{key}.metainfo.classes, and set num_classes of the heads"
        )
    in_file = [name for name in names if name in classes]
    if alike := [name for name, number in Counter(in_file).items() if number > 1]:
        raise UserError(f"{path}: has more than one category {alike[0]!r}; join them, or rename all but one")
    if in_file != classes:  # mmdet numbers labels in the file's order, not in that of `classes`
        raise UserError(f"{key}.metainfo.classes must be in the order of {path}: {', '.join(in_file)}")


# ----- its entries


def _check_entries(
    path: str, classes: list[str], images: list[dict], annotations: list[dict], categories: list[dict], use: Use
) -> None:
    _check_keys(path, "images", images, ("id", "file_name", "width", "height"))
    _check_keys(path, "annotations", annotations, ("id", "image_id", "category_id"))
    _check_ids(path, "images", [image["id"] for image in images])
    _check_ids(path, "annotations", [one["id"] for one in annotations])
    for key in ("image_id", "category_id"):
        _check_plain(path, f"annotations[{{}}].{key}", [one[key] for one in annotations])
    known = {image["id"]: image for image in images}
    wanted = {category["id"] for category in categories if category["name"] in classes}
    _check_values(path, images, annotations, known, wanted, use)
    _check_corners(path, annotations, known)
    numbers = {category["id"] for category in categories}
    lost = [one["image_id"] for one in annotations if one["image_id"] not in known]
    if lost:
        print_log(
            f"{path}: {len(lost)} of its annotations are of images, for example image_id {lost[0]!r}, that it "
            "does not have; they are left out",
            level=logging.WARNING,
        )
    foreign = [one["category_id"] for one in annotations if one["category_id"] not in numbers]
    if foreign:
        raise UserError(
            f"{path}: {len(foreign)} of its annotations have a category_id, for example {foreign[0]!r}, that none of "
            "its categories has; mmdet would leave them out"
        )
    _warn_of_crowds(path, annotations)
    reasons = [_reason_against(one, known, wanted, use) for one in annotations]
    _count_passed_over(path, images, Counter(reasons))
    left = _without_filtered(path, images, annotations, wanted, use.filters)
    _check_file_names(path, left, annotations, use.compared)
    _warn_of_repeated(path, annotations)
    if use.folder is not None:
        _check_images_exist(path, left, use.folder)
    if use.masks:
        read = {
            i: one
            for i, (one, reason) in enumerate(zip(annotations, reasons, strict=True))
            if one["image_id"] in known and one["category_id"] in wanted and (use.compared or _is_read(one, reason))
        }
        _check_masks(path, read, known, use)
    if use.compared and any(one["id"] == 0 for one in annotations):
        print_log(
            f"{path}: an annotation has the id 0. pycocotools counts its object as missed, whatever is predicted; "
            "number annotations from 1",
            level=logging.WARNING,
        )
    if use.compared:
        _warn_of_odd_areas(path, [one for one in annotations if one["category_id"] in wanted])
        _warn_of_ignored(path, [one for one in annotations if one["category_id"] in wanted])


def _warn_of_crowds(path: str, annotations: list[dict]) -> None:
    """Warn if many annotations are marked "iscrowd", as some tools mark all masks that were drawn with a brush."""
    crowds = sum(bool(one.get("iscrowd")) for one in annotations)
    if MANY_CROWDS * len(annotations) < crowds < len(annotations):
        print_log(
            f'{path}: {crowds} of its {len(annotations)} annotations are marked "iscrowd", so they are left out in '
            "training, and not counted in tests; of single objects, correct it to 0",
            level=logging.WARNING,
        )


def _warn_of_ignored(path: str, annotations: list[dict]) -> None:
    """Warn of annotations that are marked "ignore" alone, as converters mark difficult objects."""
    ignored = [one for one in annotations if one.get("ignore") and not one.get("iscrowd")]
    if ignored:
        print_log(
            f'{path}: {len(ignored)} annotations are marked "ignore", but not "iscrowd": pycocotools counts them as '
            "objects that are to be found; write iscrowd=1 if they are to be ignored",
            level=logging.WARNING,
        )


def _check_keys(path: str, what: str, entries: list[dict], keys: Sequence[str]) -> None:
    for i, one in enumerate(entries):
        for key in keys:
            if key not in one:
                raise UserError(f"{path}: {what}[{i}] has no {key!r}; each of its {what} needs {', '.join(keys)}")


def _is_read(annotation: dict, reason: str | None) -> bool:
    """Whether mmdet reads the annotation's mask. It reads crowds, and leaves out what is marked "ignore"."""
    return reason is None or (reason == MARKED and not annotation.get("ignore"))


def _check_values(path: str, images: list[dict], annotations: list[dict], known: dict, wanted: set, use: Use) -> None:
    """Check what mmdet reads of each image, and of each of its annotations that is not marked "ignore".

    pycocotools reads annotations of the wanted categories, whether they are marked or not.
    """
    for i, image in enumerate(images):
        name = image["file_name"]
        if not isinstance(name, str) or os.path.basename(name) in ("", ".", ".."):
            raise UserError(f"{path}: images[{i}].file_name is {name!r:.100}; write the name of a file")
        for key in ("width", "height"):
            if not _is_number(image[key]):
                raise UserError(f"{path}: images[{i}].{key} is {image[key]!r:.100}; write a number of pixels")
    for i, one in enumerate(annotations):
        compared = use.compared and one["category_id"] in wanted
        if one["image_id"] not in known or (one.get("ignore") and not compared):
            continue
        for key in ("ignore", "iscrowd"):
            if one.get(key, 0) not in (0, 1, *(() if compared else (None,))):
                raise UserError(f"{path}: annotations[{i}].{key} is {one[key]!r:.100}; write 0 or 1")
        if compared and not _is_number(one["id"]):
            raise UserError(f"{path}: annotations[{i}].id is {one['id']!r:.100}, which pycocotools needs as a number")
        needed = ("bbox", "area", *(("iscrowd",) if compared else ()))
        for key in needed:
            if key not in one:
                advice = "; write 0, or 1 for a crowd" if key == "iscrowd" else ""
                raise UserError(f"{path}: annotations[{i}] has no {key!r}{advice}")
        box = one["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(side) for side in box)):
            raise UserError(
                f"{path}: annotations[{i}].bbox is {box!r:.100}; write [x, y, width, height], four numbers of pixels"
            )
        if not _is_number(one["area"]):
            raise UserError(f"{path}: annotations[{i}].area is {one['area']!r:.100}; write a number of pixels")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def _check_ids(path: str, what: str, ids: list) -> None:
    _check_plain(path, f"{what}[{{}}].id", ids)
    if what == "images" and None in ids:  # which pycocotools cannot sort
        raise UserError(f"{path}: images[{ids.index(None)}].id is None; write a number")
    if what != "annotations" and len({isinstance(one, str) for one in ids}) > 1:  # pycocotools sorts the others
        raise UserError(f"{path}: some ids of its {what} are texts, others numbers; write numbers")
    for one, number in Counter(ids).items():
        if number > 1:
            raise UserError(f"{path}: {number} of its {what} have the id {one!r}; give each its own")


def _check_plain(path: str, entry: str, ids: list) -> None:
    for i, one in enumerate(ids):
        if isinstance(one, list | dict):
            raise UserError(f"{path}: {entry.format(i)} is {one!r:.100}; write a number")


def _check_corners(path: str, annotations: list[dict], images: dict) -> None:
    """Raise a UserError or warn if boxes are probably [x1, y1, x2, y2] instead of [x, y, width, height].

    mmdet reads four numbers as [x, y, width, height], and cuts off the part of a box that is beyond the image. The
    numbers do not show for certain which of the two they are. An error is raised if at least a tenth of the boxes reach
    beyond their images and all boxes could be corners. Otherwise a warning counts the boxes that reach beyond, and says
    if most of these could be corners.
    """
    boxes = beyond = corners = corners_beyond = 0
    for one in annotations:
        image = images.get(one["image_id"])
        if one.get("ignore") or image is None:
            continue
        (x, y, width, height), whole = one["bbox"], (image["width"], image["height"])
        could_be = x < width <= whole[0] + 1 and y < height <= whole[1] + 1 and min(x, y) >= 0
        could_be = could_be and not _is_around(one["bbox"], one.get("segmentation"), whole)
        reaches = x + width > whole[0] + 1 or y + height > whole[1] + 1 or min(x, y) < -1
        boxes, beyond, corners = boxes + 1, beyond + reaches, corners + could_be
        corners_beyond += could_be and reaches
    advice = "[x1, y1, x2, y2]? Write [x, y, width, height]"
    if corners == boxes and 10 * beyond >= boxes > 0:
        raise UserError(
            f"{path}: {beyond} of its {boxes} boxes reach beyond their images, and all would fit if they were "
            f"{advice}; if they are that, end them at the image's border"
        )
    if beyond:
        suspect = 2 * corners_beyond > beyond
        print_log(
            f"{path}: {beyond} of its {boxes} boxes reach beyond their images by more than a pixel"
            + (f", and {corners_beyond} of these would fit if they were {advice}" if suspect else "; they are clipped"),
            level=logging.WARNING,
        )


def _warn_of_odd_areas(path: str, annotations: list[dict]) -> None:
    """Warn if most areas do not fit their boxes, for example if all are 1 or are from before images were resized.

    pycocotools tells small, medium and large objects apart by `area`.
    """
    plain = [one for one in annotations if not one["iscrowd"] and one["area"] > 0]  # others are named elsewhere
    areas = [(one["area"], one["bbox"][2] * one["bbox"][3]) for one in plain]
    odd = [(area, box) for area, box in areas if not 0.02 * box <= area <= 1.1 * box + 1]  # a thin object has 2 %
    if 2 * len(odd) > len(areas):
        print_log(
            f"{path}: the area of {len(odd)} of its {len(areas)} objects does not fit the box, for example "
            f"{odd[0][0]:g} in a box of {odd[0][1]:g} pixels; AP of small, medium and large objects goes by area: "
            "correct it",
            level=logging.WARNING,
        )


def _is_around(box: list[float], segmentation: object, size: tuple[int, int]) -> bool:
    """Whether polygons show that a box is [x, y, width, height]."""
    with suppress(TypeError, ValueError):
        if isinstance(segmentation, list):
            return _overlap(_extent(segmentation, [*size], strict=False), box) > SURE
    return False


# ----- what mmdet passes over


def _reason_against(annotation: dict, images: dict, wanted: set, use: Use) -> str | None:
    """Return why CocoDataset leaves an annotation out, or why training ignores it; None if it is used."""
    if annotation["image_id"] not in images:
        return NO_IMAGE
    if annotation.get("ignore") or annotation.get("iscrowd"):
        return MARKED
    if annotation["category_id"] not in wanted:
        return OTHER_CATEGORY
    image = images[annotation["image_id"]]
    x, y, width, height = annotation["bbox"]
    if width < 1 or height < 1:
        return THIN
    for start, size, whole in ((x, width, image["width"]), (y, height, image["height"])):
        if min(start + size, whole) <= max(start, 0):
            return OUTSIDE
    if annotation["area"] <= 0:
        return NO_AREA
    return _reason_against_mask(annotation.get("segmentation"), use.polygons) if use.masks else None


def _reason_against_mask(segmentation: object, polygons: bool) -> str | None:
    if isinstance(segmentation, list) and segmentation and not _polygons(segmentation):
        return NO_MASK
    if isinstance(segmentation, dict):
        if polygons:
            return POLYGONS
        if not isinstance(segmentation.get("counts"), list | str) or segmentation.get("size") is None:
            return NO_MASK
    return None


def _polygons(segmentation: list) -> list[list]:
    """Return the polygons that mmdet takes: those of three points or more, with two numbers each."""
    return [one for one in segmentation if isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0]


def _count_passed_over(path: str, images: list[dict], reasons: Counter) -> None:
    number, kept = reasons.total(), reasons.pop(None, 0)
    if images and reasons and not kept:
        reason, most = reasons.most_common(1)[0]
        raise UserError(
            f"{path}: mmdet would pass over all of its {number} annotations, over {most} because {reason}; correct them"
        )
    for quiet in (MARKED, OTHER_CATEGORY, NO_IMAGE):
        reasons.pop(quiet, None)
    if reasons:
        reason, most = reasons.most_common(1)[0]
        print_log(
            f"{path}: mmdet passes over {reasons.total()} of its {number} annotations, over {most} because {reason}",
            level=logging.WARNING,
        )


def _without_filtered(path: str, images: list[dict], annotations: list[dict], wanted: set, filters: dict) -> list[dict]:
    """Return the images that filter_cfg keeps. Warn of the others, which mmdet does not report.

    Raises:
        UserError: filter_cfg keeps none.
    """
    annotated = {one["image_id"] for one in annotations if one["category_id"] in wanted}
    smallest, empty, small, left = filters.get("min_size", 0), 0, 0, []
    for image in images:
        if filters.get("filter_empty_gt") and image["id"] not in annotated:
            empty += 1
        elif min(image["width"], image["height"]) < smallest:
            small += 1
        else:
            left.append(image)
    report_filtered(path, len(images), empty, small, smallest)
    return left


def report_filtered(path: str, images: int, empty: int, small: int, smallest: float) -> None:
    """Warn of the images that filter_cfg leaves out, for they are empty or small.

    Raises:
        UserError: it leaves out all.
    """
    reasons = [f"{empty} have no annotation of the data set's classes (filter_empty_gt)"] if empty else []
    reasons += [f"{small} are narrower or lower than {smallest} pixels (min_size)"] if small else []
    text = f"{path}: filter_cfg leaves out {empty + small} of its {images} images: {' and '.join(reasons)}"
    if empty + small == images:
        raise UserError(f"{text}, so there is nothing to train on; correct the file or filter_cfg")
    if reasons:
        print_log(text, level=logging.WARNING)


# ----- its images and masks


def _check_file_names(path: str, images: list[dict], annotations: list[dict], compared: bool) -> None:
    """Raise a UserError if an image is listed twice, with other objects: each entry would lack the other's objects.

    A file may repeat an image with all its objects, so that it is seen more often; where results are
    compared, that is a warning.
    """
    same = defaultdict(list)
    for image in images:
        same[os.path.normpath(image["file_name"])].append(image["id"])
    shared = {one for ids in same.values() if len(ids) > 1 for one in ids}
    objects = {one: Counter() for one in shared}
    for one in annotations:
        if one["image_id"] in shared:
            objects[one["image_id"]][one["category_id"], str(one.get("bbox"))] += 1
    for name, ids in same.items():
        for other in ids[1:]:
            if objects[other] != objects[ids[0]]:
                raise UserError(
                    f"{path}: the images of the ids {ids[0]!r} and {other!r} are both {name}, with other annotations: "
                    "each would count as without the other's objects; give them one id"
                )
    repeated = [(name, len(ids)) for name, ids in same.items() if len(ids) > 1]
    if repeated and compared:
        print_log(
            f"{path}: {len(repeated)} images are listed more than once, for example {repeated[0][0]} "
            f"{repeated[0][1]} times, and count as often",
            level=logging.WARNING,
        )


def _warn_of_repeated(path: str, annotations: list[dict]) -> None:
    """Warn of objects that are there twice: of two, a detector can find but one."""
    keys = ("image_id", "category_id", "bbox", "segmentation")
    objects = Counter(str([one.get(key) for key in keys]) for one in annotations if not one.get("iscrowd"))
    if repeated := objects.total() - len(objects):
        print_log(
            f"{path}: {repeated} of its annotations repeat another one's image, category, bbox and segmentation, as "
            f"{objects.most_common(1)[0][0]:.100}; each counts as an object of its own",
            level=logging.WARNING,
        )


def _check_images_exist(path: str, images: list[dict], folder: str) -> None:
    """Raise a UserError if image files are missing. It lists folders, as many files are slow to look for one by one."""
    listed = defaultdict(set)
    places = [os.path.split(os.path.join(folder, image["file_name"])) for image in images]
    for parent in dict.fromkeys(parent for parent, _ in places):
        with suppress(OSError), os.scandir(parent) as entries:
            listed[parent] = {one.name for one in entries if not one.is_symlink()}
    missing = [os.path.join(*place) for place in places if place[1] not in listed[place[0]]]
    missing = [one for one in missing if not os.path.isfile(one)]  # links; or the file system ignores case
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of its {len(images)} images are not there, for example {missing[0]}; set "
            "data_prefix.img to their folder, or take them out of the file"
        )


def _check_masks(path: str, annotations: dict[int, dict], images: dict, use: Use) -> None:
    """Raise a UserError or warn if masks are missing, of another size than their image, or apart from their boxes."""
    apart = {}
    for i, one in annotations.items():
        image, segmentation = images[one["image_id"]], one.get("segmentation")
        if not segmentation:
            raise UserError(f"{path}: annotations[{i}] has no segmentation, and {use.key} reads masks; write one")
        size = [image["height"], image["width"]]
        if isinstance(segmentation, dict) and segmentation.get("size") != size:
            raise UserError(
                f"{path}: annotations[{i}].segmentation.size is {segmentation.get('size')!r:.100}, but its image is "
                f"{size[0]} pixels high and {size[1]} wide; write [height, width], and counts down the columns"
            )
        try:
            extent = _extent(segmentation, size, strict=use.compared)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{path}: annotations[{i}].segmentation cannot be read ({error})") from error
        if min(one["bbox"][2:]) >= 1 and _overlap(extent, one["bbox"]) < SAME_PLACE:
            apart[i] = extent
    if not apart:
        return
    i, extent = next(iter(apart.items()))
    text = (
        f"{path}: {len(apart)} of its {len(annotations)} masks are elsewhere than their boxes, for example "
        f"annotations[{i}], whose mask takes up {[round(side, 1) for side in extent]} "
        f"and whose bbox is {annotations[i]['bbox']}"
    )
    if 2 * len(apart) > len(annotations):
        raise UserError(f"{text}; write both in pixels of the image, [x, y, width, height] and [x1, y1, x2, y2, ...]")
    print_log(text, level=logging.WARNING)


def _extent(segmentation: list | dict, size: list[int], strict: bool) -> list[float]:
    """Return [x, y, width, height] of a mask's pixels or of all its polygons.

    Args:
        segmentation: polygons or an RLE.
        size: the image's [height, width].
        strict: refuse polygons of less than three points, which mmdet leaves out and pycocotools does not read.

    Raises:
        KeyError, TypeError, ValueError: the mask is of other pixels, or holds what is no number.
    """
    if isinstance(segmentation, dict):
        from pycocotools import mask as rle  # which only detection needs

        counts = segmentation["counts"]
        counts = _decompressed(counts) if isinstance(counts, str) else np.asarray(counts)
        if counts.dtype.kind != "i" or counts.ndim != 1 or counts.sum() != size[0] * size[1] or counts.min() < 0:
            raise ValueError(f"its counts are not of {size[0] * size[1]} pixels")
        whole = {"size": [int(side) for side in size], "counts": segmentation["counts"]}
        if isinstance(segmentation["counts"], list):
            whole = rle.frPyObjects(whole, *whole["size"])
        return rle.toBbox(whole).tolist()
    polygons = _polygons(segmentation)
    if not polygons or (strict and len(polygons) < len(segmentation)):
        raise ValueError("a polygon is no list of x and y of three points or more")
    arrays = [np.asarray(one, float) for one in polygons]
    if any(one.ndim != 1 for one in arrays):
        raise ValueError("a polygon is no plain list of x1, y1, x2, y2, ...")
    points = np.concatenate(arrays).reshape(-1, 2)
    if not (np.abs(points) <= FARTHEST * max(size)).all():  # pycocotools walks along each edge, pixel by pixel
        raise ValueError("a point is far from its image")
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *(high - low).tolist()]


def _decompressed(text: str) -> np.ndarray:
    """Return the counts of a compressed RLE.

    A count is written in groups of five bits from the lowest on, of which the last has the sign; bit 5 says that more
    follow. From the fourth on, a count is the difference from the one before the last.
    """
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("its counts are damaged")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 11:
        raise ValueError("its counts are damaged")
    counts = np.add.reduceat((codes & 31) << 5 * places, starts)
    counts -= np.where(codes[ends] & 16, np.int64(1) << 5 * (places[ends] + 1), 0)
    counts[1::2], counts[2::2] = counts[1::2].cumsum(), counts[2::2].cumsum()
    return counts


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes [x, y, width, height], each half a pixel wider on each side."""
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    return both / ((a[2] + 1) * (a[3] + 1) + (b[2] + 1) * (b[3] + 1) - both)
