"""Write digits scenes, handwritten digits on textured canvases: a data set for detection or for segmentation.

    python -m classification.data.digits_scenes data/digits_scenes
    python -m classification.data.digits_scenes data/digits_scenes_ade20k --layout ade20k

The first command writes COCO's format: `train/*.png`, `val/*.png`, `annotations/instances_{train,val}.json`. The
polygons of a digit are its outlines at half opacity, without holes. The second command writes ADE20K's format: images
in `images/` and their maps in `annotations/`, both with `training/` and `validation/`. A pixel of a map is 0 for the
background and 1 + d where digit d is more than half opaque.

The scenes are always the same. Each canvas holds up to five digits of the embedded set (see `digits`), turned, coloured
and enlarged; no digit is in both training and validation scenes.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contourpy import contour_generator
from PIL import Image
from sklearn.datasets import load_digits

from classification.data.digits import split_digits
from classification.errors import UserError, is_dir, prepare_console, printable

SIZE = 128
SCENES = {"train": 480, "val": 96}
SEEDS = {"train": 1, "val": 2}
DIGITS_PER_SCENE = (2, 5)
DIGIT_SIDE = (36, 60)  # pixels to which the 8x8 original is enlarged
MAX_TURN = 15  # degrees
MAX_TRIES = 20  # places to try for a digit; if none is free, the digit is left out
MIN_AREA = 16  # least square pixels of an outline; smaller outlines are left out
CLASSES = tuple("0123456789")
ANNOTATIONS = "annotations/instances_{}.json"  # COCO's name
ADE20K = {"train": "training", "val": "validation"}  # ADE20K's folders


@dataclass
class Digit:
    label: int
    polygons: list[np.ndarray]  # each (points, 2), x and y from the image's corner
    opacity: np.ndarray  # (SIZE, SIZE), on the whole canvas

    def box(self) -> list[float]:
        """Return COCO's x, y, width, height."""
        points = np.concatenate(self.polygons)
        low, high = points.min(axis=0), points.max(axis=0)
        return [*low.tolist(), *(high - low).tolist()]

    def area(self) -> float:
        return sum(_area(polygon) for polygon in self.polygons)


def _area(polygon: np.ndarray) -> float:
    """Return the area of a closed polygon, by the shoelace formula."""
    x, y = polygon.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def scenes(split: str) -> Iterator[tuple[np.ndarray, list[Digit]]]:
    """Yield images (SIZE, SIZE, 3) of bytes and the digits on them."""
    data = load_digits()
    members = dict(zip(("train", "val"), split_digits(), strict=True))[split]
    rng = np.random.RandomState(SEEDS[split])  # RandomState draws the same numbers in every NumPy version
    for _ in range(SCENES[split]):
        image, digits = _texture(rng), []
        taken = np.zeros((SIZE, SIZE), bool)
        for _ in range(rng.randint(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1)):
            index = rng.choice(members)
            placed = _place(rng, data.images[index], taken)
            if placed is not None:
                digit = Digit(int(data.target[index]), *placed)
                image = _paint(rng, image, digit.opacity)
                digits.append(digit)
        yield (image * 255).round().astype(np.uint8), digits


