"""Write the embedded data set, scikit-learn's 1,797 handwritten digits, as an image folder, without a download.

    python -m classification.data.digits data/digits

writes 1,437 training and 360 validation images, 32x32 PNG, as `train/0` ... `val/9`. The split is stratified and always
the same. The digits come from the UCI optical recognition data set (test part) and have 8x8 pixels of 17 grey levels.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from classification.errors import UserError, is_dir, prepare_console, printable

SIZE = 32
VAL_IMAGES = 360
SPLIT_SEED = 0


def write_digits(root: Path) -> bool:
    """Write the image folder at `root` if it does not exist yet. Return whether it was written.

    Raises:
        UserError: `root` exists but is something else, or cannot be made.
    """
    is_folder = is_dir(root)
    if root.exists() and (not is_folder or any(root.iterdir())):
        if _count(root / "train") + _count(root / "val") == len(load_digits().target):
            return False
        raise UserError(f"{root}: exists and is not the digits data set; remove it or name another folder")
    # Write beside the target, then rename: so the folder is whole or absent.
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    except OSError as error:
        raise UserError(f"{root}: cannot be made ({error}); name another folder") from error
    try:
        _write_splits(staging)
        staging.chmod(0o755)
        staging.replace(root)
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def split_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training and of the validation digits in scikit-learn's set."""
    target = load_digits().target
    everyone = np.arange(len(target))
    train, val = train_test_split(everyone, test_size=VAL_IMAGES, stratify=target, random_state=SPLIT_SEED)
    return train, val


def _write_splits(root: Path) -> None:
    digits = load_digits()
    train, val = split_digits()
    for split, members in (("train", train), ("val", val)):
        for index in members:
            folder = root / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((digits.images[index] * (255 / 16)).round().astype(np.uint8))
            grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.png")


def _count(split: Path) -> int:
    return sum(1 for _ in split.glob("?/*.png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write scikit-learn's handwritten digits as an image folder.", allow_abbrev=False
    )
    parser.add_argument("root", type=Path, help="folder to make, e.g. data/digits")
    root = parser.parse_args().root
    prepare_console()
    try:
        written = write_digits(root)
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    print(
        printable(f"{root}: ") + f"{_count(root / 'train')} training and {_count(root / 'val')} validation images",
        end="",
    )
    print("" if written else " (already there)")


if __name__ == "__main__":
    main()
