"""Early check of VOC's annotation files, one XML file an image, as mmdet's XMLDataset reads them."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree

from mmengine.config import ConfigDict
from mmengine.fileio import list_from_file

from classification.errors import UserError
from classification.openmmlab.messages import print_log

NAMED = 3  # names in a message


def check_object_names(dataset: ConfigDict, root: str, folder: str, classes: Sequence[str], key: str) -> None:
    """Warn of objects whose name is no class, and of classes without an object. mmdet leaves such objects out.

    Args:
        dataset: its `ann_file` names the images, one a line.
        root: the data root.
        folder: the folder of the XML files in the folder `data_prefix.sub_data_root`.

    Raises:
        UserError: an XML file is missing or cannot be read, or the name of no object is a class.
    """
    images = list_from_file(os.path.join(root, dataset.ann_file))
    folder = os.path.join(root, (dataset.get("data_prefix") or {}).get("sub_data_root", ""), folder)
    found: Counter[str | None] = Counter()
    for image in images:
        path = os.path.join(folder, f"{image}.xml")
        try:
            found.update(one.findtext("name") for one in ElementTree.parse(path).iterfind("object"))
        except (OSError, ElementTree.ParseError) as error:
            raise UserError(f"{path}: cannot be read ({error}); it is the annotation of an image of {key}") from error
    foreign = {name: count for name, count in found.items() if name not in classes}
    if not foreign:
        return
    named = ", ".join(f"{name!r} ({count})" for name, count in Counter(foreign).most_common(NAMED))
    number = f"{sum(foreign.values())} of {found.total()}"
    text = f"{folder}: {number} objects have a name that is no class, for example {named}"
    absent = [name for name in classes if name not in found]
    if len(absent) == len(classes):
        raise UserError(f"{text}; set {key}.metainfo.classes to their names")
    without = f"; no object is called {', '.join(map(repr, absent[:NAMED]))}" if absent else ""
    print_log(f"{text}: they are left out, and count as background{without} ({key})", level=logging.WARNING)
