"""ImageFolder data sets with timm's transforms, and loaders that share them among processes.

A loader's batches are (images, targets, messages): the last a list with one message for each image that could not be
read.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from PIL.Image import Image
from PIL.ImageOps import posterize
from timm.data import Mixup, auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from yacs.config import CfgNode

from classification.errors import UserError
from classification.seeding import seeded

logger = logging.getLogger("spatialmamba")


def _posterize(image: Image, bits_to_keep: int, **_: object) -> Image:
    """timm's, but for 0 bits, which its policies can ask for and Pillow 13 refuses: all black, as before."""
    if bits_to_keep < 1:
        return image.point(lambda _: 0)
    return image if bits_to_keep >= 8 else posterize(image, bits_to_keep)


auto_augment.NAME_TO_OP.update({n: _posterize for n in auto_augment.NAME_TO_OP if n.startswith("Posterize")})

REPLACEMENTS = 20  # images tried in place of one that cannot be read
Sample = tuple[Tensor, int, list[str]]


class TrainImages(Dataset):
    """Augmented images of a folder. An item is (epoch, index), and all that is random in it follows from these two.

    One that cannot be read is replaced by the next in the folder that can.
    """

    def __init__(self, folder: ImageFolder, seed: int):
        self.folder, self.seed = folder, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        messages: list[str] = []
        for i in range(index, index + min(1 + REPLACEMENTS, len(self.folder))):
            try:
                with seeded(self.seed, epoch, index):
                    image, target = self.folder[i % len(self.folder)]
            except UnreadableImageError as error:
                messages.append(str(error))
            else:
                return image, target, messages
        raise UserError(f"{messages[-1]}; nor can the {len(messages) - 1} images before it")


class EvalImages(Dataset):
    """Images of a folder; one that cannot be read is black and of class -1."""

    def __init__(self, folder: ImageFolder, size: int):
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Sample:
        try:
            return *self.folder[index], []
        except UnreadableImageError as error:
            return torch.zeros(3, self.size, self.size), -1, [str(error)]


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    images, targets = default_collate([sample[:2] for sample in samples])
    return images, targets, [message for sample in samples for message in sample[2]]


class EpochSampler(DistributedSampler):
    """Items of `TrainImages` for one process, shuffled anew each epoch, from `start` on where an epoch is resumed."""

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))

    def __len__(self) -> int:
        return super().__len__() - self.start


class UnreadableImages:
    """Logs and counts images that could not be read, each once; more than `limit` of them in a process are an error."""

    def __init__(self, limit: int = 0):
        self.limit, self.seen = limit, set()

    def add(self, messages: list[str]) -> None:
        """
        Raises:
            UserError: there are more than `limit` by now.
        """
        for message in messages:
            if message in self.seen:
                continue
            self.seen.add(message)
            count = len(self.seen)
            if count > self.limit:
                raise UserError(
                    f"{message}; it is number {count}, and DATA.MAX_UNREADABLE allows {self.limit}: replace or "
                    "remove the images named in the log, or raise it"
                )
            logger.warning("%s; another takes its place (%d of %d allowed)", message, count, self.limit)


def class_names(data_path: str, split: str) -> list[str]:
    """Names of the class folders of a split, in the order of their labels."""
    return image_folder(data_path, split, transform=None).classes


def build_train_loader(config: CfgNode, rank: int, world_size: int) -> DataLoader:
    """Shuffled batches of DATA_PATH/train for one process. Its sampler is an `EpochSampler`: set the epoch before each.

    Raises:
        UserError: a missing or empty folder, classes other than those of val/, fewer images than one batch each, an
            odd batch for mixup.
    """
    dataset = image_folder(config.DATA.DATA_PATH, "train", _train_transform(config))
    _check_same_classes(config.DATA.DATA_PATH, dataset.classes)
    _check_enough(len(dataset), world_size, "train", config.DATA.DATA_PATH)
    if (config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0) and config.DATA.BATCH_SIZE % 2:
        raise UserError(
            "mixup and cutmix pair the images of a batch: DATA.BATCH_SIZE (--batch-size) must be even, got "
            f"{config.DATA.BATCH_SIZE}; or set AUG.MIXUP 0 and AUG.CUTMIX 0"
        )
    if config.DATA.BATCH_SIZE == 1 and config.DATA.IMG_SIZE <= 32:
        raise UserError("one image a batch leaves batch norm a single value at DATA.IMG_SIZE 32; raise --batch-size")
    # Only whole batches, which mixup needs: the images left over in one epoch are others in the next.
    share = len(dataset) // world_size
    if share < config.DATA.BATCH_SIZE:
        raise UserError(
            f"{Path(config.DATA.DATA_PATH, 'train')}: {len(dataset)} images make {share} for each of {world_size} "
            f"process(es), less than one batch of {config.DATA.BATCH_SIZE}; lower --batch-size"
        )
    sampler = EpochSampler(dataset, world_size, rank, shuffle=True, seed=config.SEED)
    return _loader(config, TrainImages(dataset, config.SEED), sampler=sampler, drop_last=True)


