"""The parts of a config: data sets and the steps of their pipelines, metrics, heads, and what types they have."""

import inspect
from collections.abc import Iterator, Sequence

from mmengine.config import Config, ConfigDict
from mmengine.fileio import list_from_file
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    TRANSFORMS,
    Registry,
)

from classification.errors import UserError, is_file

# Arguments of the toolchains' Swin and of the authors' backbone that have no effect on MM_SpatialMamba, with the
# accepted values; None accepts all. The authors' configs inherit from Swin's, and their backbone accepts any argument.
DO_NOTHING = {
    **dict.fromkeys(
        ("embed_dims", "pretrain_img_size", "img_size", "patch_size", "window_size", "num_heads", "strides")
    ),
    **dict.fromkeys(("qkv_bias", "qk_scale", "patch_norm", "act_cfg", "norm_cfg", "convert_weights", "dt_init")),
    "in_channels": (3,),
    "in_chans": (3,),
    "use_abs_pos_embed": (False,),
    "drop_rate": (0,),
    "attn_drop_rate": (0,),
    "norm_layer": ("ln", "LN"),
}


def kind_of(config: ConfigDict) -> str:
    """Return the name of a config's class, without a scope as in "mmdet.CocoDataset". `type` may also be the class."""
    kind = config.get("type")
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def is_kind(config: ConfigDict, *kinds: str) -> bool:
    """Return whether a config's class, or a class that it inherits from, has one of these names."""
    return kind_of(config) in kinds or any(base.__name__ in kinds for base in getattr(type_of(config), "__mro__", ()))


# What a subclass overrides if it reads other files, loads other labels, or compares otherwise.
ESSENTIAL = ("load_data_list", "parse_data_info", "transform", "_load_seg_map", "process", "compute_metrics")


def works_as(config: ConfigDict, kind: str) -> bool:
    """Return whether a config's class is called `kind`, or inherits from it and does the same.

    A method that calls its base's, for example to add a field, does the same.
    """
    for base in getattr(type_of(config), "__mro__", ()):
        if base.__name__ == kind:
            return True
        own = {name: inspect.unwrap(vars(base)[name]) for name in ESSENTIAL if name in vars(base)}
        if not all(name in method.__code__.co_names for name, method in own.items()):
            return False
    return kind_of(config) == kind


def parts_within(value: object) -> Iterator[ConfigDict]:
    """Yield a config and all parts of it that have a `type`."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from parts_within(part)
    if isinstance(value, dict) and "type" in value:
        yield value


def datasets_of(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """Yield the data sets that read files, without wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get("dataset", dataset.get("datasets"))
    if inner is None:
        yield dataset
    for one in inner if isinstance(inner, list) else [inner] if inner else ():
        yield from datasets_of(one)