def _texture(rng: np.random.RandomState) -> np.ndarray:
    """Return coarse and fine colour noise, (SIZE, SIZE, 3) in [0, 1]."""
    layers = []
    for cells, strength in ((4, 0.5), (16, 0.25), (SIZE, 0.1)):
        noise = Image.fromarray((rng.rand(cells, cells, 3) * 255).astype(np.uint8))
        layers.append(strength * (np.asarray(noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255 - 0.5))
    return np.clip(rng.uniform(0.3, 0.7, 3) + sum(layers), 0, 1)


def _place(
    rng: np.random.RandomState, grey: np.ndarray, taken: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Place a digit where nothing has been placed yet, and mark the place in `taken`.

    Returns:
        Outlines and opacity of the digit; None if there is no free place or no outline is large enough.
    """
    small = Image.fromarray((grey * (255 / 16)).round().astype(np.uint8))
    side = rng.randint(DIGIT_SIDE[0], DIGIT_SIDE[1] + 1)
    large = small.resize((side, side), Image.Resampling.BICUBIC)
    large = large.rotate(rng.uniform(-MAX_TURN, MAX_TURN), Image.Resampling.BICUBIC)
    for _ in range(MAX_TRIES):
        left, top = rng.randint(0, SIZE - side + 1, 2)
        opacity = np.zeros((SIZE, SIZE))
        opacity[top : top + side, left : left + side] = np.asarray(large) / 255
        if not (taken & (opacity > 0.25)).any():
            # The margin closes outlines at the border; a pixel's centre lies half a pixel from its corner.
            lines = contour_generator(z=np.pad(opacity, 1)).lines(0.5)
            polygons = [np.clip(line[:-1] - 0.5, 0, SIZE) for line in lines]
            polygons = [p for p in _outer(polygons) if _area(p) >= MIN_AREA]
            if not polygons:
                return None
            taken |= opacity > 0.25
            return polygons, opacity
    return None


def _outer(polygons: list[np.ndarray]) -> list[np.ndarray]:
    """Return the polygons without holes, which lie within another polygon."""

    def within(inner: np.ndarray, outer: np.ndarray) -> bool:
        return bool((inner.min(axis=0) > outer.min(axis=0)).all() and (inner.max(axis=0) < outer.max(axis=0)).all())

    return [p for p in polygons if not any(within(p, other) for other in polygons if other is not p)]


def _paint(rng: np.random.RandomState, image: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Paint the digit on the image in a colour that stands out from the image under it."""
    under = np.average(image.reshape(-1, 3), axis=0, weights=opacity.reshape(-1))
    colour = rng.uniform(0.75, 1, 3) if under.mean() < 0.5 else rng.uniform(0, 0.25, 3)
    alpha = np.clip(1.5 * opacity, 0, 1)[..., None]
    return (1 - alpha) * image + alpha * colour


def write_digits_scenes(root: Path, layout: str = "coco") -> bool:
    """Write the data set at `root` in one of `LAYOUTS` if it does not exist yet. Return whether it was written.

    Raises:
        UserError: `root` exists but is something else, or cannot be made.
    """
    write, is_written = LAYOUTS[layout]
    is_folder = is_dir(root)
    if root.exists() and (not is_folder or any(root.iterdir())):
        if all(is_written(root, split) for split in SCENES):
            return False
        raise UserError(
            f"{root}: exists and is not the digits scenes data set as for {layout}; remove it or name another folder"
        )
    # Write beside the target, then rename: so the folder is whole or absent.
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    except OSError as error:
        raise UserError(f"{root}: cannot be made ({error}); name another folder") from error
    try:
        for split in SCENES:
            write(staging, split)
        staging.chmod(0o755)
        staging.replace(root)
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _is_coco(root: Path, split: str) -> bool:
    return _count(root / split) == SCENES[split] and (root / ANNOTATIONS.format(split)).is_file()


def _is_ade20k(root: Path, split: str) -> bool:
    return all(_count(root / part / ADE20K[split]) == SCENES[split] for part in ("images", "annotations"))


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.png"))


def _write_ade20k(root: Path, split: str) -> None:
    images, maps = (root / part / ADE20K[split] for part in ("images", "annotations"))
    images.mkdir(parents=True)
    maps.mkdir(parents=True)
    for number, (image, digits) in enumerate(scenes(split), start=1):
        labels = np.zeros((SIZE, SIZE), np.uint8)
        for digit in digits:
            labels[digit.opacity > 0.5] = 1 + digit.label
        Image.fromarray(image).save(images / f"{number:04d}.png")
        Image.fromarray(labels).save(maps / f"{number:04d}.png")


def _write_coco(root: Path, split: str) -> None:
    (root / split).mkdir()
    coco = {
        "info": {"description": "handwritten digits on textured canvases"},
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES)],
    }
    for image_id, (image, digits) in enumerate(scenes(split), start=1):
        name = f"{image_id:04d}.png"
        Image.fromarray(image).save(root / split / name)
        coco["images"].append({"id": image_id, "file_name": name, "height": SIZE, "width": SIZE})
        for digit in digits:
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": digit.label + 1,
                    "bbox": [round(v, 2) for v in digit.box()],
                    "area": round(digit.area(), 2),
                    "segmentation": [np.round(p, 2).reshape(-1).tolist() for p in digit.polygons],
                    "iscrowd": 0,
                }
            )
    path = root / ANNOTATIONS.format(split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco))


LAYOUTS = {"coco": (_write_coco, _is_coco), "ade20k": (_write_ade20k, _is_ade20k)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write handwritten digits on textured canvases.", allow_abbrev=False)
    parser.add_argument("root", type=Path, help="folder to make, e.g. data/digits_scenes")
    parser.add_argument("--layout", choices=LAYOUTS, default="coco", help="for detection or for segmentation")
    args = parser.parse_args()
    prepare_console()
    try:
        written = write_digits_scenes(args.root, args.layout)
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    print(printable(f"{args.root}: ") + f"{SCENES['train']} training and {SCENES['val']} validation scenes", end="")
    print("" if written else " (already there)")


if __name__ == "__main__":
    main()
