"""Early checks of a config, its data and its checkpoints, so that a mistake gives one clear line."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from torch import nn

from classification.checkpoint import differences
from classification.errors import UserError, check_utf8, is_dir, is_file, normalisation_hint
from classification.models.openmmlab import BACKBONE, checkpoints_of, size_hint
from classification.openmmlab.checkpoint import load_from_local, weights_of
from classification.openmmlab.coco import Use, check_annotations, image_ids
from classification.openmmlab.config_parts import (
    DO_NOTHING,
    argument_of,
    class_names_of,
    datasets_of,
    datasets_of_metrics,
    is_kind,
    kind_of,
    metrics_of,
    must_exist,
    parts_of,
    parts_within,
    predicting_head,
    segmentation_heads,
    steps_of,
    type_of,
    with_pipelines,
    works_as,
)
from classification.openmmlab.label_maps import check_foreground, check_maps
from classification.openmmlab.messages import print_log
from classification.openmmlab.pickle_files import PICKLES
from classification.openmmlab.voc import check_objects

# Heads whose num_classes differs from the data set's: mmseg's head of borders, mmseg's head of texts (without the
# background's text), and mmdet's heads that compare with the texts of any classes.
OTHER_CLASSES = ("STDCHead", "SideAdapterCLIPHead", "ATSSVLFusionHead", "GroundingDINOHead")


def check_channels(model: ConfigDict) -> None:
    """Raise a UserError if the neck or a head expects other channels or strides than those of the backbone's maps."""
    backbone = model.get("backbone")
    if backbone and not backbone.get("type"):
        raise UserError("model.backbone has no type; set MM_SpatialMamba or another backbone")
    if not backbone or kind_of(backbone) != "MM_SpatialMamba":
        return
    dims, depths = backbone.get("dims", 64), backbone.get("depths", (2, 4, 8, 4))
    dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
    # The maps come in the order of the stages.
    stages = sorted(i % len(dims) for i in backbone.get("out_indices", (0, 1, 2, 3)) if -len(dims) <= i < len(dims))
    given = [dims[i] for i in stages]
    if neck := model.get("neck"):
        neck = neck[0] if isinstance(neck, list) else neck
        reads_backwards = is_kind(neck, "YOLOV3Neck")  # its lists begin with the last map
        _compare_channels("neck", neck, given[::-1] if reads_backwards else given)
        _check_strides(model, neck, [4 * 2**i for i in stages])
    else:
        for part in ("decode_head", "auxiliary_head"):
            heads = model.get(part) or []
            for head in heads if isinstance(heads, list) else [heads]:
                _compare_channels(part, {"in_index": -1, **head}, given)  # mmseg's default


def _compare_channels(part: str, config: dict, given: list[int]) -> None:
    wanted, index = config.get("in_channels"), config.get("in_index")
    if isinstance(index, (list, tuple)):
        given = [given[i] for i in index if -len(given) <= i < len(given)]
    elif index is not None and -len(given) <= index < len(given):
        given = given[index]
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else wanted
    if type(wanted) is type(given) and wanted != given:
        raise UserError(
            f"model.{part}.in_channels is {wanted}, but the backbone's maps have {given} channels; "
            f"set model.{part}.in_channels to that, or model.backbone.dims"
        )


KEEP_STRIDES = ("FPN", "PAFPN", "NASFPN", "FPN_CARAFE", "ChannelMapper", "YOLOXPAFPN", "CSPNeXtPAFPN")


def _check_strides(model: ConfigDict, neck: ConfigDict, given: list[int]) -> None:
    """Raise a UserError if boxes or regions are placed on the neck's maps by other strides than the maps have."""
    start = neck.get("start_level", 0)
    if not is_kind(neck, *KEEP_STRIDES) or not 0 <= start < len(given):
        return
    roi_head = model.get("roi_head")
    holders = {"": model, "roi_head.": roi_head if isinstance(roi_head, dict) else {}}
    places = ("rpn_head", "bbox_head", "bbox_roi_extractor", "mask_roi_extractor")
    for place, part in ((f"{p}{name}", one.get(name)) for p, one in holders.items() for name in places):
        for key, one in parts_of(place, part):
            generators = {f"{key}.{name}": one.get(name) or {} for name in ("anchor_generator", "prior_generator")}
            found = {f"{name}.strides": value.get("strides") for name, value in {key: one, **generators}.items()}
            found[f"{key}.featmap_strides"] = one.get("featmap_strides")
            for name, strides in found.items():
                several = isinstance(strides, list | tuple) and len(strides) > 1
                first = strides[0] if several else None
                first = first[0] if isinstance(first, list | tuple) and first else first
                if isinstance(first, int) and first != given[start]:
                    raise UserError(
                        f"model.{name} begins with {first}, but the neck's first map has a stride of {given[start]} "
                        "pixels (backbone.out_indices, neck.start_level): boxes would be in other places; set it to "
                        f"{[given[start] * 2**i for i in range(len(strides))]}"
                    )


def pretrained_of(model: ConfigDict) -> str | None:
    """Return the file that a model's backbone starts from: `pretrained` of the backbone, or else of the model.

    mmseg hands the model's `pretrained` on to the backbone. For MM_SpatialMamba, the file may also be that of init_cfg,
    or an address. For other backbones, mmengine downloads addresses.
    """
    backbone = model.get("backbone") or {}
    named = backbone.get("pretrained") or model.get("pretrained")
    if not is_kind(backbone, "MM_SpatialMamba"):
        return named if isinstance(named, str) and "://" not in named else None
    if named:
        return named
    configs = checkpoints_of(backbone.get("init_cfg"), {*backbone} & {*DO_NOTHING})
    return configs[0]["checkpoint"] if configs else None


NORMALISED = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375), "bgr_to_rgb": True}  # as for ImageNet


def warn_of_other_normalisation(cfg: Config) -> None:
    """Warn if the config normalises images differently from the images that the pretrained weights were trained on."""
    backbone = cfg.model.get("backbone") or {}
    if not is_kind(backbone, "MM_SpatialMamba") or not pretrained_of(cfg.model):
        return
    given = cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
    own = {"mean": given.get("mean"), "std": given.get("std"), "bgr_to_rgb": given.get("bgr_to_rgb", False)}
    for name, value in NORMALISED.items():
        same = own[name] == value if name == "bgr_to_rgb" else _near(own[name], value)
        own[name] = None if same else f"{name} is {own[name]}, theirs {value if name == 'bgr_to_rgb' else list(value)}"
    if others := list(filter(None, own.values())):
        print_log(
            "model.data_preprocessor normalises images otherwise than those that the backbone's checkpoint was trained "
            f"on: {'; '.join(others)}",
            level=logging.WARNING,
        )


def _near(value: object, expected: Sequence[float]) -> bool:
    try:
        return np.allclose(np.asarray(value, float), expected, rtol=0.01)
    except (TypeError, ValueError):  # a different number of channels, or no numbers
        return False


# Shares of 1: of an overlap (intersection over union), a score or a mask's probability.
SHARES = ("iou_thr", "iou_threshold", "pos_iou_thr", "neg_iou_thr", "min_pos_iou", "score_thr", "conf_thr")
SHARES += ("mask_thr_binary", "nms_thr")


