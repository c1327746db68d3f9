"""Checks for data pipelines that the toolchains lack.

They read any format that Pillow reads, for so do the toolchains' loaders.
"""

import logging
import os
import re
import sys

import cv2
import numpy as np
from mmengine.registry import TRANSFORMS
from PIL import EpsImagePlugin, ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from classification.data.images import (
    EIGHT_BITS_A_BAND,
    SAMPLE_FORMAT,
    image_formats,
    misread_planes,
    misread_samples,
)
from classification.errors import UserError, check_utf8
from classification.openmmlab.messages import print_log
from classification.openmmlab.palettes import Palettes

EpsImagePlugin.gs_binary = False  # or an EPS file among the data, with any suffix, makes Pillow start Ghostscript
LARGEST = 255  # of 8 bits
TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two for large files
TURNED = range(2, 9)  # orientations of EXIF by which an image is turned or mirrored


@TRANSFORMS.register_module()
class CheckMap:
    """Checks that a label map is whole before LoadAnnotations, whose error names no file.

    Args:
        images_only: whether the loader reads images alone; False for one that may read other files too.

    Raises:
        UserError: the file is empty or damaged, or no image.
    """

    def __init__(self, images_only: bool = True):
        self.images_only = images_only

    def __call__(self, results: dict) -> dict:
        path = results.get("seg_map_path")
        if path is None:  # an inferencer has no maps
            return results
        try:
            with Image.open(path) as image:
                if image.format == "PNG":
                    image.verify()  # each chunk's checksum
                elif image.format != "TIFF":  # which tifffile may read, where Pillow does not
                    image.load()
        except FileNotFoundError:  # the loader names it, or reads it from elsewhere
            pass
        except UnidentifiedImageError as error:
            if not os.path.getsize(path):
                raise UserError(f"{path}: is empty; replace it") from error
            if self.images_only and not _is_read_otherwise(path):
                raise UserError(f"{path}: is no image; replace it") from error
        except Image.DecompressionBombError:  # too large for Pillow alone
            pass
        except Exception as error:  # on a damaged file, Pillow's plugins raise any error
            raise UserError(f"{path}: is damaged, or of a kind that is not read ({error}); replace it") from error
        return results


def _is_read_otherwise(path: str) -> bool:
    """Whether tifffile or OpenCV, which LoadAnnotations can be set to, may read a file that Pillow does not."""
    with open(path, "rb") as file:
        if file.read(4) in TIFF_HEADERS:
            return True
    check_utf8(path)  # or OpenCV ends the process
    return cv2.haveImageReader(path)


