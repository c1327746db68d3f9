"""Image folders: find the images of each class and read them; nothing is left out without a message."""

import errno
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

# Formats that Pillow decodes in this process; for EPS, it would start Ghostscript.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
IN_FULL_RANGE = ("PNG", "PPM")  # for these, Pillow's mode I holds 16 bits
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags; Pillow inverts WHITE_IS_ZERO only in 8 bits
SAMPLE_FORMAT, UNSIGNED = 339, 1  # TIFF's tag; Pillow reads -1 in 8 signed bits as 255
COMPRESSION, COLOR_MAP, PLANAR, SEPARATE = 259, 320, 284, 2  # TIFF's tags
FILL_ORDER, YCBCR, SUBSAMPLING = 266, 6, 530  # TIFF's tags, and a value of PHOTOMETRIC
EIGHT_BITS_A_BAND = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


class UnreadableImageError(UserError):
    """A file is not an image, is damaged, or has values whose range is not known."""


def read_image(path: str) -> Image.Image:
    """Read an image as RGB with 8 bits a band; scale 16 bits by 255 / 65535, and 12 bits of a TIFF by 255 / 4095.

    Raises:
        UnreadableImageError: the file cannot be read as an image.
    """
    try:
        image = _in_eight_bits(path)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # on a damaged file, Pillow's plugins raise any error
        raise UnreadableImageError(f"{path}: cannot be read as an image ({error})") from error


def _in_eight_bits(path: str) -> Image.Image:
    """Read an image as RGB, or as 8-bit grey if the file has more bits."""
    with open(path, "rb") as file, Image.open(file, formats=image_formats()) as image:
        if fault := misread_samples(image):
            raise ValueError(fault)
        return image.convert("RGB") if image.mode in EIGHT_BITS_A_BAND else _to_eight_bits(image)


def misread_samples(image: Image.Image) -> str | None:
    """Say why Pillow misreads the samples of a TIFF or JPEG 2000; None if it reads them rightly, or for other formats.

    The image must not be loaded yet.
    """
    if image.format == "JPEG2000":
        fewest, most = _jpeg2000_bits(image)
        if fewest < 8:
            return f"its samples have {fewest} bits, and Pillow reads white as grey; convert it to PNG"
        if most > 8 and not image.mode.startswith("I;16"):
            return f"its colours have {most} bits, and Pillow reads white as black; convert it to PNG"
    if image.format != "TIFF":
        return None
    kinds = _tag(image, SAMPLE_FORMAT, UNSIGNED)
    if any(kind != UNSIGNED for kind in kinds) and image.mode not in ("I", "F"):  # `_to_eight_bits` refuses these
        return f"its samples are not unsigned numbers (SampleFormat {kinds}); convert it to 8 or 16 bits"
    if image.mode in ("P", "PA") and 0 < max(_tag(image, COLOR_MAP, 0)) <= 255:
        return "its colour map has 8 bits in place of 16, which Pillow reads as black; convert it to PNG"
    sampling = _tag(image, SUBSAMPLING, (2, 2))
    if (_tag(image, PHOTOMETRIC, 1), _tag(image, COMPRESSION, 1)) == ((YCBCR,), (1,)):
        if sampling != (1, 1):
            return f"its colours have fewer pixels (YCbCrSubSampling {sampling}) and no compression; convert it to PNG"
        if image.mode != "YCbCr":  # Pillow 12 takes it for pixels of four bytes
            return (
                f"its colours are YCbCr without compression, which this Pillow reads as {image.mode}; convert it to PNG"
            )
    return misread_planes(image)


def misread_planes(image: Image.Image) -> str | None:
    """Say why Pillow misreads the planes of a TIFF; None if it reads them rightly, or the image is no TIFF.

    Pillow takes each plane that is not compressed for one of 8 bits in which 0 is black.
    """
    if image.format != "TIFF" or _tag(image, PLANAR, 1) != (SEPARATE,) or _tag(image, COMPRESSION, 1) != (1,):
        return None
    bits, inverted = _tag(image, BITS_PER_SAMPLE, 1), _tag(image, PHOTOMETRIC, 1) == (WHITE_IS_ZERO,)
    mirrored = _tag(image, FILL_ORDER, 1) == (2,)
    if set(bits) == {8} and not inverted and not mirrored:
        return None
    what = "in which 0 is white" if inverted else f"of {max(bits)} bits"
    what += " in reverse order (FillOrder 2)" * mirrored
    return (
        f"its bands are stored one after another (PlanarConfiguration 2), {what}; write them pixel by pixel, or as PNG"
    )


def _jpeg2000_bits(image: Image.Image) -> tuple[int, int]:
    """Return the fewest and the most bits of a band, as the codestream's header names them (ISO/IEC 15444-1, A.5.1)."""
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    at = content.find(b"\xff\x4f\xff\x51") + 2  # the markers of its start and of the sizes
    bands = int.from_bytes(content[at + 38 : at + 40], "big")
    depths = [(depth & 127) + 1 for depth in content[at + 40 : at + 40 + 3 * bands : 3]]
    return min(depths, default=8), max(depths, default=8)


def _tag(image: Image.Image, tag: int, default: int | tuple[int, ...]) -> tuple[int, ...]:
    value = image.tag_v2.get(tag, default)
    return value if isinstance(value, tuple) else (value,)


