"""Image folders: which files are a class' images, and how one is read, losing nothing in silence."""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from classification.errors import UserError, is_dir

# Decoded in this process: for EPS, Pillow would start Ghostscript.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
IN_FULL_RANGE = ("PNG", "PPM")  # of which Pillow's mode I is 16 bits
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF, which Pillow inverts in 8 bits alone
SAMPLE_FORMAT, UNSIGNED = 339, 1  # of TIFF: Pillow reads -1 in 8 signed bits as 255
EIGHT_BITS_A_BAND = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


class UnreadableImageError(UserError):
    """A file that is no image, a damaged one, or one whose values have no known range."""


def read_image(path: str) -> Image.Image:
    """As RGB, 8 bits a band; 16 bits are scaled by 255 / 65535, and 12 of a TIFF by 255 / 4095.

    Raises:
        UnreadableImageError: the file cannot be read as such.
    """
    try:
        image = _in_eight_bits(path)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise what they like on a damaged file
        raise UnreadableImageError(f"{path}: cannot be read as an image ({error})") from error


def _in_eight_bits(path: str) -> Image.Image:
    """As RGB, or as grey where the file has more bits."""
    with open(path, "rb") as file, Image.open(file, formats=image_formats()) as image:
        _check_samples(image)
        return image.convert("RGB") if image.mode in EIGHT_BITS_A_BAND else _to_eight_bits(image)


def _check_samples(image: Image.Image) -> None:
    kinds = image.tag_v2.get(SAMPLE_FORMAT, ()) if image.format == "TIFF" else ()
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if any(kind != UNSIGNED for kind in kinds) and image.mode not in ("I", "F"):  # whose range is not known anyway
        raise ValueError(f"its samples are not unsigned numbers (SampleFormat {kinds}); convert it to 8 or 16 bits")