@TRANSFORMS.register_module()
class CheckLabels:
    """Checks the labels of a segmentation map after LoadAnnotations.

    Without this check, a label that is no class ends training in the loss. On a GPU, that is an assertion that names no
    file. If a file's format is not known to keep labels, or its EXIF orientation turns it, a warning says so once.

    Args:
        num_classes: labels must be less than this, or `ignore_index`.
        class_weight: whether a loss has class weights, but none for ignored pixels, which it looks up all the same.
        ignore_index: the label that the loss ignores.
        turned: whether images are loaded as their EXIF orientation says; if one is turned, a warning says so once.
        of_file: whether the file holds the labels as they are; False for a loader that makes them otherwise.

    Raises:
        UserError: a label is no class, or is ignored although the loss has class weights; or the file is no label map,
            or has another size than the image.
    """

    def __init__(
        self,
        num_classes: int,
        class_weight: bool = False,
        ignore_index: int = 255,
        turned: bool = True,
        of_file: bool = True,
    ):
        self.num_classes, self.class_weight, self.ignore_index = num_classes, class_weight, ignore_index
        self.turned, self.of_file = turned, of_file
        self.palettes: Palettes | None = Palettes()  # None after a warning
        self.warned = not of_file  # of a doubtful file

    def __call__(self, results: dict) -> dict:
        if "gt_seg_map" not in results:  # mmseg's inferencer takes LoadAnnotations out of a pipeline
            return results
        path, labels = results.get("seg_map_path"), results["gt_seg_map"]
        if labels.ndim < 2:
            raise UserError(f"{path}: is one pixel wide or high, and LoadAnnotations drops such a side: leave it out")
        if labels.ndim > 2:
            raise UserError(
                f"{path}: is a picture of {labels.shape[-1]} colours, not a map of labels: write one number a pixel"
            )
        size = results.get("ori_shape")  # the size of the image file
        if size is not None and tuple(size[:2]) != labels.shape:
            raise UserError(
                f"{path}: is a map of {labels.shape[1]}x{labels.shape[0]} pixels, but the image "
                f"{results.get('img_path')} has {size[1]}x{size[0]}; make them equal"
            )
        reduced = bool(results.get("reduce_zero_label"))  # then LoadAnnotations has subtracted 1
        wrong = _not_of_a_byte(path) if self.of_file else None
        if not self.warned and (doubt := _doubt(path)):
            self.warned = True
            print_log(f"{path}: {doubt}", logger="current", level=logging.WARNING)
        if self.of_file and wrong is None and not results.get("label_map"):
            _check_one_bit(path, labels, reduced)
            meant = {*range(self.num_classes + reduced), self.ignore_index}
            if self.palettes and (fault := self.palettes.fault(path, labels, reduced, meant)):
                self.palettes = None
                print_log(f"{path}: {fault}", logger="current", level=logging.WARNING)
        if wrong is None:
            outside = labels[(labels >= self.num_classes) & (labels != self.ignore_index)]
            wrong = np.max(outside) + reduced if outside.size else None
        if wrong is not None:
            first = int(reduced)
            raise UserError(
                f"{path}: has label {wrong}, but with {self.num_classes} classes {first} to "
                f"{self.num_classes - 1 + first} are labels, and {self.ignore_index} is what is ignored"
            )
        if self.class_weight and (labels == self.ignore_index).any():
            raise UserError(
                f"{path}: has ignored pixels ({self.ignore_index}), for which a loss "
                "with class_weight has no weight: leave class_weight out of the heads' loss_decode, or label them"
            )
        self.turned = self.turned and not _warn_if_turned(results.get("img_path"))
        return results


@TRANSFORMS.register_module()
class CheckSize:
    """Compares the size of an image with the size in its annotations after LoadImageFromFile.

    mmdet scales boxes by the image's own size. If an image was resized or rotated after its annotation, all its boxes
    are wrong. If the image was turned by its EXIF orientation and its size is the same, a warning says so once.

    Args:
        turned: whether images are loaded as their EXIF orientation says.

    Raises:
        UserError: the sizes differ.
    """

    def __init__(self, turned: bool = True):
        self.turned = turned

    def __call__(self, results: dict) -> dict:
        noted, size = [results.get(key) for key in ("height", "width")], results.get("ori_shape")
        if size is None or not all(isinstance(side, int | float) and side > 0 for side in noted):
            return results
        height, width = size[:2]
        if [height, width] != noted:
            turned = [width, height] == noted
            raise UserError(
                f"{results.get('img_path')}: has {width}x{height} pixels, but {noted[1]:g}x{noted[0]:g} in its "
                "annotation file: "
                + (
                    "is it turned by its EXIF orientation? If the boxes were drawn before that, set "
                    "color_type='color_ignore_orientation' of LoadImageFromFile; else correct width and height"
                    if turned
                    else "take the images that the boxes were drawn on, or scale width, height, boxes and masks there"
                )
            )
        self.turned = self.turned and not _warn_if_turned(results.get("img_path"))  # say it once
        return results