BAND = 2**18  # approximate pixels of a band of rows


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits to 8 bits.

    Bands of rows are scaled one after another: a copy of the whole image in wide numbers would take many times its
    memory.

    Raises:
        ValueError: the range of the values is not known, or the values are outside it.
    """
    if image.mode not in SIXTEEN_BITS and not (image.mode == "I" and image.format in IN_FULL_RANGE):
        raise ValueError(f"its values are of mode {image.mode}, whose range is not known; convert it to 8 or 16 bits")
    highest, inverted = 65535, False
    if image.format == "TIFF":
        bits = _tag(image, BITS_PER_SAMPLE, 16)[0]
        highest = 2**bits - 1 if bits in (12, 16) else highest
        inverted = _tag(image, PHOTOMETRIC, 1) == (WHITE_IS_ZERO,)
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
    """Return the formats of `FORMATS` that the installed Pillow has."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of these formats, in lower case."""
    kinds = (*image_formats(), "MPO")  # read as JPEG
    return tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


def escaped(name: str) -> str:
    """Return the name of a folder, as Python has it, as a checkpoint holds it: valid Unicode, whatever bytes it has.

    Under another locale than UTF-8, Python has the bytes of a name otherwise; the name is the same as elsewhere.
    """
    text = os.fsencode(name).decode("utf-8", "surrogateescape")
    return text.encode("utf-8", "backslashreplace").decode()


def class_names(data_path: str, split: str, ignored: Counter[str] | None = None) -> list[str]:
    """Return the names of the class folders of a split, in the order of their labels, without a look into them.

    Args:
        ignored: counts what is no class folder, by the reason.

    Raises:
        UserError: a folder is missing or may not be entered, there are no class folders, or a checkpoint could not tell
            two of them apart.
    """
    if not data_path:
        raise UserError("no data: pass --data-path DIR with the folders train/ and val/, one folder a class in each")
    root = str(Path(data_path, split))
    for folder in (str(Path(data_path)), root):
        if not is_dir(folder):
            raise UserError(f"{folder}: no such folder; --data-path must hold {split}/ with one folder a class")
    names, ignored = [], Counter() if ignored is None else ignored
    for entry in _entries(root):
        if not _is(entry, os.DirEntry.is_dir):
            ignored["file(s) beside the class folders"] += 1
        elif entry.name.startswith("."):
            ignored["hidden folder(s)"] += 1
        else:
            names.append(entry.name)
    if not names:
        raise UserError(f"{root}: no class folders; expected {root}/CLASS/*.jpg")
    if twice := [name for name, count in Counter(map(escaped, names)).items() if count > 1]:
        raise UserError(f"{root}: two class folders are both called {twice[0]!r} in a checkpoint; rename one of them")
    return names


class ImageFolder(Dataset):
    """The images of DATA_PATH/split as (image, label), like torchvision's ImageFolder.

    Each class has a folder, with images at any depth. A folder counts once, by its real path, however many links lead
    to it. A link to a file is an image of its own, as in torchvision, because tools that store files by content (DVC,
    git-annex, Hugging Face) make equal files links to the same file. `left_out` counts the files that are left out,
    and `folders` are the real paths of the folders that hold images.

    Raises:
        UserError: a folder is missing or may not be entered, there are no class folders, a class folder has no images,
            or two classes share a folder. Reading an image can raise an UnreadableImageError.
    """

    def __init__(self, data_path: str, split: str, transform: Callable | None):
        self.ignored: Counter[str] = Counter()
        self.classes = class_names(data_path, split, self.ignored)
        self.root, self.transform = str(Path(data_path, split)), transform
        self.suffixes = image_suffixes()
        self.folders: set[str] = set()
        self.samples = self._samples()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[object, int]:
        path, label = self.samples[index]
        image = read_image(path)
        return (image if self.transform is None else self.transform(image)), label

    @property
    def left_out(self) -> str:
        """Say how many files and folders are not used, and why; "" if all are used."""
        found = ", ".join(f"{count} {why}" for why, count in sorted(self.ignored.items()))
        return f"{self.root}: left out: {found}" if found else ""

    def shared_with(self, other: "ImageFolder") -> str:
        """Say how many folders are those of another split, too, for example by a link; "" if none is."""
        shared = self.folders & other.folders
        if not shared:
            return ""
        what = f"{len(shared)} of its {len(self.folders)} folders are folders of {other.root}, too, as {min(shared)}"
        return f"{self.root}: {what}; accuracy on images that are trained on says nothing of others"

    def digest(self) -> str:
        """Return the SHA-256 of the images' names in their order, which must be the same for all processes."""
        found = hashlib.sha256()
        for path, _ in self.samples:
            found.update(os.fsencode(path.removeprefix(self.root)) + b"\0")
        return found.hexdigest()

    def _samples(self) -> list[tuple[str, int]]:
        samples, owners, empty = [], {}, []
        for label, name in enumerate(self.classes):
            top = os.path.join(self.root, name)
            found = self._images_of(top, owners)
            samples += [(path, label) for path in found]
            empty += [] if found else [top]
        holding = set(map(os.path.dirname, (path for path, _ in samples)))
        self.folders = {real for real, (_, folder) in owners.items() if folder in holding}
        if empty:
            raise UserError(
                f"{', '.join(empty[:5])}: no images in {len(empty)} class folder(s); fill or remove them. "
                f"Images' names end in {', '.join(self.suffixes[:6])} and the like. {self.left_out}".strip()
            )
        return samples

    def _images_of(self, top: str, owners: dict[str, tuple[str, str]]) -> list[str]:
        """Return the paths of a class' images in torchvision's order: by folder, then by name.

        Args:
            top: the folder of the class.
            owners: for each folder found so far, by real path: its class' folder and the path at which it was found.
                This method adds to it.
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
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):  # of links that lead nowhere
            return False
        raise UserError(f"{entry.path}: cannot be looked at ({error.strerror}); mend or remove it") from error
