"""Put the checks of `transforms.py` into the pipelines of a config."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product, takewhile

from mmengine.config import Config, ConfigDict

from classification.openmmlab.config_parts import (
    class_names_of,
    datasets_of,
    is_kind,
    kind_of,
    parts_of,
    predicting_head,
    segmentation_heads,
    steps_of,
    type_of,
    with_pipelines,
    works_as,
)


def insert_label_checks(cfg: Config) -> None:
    """Put CheckMap before each LoadAnnotations of mmseg, and CheckLabels after it: it wraps labels of over 8 bits."""
    if cfg.get("default_scope") != "mmseg":
        return
    head = predicting_head(cfg.model)
    for key, dataset in _all_datasets(cfg):
        # If the data set does not know its classes, take the head's number.
        number = len(class_names_of(dataset, key)) or head.get("num_classes", 0)
        if number:
            ignored = head.get("ignore_index", 255)  # mmseg's default
            check = ConfigDict(type="CheckLabels", num_classes=number, ignore_index=ignored, turned=_turns(dataset))
            _insert(dataset.pipeline, _loads_maps, check, after=True)
            _insert(dataset.pipeline, _loads_otherwise, ConfigDict(check, of_file=False), after=True)
        for images_only in (True, False):
            check = ConfigDict(type="CheckMap", images_only=images_only)
            _insert(dataset.pipeline, partial(_loads_files, images_only), check, after=False)


def pass_class_weights(cfg: Config) -> None:
    """Set `class_weight` of each CheckLabels in the training pipeline if a loss has no weight for ignored pixels.

    mmseg's CrossEntropyLoss by softmax looks up the weight of each pixel's label. Other losses do not.
    """

    def lacks(head: ConfigDict, loss: ConfigDict) -> bool:
        weights = loss.get("class_weight")
        if not weights or loss.get("use_sigmoid") or not is_kind(loss, "CrossEntropyLoss"):
            return False
        return isinstance(weights, str) or not 0 <= head.get("ignore_index", 255) < len(weights)

    losses = [(h, loss) for _, h in segmentation_heads(cfg.model) for _, loss in parts_of("", h.get("loss_decode"))]
    lacking = any(lacks(head, loss) for head, loss in losses)
    for dataset in with_pipelines(cfg.train_dataloader.dataset) if lacking else ():
        for step in steps_of(dataset.pipeline):
            if kind_of(step) == "CheckLabels":
                step.class_weight = True


def insert_image_checks(cfg: Config) -> None:
    """Put CheckImage before each step that loads an image file, and CheckValues after one that leaves values alone."""
    for _, dataset in _all_datasets(cfg):
        _insert(dataset.pipeline, _leaves_values, ConfigDict(type="CheckValues"), after=True)
        for backend, unchanged, ignores_empty in product(BACKENDS, (True, False), (True, False)):
            check = ConfigDict(type="CheckImage", backend=backend, unchanged=unchanged, ignore_empty=ignores_empty)
            _insert(dataset.pipeline, partial(_loads_image, backend, unchanged, ignores_empty), check, after=False)


def insert_size_checks(cfg: Config) -> None:
    """Put CheckSize after each LoadImageFromFile of mmdet: the annotation file may have other image sizes."""
    if cfg.get("default_scope") != "mmdet":
        return
    for _, dataset in _all_datasets(cfg):
        check = ConfigDict(type="CheckSize", turned=_turns(dataset))
        _insert(dataset.pipeline, lambda step: is_kind(step, "LoadImageFromFile"), check, after=True)


def _all_datasets(cfg: Config) -> Iterator[tuple[str, ConfigDict]]:
    """Yield the data sets and wrappers with a pipeline of all splits, each with the key of its split's.

    A training set comes once more for each hook that gives it another pipeline, as mmdet's PipelineSwitchHook.
    """
    for split in ("train", "val", "test"):
        loader = cfg.get(f"{split}_dataloader")
        yield from ((f"{split}_dataloader.dataset", one) for one in (with_pipelines(loader.dataset) if loader else ()))
    trained = next(datasets_of(cfg.train_dataloader.dataset), None) if cfg.get("train_dataloader") else None
    for hook in cfg.get("custom_hooks") or () if trained else ():
        if isinstance(hook, dict) and hook.get("switch_pipeline"):
            switched = ConfigDict(trained, pipeline=hook.switch_pipeline)
            yield "train_dataloader.dataset", switched
            hook.switch_pipeline = switched.pipeline


def _turns(dataset: ConfigDict) -> bool:
    """Return whether a data set loads images as their EXIF orientation says."""
    steps = steps_of(dataset.get("pipeline") or ())
    return not any(str(step.get("color_type")).endswith(("ignore_orientation", "unchanged")) for step in steps)


def _loads_maps(step: ConfigDict) -> bool:
    return works_as(step, "LoadAnnotations")


def _loads_files(images_only: bool, step: ConfigDict) -> bool:
    """Return whether a step loads maps: by the toolchain's class, or by a subclass, which may read other files too."""
    of_toolchain = getattr(type_of(step), "__module__", "").startswith(("mmcv.", "mmseg."))
    return _loads_maps(step) and of_toolchain == images_only


def _loads_otherwise(step: ConfigDict) -> bool:
    return is_kind(step, "LoadAnnotations") and not _loads_maps(step)


BACKENDS = ("cv2", "pillow")  # which decode images


def _loads_image(backend: str, unchanged: bool, ignores_empty: bool, step: ConfigDict) -> bool:
    own = step.get("imdecode_backend") or "cv2", step.get("color_type") == "unchanged", bool(step.get("ignore_empty"))
    return _is_loader(step) and own == (backend, unchanged, ignores_empty)


def _leaves_values(step: ConfigDict) -> bool:
    return _is_loader(step) and step.get("color_type") == "unchanged"


def _is_loader(step: ConfigDict) -> bool:
    return is_kind(step, "LoadImageFromFile") or "LoadImage" in kind_of(step)


def _insert(pipeline: list, wanted: Callable[[ConfigDict], bool], check: ConfigDict, after: bool) -> None:
    """Put `check` after (or else before) each wanted step; one that is there gets the arguments that it lacks."""
    for i in reversed(range(len(pipeline))):
        step = pipeline[i]
        inner = step.get("transforms")
        if wanted(step):
            beside = pipeline[i + 1 :] if after else pipeline[:i][::-1]
            checks = takewhile(lambda one: kind_of(one).startswith("Check"), beside)
            if there := next((one for one in checks if kind_of(one) == kind_of(check)), None):
                for key, value in check.items():
                    there.setdefault(key, value)
            else:
                pipeline.insert(i + after, check)
        elif inner and is_kind(step, "TestTimeAug"):  # each item lists the alternatives for one place
            at = next((k for k, one in enumerate(inner) if any(map(wanted, steps_of(one)))), None)
            if at is not None and [check] not in inner:
                inner.insert(at + after, [check])
        elif inner and is_kind(step, "RandomChoice"):  # its items are steps or pipelines
            step.transforms = [list(one) if isinstance(one, list | tuple) else [one] for one in inner]
            for one in step.transforms:
                _insert(one, wanted, check, after)
        elif inner:  # RandomApply and other wrappers
            step.transforms = [inner] if isinstance(inner, dict) else list(inner)
            _insert(step.transforms, wanted, check, after)