def with_pipelines(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """Yield the data sets and the wrappers that have a pipeline, for example MultiImageMixDataset, from the inside."""
    inner = dataset.get("dataset", dataset.get("datasets"))
    for one in inner if isinstance(inner, list) else [inner] if inner else ():
        yield from with_pipelines(one)
    if dataset.get("pipeline"):
        yield dataset


def steps_of(pipeline: Sequence) -> Iterator[ConfigDict]:
    """Yield all steps of a pipeline, including those within RandomChoice, RandomApply and TestTimeAug."""
    for step in pipeline:
        if isinstance(step, list | tuple):
            yield from steps_of(step)
        else:
            yield step
            inner = step.get("transforms") or ()
            yield from steps_of([inner] if isinstance(inner, dict) else inner)


def parts_of(key: str, value: object) -> Iterator[tuple[str, ConfigDict]]:
    """Yield the key and config of a part, or of each part in a list."""
    if isinstance(value, list | tuple):
        yield from ((f"{key}[{i}]", one) for i, one in enumerate(value) if isinstance(one, dict))
    elif isinstance(value, dict):
        yield key, value


def metrics_of(cfg: Config, split: str) -> list[ConfigDict]:
    """Return the metrics of a split's evaluator, which is a metric, several, or an evaluator with `metrics`."""
    evaluator = cfg.get(f"{split}_evaluator")
    evaluator = evaluator.get("metrics", evaluator) if isinstance(evaluator, dict) else evaluator
    return [one for one in (evaluator if isinstance(evaluator, list) else [evaluator]) if isinstance(one, dict)]


def datasets_of_metrics(cfg: Config, split: str, datasets: list[ConfigDict]) -> Iterator[tuple[ConfigDict, list]]:
    """Yield each metric with the data sets that it gets: all, or with MultiDatasetsEvaluator one each, in order."""
    evaluator, metrics = cfg.get(f"{split}_evaluator"), metrics_of(cfg, split)
    apart = isinstance(evaluator, dict) and is_kind(evaluator, "MultiDatasetsEvaluator")
    for i, metric in enumerate(metrics):
        yield metric, datasets[i : i + 1] if apart and len(metrics) == len(datasets) else datasets


def segmentation_heads(model: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """Yield mmseg's heads with their keys. K-Net's head contains several heads, and the first one has ignore_index."""
    for part in ("decode_head", "auxiliary_head"):
        for key, head in parts_of(f"model.{part}", model.get(part)):
            inner = head.get("kernel_generate_head")
            yield (f"{key}.kernel_generate_head", inner) if inner else (key, head)


def predicting_head(model: ConfigDict) -> dict:
    """Return mmseg's decode head, or the last of several."""
    head = model.get("module", model).get("decode_head") or {}  # with --tta
    head = head[-1] if isinstance(head, list) else head
    return head.get("kernel_generate_head") or head  # all of K-Net takes ignore_index from this head


def resizes(cfg: Config | dict, split: str) -> dict[str, object] | None:
    """Return the resizing settings of a split's first data set, by step; None if they are not known.

    They are not known with test-time augmentation, or without a pipeline.
    """
    loader = cfg.get(f"{split}_dataloader") or {}
    dataset = next(datasets_of(loader.get("dataset") or {}), {})
    steps = [step for step in steps_of(dataset.get("pipeline") or ()) if isinstance(step, dict)]
    # By name alone: a saved config may name a type that is in a module with effects on import.
    if not steps or any(kind_of(step) == "TestTimeAug" for step in steps):
        return None
    return {
        f"{kind_of(step)}.{key}": step.get(key)
        for step in steps
        if "Resize" in kind_of(step)
        for key in ("scale", "scale_factor", "keep_ratio")
        if step.get(key)
    }


def type_of(config: ConfigDict) -> type | None:
    """Return a config's class, which `type` names or is. None if no registry has it."""
    kind = config.get("type")
    if not isinstance(kind, str):
        return kind if isinstance(kind, type) else None
    for registry in (DATASETS, TRANSFORMS, METRICS, MODELS, EVALUATOR, LOOPS, OPTIM_WRAPPERS, DATA_SAMPLERS):
        with registry.switch_scope_and_registry(None) as own:  # the toolchain's
            # `get` would import a module of that name if the registry has none.
            found = own.get(kind) if "." in kind else _registered(own, kind)
        if isinstance(found, type):
            return found
    return None


def _registered(registry: Registry | None, name: str) -> object:
    """Return what a registry, or one of its parents, has under a name."""
    while registry is not None:
        registry.import_from_location()
        if name in registry.module_dict:
            return registry.module_dict[name]
        registry = registry.parent
    return None


def argument_of(dataset: ConfigDict, name: str) -> object:
    """Return the value of a data set's argument: the config's, or else the default of its type, or else None."""
    if name in dataset:
        return dataset[name]
    for base in getattr(type_of(dataset), "__mro__", ()):
        given = inspect.signature(base.__init__).parameters.get(name) if "__init__" in vars(base) else None
        if given is not None:
            return given.default
    return None


def class_names_of(dataset: ConfigDict, key: str) -> list[str]:
    """Return the class names of the config, or else of the data set's type; [] if the type has none."""
    classes = (dataset.get("metainfo") or {}).get("classes")
    if not classes:
        classes = getattr(type_of(dataset), "METAINFO", {}).get("classes") or ()  # None for V3Det until it is read
    if isinstance(classes, str):
        if "://" not in classes and not is_file(classes):
            raise UserError(
                f"{classes}: no such file of classes ({key}.metainfo.classes); one class is written with a comma, as "
                f"in ({classes!r},)"
            )
        try:
            return list_from_file(classes)
        except UnicodeDecodeError as error:
            raise UserError(f"{classes}: is no text in UTF-8 ({error}); write it anew in that encoding") from error
    return list(classes)


def must_exist(path: str, what: str, key: str, exists=is_file) -> None:
    if "://" not in path and not exists(path):
        raise UserError(
            f"{path}: no such {what} ({key}); pass --cfg-options data_root=/path/to/data/, "
            f"or set {key} if yours is called otherwise"
        )
