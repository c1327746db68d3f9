"""Early checks of mmseg's folders: an image for each label map, and labels of both classes."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.fileio import list_from_file
from PIL import Image

from classification.data.images import image_suffixes
from classification.errors import UserError, is_file
from classification.openmmlab.config_parts import (
    argument_of,
    class_names_of,
    datasets_of,
    is_kind,
    kind_of,
    predicting_head,
    steps_of,
    type_of,
)
from classification.openmmlab.messages import print_log


def check_maps(dataset: ConfigDict, root: str, key: str, cfg: Config) -> None:
    """Check that mmseg finds images, and a label map for each. Warn of images whose names do not end with `img_suffix`.

    Raises:
        UserError: there is no image, or files are missing, or the ann_file is no list of names.
    """
    prefix, suffix = dataset.get("data_prefix") or {}, argument_of(dataset, "img_suffix")
    if not prefix.get("img_path") or not isinstance(suffix, str):
        return
    folder = os.path.join(root, prefix["img_path"])
    images, broken = _files_in(folder, count=not dataset.get("ann_file"))
    if not dataset.get("ann_file"):
        _warn_of_files_left_out(dataset, images, key, cfg)
    reads = getattr(type_of(dataset), "load_data_list", None)
    if getattr(reads, "__qualname__", None) != "BaseSegDataset.load_data_list" or dataset.get("indices"):
        return  # it has ways of its own
    source = folder
    if dataset.get("ann_file"):
        source = os.path.join(root, dataset.ann_file)
        names = _names_in(source)
        _check_all_there(source, names, suffix, folder, images, f"{key}.img_suffix")
    else:
        names = sorted(name.removesuffix(suffix) for name in images if name.endswith(suffix))
        if broken := [name for name in broken if name.endswith(suffix)]:
            raise UserError(
                f"{folder}: {len(broken)} of its images are links that lead nowhere, for example {broken[0]}"
            )
    _warn_of_odd_names(source, names)
    if not names:
        raise UserError(f"{folder}: no file ends with {suffix!r}; set {key}.img_suffix to what the images end with")
    loads = any(is_kind(step, "LoadAnnotations") for step in steps_of(dataset.get("pipeline") or ()))
    suffix = argument_of(dataset, "seg_map_suffix")
    if prefix.get("seg_map_path") and loads and isinstance(suffix, str):
        maps = os.path.join(root, prefix["seg_map_path"])
        _check_all_there(source, names, suffix, maps, _files_in(maps)[0], f"{key}.seg_map_suffix")


def _warn_of_odd_names(source: str, names: list[str]) -> None:
    """Warn of images that are there twice, and of those in hidden folders, as .ipynb_checkpoints, which mmseg reads."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    hidden = [name for name in names if any(p.startswith(".") and p != ".." for p in name.split("/")[:-1])]
    for found, what in ((twice, "are there more than once, and count as often"), (hidden, "lie in hidden folders")):
        if found:
            print_log(
                f"{source}: {len(found)} of its images {what}, for example {found[0]}; remove them",
                level=logging.WARNING,
            )


def _files_in(folder: str, count: bool = False) -> tuple[set[str], list[str]]:
    """Return the files in a folder and below, and the links there that lead nowhere, by paths relative to it.

    Hidden files are left out, as mmengine does.

    Raises:
        UserError: a link leads to a folder that it lies in, so there is no end; or with `count`, as each file counts,
            to one that is there anyway.
    """
    found, broken = set(), []
    start, real = os.path.join(folder, ""), os.path.realpath(folder)
    folders = [(folder, real, {real})]  # each with its real path, and those of the folders that lead to it
    places: dict[str, str] = {}
    while folders:
        at, real, above = folders.pop()
        with suppress(OSError), os.scandir(at) as entries:
            for one in entries:
                if one.is_dir():
                    inner = os.path.realpath(one.path) if one.is_symlink() else os.path.join(real, one.name)
                    if inner in above:
                        raise UserError(f"{one.path}: is a link to a folder that it lies in; remove it")
                    if (other := places.setdefault(inner, one.path)) != one.path and count:
                        raise UserError(
                            f"{one.path} and {other} are one folder, as one is a link: its files would count twice; "
                            "remove the link"
                        )
                    folders.append((one.path, inner, {*above, inner}))
                elif one.name[0] != "." and one.is_symlink() and not os.path.exists(one.path):
                    broken.append(one.path.removeprefix(start))
                elif one.name[0] != ".":
                    found.add(one.path.removeprefix(start))
    return found, broken


def _names_in(path: str) -> list[str]:
    """Return the names of an ann_file of mmseg, one a line."""
    advice = "write the name of an image, without its suffix, on each line"
    try:
        names = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")  # as mmengine reads it
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 ({error}); {advice}") from error
    if names and names[0].startswith("\ufeff"):
        raise UserError(f"{path}: begins with a byte order mark, a part of the first name; write it without")
    for i, name in enumerate(names, 1):
        if not name.strip():
            raise UserError(f"{path}: line {i} is empty; {advice}")
    return [os.path.normpath(name.strip()) for name in names]


def _check_all_there(source: str, names: list[str], suffix: str, folder: str, files: set[str], key: str) -> None:
    missing = [name + suffix for name in names if name + suffix not in files]
    missing = [name for name in missing if not os.path.isfile(os.path.join(folder, name))]  # hidden, or in other case
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(names)} files are not in {folder}, for example {missing[0]}; add "
            f"them, or set {key} to what they end with"
        )


