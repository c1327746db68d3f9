"""ImageFolder data sets with timm's transforms, and loaders that share the images among processes.

A loader's batches are (images, targets, messages); `messages` is a list with one message for each image that could not
be read.
"""

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
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
from torchvision.transforms import Compose
from yacs.config import CfgNode

from classification.data.images import ImageFolder, UnreadableImageError, class_names, escaped
from classification.errors import UserError, normalisation_hint
from classification.seeding import seeded

logger = logging.getLogger("spatialmamba")


def _posterize(image: Image, bits_to_keep: int, **_: object) -> Image:
    """Posterize as timm does, but return a black image for 0 bits.

    timm's policies can ask for 0 bits. Pillow 13 refuses 0 bits; earlier versions return a black image.
    """
    if bits_to_keep < 1:
        return image.point(lambda _: 0)
    return image if bits_to_keep >= 8 else posterize(image, bits_to_keep)


auto_augment.NAME_TO_OP.update({n: _posterize for n in auto_augment.NAME_TO_OP if n.startswith("Posterize")})

REPLACEMENTS = 20  # number of images to try in place of an image that cannot be read
Sample = tuple[Tensor, int, list[str]]


class TrainImages(Dataset):
    """Augmented images of a folder, indexed by (epoch, index); seed, epoch and index determine the augmentation.

    The next readable image in the folder replaces an image that cannot be read.
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
    """Images of a folder; an image that cannot be read becomes black and gets class -1."""

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


class ImageLoader(DataLoader):
    """A DataLoader of an image folder that can renumber its labels to the order in a checkpoint.

    Attributes:
        classes: names in the order of the labels, as a checkpoint holds them.
    """

    labels: Tensor | None = None  # the new label for each label of the folder

    def __init__(self, dataset: "TrainImages | EvalImages", **arguments: object):
        super().__init__(dataset, **arguments)
        self.classes = [escaped(name) for name in dataset.folder.classes]

    def renumber(self, names: list[str], source: str) -> None:
        """Give each class the label that its name has in `names`.

        Raises:
            UserError: `names`, which come from `source`, are not the names of the folder's classes.
        """
        if difference := names_differ(names, self.dataset.folder.classes):
            raise UserError(f"{source}: its classes are not those of {self.dataset.folder.root}: {difference}")
        own = [escaped(name) for name in self.dataset.folder.classes]
        if list(names) != own:
            places = {name: label for label, name in enumerate(names)}
            self.labels = torch.tensor([*(places[name] for name in own), -1])  # -1: unreadable
            self.classes = list(names)

    def __iter__(self) -> Iterator[tuple]:
        batches = super().__iter__()
        return batches if self.labels is None else map(self._renumbered, batches)

    def _renumbered(self, batch: tuple) -> tuple:
        images, targets, *rest = batch
        return images, self.labels[targets], *rest


def names_differ(names: Sequence[str], folder: Sequence[str]) -> str:
    """Describe the first difference between the classes of a checkpoint and of a folder, in any order; "" if none."""
    own = [escaped(name) for name in folder]
    theirs, ours = set(names), set(own)
    absent, new = [name for name in names if name not in ours], [name for name in own if name not in theirs]
    if not absent and not new:
        return ""
    parts = [f"{what} {found[0]!r}" for what, found in (("it has", absent), ("the folder has", new)) if found]
    return f"{', '.join(parts)} ({len(names)} and {len(own)} classes){normalisation_hint(absent, new)}"


class EpochSampler(DistributedSampler):
    """Items of `TrainImages` for one process, shuffled anew each epoch; `start` is where a resumed epoch goes on."""

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))

    def __len__(self) -> int:
        return super().__len__() - self.start


class UnreadableImages:
    """Logs and counts unreadable images, each image once; more than `limit` images in a process are an error."""

    def __init__(self, limit: int = 0):
        self.limit, self.seen = limit, set()

    def add(self, messages: list[str]) -> None:
        """Add a batch's messages.

        Raises:
            UserError: there are now more than `limit` unreadable images.
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


def build_train_loader(config: CfgNode, rank: int, world_size: int) -> ImageLoader:
    """Build a loader of shuffled batches of DATA_PATH/train for one process.

    Its sampler is an `EpochSampler`: set the sampler's epoch before each epoch.

    Raises:
        UserError: a folder is missing or empty; train/ and val/ have different classes; there are too few images for
            one batch in each process; or the batch is odd, which mixup does not take, or too small for batch norm.
    """
    dataset = ImageFolder(config.DATA.DATA_PATH, "train", _train_transform(config))
    _check_same_classes(config.DATA.DATA_PATH, dataset.classes)
    _check_enough(len(dataset), world_size, "train", config.DATA.DATA_PATH)
    if (config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0) and config.DATA.BATCH_SIZE % 2:
        raise UserError(
            "mixup and cutmix pair the images of a batch: DATA.BATCH_SIZE (--batch-size) must be even, got "
            f"{config.DATA.BATCH_SIZE}; or set AUG.MIXUP 0 and AUG.CUTMIX 0"
        )
    if config.DATA.BATCH_SIZE == 1 and config.DATA.IMG_SIZE <= 32:
        raise UserError("one image a batch leaves batch norm a single value at DATA.IMG_SIZE 32; raise --batch-size")
    # Only whole batches, which mixup needs; each epoch leaves out other images.
    share = len(dataset) // world_size
    if share < config.DATA.BATCH_SIZE:
        raise UserError(
            f"{Path(config.DATA.DATA_PATH, 'train')}: {len(dataset)} images make {share} for each of {world_size} "
            f"process(es), less than one batch of {config.DATA.BATCH_SIZE}; lower --batch-size"
        )
    sampler = EpochSampler(dataset, world_size, rank, shuffle=True, seed=config.SEED)
    return _loader(config, TrainImages(dataset, config.SEED), sampler=sampler, drop_last=True)