def build_eval_loader(config: CfgNode, rank: int, world_size: int) -> DataLoader:
    """DATA_PATH/val in order, every image in exactly one process: rank, rank + world_size, ...

    Raises:
        UserError: a missing or empty folder, or more processes than images.
    """
    dataset = image_folder(config.DATA.DATA_PATH, "val", eval_transform(config))
    _check_enough(len(dataset), world_size, "val", config.DATA.DATA_PATH)
    images = EvalImages(dataset, config.DATA.IMG_SIZE)
    return _loader(config, images, sampler=range(rank, len(dataset), world_size), drop_last=False)


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix with label smoothing, or None if both are off."""
    if config.AUG.MIXUP <= 0 and config.AUG.CUTMIX <= 0:
        return None
    return Mixup(
        mixup_alpha=config.AUG.MIXUP,
        cutmix_alpha=config.AUG.CUTMIX,
        prob=config.AUG.MIXUP_PROB,
        switch_prob=config.AUG.MIXUP_SWITCH_PROB,
        mode=config.AUG.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
    )


def eval_transform(config: CfgNode) -> Callable:
    """Resize the short side to IMG_SIZE / CROP_PCT, crop the centre, normalise as ImageNet."""
    return create_transform(
        config.DATA.IMG_SIZE, interpolation=config.DATA.INTERPOLATION, crop_pct=config.TEST.CROP_PCT
    )


def _train_transform(config: CfgNode) -> Callable:
    try:
        return create_transform(
            config.DATA.IMG_SIZE,
            is_training=True,
            scale=tuple(config.AUG.SCALE),
            ratio=tuple(config.AUG.RATIO),
            hflip=config.AUG.HFLIP,
            color_jitter=config.AUG.COLOR_JITTER,
            auto_augment=config.AUG.AUTO_AUGMENT or None,
            interpolation=config.DATA.INTERPOLATION,
            re_prob=config.AUG.REPROB,
            re_mode=config.AUG.REMODE,
            re_count=config.AUG.RECOUNT,
        )
    except (AssertionError, ValueError) as error:  # all but the policy is checked with the config
        policy = config.AUG.AUTO_AUGMENT
        raise UserError(f"AUG.AUTO_AUGMENT is not a policy that timm knows: {policy!r} ({error})") from error


class UnreadableImageError(UserError):
    """A file that is no image, or a damaged one."""


def _read_image(path: str) -> Image:
    try:
        return default_loader(path)
    except Exception as error:  # Pillow's plugins raise what they like on a damaged file
        raise UnreadableImageError(f"{path}: cannot be read as an image ({error})") from error


def image_folder(data_path: str, split: str, transform: Callable | None) -> ImageFolder:
    """DATA_PATH/split, one folder a class.

    Raises:
        UserError: a missing folder, no class folders, or a class folder without images; reading an image can raise too.
    """
    if not data_path:
        raise UserError("no data: pass --data-path DIR with the folders train/ and val/, one folder a class in each")
    root = Path(data_path, split)
    for folder in (Path(data_path), root):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --data-path must hold {split}/ with one folder a class")
    if not any(entry.is_dir() for entry in root.iterdir()):
        raise UserError(f"{root}: no class folders; expected {root}/CLASS/*.jpg")
    dataset = ImageFolder(str(root), transform, loader=_read_image, allow_empty=True)
    empty = sorted(set(range(len(dataset.classes))) - set(dataset.targets))
    if empty:
        names = ", ".join(str(root / dataset.classes[i]) for i in empty[:5])
        raise UserError(f"{names}: no images in {len(empty)} class folder(s); fill or remove them")
    return dataset


def _check_same_classes(data_path: str, train_classes: list[str]) -> None:
    differing = set(train_classes) ^ set(class_names(data_path, "val"))
    if differing:
        names = ", ".join(sorted(differing)[:5])
        raise UserError(f"{data_path}: train/ and val/ must hold the same classes; only in one of them: {names}")


def _check_enough(images: int, world_size: int, split: str, data_path: str) -> None:
    if images < world_size:
        raise UserError(
            f"{Path(data_path, split)}: {images} image(s) for {world_size} processes; start at most {images}"
        )


def _stand_apart(worker: int) -> None:
    """Out of reach of the signals that launchers send to a training process' group: it needs its workers to save."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends this one to all


def _loader(config: CfgNode, dataset: Dataset, sampler: object, drop_last: bool) -> DataLoader:
    workers = min(config.DATA.NUM_WORKERS, os.cpu_count() or 1)
    loader = DataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=workers > 0,
        prefetch_factor=config.DATA.PREFETCH_FACTOR if workers else None,
        worker_init_fn=_stand_apart,
    )
    if workers and dist.is_initialized():
        # Starts the workers, which stay: a fork while a thread of gloo's is in Python never returns in the child.
        iter(loader)
    return loader