BAND = 2**18  # pixels, about


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey in 8 bits of more, in bands of rows: a copy of all of it in wide numbers would be many times the image."""
    if image.mode not in SIXTEEN_BITS and not (image.mode == "I" and image.format in IN_FULL_RANGE):
        raise ValueError(f"its values are of mode {image.mode}, whose range is not known; convert it to 8 or 16 bits")
    highest, inverted = 65535, False
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]
        highest = 2**bits - 1 if bits in (12, 16) else highest
        inverted = image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    width, height = image.size
    grey = np.empty((height, width), np.uint8)
    rows = max(1, BAND // max(1, width))
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows)))
        values = np.asarray(band).astype(np.int32)
        values = highest - values if inverted else values
        if values.min(initial=0) < 0 or values.max(initial=0) > highest:
            raise ValueError(f"its values, {values.min()} to {values.max()}, are not below {highest + 1}; convert it")
        grey[top : top + rows] = (values * 255 + highest // 2) // highest
    return Image.fromarray(grey)


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow has."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def image_suffixes() -> tuple[str, ...]:
    """Of these formats, in lower case."""
    kinds = (*image_formats(), "MPO")  # read as JPEG
    return tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


class ImageFolder(Dataset):
    """DATA_PATH/split, one folder a class: (image, label), as torchvision's ImageFolder; any depth of folders in each.

    A folder counts once, by its real path, however many links lead to it. A link to a file is an image of its own, as
    in torchvision: where files are kept by their content (DVC, git-annex, Hugging Face), equal ones are links to one.
    What is left out is counted in `left_out`.

    Raises:
        UserError: a missing folder or one that may not be entered, no class folders, a class folder without images, or
            one folder in two classes; reading an image can raise too.
    """

    def __init__(self, data_path: str, split: str, transform: Callable | None):
        if not data_path:
            raise UserError(
                "no data: pass --data-path DIR with the folders train/ and val/, one folder a class in each"
            )
        root = Path(data_path, split)
        for folder in (Path(data_path), root):
            if not is_dir(folder):
                raise UserError(f"{folder}: no such folder; --data-path must hold {split}/ with one folder a class")
        self.root, self.transform = str(root), transform
        self.ignored: Counter[str] = Counter()
        self.suffixes = image_suffixes()
        self.classes = self._classes()
        self.samples = self._samples()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[object, int]:
        path, label = self.samples[index]
        image = read_image(path)
        return (image if self.transform is None else self.transform(image)), label

    @property
    def left_out(self) -> str:
        """What of the folder's files is not used, and why; empty if all are."""
        found = ", ".join(f"{count} {why}" for why, count in sorted(self.ignored.items()))
        return f"{self.root}: left out: {found}" if found else ""

    def digest(self) -> str:
        """SHA-256 of the images' names in their order, which other disks must have alike."""
        found = hashlib.sha256()
        for path, _ in self.samples:
            found.update(os.fsencode(path.removeprefix(self.root)) + b"\0")
        return found.hexdigest()

    def _classes(self) -> list[str]:
        names = []
        for entry in _entries(self.root):
            if not _is(entry, os.DirEntry.is_dir):
                self.ignored["file(s) beside the class folders"] += 1
            elif entry.name.startswith("."):
                self.ignored["hidden folder(s)"] += 1
            else:
                names.append(entry.name)
        if not names:
            raise UserError(f"{self.root}: no class folders; expected {self.root}/CLASS/*.jpg")
        return names

    def _samples(self) -> list[tuple[str, int]]:
        samples, owners, empty = [], {}, []
        for label, name in enumerate(self.classes):
            top = os.path.join(self.root, name)
            found = self._images_of(top, owners)
            samples += [(path, label) for path in found]
            empty += [] if found else [top]
        if empty:
            raise UserError(
                f"{', '.join(empty[:5])}: no images in {len(empty)} class folder(s); fill or remove them. "
                f"Images' names end in {', '.join(self.suffixes[:6])} and the like. {self.left_out}".strip()
            )
        return samples

    def _images_of(self, top: str, owners: dict[str, tuple[str, str]]) -> list[str]:
        """Paths of a class' images, in the order of torchvision's: by folder, then by name.

        Args:
            owners: which class' top and which path each folder has been met at, by its real path; added to.
        """
        folders: list[tuple[str, list[os.DirEntry]]] = []
        waiting = [(top, os.path.realpath(top))]
        while waiting:
            folder, real = waiting.pop()
            owner, path = owners.setdefault(real, (top, folder))
            if owner != top:
                raise UserError(f"{folder}: is the same folder as {path}, of another class; remove one of them")
            if path != folder:
                self.ignored["link(s) to a folder that is there already"] += 1
                continue
            inner, files = [], []
            for entry in _entries(folder):
                (inner if _is(entry, os.DirEntry.is_dir) else files).append(entry)
            folders.append((folder, files))
            for entry in reversed(inner):
                if entry.name.startswith("."):
                    self.ignored["hidden folder(s)"] += 1
                else:
                    linked = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                    waiting.append((entry.path, linked))
        return [
            entry.path
            for _, files in sorted(folders, key=lambda one: one[0])
            for entry in files
            if self._is_image(entry)
        ]

    def _is_image(self, entry: os.DirEntry) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            self.ignored["hidden file(s)"] += 1
        elif suffix not in self.suffixes:
            self.ignored[f"file(s) ending in {suffix}" if suffix else "file(s) without a suffix"] += 1
        elif not _is(entry, os.DirEntry.is_file):
            there = os.path.exists(entry.path)
            self.ignored["file(s) that are pipes, sockets or devices" if there else "broken link(s)"] += 1
        else:
            return True
        return False


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be entered ({error.strerror}); look at its permissions") from error


def _is(entry: os.DirEntry, kind: Callable[[os.DirEntry], bool]) -> bool:
    try:
        return kind(entry)
    except OSError:  # a link to itself
        return False