def _warn_of_files_left_out(dataset: ConfigDict, names: set[str], key: str, cfg: Config) -> None:
    """Warn of images and label maps that mmseg does not look for.

    These are files without `img_suffix` that look like images, by another suffix or as the only file of a label map;
    and label maps without an image, be it of another split that has its maps in the same folder.
    """
    suffix, end = (argument_of(dataset, f"{name}_suffix") for name in ("img", "seg_map"))
    folder, maps = _folder(dataset, "img_path"), _folder(dataset, "seg_map_path")
    if maps == folder:
        return
    labelled = set()
    if maps and isinstance(end, str):
        names = {name for name in names if not name.startswith(_below(maps, folder))}
        labels = {name for name in _files_in(maps)[0] if not name.startswith(_below(folder, maps))}
        labelled = {name.removesuffix(end) for name in labels if name.endswith(end)}
    lone = {stem for stem in labelled if stem + suffix not in names}
    parts = {name: os.path.splitext(name) for name in names if not name.endswith(suffix)}
    known = image_suffixes()
    others = sorted(name for name, (stem, ending) in parts.items() if ending.lower() in known or stem in lone)
    if others:
        print_log(
            f"{key}: {len(others)} images of {folder}, for example {others[0]}, are left out, for img_suffix is "
            f"{suffix!r}",
            level=logging.WARNING,
        )
    if not lone:
        return
    sharing = {_folder(one, "img_path") for one in _all_datasets(cfg) if _folder(one, "seg_map_path") == maps}
    stems = {os.path.splitext(name)[0] for other in sharing - {None} for name in _files_in(other)[0]}
    ends = {stem: [i for i, character in enumerate(stem) if character in "_-. "] for stem in lone}
    named = {stem for stem, places in ends.items() if any(stem[:i] in stems for i in places)}  # as a_colour of a
    previews = {stem for stem in named if _is_in_colour(os.path.join(maps, stem + end))}
    if alone := sorted(lone - stems - previews, key=lambda stem: (stem in named, stem)):
        what = "label maps (or other pictures of their images)" if alone[0] in named else "label maps"
        print_log(
            f"{key}: {len(alone)} {what} of {maps}, for example {alone[0]}{end}, are left out, for there is no such "
            f"image in {folder}",
            level=logging.WARNING,
        )


def _is_in_colour(path: str) -> bool:
    """Whether a file is a picture to look at, which label maps are not; a palette's numbers may be labels."""
    with suppress(Exception), Image.open(path) as image:
        return image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "F")
    return False


def _folder(dataset: ConfigDict, name: str) -> str | None:
    """Return a folder of `data_prefix`; None if it has none of that name."""
    folder = (dataset.get("data_prefix") or {}).get(name)
    return os.path.normpath(os.path.join(dataset.get("data_root") or "", folder)) if isinstance(folder, str) else None


def _below(inner: str, outer: str) -> str:
    """Return how the paths of files in `inner` begin, relative to `outer`."""
    return os.path.join(os.path.relpath(inner, outer), "")


def _all_datasets(cfg: Config) -> Iterator[ConfigDict]:
    loaders = filter(None, (cfg.get(f"{split}_dataloader") for split in ("train", "val", "test")))
    return (dataset for loader in loaders for dataset in datasets_of(loader.dataset))


def check_foreground(dataset: ConfigDict, root: str, key: str, cfg: Config) -> None:
    """Raise a UserError or warn if label maps for two classes hold no label of the second class.

    In masks of 0 and 255, the foreground is ignored, so that any prediction counts as right.
    """
    head = predicting_head(cfg.model)
    folder = (dataset.get("data_prefix") or {}).get("seg_map_path")
    if not head or "Depth" in kind_of(head) or not isinstance(folder, str):
        return
    suffix, reduced = argument_of(dataset, "seg_map_suffix"), bool(argument_of(dataset, "reduce_zero_label"))
    if (len(class_names_of(dataset, key)) or head.get("num_classes")) != 2 or not isinstance(suffix, str):
        return
    ignored = head.get("ignore_index", 255)
    folder = os.path.join(root, folder)
    paths = sorted(os.path.join(at, n) for at, _, names in os.walk(folder) for n in names if n.endswith(suffix))
    if dataset.get("ann_file") and is_file(listed := os.path.join(root, dataset.ann_file)):
        paths = [os.path.join(folder, name.strip() + suffix) for name in list_from_file(listed) if name.strip()]
    found = set()
    for path in paths:  # usually the first map has both classes; read on, as the second class may be rare
        found |= _labels_in(path)
        classes = {255 if label in (0, 255) else label - 1 for label in found} if reduced else found
        if classes - {0, ignored}:
            return
    if not found:
        return
    text = (
        f"{folder}: its {len(paths)} label maps hold only the labels {', '.join(map(str, sorted(found)))}: the second "
        f"of the two classes is {1 + reduced}"
    )
    if ignored in found and key.startswith("train"):
        raise UserError(
            f"{text}, and {ignored} is ignored, so nothing is learnt; write the foreground as {1 + reduced} ({key})"
        )
    print_log(f"{text} ({key})", level=logging.WARNING)


def _labels_in(path: str) -> set[int]:
    """Return the labels in a map. It is empty if the file is no map: LoadAnnotations or CheckLabels reports that."""
    with suppress(Exception), Image.open(path) as image:
        labels = np.asarray(image)
        return {int(label) for label in np.unique(labels)} if labels.dtype.kind in "bui" and labels.ndim == 2 else set()
    return set()