def _warn_if_turned(path: str | None) -> bool:
    """Warn if an image has an EXIF orientation by which it is turned, and return whether it has."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    except Exception:  # an array, or a file that is damaged or too large for Pillow; the loader has read it
        return False
    if turned:
        print_log(
            f"{path}: is turned by its EXIF orientation, as other images may be; if boxes, masks or label maps were "
            "drawn before that, set color_type='color_ignore_orientation' of LoadImageFromFile",
            logger="current",
            level=logging.WARNING,
        )
    return turned


@TRANSFORMS.register_module(name=["CheckImage", "CheckBits"])  # the second in configs that earlier versions saved
class CheckImage:
    """Checks an image file before LoadImageFromFile, which clips or misreads some, and names no file that is empty.

    Args:
        backend: the loader's imdecode_backend. "pillow" clips 16 bits to white and misreads some TIFFs. "cv2" misreads
            a PPM or PGM whose white is neither 255 nor 65535, numbers with a sign, PFM, Radiance HDR, the colours of
            PAM, and TIFFs with alpha; a warning says so once.
        unchanged: for color_type="unchanged", which loads values as they are: "pillow" does not clip then, but gives
            numbers that are no greys or colours for some modes, as a palette's; a warning says so once. For more than
            8 bits, see `CheckValues`.
        ignore_empty: whether the loader leaves out what it cannot read.

    Raises:
        UserError: the file is empty, and the loader would not leave it out; or Pillow decodes it, and it has more than
            8 bits per band, or is a TIFF that Pillow misreads.
    """

    def __init__(self, backend: str = "cv2", unchanged: bool = False, ignore_empty: bool = False):
        self.backend, self.unchanged, self.ignore_empty = backend, unchanged, ignore_empty
        self.warned = False

    def __call__(self, results: dict) -> dict:
        path = results.get("img_path") if isinstance(results, dict) else None
        if not isinstance(path, str):  # an inferencer has an array, or takes files and arrays themselves
            return results
        try:
            kind = _head(path, 2)
            by_opencv = self.backend != "pillow"
            common, mode, fault, misread = True, "L", None, by_opencv and _misread_by_opencv(path, kind, self.unchanged)
            if kind and not by_opencv:
                with Image.open(path) as image:
                    mode, fault = image.mode, misread_samples(image)
                    common = image.format in image_formats()  # OpenCV reads no FITS
        except Exception:  # it is not on this disk, or is damaged, which the loader reports
            return results
        if not kind and not self.ignore_empty:
            raise UserError(f"{path}: is empty; replace it, or take it out of the data")
        if misread:
            self._warn(f"{path}: {misread}: convert it, and others like it, to PNG")
        elif fault:
            raise UserError(f"{path}: {fault}; or leave imdecode_backend='pillow' out of LoadImageFromFile")
        elif self.unchanged:
            if mode in EIGHT_BITS_A_BAND and mode not in AS_LOADED:
                self._warn(
                    f"{path}: is of mode {mode}, and color_type='unchanged' loads its values as they are: mean and std "
                    "of the data_preprocessor must be for these; leave color_type out, or convert it to RGB"
                )
        elif mode not in EIGHT_BITS_A_BAND:
            scaled = common and not _misread_by_opencv(path, kind)
            other = "leave it out of LoadImageFromFile (cv2 scales 16 bits), or " if scaled else ""
            raise UserError(
                f"{path}: is of mode {mode}, which imdecode_backend='pillow' clips to 8 bits: {other}convert the image"
            )
        return results

    def _warn(self, message: str) -> None:
        if not self.warned:
            self.warned = True
            print_log(message, logger="current", level=logging.WARNING)


AS_LOADED = ("L", "LA", "RGB", "RGBA")  # modes of Pillow whose numbers are greys or colours of 8 bits


@TRANSFORMS.register_module()
class CheckValues:
    """Checks an image after a LoadImageFromFile with color_type="unchanged", which leaves 16 bits as they are.

    If values are not of 8 bits, a warning says so once, as the normalisation must be for these. Whole numbers from 0 to
    255 in floating point (`to_float32`) count as 8 bits.
    """

    def __init__(self):
        self.warned = False

    def __call__(self, results: dict) -> dict:
        image = results.get("img")
        if not self.warned and isinstance(image, np.ndarray) and image.dtype != np.uint8:
            small = image.dtype.kind == "f" and ((image >= 0) & (image <= LARGEST) & (image % 1 == 0)).all()
            self.warned = not small
            if self.warned:
                print_log(
                    f"{results.get('img_path')}: is not of 8 bits, and color_type='unchanged' loads its values as they "
                    f"are ({image.dtype}, up to {image.max(initial=0):g}): mean and std of the data_preprocessor must "
                    "be for these",
                    logger="current",
                    level=logging.WARNING,
                )
        return results


PPM = (b"P2", b"P3", b"P5", b"P6")  # the beginnings of PGM and PPM files with more than one bit
PFM, TIFF, PAM, HDR, SUN = (b"PF", b"Pf"), (b"II", b"MM"), b"P7", b"#?", b"\x59\xa6"
PLAIN = "ppm_plain"  # Pillow's decoder of the two that are text
SIGNED, BIG = 2, 43  # of TIFF: a SampleFormat for integers with a sign, and BigTIFF's version
EXTRA_SAMPLES, ALPHA = 338, 2  # of TIFF: a tag, and its value for an alpha that colours are not multiplied by


def _misread_by_opencv(path: str, kind: bytes, unchanged: bool = False) -> str | None:
    """Say why OpenCV reads an image too dark, or in other colours; None if it does not, or if that is not known.

    Args:
        kind: its first two bytes.
        unchanged: whether OpenCV leaves values as they are.
    """
    if kind in PFM:
        return None if unchanged else "is a PFM, whose numbers OpenCV rounds to 0 to 255"
    if kind == HDR:
        return None if unchanged else "is a Radiance HDR, whose white OpenCV takes for 1, and clips what is above"
    if kind == SUN:
        return "is a Sun raster file, whose greys OpenCV reads as black" if unchanged else None
    if kind == PAM:
        header = dict(re.findall(rb"^(DEPTH|MAXVAL)\s+(\d+)", _head(path, 500), re.MULTILINE))
        right = header.get(b"DEPTH") == b"1" and header.get(b"MAXVAL") in (b"255", b"65535")
        return None if right else "is a PAM, of which OpenCV reads greys of 255 or 65535 alone rightly"
    if kind in TIFF:
        with open(path, "rb") as file:
            header = file.read(8)
            header += file.read(8) if BIG in header[2:4] else b""
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
        if SIGNED in _values(tags, SAMPLE_FORMAT) and not unchanged:
            return f"has numbers with a sign (SampleFormat {SIGNED}), which OpenCV reads as without"
        if ALPHA in _values(tags, EXTRA_SAMPLES) and set(_values(tags, BITS)) in ({8}, {8 if unchanged else 16}):
            with Image.open(path, formats=("TIFF",)) as image:
                if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < LARGEST:
                    return "has an alpha band, by which OpenCV multiplies its colours"
        return None
    if kind not in PPM:
        return None
    with Image.open(path, formats=("PPM",)) as image:
        decoder, arguments = image.tile[0][0], image.tile[0][3]
    white = arguments[-1] if isinstance(arguments, tuple) else 255  # otherwise, Pillow does not scale either
    if not isinstance(white, int) or white in (255, 65535) or (decoder == PLAIN and white < 255):
        return None
    if unchanged and white > 255:  # see CheckValues
        return None
    return f"has {white} for white, but OpenCV takes {255 if white < 255 else 65535}"


def _values(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> tuple:
    value = tags.get(tag)
    return value if isinstance(value, tuple) else (value,)


def _not_of_a_byte(path: str) -> int | None:
    """Return the smallest or largest label of a map if it is not in 0 to 255, else None. LoadAnnotations would wrap it.

    Raises:
        UserError: labels are not whole numbers, or the file is compressed with losses, or they are changed as they are
            read.
    """
    try:
        with Image.open(path) as image:
            fault = _changes_labels(image, path)
            labels = None if fault or image.mode in ("1", "L", "P") else np.asarray(image)
    except Exception:  # LoadAnnotations has read the file by other means
        if "tifffile" not in sys.modules:  # mmcv imports it if it is installed
            return None
        fault, labels = None, sys.modules["tifffile"].imread(path)
    if fault:
        raise UserError(f"{path}: {fault}")
    if labels is None:
        return None
    if labels.dtype.kind not in "bui":
        raise UserError(f"{path}: has labels of type {labels.dtype}: write whole numbers of 8 bits")
    smallest, largest = int(labels.min(initial=0)), int(labels.max(initial=0))
    return smallest if smallest < 0 else largest if largest > LARGEST else None


def _check_one_bit(path: str, labels: np.ndarray, reduced: bool) -> None:
    """Raise a UserError if a map of one bit was read as 0 and 255, as cv2 reads it."""
    try:
        with Image.open(path) as image:
            ones = int(np.count_nonzero(image)) if image.mode == "1" else None
    except Exception:  # LoadAnnotations has read the file by other means
        return
    if ones is not None and ones != np.count_nonzero(labels == 1 - reduced):
        raise UserError(
            f"{path}: is a map of 1 bit, in which the loader reads another label than 1; set "
            "imdecode_backend='pillow' of LoadAnnotations, or write 8 bits"
        )


BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
KIND_OF_PAGE, REDUCED, MASK = 254, 1, 4  # of TIFF: a tag, and bits of its value
KEEP_LABELS = ("PNG", "BMP", "PPM", "TIFF", "TGA", "WEBP")  # if `_changes_labels` names no fault
LOSSY = ("AVIF", "JPEG", "MPO")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")


def _changes_labels(image: Image.Image, path: str) -> str | None:
    """Say why a map's labels are not those that were meant; None if nothing is known against them."""
    kind = image.format
    compression = image.info.get("compression") if kind == "TIFF" else None
    lossy = kind in LOSSY or (kind == "WEBP" and _head(path)[12:16] == b"VP8 ")
    lossy |= kind == "JPEG2000" and not _is_reversible(path)
    if lossy or compression in LOSSY_TIFF:
        name = f"TIFF compressed as {compression}" if compression else kind.replace("MPO", "JPEG")
        return f"is a {name}, which changes labels where they meet: write the map as PNG, from what it was made of"
    tags = image.tag_v2 if kind == "TIFF" else {}
    bits = _head(path)[24] if kind == "PNG" else tags.get(BITS, (8,))[0]
    largest = image.tile[0][3][-1] if kind == "PPM" and image.mode == "L" else LARGEST
    if isinstance(largest, int) and largest < LARGEST:
        return f"is a PGM whose white is {largest}, so that its labels are stretched to {LARGEST}; write it as PNG"
    if image.mode == "L" and bits in (2, 4):
        return (
            f"is a grey {kind} of {bits} bits, whose labels are multiplied by {LARGEST // (2**bits - 1)} as they are "
            "read, for white is 255; write 8 bits, or a palette"
        )
    if (pages := _count_pages(image)) > 1:
        return f"has {pages} pages, of which the first alone would be read: write one map a file"
    if image.mode in ("1", "L") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        return "is a TIFF in which 0 is white, so that its labels are inverted as they are read; write it as PNG"
    return misread_planes(image)