def check_thresholds(cfg: object, place: str) -> None:
    """Raise a UserError if a threshold of overlaps or scores is above 1, such as one in percent: nothing reaches it."""
    for key, value in cfg.items() if isinstance(cfg, dict) else enumerate(cfg):
        where = f"{place}.{key}" if isinstance(cfg, dict) else f"{place}[{key}]"
        numbers = value if isinstance(value, list | tuple) else [value]
        if key in SHARES and any(isinstance(one, int | float) and not one <= 1 for one in numbers):
            raise UserError(f"{where} is {value!r}, but an overlap or a score is at most 1")
        if isinstance(value, dict | list | tuple):
            check_thresholds(value, where)


def check_operators(model: nn.Module) -> None:
    """Raise a UserError if a layer needs a compiled operator that mmcv-lite does not have."""
    advice = getattr(sys.modules.get("mmcv._ext"), "INSTALL_FULL", None)
    if advice is None:
        return  # full mmcv is installed, or no operator of mmcv is imported
    for name, module in model.named_modules():
        source = type(module).__module__
        if source.startswith("mmcv.ops.") and hasattr(sys.modules[source], "ext_module"):
            kind = type(module).__name__
            plain = ("RoIAlign",) if torch.cuda.is_available() else ("RoIAlign", "MultiScaleDeformableAttention")
            if kind not in plain:
                raise UserError(f"model.{name} is a {kind}, which mmcv-lite has no operator for; {advice}")


# ----- data


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Raise a UserError if a dataset of `splits` ("train", "val", "test") lacks a file, a folder or a class."""
    _check_no_pickles(cfg.get("custom_hooks") or [], "custom_hooks")  # which may have a pipeline
    check_thresholds(cfg.model, "model")
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if loader:
            _check_no_pickles(loader.dataset, f"{split}_dataloader.dataset")
        if loader and split != "train":
            _check_whole(loader, split)
            _check_tested_once(cfg, split, loader.dataset)
        datasets = list(datasets_of(loader.dataset)) if loader else []
        for dataset in datasets:
            _check_dataset(dataset, f"{split}_dataloader.dataset", cfg)
        for metric, its in datasets_of_metrics(cfg, split, datasets):
            _check_loads_maps(metric, its, split)
            _check_packs_what_is_written(metric, its, split)
            _check_removes_nothing(metric, split)
            check_thresholds(metric, f"{split}_evaluator")
            if isinstance(metric.get("output_dir"), str):
                check_is_no_data(cfg, metric.output_dir, f"{split}_evaluator.output_dir={metric.output_dir}")
            if metric.get("ann_file"):
                _check_no_pickles(metric.ann_file, f"{split}_evaluator.ann_file")
                if not _is_remote(metric):
                    must_exist(metric.ann_file, "annotation file", f"{split}_evaluator.ann_file")
                    _check_compared(metric, its, split)
                _check_all_are_tested(metric, its, split)
            if is_kind(metric, "CocoMetric"):
                _check_image_ids(metric, its, split)
                roi_head = cfg.model.get("roi_head")
                if isinstance(roi_head, dict) and not roi_head.get("mask_head") and _compares_masks(metric):
                    raise UserError(
                        f"{split}_evaluator compares masks, but model.roi_head has no mask_head; set its metric='bbox'"
                    )
        if loader:
            _check_steps(cfg, split, loader.dataset)
    if "train" in splits:
        _check_learns(cfg.model)
        _check_loads_masks(cfg)
        _check_save_best(cfg)
        if "val" in splits:
            _warn_of_shared_images(cfg)
    _check_same_labels(cfg, splits)
    _check_ignored(cfg, splits)


ENDLESS_SAMPLERS = ("InfiniteSampler", "InfiniteGroupBatchSampler")  # of mmengine, mmdet


def _check_whole(loader: ConfigDict, split: str) -> None:
    """Raise a UserError if images are left out: CocoMetric counts their objects as missed, others do not know them."""
    sampler = loader.get("batch_sampler") or {}
    if loader.get("drop_last") or sampler.get("drop_last"):
        raise UserError(f"{split}_dataloader has drop_last=True, so the last images are not tested; leave it out")
    if is_kind(loader.get("sampler") or {}, *ENDLESS_SAMPLERS):
        raise UserError(f"{split}_dataloader has an {kind_of(loader.sampler)}, which has no end; take a DefaultSampler")
    if sampler and kind_of(sampler) != "BatchSampler" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{split}_dataloader.batch_sampler is a {kind_of(sampler)}: if it changes the order of images, several "
            "processes count an image twice, and lose another; leave it out"
        )


def _check_tested_once(cfg: Config, split: str, dataset: ConfigDict) -> None:
    """Raise a UserError if images are tested several times: metrics of boxes count all predictions of an image."""
    wrapper = next((one for one in parts_within(dataset) if is_kind(one, *REPEATING)), None)
    if wrapper and not all(is_kind(metric, "IoUMetric") for metric in metrics_of(cfg, split)):
        raise UserError(
            f"{split}_dataloader.dataset has a {kind_of(wrapper)}, so images are tested several times, and their "
            "predictions count as often; leave it out"
        )


REPEATING = ("RepeatDataset", "ClassBalancedDataset")


def _check_steps(cfg: Config, split: str, dataset: ConfigDict) -> None:
    """Warn of images that are normalised twice, and of steps that spoil what is learnt or compared.

    Raises:
        UserError: images for training are moved before their labels are loaded.
    """
    given = cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
    for part in with_pipelines(dataset):
        steps, key = list(steps_of(part.pipeline)), f"{split}_dataloader.dataset.pipeline"
        if given.get("mean") and any(is_kind(step, "Normalize") for step in steps):
            _warn(f"{key} has a Normalize, and data_preprocessor a mean: images are normalised twice; leave one out")
        _check_decoder(steps, key)
        _check_order(cfg, split, steps, key)
        if split == "train":
            _warn_of_padding(cfg, steps, given.get("size"), key)
        else:
            _warn_of_changed_images(cfg, part.pipeline, key)


def _check_decoder(steps: list[ConfigDict], key: str) -> None:
    """Warn of images that tifffile decodes: mmcv passes them as they are.

    Raises:
        UserError: the package is missing.
    """
    if not any(step.get("imdecode_backend") == "tifffile" and "LoadImage" in kind_of(step) for step in steps):
        return
    if find_spec("tifffile") is None:
        raise UserError(f"{key} has imdecode_backend='tifffile', which needs that package: pip install tifffile")
    _warn(
        f"{key} has imdecode_backend='tifffile', which gives RGB, not BGR, and numbers as they are in the file: "
        "bgr_to_rgb of the data_preprocessor must be False, and its mean and std for the range of these numbers"
    )


def _check_order(cfg: Config, split: str, steps: list[ConfigDict], key: str) -> None:
    """Warn of labels that are scaled before they are compared.

    Raises:
        UserError: images for training are moved before their labels are loaded.
    """
    loads = next((i for i, step in enumerate(steps) if is_kind(step, "LoadAnnotations")), None)
    if loads is None:
        return
    early = [step for step in steps[:loads] if is_kind(step, *MOVES_BOXES, *MOVES_IN_TRAINING)]
    late = [step for step in steps[loads:] if is_kind(step, *MOVES_BOXES)]
    if early and split == "train":
        raise UserError(
            f"{key} has {kind_of(early[0])} before LoadAnnotations, so boxes, masks or maps are not moved with the "
            "image; put LoadAnnotations before it"
        )
    of_maps = cfg.get("default_scope") == "mmseg" and split != "train"
    of_loaded_boxes = any(is_kind(metric, "VOCMetric", "OpenImagesMetric") for metric in metrics_of(cfg, split))
    if late and (of_loaded_boxes or of_maps):
        _warn(
            f"{key} has {kind_of(late[0])} after LoadAnnotations, which then scales the true "
            f"{'maps' if of_maps else 'boxes'}, but not the predicted ones that they are compared with; put "
            "LoadAnnotations after it"
        )


def _warn_of_padding(cfg: Config, steps: list[ConfigDict], size: Sequence[int] | None, key: str) -> None:
    """Warn if mmseg pads all crops for training, to data_preprocessor's `size`."""
    crop = _last_crop(steps)
    if cfg.get("default_scope") == "mmseg" and crop and size and any(map(int.__lt__, crop, size)):
        _warn(
            f"{key} crops images to {crop}, but data_preprocessor.size is {tuple(size)}: all are padded to that, and "
            "the loss is a mean over the padding too; make them equal"
        )


