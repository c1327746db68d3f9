"""Early checks of VOC's annotation files, one XML file an image, as mmdet's XMLDataset reads them."""

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree

from mmengine.config import ConfigDict
from mmengine.fileio import list_from_file

from classification.errors import UserError
from classification.openmmlab.coco import check_names, report_filtered
from classification.openmmlab.messages import print_log

NAMED = 3  # names in a message


def _is_box(box: ElementTree.Element, size: dict[str, int]) -> bool:
    """Return whether a box in whole pixels, as mmdet reads it, has an area and begins within its image."""
    left, top, right, bottom = (int(float(box.findtext(name))) for name in ("xmin", "ymin", "xmax", "ymax"))
    width, height = size.get("width") or math.inf, size.get("height") or math.inf  # some tools write 0
    return left < right and top < bottom and left <= width and top <= height


def check_objects(dataset: ConfigDict, root: str, folder: str, classes: Sequence[str], key: str) -> None:
    """Warn of objects whose name is no class, and of classes without an object. mmdet leaves such objects out.

    Warn of images that filter_cfg leaves out, and of those that are listed more than once, too.

    Args:
        dataset: its `ann_file` names the images, one a line.
        root: the data root.
        folder: the folder of the XML files in the folder `data_prefix.sub_data_root`.

    Raises:
        UserError: the name of a class is no text, an XML file is missing or cannot be read, or the name of no object is
            a class, or most images have boxes that are empty or outside, or no image is left.
    """
    images = list_from_file(os.path.join(root, dataset.ann_file))
    twice = [name for name, count in Counter(map(os.path.normpath, images)).items() if count > 1]
    if twice:
        print_log(
            f"{dataset.ann_file}: {len(twice)} images are there more than once, and count as often, for example "
            f"{twice[0]} ({key})",
            level=logging.WARNING,
        )
    folder = os.path.join(root, (dataset.get("data_prefix") or {}).get("sub_data_root", ""), folder)
    check_names(folder, classes, key)
    filters = {} if dataset.get("test_mode") else dataset.get("filter_cfg") or {}
    found: Counter[str | None] = Counter()
    empty, small, smallest = 0, 0, filters.get("min_size", 0)
    odd: list[str] = []  # images with a box that is none
    for image in images:
        path = os.path.join(folder, f"{image}.xml")
        try:
            annotation = ElementTree.parse(path)
            names = [one.findtext("name") for one in annotation.iterfind("object")]
            size = {one.tag: int(one.text) for one in annotation.iterfind("size/*") if one.tag in ("width", "height")}
            sides = list(size.values())
            if any(not _is_box(one, size) for one in annotation.iterfind("object/bndbox")):
                odd.append(path)
        except (OSError, TypeError, ValueError, ElementTree.ParseError) as error:
            raise UserError(f"{path}: cannot be read ({error}); it is the annotation of an image of {key}") from error
        found.update(names)
        if filters.get("filter_empty_gt") and not set(names) & set(classes):
            empty += 1
        elif sides and min(sides) < smallest:
            small += 1
    if odd:
        text = f"{odd[0]}: has a box that is empty or outside its image, as {len(odd)} of {len(images)} images"
        if 2 * len(odd) > len(images):
            raise UserError(f"{text}; boxes must be xmin, ymin, xmax and ymax in pixels of <size> ({key})")
        print_log(f"{text} ({key})", level=logging.WARNING)
    foreign = {name: count for name, count in found.items() if name not in classes}
    if not foreign:
        report_filtered(folder, len(images), empty, small, smallest)
        return
    named = ", ".join(f"{name!r} ({count})" for name, count in Counter(foreign).most_common(NAMED))
    number = f"{sum(foreign.values())} of {found.total()}"
    text = f"{folder}: {number} objects have a name that is no class, for example {named}"
    absent = [name for name in classes if name not in found]
    if len(absent) == len(classes):
        raise UserError(f"{text}; set {key}.metainfo.classes to their names")
    without = f"; no object is called {', '.join(map(repr, absent[:NAMED]))}" if absent else ""
    print_log(f"{text}: they are left out, and count as background{without} ({key})", level=logging.WARNING)
    report_filtered(folder, len(images), empty, small, smallest)