def _doubt(path: str) -> str | None:
    """Say why a map's labels may be others than were meant, or turned; None if nothing speaks for that."""
    kind = None
    try:
        with Image.open(path) as image:
            # Of a PNG without EXIF before its pixels, getexif decodes all pixels.
            known = image.format == "TIFF" or "exif" in image.info
            if known and image.getexif().get(ExifTags.Base.Orientation) in TURNED:
                return (
                    "has an EXIF orientation by which viewers turn it, but not all readers do: write it without, "
                    "turned as its image is loaded"
                )
            kind = f"the format {image.format}" if image.format not in KEEP_LABELS else None
            if image.format == "BMP" and image.mode != "L":  # Pillow and OpenCV do not agree on these
                kind = "the format BMP with a palette"
    except UnidentifiedImageError:
        kind = "a format that Pillow lacks" if _head(path, 4) not in TIFF_HEADERS else None
    except Exception:  # it is not on this disk, or is damaged or too large for Pillow
        return None
    return kind and (
        f"is of {kind}, in which labels may change as they are written or read: write the maps as PNG, from what they "
        "were made of"
    )


def _count_pages(image: Image.Image) -> int:
    """Return the number of pages, without those that a TIFF marks as masks or as reduced (a GeoTIFF's overviews)."""
    pages = 0
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        kind = image.tag_v2.get(KIND_OF_PAGE, 0) if image.format == "TIFF" else 0
        pages += not kind & (REDUCED | MASK)
    image.seek(0)
    return pages


def _is_reversible(path: str) -> bool:
    """Whether a JPEG 2000 file has the transform without losses, by its first COD segment (ISO 15444-1, A.6.1)."""
    _, found, segment = _head(path, 65536).partition(b"\xff\x52")
    return bool(found) and segment[11:12] == b"\1"


def _head(path: str, size: int = 32) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)