def _warn_of_changed_images(cfg: Config, pipeline: Sequence, key: str) -> None:
    """Warn of steps for validation or a test that crop or pad images, or change them by chance."""
    plain = [step for step in pipeline if isinstance(step, dict) and not is_kind(step, "TestTimeAug")]
    compared = any(is_kind(step, "LoadAnnotations") for step in steps_of(pipeline))  # not for classification
    is_segmentation = cfg.get("default_scope") == "mmseg"
    moves = ("CenterCrop", "Pad") if is_segmentation else ("CenterCrop",)
    for step in steps_of(plain):
        if compared and is_kind(step, *moves):
            _warn(
                f"{key} has {kind_of(step)}, but predictions are compared as if they were of the whole image; leave it "
                "out, and if the model needs padding, set "
                f"data_preprocessor.{'test_cfg.size_divisor' if is_segmentation else 'pad_size_divisor'}"
            )
    for step in filter(_is_by_chance, steps_of(plain)):
        _warn(
            f"{key} has {kind_of(step)}, which changes images by chance, so that the score changes from run to run, "
            "and mmdet does not flip boxes back; leave it out"
        )


def _warn(message: str) -> None:
    print_log(message, level=logging.WARNING)


def _is_by_chance(step: ConfigDict) -> bool:
    """Return whether a step changes images by chance."""
    if is_kind(step, "RandomFlip"):
        return step.get("prob") is not None and step.prob != 0
    return ("Random" in kind_of(step) and not step.get("test_mode")) or is_kind(step, *BY_CHANCE)


BY_CHANCE = (  # beside what is called Random; with subclasses of any name
    *("Albu", "AutoAugment", "CachedMixUp", "CachedMosaic", "CopyPaste", "CutOut", "Expand", "MixUp", "Mosaic"),
    *("PhotoMetricDistortion", "RandAugment", "RandomAffine", "RandomCrop", "RandomResize", "Rotate", "ShearX"),
    *("ShearY", "TranslateX", "TranslateY"),
)
MOVES_BOXES = (
    *("Resize", "RandomFlip", "RandomResize", "RandomChoiceResize", "FixScaleResize", "ResizeShortestEdge"),
    *("RandomCrop", "RandomRotate"),
)