def build_eval_loader(config: CfgNode, rank: int, world_size: int) -> ImageLoader:
    """Build a loader of DATA_PATH/val in order; this process gets the images rank, rank + world_size, ...

    Each image is in exactly one process.

    Raises:
        UserError: a folder is missing or empty, or there are more processes than images.
    """
    dataset = ImageFolder(config.DATA.DATA_PATH, "val", eval_transform(config))
    _check_enough(len(dataset), world_size, "val", config.DATA.DATA_PATH)
    images = EvalImages(dataset, config.DATA.IMG_SIZE)
    return _loader(config, images, sampler=range(rank, len(dataset), world_size), drop_last=False)


def build_mixup(config: CfgNode, num_classes: int) -> Mixup | None:
    """Return timm's mixup and cutmix with label smoothing, or None if both are off."""
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
    """Return a transform: resize the short side to IMG_SIZE / CROP_PCT, crop the centre, normalise as for ImageNet."""
    method = config.DATA.INTERPOLATION
    resize_and_crop = create_transform(
        config.DATA.IMG_SIZE,
        interpolation="bilinear" if method == "random" else method,  # timm's method without augmentation
        crop_pct=config.TEST.CROP_PCT,
    )
    return Compose([_cut_ends, *resize_and_crop.transforms])


LONGEST = 8  # longest side to resize, as a multiple of the short side


def _cut_ends(image: Image) -> Image:
    """Return the middle of a very long image, which contains the centre crop; resizing it all could take gigabytes."""
    keep = LONGEST * min(image.size)
    if max(image.size) <= keep:
        return image
    # Cut off the same number at both ends, so that the centre stays where it is.
    left, top = (max(0, side - keep) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


SETS_OF_TRANSFORMS = ("t3a", "t3aw", "tweights")  # of RandAugment; for any other name, timm uses its default set


def _check_policy(policy: str) -> None:
    """Raise a ValueError for mistakes in a policy that timm ignores.

    timm ignores a part without a number and an unknown name of a set, and uses only one of two parts with the same key.
    """
    name, *parts = policy.split("-")
    keys = []
    for part in parts:
        chooses = name == "rand" and part.startswith("t")
        number = re.fullmatch(r"([a-z]+)\d.*", part)
        if not (part in SETS_OF_TRANSFORMS if chooses else number):
            kind = f"is none of {', '.join(SETS_OF_TRANSFORMS)}" if chooses else "has no number, unlike m9"
            raise ValueError(f"its part {part!r} {kind}")
        keys.append("t" if chooses else number[1])
    if len(set(keys)) < len(keys):
        raise ValueError(f"its part {max(keys, key=keys.count)!r} is there more than once")


def _train_transform(config: CfgNode) -> Callable:
    try:
        _check_policy(config.AUG.AUTO_AUGMENT)
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
    except (AssertionError, ValueError) as error:  # the config has checked all values but the policy
        policy = config.AUG.AUTO_AUGMENT
        raise UserError(f"AUG.AUTO_AUGMENT is not a policy that timm knows: {policy!r} ({error})") from error


def _check_same_classes(data_path: str, train_classes: list[str]) -> None:
    train, val = set(train_classes), set(class_names(data_path, "val"))
    if differing := train ^ val:
        names, hint = ", ".join(sorted(differing)[:5]), normalisation_hint(train - val, val - train)
        raise UserError(f"{data_path}: train/ and val/ must hold the same classes; only in one of them: {names}{hint}")


def _check_enough(images: int, world_size: int, split: str, data_path: str) -> None:
    if images < world_size:
        raise UserError(
            f"{Path(data_path, split)}: {images} image(s) for {world_size} processes; start at most {images}"
        )


def _stand_apart(worker: int) -> None:
    """Move a worker out of the training process' group, to which launchers send signals.

    The training process needs its workers until it has saved.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends SIGUSR1 to all processes, whatever their group


def _loader(config: CfgNode, dataset: Dataset, sampler: object, drop_last: bool) -> ImageLoader:
    workers = min(config.DATA.NUM_WORKERS, os.cpu_count() or 1)
    if workers:
        _check_shared_memory(config, workers)
    loader = ImageLoader(
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
        # Start the persistent workers now: if a thread of gloo is in Python during a later fork, the child hangs.
        iter(loader)
    return loader


SHARED_MEMORY = "/dev/shm"
MIB = 2**20


def _check_shared_memory(config: CfgNode, workers: int) -> None:
    """Check that shared memory can hold the batches that workers hand over; if it is full, workers die of a bus error.

    Raises:
        UserError: there is not enough for one batch of each worker.
    """
    batch = config.DATA.BATCH_SIZE * 3 * config.DATA.IMG_SIZE**2 * torch.get_default_dtype().itemsize
    needed = batch * workers * config.DATA.PREFETCH_FACTOR
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if needed <= free:
        return
    message = (
        f"{SHARED_MEMORY}: has {free / MIB:.0f} MiB, but {workers} worker(s) with {config.DATA.PREFETCH_FACTOR} "
        f"batches of {batch / MIB:.0f} MiB each can need {needed / MIB:.0f}: start the container with a larger one "
        "(docker's --shm-size=16g or --ipc=host), or lower DATA.NUM_WORKERS, 0 for none"
    )
    if batch * workers > free:
        raise UserError(message)
    logger.warning("%s", message)