MOVES_IN_TRAINING = (
    *("BioMedical3DRandomCrop", "CenterCrop", "Expand", "MinIoURandomCrop", "RandomAffine", "RandomCenterCropPad"),
    *("RandomRotFlip", "RandomShift", "ResizeToMultiple", "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)


def _last_crop(steps: list[ConfigDict]) -> tuple[int, ...] | None:
    """Return the size of a RandomCrop, unless a later step may change it."""
    for step in reversed(steps):
        if is_kind(step, "RandomCrop"):
            size = step.get("crop_size")
            return (size, size) if isinstance(size, int) else tuple(size or ()) or None
        if any(word in kind_of(step) for word in ("Resize", "Pad", "Crop", "Mosaic")):
            return None
    return None


def _check_same_labels(cfg: Config, splits: Sequence[str]) -> None:
    """Raise a UserError if a label means different classes in two data sets, and warn if it may.

    The data sets of training and of the validation that chooses the best checkpoint must agree.
    """
    first: dict[str, tuple[str, object, str]] = {}
    by_text = any(is_kind(part, *OTHER_CLASSES) for part in parts_within(cfg.model))
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        for dataset in datasets_of(loader.dataset) if loader else ():
            key = f"{split}_dataloader.dataset"
            reduces = bool(argument_of(dataset, "reduce_zero_label"))  # None for mmdet's data sets
            folder = _parent_of_maps(dataset)
            classes = class_names_of(dataset, key)
            if twice := next((one for i, one in enumerate(classes) if one in classes[:i]), None):
                raise UserError(f"{key} has the class {twice!r} twice; leave one out")
            labels = {"reduce_zero_label": reduces, **({"classes": classes} if classes else {})}
            for name, value in labels.items():
                place, before, its_folder = first.setdefault(name, (key, value, folder))
                if name == "reduce_zero_label" and value != before:
                    text = f"{name} is {before} in {place} and {value} in {key}"
                    if folder == its_folder:
                        raise UserError(f"{text}; make them equal")
                    # Maps from another source may already be reduced.
                    print_log(
                        f"{text}: in the maps of {its_folder}, label {int(before)} is the first class, and in those of "
                        f"{folder}, label {int(value)}; make them equal if that is not so",
                        level=logging.WARNING,
                    )
                # The data sets of trackers may have no class in common. Models that read texts need no order.
                if name == "classes" and not by_text and (moved := _first_moved_name(before, value)):
                    one, old, new = moved
                    raise UserError(
                        f"{place} and {key} have their classes in another order: {one!r} is class {old} and {new}; "
                        "make them equal, and with them the labels in maps, or the categories of annotation files"
                    )


def _check_learns(model: ConfigDict) -> None:
    """Raise a UserError if nothing is learnt: by a loss that is only logged, a softmax of one channel, or one class."""
    for part, head in segmentation_heads(model):
        for place, loss in parts_of(f"{part}.loss_decode", head.get("loss_decode", {"type": "CrossEntropyLoss"})):
            if "loss" not in str(loss.get("loss_name", "loss")):
                raise UserError(
                    f"{place}.loss_name is {loss.loss_name!r}, without 'loss' in it, so mmengine logs it, but does not "
                    f"train by it; write 'loss_{loss.loss_name}'"
                )
            if head.get("out_channels") == 1 and is_kind(loss, "CrossEntropyLoss") and not loss.get("use_sigmoid"):
                raise UserError(
                    f"{part} has one channel, whose softmax is always 1, so nothing is learnt: set {place}.use_sigmoid"
                )
            binary = is_kind(loss, "LovaszLoss") and loss.get("loss_type") == "binary"
            if head.get("out_channels") == 1 and is_kind(loss, *OF_SEVERAL_CHANNELS) and not binary:
                raise UserError(
                    f"{place} is a {kind_of(loss)}, which is not for the one channel of {part}: mmseg compares it with "
                    "label 0, or with nothing; leave it out, or set out_channels=2"
                )
            weights = loss.get("class_weight")
            number = None if is_kind(head, *OTHER_CLASSES) else head.get("out_channels") or head.get("num_classes")
            if isinstance(weights, list | tuple) and number not in (None, len(weights)):
                raise UserError(f"{place}.class_weight has {len(weights)} numbers, but {part} has {number} channels")
            numbers = weights if isinstance(weights, list | tuple) else []
            if odd := [one for one in numbers if isinstance(one, int | float) and not one >= 0]:
                raise UserError(
                    f"{place}.class_weight has {odd[0]!r}, by which a class is unlearnt; weights are 0 or more"
                )
        if head.get("num_classes") == 1 and not is_kind(head, *OTHER_CLASSES) and "Depth" not in kind_of(head):
            raise UserError(
                f"{part} has one class, so each label is 0 or ignored, and any prediction counts as right: make the "
                "background a class, and set num_classes=2 (and, for one channel, out_channels=1 with a "
                "CrossEntropyLoss that has use_sigmoid=True)"
            )


# Losses of mmseg that need a channel for each class; LovaszLoss with loss_type="binary" does not.
OF_SEVERAL_CHANNELS = (
    "DiceLoss",
    "FocalLoss",
    "HuasdorffDisstanceLoss",
    "LovaszLoss",
    "OhemCrossEntropy",
    "TverskyLoss",
)


def _check_loads_masks(cfg: Config) -> None:
    """Raise a UserError if a detector learns masks, but its pipeline loads none."""
    roi_head = cfg.model.get("roi_head")
    if not (isinstance(roi_head, dict) and roi_head.get("mask_head")):
        return
    for dataset in datasets_of(cfg.train_dataloader.dataset):
        steps = [one for one in steps_of(dataset.get("pipeline") or ()) if is_kind(one, "LoadAnnotations")]
        if steps and not any(argument_of(step, "with_mask") for step in steps):
            raise UserError(
                "model.roi_head has a mask_head, but LoadAnnotations in train_dataloader.dataset.pipeline loads no "
                "masks; set its with_mask=True"
            )


def _check_save_best(cfg: Config) -> None:
    """Check the name of the metric that chooses the best checkpoint; mmengine looks for it after the first validation.

    Raises:
        UserError: no metric of the evaluator has names that begin so.
    """
    wanted = ((cfg.get("default_hooks") or {}).get("checkpoint") or {}).get("save_best")
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted and not cfg.get("val_dataloader"):
        _warn("default_hooks.checkpoint.save_best does nothing, for there is no val_dataloader")
    evaluator, metrics = cfg.get("val_evaluator"), metrics_of(cfg, "val")
    kinds = [type_of(metric) for metric in metrics]
    known = all(getattr(kind, "__module__", "").startswith(("mmdet.", "mmseg.")) for kind in kinds)
    # These have longer prefixes: mmdet's MultiDatasetsEvaluator, and loops such as its TeacherStudentValLoop.
    apart = isinstance(evaluator, dict) and is_kind(evaluator, "MultiDatasetsEvaluator")
    apart |= kind_of(cfg.get("val_cfg") or {}) not in ("", "ValLoop")
    if not isinstance(wanted, list | tuple) or not metrics or not known or apart:
        return
    prefixes = [metric.get("prefix") or kind.default_prefix or "" for metric, kind in zip(metrics, kinds, strict=True)]
    for name in map(str, wanted):
        last = name.rpartition("/")[2]
        fits = any(name.startswith(f"{prefix}/") if prefix else "/" not in name for prefix in prefixes)
        if name != "auto" and not fits:
            raise UserError(
                f"default_hooks.checkpoint.save_best is {name!r}, but the values of {kind_of(metrics[0])} are called "
                f"{'/'.join(filter(None, (prefixes[0], last)))!r} and the like; write that, or 'auto'"
            )


def _warn_of_shared_images(cfg: Config) -> None:
    """Warn of a data set for validation that is one for training, too, by its real paths."""

    def places(split: str) -> dict[str, str]:
        loader, found = cfg.get(f"{split}_dataloader"), {}
        for dataset in datasets_of(loader.dataset) if loader else ():
            root, prefix = dataset.get("data_root") or "", dataset.get("data_prefix") or {}
            names = (dataset.get("ann_file"), *(prefix.values() if isinstance(prefix, dict) else ()))
            names = [one for one in names if isinstance(one, str) and one]
            paths = sorted(os.path.realpath(os.path.join(root, name)) for name in names)
            same = {*OF_ANY_SPLIT, *(["indices"] if split == "val" else [])}  # a part of what is trained on, too
            rest = {key: value for key, value in dataset.items() if key not in same}
            if paths and isinstance(dataset.get("ann_file"), str | None):
                found[repr((paths, sorted(rest.items())))] = os.path.join(root, names[0])
        return found

    trained, validated = places("train"), places("val")
    if shared := next((validated[one] for one in validated if one in trained), None):
        _warn(
            f"val_dataloader.dataset is of the images that are trained on, too ({shared}): its scores say nothing of "
            "other images"
        )


# Arguments of data sets that do not say which images they hold; the paths are compared by themselves.
OF_ANY_SPLIT = {"ann_file", "data_prefix", "data_root", "filter_cfg", "lazy_init", "max_refetch", "metainfo"}
OF_ANY_SPLIT |= {"pipeline", "serialize_data", "test_mode"}


def _parent_of_maps(dataset: ConfigDict) -> str:
    """Return the parent of the folder of a data set's label maps."""
    maps = (dataset.get("data_prefix") or {}).get("seg_map_path") or ""
    return os.path.dirname(os.path.realpath(os.path.join(dataset.get("data_root") or "", str(maps))))


def _first_moved_name(before: list[str], now: list[str]) -> tuple[str, int, int] | None:
    """Return the first name that the two lists hold at different places, with both places."""
    places = {one: i for i, one in enumerate(now)}
    moved = ((one, i, places[one]) for i, one in enumerate(before) if one in places)
    return next((one for one in moved if one[1] != one[2]), None)


def _check_ignored(cfg: Config, splits: Sequence[str]) -> None:
    """Raise a UserError if parts of mmseg have different values of ignore_index.

    Each part has its own ignore_index, 255 by default. If two differ, ignored pixels are learnt or count as errors.
    """
    model = cfg.model.get("module", cfg.model)  # with --tta
    head = predicting_head(model)
    ignored = head.get("ignore_index", 255)
    if not head or not isinstance(ignored, int) or "Depth" in kind_of(head):  # depth is no label
        return
    found = _ignore_settings(cfg, model, splits)
    others = [f"{key} is {value}" for key, value in found if isinstance(value, int) and value != ignored]
    if others:
        raise UserError(
            f"the ignore_index of model.decode_head is {ignored}, but {', '.join(dict.fromkeys(others))} "
            "(255 where a config does not say); make them equal"
        )
    if 0 <= ignored < (number := head.get("num_classes", 0)):
        print_log(
            f"model.decode_head has {number} classes, and its ignore_index is {ignored}: class {ignored} is neither "
            "learnt nor counted; set another ignore_index if it is to be",
            level=logging.WARNING,
        )


def _ignore_settings(cfg: Config, model: ConfigDict, splits: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Yield the keys and values of all labels that mmseg ignores or pads with, except the predicting head's."""
    for split in splits:
        for i, metric in enumerate(metrics_of(cfg, split)):
            if is_kind(metric, "IoUMetric"):
                place = f"[{i}]" if isinstance(cfg.get(f"{split}_evaluator"), list) else ""
                yield f"{split}_evaluator{place}.ignore_index", metric.get("ignore_index", 255)
        loader = cfg.get(f"{split}_dataloader")
        for dataset in with_pipelines(loader.dataset) if loader else ():
            if (ignored := dataset.get("ignore_index")) is not None:  # mmseg takes it, but leaves it to the others
                yield f"{split}_dataloader.dataset.ignore_index", ignored
            for step in steps_of(dataset.pipeline):
                key = f"{split}_dataloader.dataset.pipeline.{kind_of(step)}"
                if kind_of(step) == "CheckLabels":
                    yield f"{key}.ignore_index", step.get("ignore_index", 255)
                elif is_kind(step, "Pad"):  # of mmcv; a plain number in pad_val is for the image only
                    value = step.get("pad_val")
                    yield f"{key}.pad_val.seg", (value.get("seg", 255) if isinstance(value, dict) else 255)
                elif is_kind(step, "RandomRotate", "RandomMosaic"):
                    yield f"{key}.seg_pad_val", step.get("seg_pad_val", 255)
                elif is_kind(step, "GenerateEdge") or (
                    is_kind(step, "RandomCrop") and step.get("cat_max_ratio", 1) < 1  # only then it counts labels
                ):
                    yield f"{key}.ignore_index", step.get("ignore_index", 255)
    if "train" in splits:
        preprocessor = model.get("data_preprocessor") or {}
        if is_kind(preprocessor, "SegDataPreProcessor"):
            yield "model.data_preprocessor.seg_pad_val", preprocessor.get("seg_pad_val", 255)
        for part, other in segmentation_heads(model):
            if not is_kind(other, *OTHER_CLASSES):
                yield f"{part}.ignore_index", other.get("ignore_index", 255)
            for place, loss in parts_of(f"{part}.loss_decode", other.get("loss_decode")):
                for name in (name for kind, name in IGNORING_LOSSES.items() if is_kind(loss, kind)):
                    yield f"{place}.{name}", loss.get(name, 255)


# mmseg's losses that do not get ignore_index from their head, and the name of their own argument for it.
IGNORING_LOSSES = {
    "DiceLoss": "ignore_index",
    "HuasdorffDisstanceLoss": "ignore_index",
    "OhemCrossEntropy": "ignore_label",
    "TverskyLoss": "ignore_index",
}


def _check_no_pickles(value: object, key: str) -> None:
    """Raise a UserError if a data set's config names a pickle, which mmengine, mmseg or NumPy would load."""
    if isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_no_pickles(item, f"{key}.{name}")
    elif isinstance(value, str) and value.lower().endswith(tuple(f".{kind}" for kind in PICKLES)):
        instead = {
            "ann_file": "write the annotations as JSON (mmdet's own CocoDataset, mmengine's BaseDataset)",
            "proposal_file": "leave it out, and take a detector with a proposal network of its own (rpn_head)",
        }.get(key.rpartition(".")[2], "write it as JSON")
        raise UserError(f"{value}: is a pickle, which can run code, so it is not read ({key}); {instead}")
    elif key.endswith("decode_backend") and value == "pickle":
        raise UserError(f"{key} is 'pickle', which can run code; write the data for 'numpy' or 'nifti'")


def _check_loads_maps(metric: ConfigDict, datasets: list[ConfigDict], split: str) -> None:
    """Raise a UserError if IoUMetric is to compare predictions with label maps, but a pipeline loads none."""
    if not works_as(metric, "IoUMetric") or metric.get("format_only"):
        return
    for dataset in datasets:
        steps = list(steps_of(dataset.get("pipeline") or ()))
        loads = not steps or any(map(_may_load_maps, steps))
        has = "data_prefix" not in dataset or dataset.data_prefix.get("seg_map_path") is not None
        if not (loads and has):
            raise UserError(
                f"{split}_evaluator's IoUMetric compares predictions with label maps, but {split}_dataloader.dataset "
                f"{'has no data_prefix.seg_map_path' if loads else 'has no LoadAnnotations in its pipeline'}; if there "
                "are no maps, set format_only=True and output_dir in the metric, which then only writes the predictions"
            )


def check_is_no_data(cfg: Config, folder: str, key: str) -> None:
    """Raise a UserError if results are to be written where a split has its images or label maps, or below."""
    target = Path(folder).expanduser().resolve()
    for split in ("train", "val", "test"):
        loader = cfg.get(f"{split}_dataloader")
        for dataset in datasets_of(loader.dataset) if loader else ():
            prefixes = dataset.get("data_prefix") or {}
            for prefix in prefixes.values() if isinstance(prefixes, dict) else ():
                own = Path(dataset.get("data_root") or "", prefix).resolve() if isinstance(prefix, str) else None
                is_root = own == Path(dataset.get("data_root") or "").resolve()  # below which results may be
                if own and (target == own or (own in target.parents and not is_root)):
                    raise UserError(
                        f"{key}: {own} holds data of {split}_dataloader, which would be written over; name another "
                        "folder"
                    )


def _check_removes_nothing(metric: ConfigDict, split: str) -> None:
    """Raise a UserError if a metric of Cityscapes or MOTChallenge would remove files that it has not written."""
    folder, prefix = metric.get("output_dir"), metric.get("outfile_prefix")
    removes = is_kind(metric, "CityscapesMetric") and folder and not metric.get("keep_results")
    if removes and is_dir(folder) and any(Path(folder).iterdir()):
        raise UserError(
            f"{split}_evaluator.output_dir: CityscapesMetric would remove the folder {folder}, which is not empty; "
            "name a new one, or set keep_results=True"
        )
    if not isinstance(prefix, str):
        return
    place, others = Path(prefix).expanduser(), []  # mmdet's metrics remove what an earlier test has written
    if is_kind(metric, "MOTChallengeMetric") and is_dir(place):
        others = [one for one in place.iterdir() if one.name != "default-tracker"]
    elif is_kind(metric, "CityScapesMetric") and is_dir(place / "results"):
        others = [one for one in (place / "results").rglob("*") if one.is_file() and one.suffix not in (".png", ".txt")]
    if others:
        raise UserError(
            f"{split}_evaluator.outfile_prefix: {kind_of(metric)} would remove {others[0]}; name a folder of its own"
        )


def _check_packs_what_is_written(metric: ConfigDict, datasets: list[ConfigDict], split: str) -> None:
    """Raise a UserError if IoUMetric is to write maps, but would not know that 1 is to be added to their labels."""
    if not (is_kind(metric, "IoUMetric") and metric.get("output_dir")):
        return
    for dataset in datasets:
        packs = [one for one in steps_of(dataset.get("pipeline") or ()) if is_kind(one, "PackSegInputs")]
        lack = any("reduce_zero_label" not in one.get("meta_keys", ["reduce_zero_label"]) for one in packs)
        if lack and argument_of(dataset, "reduce_zero_label"):
            raise UserError(
                f"{split}_dataloader.dataset has reduce_zero_label=True, but the meta_keys of its PackSegInputs lack "
                "'reduce_zero_label', so the labels of the written maps would be too low by 1; add it"
            )


def _may_load_maps(step: ConfigDict) -> bool:
    """Return whether a step loads label maps. A step that is not one of the toolchains' own may do so."""
    known = getattr(type_of(step), "__module__", "").partition(".")[0] in ("classification", "mmcv", "mmseg")
    return not known or ("Load" in kind_of(step) and "Annotation" in kind_of(step))


def _check_compared(metric: ConfigDict, datasets: list[ConfigDict], split: str) -> None:
    """Raise a UserError if CocoMetric's file has other categories than the data set; warn if it is another file.

    CocoMetric numbers labels by the categories of its own file. In another order, perfect predictions count as wrong.
    """
    plain = [dataset for dataset in datasets if works_as(dataset, "CocoDataset") and dataset.get("ann_file")]
    if works_as(metric, "CocoMetric") and metric.get("sort_categories") and plain:
        raise UserError(
            f"{split}_evaluator.sort_categories=True numbers labels by the categories' ids, as only mmdet's "
            f"Objects365V1Dataset does, and {split}_dataloader.dataset by the order of classes; leave it out"
        )
    if not works_as(metric, "CocoMetric") or len(plain) != 1 or _is_remote(plain[0]):
        return
    loaded = os.path.join(plain[0].get("data_root") or "", plain[0].ann_file)
    if os.path.realpath(loaded) == os.path.realpath(metric.ann_file):
        return  # _check_dataset checks this file
    if classes := class_names_of(plain[0], f"{split}_dataloader.dataset"):
        use = Use(f"{split}_evaluator", compared=True, masks=_compares_masks(metric))
        check_annotations(metric.ann_file, classes, use)
    print_log(
        f"{split}_evaluator.ann_file is {metric.ann_file}, but {split}_dataloader.dataset loads {loaded}: "
        "predictions are compared with another file than their images are from",
        level=logging.WARNING,
    )


def _check_all_are_tested(metric: ConfigDict, datasets: list[ConfigDict], split: str) -> None:
    """Raise a UserError if only some images of CocoMetric's file are tested.

    CocoMetric counts all objects in its file. The objects of an untested image count as missed.
    """
    for dataset in datasets if is_kind(metric, "CocoMetric") else ():
        if dataset.get("indices") is not None:
            raise UserError(
                f"{split}_dataloader.dataset.indices has only some images tested, but {split}_evaluator.ann_file "
                "counts the objects of all: leave indices out; or set ann_file to None, and put 'instances' into the "
                "meta_keys of the pipeline's PackDetInputs, so that only what is loaded is compared (mAP by size then "
                "takes the area of the box for that of the object)"
            )


def _check_image_ids(metric: ConfigDict, datasets: list[ConfigDict], split: str) -> None:
    """Raise a UserError if two data sets share an image id, or if CocoMetric's file lacks one.

    CocoMetric knows an image only by its id, and confuses two images of the same id.
    """
    plain = [one for one in datasets if works_as(one, "CocoDataset") and one.get("ann_file")]
    if len(plain) < 2 or any(map(_is_remote, [metric, *plain])):
        return
    seen: dict[object, str] = {}
    whole = True  # the ids of large files are not known
    for dataset in plain:
        path = os.path.join(dataset.get("data_root") or "", dataset.ann_file)
        own = image_ids(path)
        whole = whole and bool(own)
        if both := sorted(own & seen.keys(), key=str):
            raise UserError(
                f"{split}_dataloader.dataset joins {seen[both[0]]} and {path}, which both have an image of the id "
                f"{both[0]!r}: {kind_of(metric)} would take the one for the other; give each image an id of its own, "
                "or take mmdet's MultiDatasetsEvaluator with a metric for each data set"
            )
        seen.update(dict.fromkeys(own, path))
    known = image_ids(metric.ann_file) if metric.get("ann_file") else set()
    if known and (foreign := sorted(seen.keys() - known, key=str)):
        raise UserError(
            f"{metric.ann_file}: has no image of the id {foreign[0]!r}, which {seen[foreign[0]]} has, so their "
            f"predictions cannot be compared; name a file of all images in {split}_evaluator.ann_file, or take "
            "mmdet's MultiDatasetsEvaluator with a metric for each data set"
        )
    if whole and len(plain) == len(datasets) and (untested := sorted(known - seen.keys(), key=str)):
        _warn(
            f"{metric.ann_file}: has {len(untested)} images, for example of the id {untested[0]!r}, in none of the "
            f"files of {split}_dataloader.dataset: their objects count as missed"
        )


def _is_remote(config: ConfigDict) -> bool:
    """Return whether a data set or a metric reads its files from elsewhere than this disk."""
    backend = (config.get("backend_args") or {}).get("backend", "local")
    return backend != "local" or any("://" in str(config.get(key)) for key in ("data_root", "ann_file"))


def _check_dataset(dataset: ConfigDict, key: str, cfg: Config) -> None:
    if _is_remote(dataset):
        return
    root = dataset.get("data_root") or ""
    for name, folder in (dataset.get("data_prefix") or {}).items():
        if isinstance(folder, str):
            must_exist(os.path.join(root, folder), "folder", f"{key}.data_prefix.{name}", is_dir)
    images, maps = ((dataset.get("data_prefix") or {}).get(name) for name in ("img_path", "seg_map_path"))
    if images and images == maps and argument_of(dataset, "img_suffix") == argument_of(dataset, "seg_map_suffix"):
        raise UserError(f"{key}.data_prefix has the label maps of {images} as images, too; set img_path to the images")
    annotations = os.path.join(root, dataset.get("ann_file") or "")
    if dataset.get("ann_file"):
        must_exist(annotations, "annotation file", f"{key}.ann_file")
    check_maps(dataset, root, key, cfg)
    check_foreground(dataset, root, key, cfg)
    if tree := dataset.get("hierarchy_file"):
        _check_array(os.path.join(root, tree), f"{key}.hierarchy_file")
    model = cfg.model.get("module", cfg.model)  # with --tta
    numbers = _panoptic_class_counts(model)
    if classes := class_names_of(dataset, key):
        _check_renumbered(dataset, classes, key)
        _check_palette(dataset, classes, key)
        if works_as(dataset, "CocoDataset") and dataset.get("ann_file"):
            check_annotations(annotations, classes, _use_of(annotations, dataset, key, cfg))
        if works_as(dataset, "XMLDataset") and dataset.get("ann_file"):
            check_objects(dataset, root, str(argument_of(dataset, "ann_subdir")), classes, key)
        if numbers:
            _check_things_and_stuff(numbers, dataset, classes, key)
        if not is_kind(dataset, "CocoPanopticDataset"):  # boxes are of things only, the first of its classes
            _check_num_classes(model, len(classes), key)
        for step in steps_of(dataset.get("pipeline") or ()):
            if kind_of(step) == "CheckLabels" and (number := step.get("num_classes")) != len(classes):
                raise UserError(
                    f"{key}.pipeline: CheckLabels has {number} classes, but the data set {len(classes)}; "
                    "make them equal"
                )


def _check_renumbered(dataset: ConfigDict, classes: list[str], key: str) -> None:
    """Say how mmseg reads the label maps of some of a known data set's classes: by that data set's numbers.

    Raises:
        UserError: a class is none of that data set's.
    """
    known = list(getattr(type_of(dataset), "METAINFO", {}).get("classes") or ())
    if classes == known or not known or not hasattr(type_of(dataset), "get_label_map"):
        return
    advice = "if the maps have numbers of their own, take BaseSegDataset, with img_suffix and seg_map_suffix"
    if foreign := [one for one in classes if one not in known]:
        raise UserError(f"{key}: {kind_of(dataset)} has no class {foreign[0]!r}; {advice}")
    first = int(bool(argument_of(dataset, "reduce_zero_label")))
    numbers = ", ".join(f"{known.index(one) + first} {one}" for one in classes[:NAMED])
    print_log(f"{key}: labels in the maps are taken for {kind_of(dataset)}'s ({numbers}...); {advice}")


NAMED = 5  # classes in a message


def _check_palette(dataset: ConfigDict, classes: list[str], key: str) -> None:
    """Raise a UserError if mmseg has another number of colours than of classes, as after a change of the classes."""
    kind, palette = type_of(dataset), (dataset.get("metainfo") or {}).get("palette")
    takes_some = bool(getattr(kind, "METAINFO", {}).get("classes"))  # of a known data set's colours
    if hasattr(kind, "get_label_map") and not takes_some and palette and len(palette) != len(classes):
        raise UserError(
            f"{key}.metainfo.palette has {len(palette)} colours, but there are {len(classes)} classes; give each class "
            "one, or set palette=[] to have them chosen"
        )


def _use_of(path: str, dataset: ConfigDict, key: str, cfg: Config) -> Use:
    """Return what a config does with the annotation file of a CocoDataset."""
    metrics = metrics_of(cfg, key.partition("_")[0])
    read = [one for one in metrics if works_as(one, "CocoMetric") and one.get("ann_file") and not _is_remote(one)]
    read = [one for one in read if os.path.realpath(one.ann_file) == os.path.realpath(path)]
    steps = [step for step in steps_of(dataset.get("pipeline") or ()) if is_kind(step, "LoadAnnotations")]
    masks = [step for step in steps if argument_of(step, "with_mask")]
    images = None if dataset.get("indices") else (dataset.get("data_prefix") or {}).get("img")
    return Use(
        key,
        trains=key.startswith("train"),
        compared=bool(read),
        scored=any(not one.get("format_only") for one in read),
        masks=bool(masks) or any(map(_compares_masks, read)),
        polygons=any(not step.get("poly2mask", True) for step in masks),
        filters={} if dataset.get("test_mode") else dataset.get("filter_cfg") or {},
        folder=None if images is None else os.path.join(dataset.get("data_root") or "", images),
    )


def _compares_masks(metric: ConfigDict) -> bool:
    kinds = metric.get("metric", "bbox")
    return "segm" in ([kinds] if isinstance(kinds, str) else kinds)


def _check_array(path: str, key: str) -> None:
    """Raise a UserError if OpenImages' tree of labels is a pickle: unless it is JSON, mmdet has NumPy unpickle it."""
    if path.endswith("json") or not is_file(path):
        return
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: is no array of numbers but a pickle, which can run code, so it is not read ({key}); write it as "
            "JSON, or as numbers by numpy.save"
        ) from error


def _check_num_classes(model: ConfigDict, classes: int, key: str) -> None:
    roi_head = model.get("roi_head") or {}
    places = {"roi_head.": roi_head if isinstance(roi_head, dict) else {}, "": model}
    # Not rpn_head, which knows no classes, nor panoptic heads, which count things and stuff separately.
    parts = {
        f"{place}{name}": heads
        for place, holder in places.items()
        for name, heads in holder.items()
        if isinstance(heads, dict | list) and name.endswith(("bbox_head", "mask_head", "query_head"))
    }
    heads = [(f"model.{part}", head) for part, found in parts.items() for _, head in parts_of("", found)]
    heads += segmentation_heads(model)
    for part in ("decode_head", "auxiliary_head"):
        for place, head in parts_of(f"model.{part}", model.get(part)):  # K-Net's heads
            heads += parts_of(f"{place}.kernel_update_head", head.get("kernel_update_head"))
    for part, head in heads:
        if not is_kind(head, *OTHER_CLASSES) and head.get("num_classes", classes) != classes:
            raise UserError(
                f"{part}.num_classes is {head['num_classes']!r}, but {key} has {classes} classes; make them equal"
            )


THINGS_AND_STUFF = {"num_things_classes": 80, "num_stuff_classes": 53}  # mmdet's defaults in all its heads


def _panoptic_class_counts(model: ConfigDict) -> dict[str, int]:
    """Return the numbers of things and stuff of a panoptic model's head; {} for other models.

    Raises:
        UserError: the part that joins the head's masks, or a head of boxes, has other numbers. With other numbers, the
            joining part takes the class of one query for that of another, and things for stuff.
    """
    head = next((name for name in ("panoptic_head", "semantic_head") if model.get(name)), None)
    fusion = model.get("panoptic_fusion_head")
    if not (head and fusion):
        return {}
    own = {name: model[head].get(name, default) for name, default in THINGS_AND_STUFF.items()}
    found = [(f"panoptic_fusion_head.{name}", fusion.get(name, THINGS_AND_STUFF[name]), name) for name in own]
    for part in ("bbox_head", "mask_head"):  # in PanopticFPN; its boxes are of things
        for place, one in parts_of(f"roi_head.{part}", (model.get("roi_head") or {}).get(part)):
            found.append((f"{place}.num_classes", one.get("num_classes", 80), "num_things_classes"))
    for place, number, name in found:
        if number != own[name]:
            raise UserError(
                f"model.{place} is {number}, but model.{head}.{name} is {own[name]} "
                f"({THINGS_AND_STUFF[name]} where a config does not say); make them equal"
            )
    return own


def _check_things_and_stuff(numbers: dict[str, int], dataset: ConfigDict, classes: list[str], key: str) -> None:
    """Raise a UserError if a panoptic model has other numbers than the data set. A CocoDataset has only things."""
    metainfo = {**getattr(type_of(dataset), "METAINFO", {}), **(dataset.get("metainfo") or {})}
    known = {"num_things_classes": metainfo.get("thing_classes"), "num_stuff_classes": metainfo.get("stuff_classes")}
    if all(isinstance(names, list | tuple) for names in known.values()):
        for name, number in numbers.items():
            if number != len(known[name]):
                raise UserError(
                    f"the model's {name} is {number}, but {key} has {len(known[name])} such classes; set {name} of "
                    "panoptic_head (or semantic_head) and panoptic_fusion_head, or metainfo's thing_classes and "
                    "stuff_classes"
                )
    elif works_as(dataset, "CocoDataset") and numbers["num_things_classes"] != len(classes):
        raise UserError(
            f"the model's num_things_classes is {numbers['num_things_classes']}, but {key} has {len(classes)} "
            "classes; set num_things_classes of panoptic_head (or semantic_head) and panoptic_fusion_head"
        )


# ----- checkpoints


def _compare_labels(meta: object, reduces: object, path: str) -> None:
    """Warn if a checkpoint was trained with another reduce_zero_label than the data set has.

    The numbers in a label map then mean other classes, unless the author of the maps numbered them differently.
    """
    known = meta.get("dataset_meta") if isinstance(meta, dict) else None
    reduced = known.get("reduce_zero_label") if isinstance(known, dict) else None
    if isinstance(reduced, bool) and isinstance(reduces, bool) and reduced != reduces:
        print_log(
            f"{path}: was trained with reduce_zero_label={reduced}, and the data set has {reduces}: in a map, label "
            f"{int(reduced)} was the first class, and {int(reduces)} is here; make them equal if the maps are alike",
            logger="current",
            level=logging.WARNING,
        )


def _class_names_in(meta: object) -> list[str] | None:
    meta = meta if isinstance(meta, dict) else {}
    known = meta.get("dataset_meta")
    known = known if isinstance(known, dict) else meta  # of mmdet 2 and mmseg 0
    names = next((known[key] for key in ("classes", "CLASSES") if key in known), None)
    return list(map(str, names)) if isinstance(names, list | tuple) else None  # a stranger's may be arrays


def _first_difference(names: Sequence[str], others: Sequence[str]) -> int:
    pairs = enumerate(zip(names, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(names), len(others)))


def warn_of_a_head_for_other_classes(meta: object, classes: Sequence[str], path: str) -> None:
    """Warn if training starts from a head that fits, but whose classes are others, or in another order."""
    names, classes = _class_names_in(meta) or [], list(map(str, classes))
    if len(names) == len(classes) and names != classes:
        at = _first_difference(names, classes)
        print_log(
            f"{path}: its class {at} is {names[at]!r}, the data set's {classes[at]!r}: a head that fits "
            "begins with weights for others",
            logger="current",
            level=logging.WARNING,
        )


def _compare_classes(meta: object, classes: Sequence[str], path: str) -> None:
    names, classes = _class_names_in(meta), list(map(str, classes))
    if names is None and classes:
        print_log(f"{path}: holds no names of classes; they are taken in the order of the data set's", logger="current")
    if names is None or not classes or names == classes:
        return
    at = _first_difference(names, classes)
    advice = "set metainfo.classes to its own"
    if sorted(names) == sorted(classes):
        advice += ", and number the data alike (the labels in maps, or the categories' order in the annotation file)"
    here, there = (repr(found[at]) if at < len(found) else "missing" for found in (classes, names))
    raise UserError(
        f"{path}: its classes are not the data set's: class {at} is {there} in it and {here} in the data set "
        f"({len(names)} and {len(classes)} classes); {advice}, or train for these"
        f"{normalisation_hint(names, classes)}"
    )


def check_written_names(dataset: object, suffix: bool, folders: Sequence[str] = (), by_opencv: bool = False) -> None:
    """Raise a UserError if two results would get the same file name, or a result that of an image or a label map.

    Args:
        dataset: of a toolchain.
        suffix: whether the names of results keep the suffix of the image's name.
        folders: in which label maps or drawings are written.
        by_opencv: whether OpenCV writes files of the images' names. It ends the process if a name is no UTF-8.
    """
    seen: dict[str, str] = {}
    written = {os.path.realpath(folder) for folder in folders}
    for i in range(len(dataset)) if hasattr(dataset, "get_data_info") else ():
        info = dataset.get_data_info(i)
        path = info.get("img_path")
        if not isinstance(path, str):
            return
        for own in (path, info.get("seg_map_path")) if written else ():
            if isinstance(own, str) and os.path.realpath(os.path.dirname(own)) in written:
                raise UserError(
                    f"{os.path.dirname(own)}: holds the data, and results would be written over it; name another "
                    "folder (--out, --show-dir, output_dir)"
                )
        name = os.path.basename(path)
        if by_opencv:
            check_utf8(name)
        other = seen.setdefault(name if suffix else os.path.splitext(name)[0], path)
        if other != path:
            raise UserError(
                f"{path}: what is written for it would take the place of that for {other}, as it is called by the "
                "image's name alone; test one folder at a time, each with an --out or --show-dir of its own, or rename"
            )


def check_file(path: str | None) -> None:
    """Raise a UserError if the named checkpoint file does not exist."""
    if path and not is_file(Path(path).expanduser()):
        raise UserError(f"{path}: no such checkpoint file; if it is an address, download it first")


def data_classes(cfg: Config, split: str) -> list[str]:
    """Return the class names of a split's first data set; [] if they are not known."""
    loader = cfg.get(f"{split}_dataloader")
    dataset = next(datasets_of(loader.dataset), None) if loader else None
    return class_names_of(dataset, f"{split}_dataloader.dataset") if dataset else []


def reduces_zero_label(cfg: Config, split: str) -> bool | None:
    """Return `reduce_zero_label` of a split's first data set; None if it has no such argument."""
    loader = cfg.get(f"{split}_dataloader")
    dataset = next(datasets_of(loader.dataset), None) if loader else None
    return argument_of(dataset, "reduce_zero_label") if dataset else None


def check_checkpoint(
    model: nn.Module,
    path: str,
    only_backbone: bool = False,
    classes: Sequence[str] = (),
    reduces: bool | None = None,
) -> object:
    """Check that a checkpoint fits the model, and return its `meta`. mmengine would load the part that fits and go on.

    Args:
        model: the model that the checkpoint is loaded into.
        path: the checkpoint file.
        only_backbone: compare only the backbone's weights, as in fine-tuning for other classes.
        classes: class names. If the checkpoint holds names, these must be the same in the same order.
        reduces: the data set's `reduce_zero_label`. If the checkpoint has another, a warning says so; None fits any.

    Raises:
        UserError: the checkpoint does not fit.
    """
    content = load_from_local(path)
    state, own = weights_of(content, path), model.state_dict()
    for key, value in state.items():
        if key in own and own[key].is_floating_point() and not value.is_floating_point():
            raise UserError(
                f"{path}: its weights hold {key!r} as {value.dtype}, which is {own[key].dtype} in the model"
            )
    if only_backbone:
        state, own = ({k: v for k, v in names.items() if k.startswith(BACKBONE)} for names in (state, own))
        if not state:
            raise UserError(
                f"{path}: has no weights of a backbone; a classification checkpoint is loaded by "
                "model.backbone.pretrained instead"
            )
    if found := differences(own, state):
        backbone = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
        hint = size_hint(backbone) if backbone else "; it is no checkpoint of such a model"
        raise UserError(f"{path}: its weights are of another model: {found}{hint}")
    _compare_classes(content.get("meta"), classes, path)
    _compare_labels(content.get("meta"), reduces, path)
    return content.get("meta")
