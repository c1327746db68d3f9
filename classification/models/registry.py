"""The sizes in timm's registry: after `import classification.models`, `timm.create_model("spatialmamba_tiny")`.

timm's arguments have timm's meaning. timm finds no published weights, so `pretrained` may also be a path or a hub id.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    load_model_config_from_hf,
    load_state_dict_from_hf,
    register_model,
)
from timm.utils import natural_key

from classification.download import discard, download, is_address
from classification.errors import UserError
from classification.models.spatialmamba import VARIANTS, SpatialMamba

HUB, LOCAL = "hf-hub:", "local-dir:"
WEIGHTS = ("source", "state_dict", "file", "hf_hub_id", "url")  # entries of a pretrained_cfg that name weights
SIZES = ("depths", "dims", "d_state", "expand", "mlp_ratio")
PRETRAINED_CFG = dict(
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    num_classes=1000,
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    crop_pct=224 / 256,
    interpolation="bicubic",
    first_conv="patch_embed.conv1.conv",
    classifier="head",
    license="apache-2.0",
    paper_ids="arXiv:2410.15091",
)
default_cfgs = generate_default_cfgs(dict.fromkeys(VARIANTS, PRETRAINED_CFG))


def _create(name: str, pretrained: bool | str | Path = False, **kwargs) -> torch.nn.Module:
    """Create a model of this size.

    Args:
        name: the size, for example "spatialmamba_tiny".
        pretrained: the path or address of a checkpoint, or a hub id such as "hf-hub:user/repository"; True if kwargs
            name weights.
        kwargs: arguments of `timm.create_model` and `SpatialMamba`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: `pretrained=True` without weights, an empty path, weights that are named twice or are not of this
            model, or a pretrained_cfg that contradicts them.
    """
    if pretrained == "":  # as of a variable that is not set
        raise ValueError("pretrained is empty: name a checkpoint, or leave it out")
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    source, stored = None, {}
    if pretrained:
        named = str(pretrained) if isinstance(pretrained, str | Path) else None
        source, overlay, kwargs, stored = _with_weights(name, named, overlay, kwargs)
    # timm's own models also take a device and a dtype.
    device, dtype = torch.device(kwargs.pop("device", None) or torch.get_default_device()), kwargs.pop("dtype", None)

    def build(**arguments) -> SpatialMamba:
        with device:
            return SpatialMamba(**{**VARIANTS[name], **arguments}).to(dtype=dtype)

    model = build_model_with_cfg(
        build,
        name,
        bool(pretrained),
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(feature_cls="getter", out_indices=(0, 1, 2, 3)),
        **kwargs,
    )
    model.pretrained_cfg.pop("state_dict", None)
    model._model_args = dict(stored)  # timm adds those that the caller names, and save_for_hf stores all
    names = model.pretrained_cfg.get("label_names")
    numbers = {getattr(model, "num_classes", 0), model.pretrained_cfg.get("num_classes")}
    if pretrained and isinstance(names, list | tuple) and numbers == {len(names)}:
        _warn_of_timms_order(names, source)
    return model


def _with_weights(name: str, named: str | None, overlay: dict, kwargs: dict) -> tuple[str, dict, dict, dict]:
    """Read a model's weights, so that timm need not.

    Args:
        name: the size of the model.
        named: the argument `pretrained` of `timm.create_model`, if it names weights.
        overlay: timm's pretrained_cfg_overlay.
        kwargs: the other arguments, with timm's pretrained_cfg.

    Returns: where the weights are, for messages; a pretrained_cfg_overlay that holds them and what describes them; the
        other arguments; and those of them that are stored with the weights.
    """
    cfg = kwargs.get("pretrained_cfg")
    given, overlay = _given(cfg), dict(overlay)
    new_head = any((one.get("num_classes") or 0) < 0 for one in (given, overlay))  # timm's train.py says -1
    of_given, of_overlay = _take_places(given), _take_places(overlay)
    places = [*([named] if named else []), *of_given, *of_overlay]
    if len(places) > 1:
        first, second = (place if isinstance(place, str) else "a state_dict" for place in places[:2])
        raise ValueError(f"weights are named twice, by {first} and by {second}: name one of them")
    if not places:
        raise ValueError(
            f"no weights are published for {name} where timm finds them: pass pretrained='/path/to/checkpoint.pth', "
            "pretrained='hf-hub:user/repository', or checkpoint_path"
        )
    (place,) = places
    if of_given and _is_of_a_name(cfg):
        described = cfg if isinstance(cfg, dict) else vars(cfg)
        layers = {key: PRETRAINED_CFG[key] for key in ("first_conv", "classifier") if not described.get(key)}
        return place, layers | overlay, kwargs, {}
    if of_overlay and isinstance(place, str) and place.startswith(LOCAL):
        raise ValueError(f"{place}: pass it as the model's name: timm.create_model({place!r}, pretrained=True)")
    file = overlay.pop("hf_hub_filename", None) or given.pop("hf_hub_filename", None)
    if isinstance(place, str):
        found, model_args = _read(place, name, file, kwargs.get("cache_dir"))
    else:
        place, found, model_args = "state_dict", dict(state_dict=place), {}
    own_number, kwargs = "num_classes" in kwargs, model_args | kwargs
    if not isinstance(cfg, str):  # the tag of one of the registry's
        kwargs.pop("pretrained_cfg", None)  # it goes over the registry's, which names the layers
    state = found["state_dict"]
    _check_trunk(name, place, state, {**VARIANTS[name], **{k: kwargs[k] for k in ("in_chans", *SIZES) if k in kwargs}})
    # timm drops a head of another number of classes than it expects, and then loads without strictness.
    classes, offset = _classes_of(state, place), {**found, **given, **overlay}.get("label_offset") or 0
    if not isinstance(offset, int) or not 0 <= offset < (classes or 1):
        raise ValueError(f"{place}: label_offset is {offset!r}, of {classes} classes")
    left = classes - offset  # timm cuts off the first ones
    headless = new_head or bool(kwargs.get("features_only"))
    if offset and own_number and kwargs["num_classes"] == classes and not headless:  # a head that timm would make anew
        raise ValueError(f"{place}: label_offset={offset} leaves {left} of {classes} classes: pass num_classes={left}")
    if model_args.get("num_classes") and not (own_number or headless):
        if model_args["num_classes"] not in (classes, left):
            raise ValueError(
                f"{place}: has {classes} classes, but its config.json says {model_args['num_classes']}: correct that, "
                "or pass num_classes to create_model"
            )
        kwargs["num_classes"] = left
    for one in (found, given, overlay):
        names = one.get("label_names")
        if isinstance(names, list | tuple) and len(names) == classes:
            one["label_names"] = names[offset:]
    kept = not headless and kwargs.get("num_classes", left) == left
    if not new_head:
        _check_number(place, {**given, **overlay}.get("num_classes"), left, offset)
    _check_description(place, found, given, kept, bool(of_given))
    entries = {**found, **given, **overlay, "source": None, "num_classes": -1 if new_head else left}
    names = entries.get("label_names")
    if kept and classes and isinstance(names, list | tuple) and len(names) != left:
        raise ValueError(
            f"{place}: has {left} classes, but its pretrained_cfg holds {len(names)} label_names: correct them in "
            "pretrained_cfg_overlay, or pass label_names=None there"
        )
    return place, entries, kwargs, model_args


def _check_number(place: str, stated: int | None, classes: int, offset: int) -> None:
    if stated not in (None, classes):
        raise ValueError(
            f"{place}: has {classes} classes{f' after label_offset={offset}' if offset else ''}, but pretrained_cfg, "
            f"its overlay or config.json says num_classes={stated}: leave that out, or mend it; for a new head, pass "
            "num_classes to create_model"
        )


def _check_description(place: str, found: dict, given: dict, kept: bool, names_alone: bool) -> None:
    """Check that a pretrained_cfg, which may have come from another model, agrees with what was found at a place.

    Args:
        place: where the weights are.
        found: what lies beside the weights.
        given: the pretrained_cfg.
        kept: whether the model has the weights' head.
        names_alone: whether the names of classes alone must agree, since the pretrained_cfg names the weights itself.

    Raises:
        ValueError: they differ.
    """
    for key in found.keys() & given.keys() - {"num_classes"}:
        if (kept if key == "label_names" else not names_alone) and not np.array_equal(given[key], found[key]):
            raise ValueError(
                f"{place}: its {key} is {found[key]!s:.99}, but pretrained_cfg says {given[key]!s:.99}: leave that "
                "out, or pass it in pretrained_cfg_overlay"
            )


def _take_places(entries: dict) -> list[str | dict]:
    """Remove from a pretrained_cfg what names weights, and return it.

    Returns: state dicts; and strings, in the form of `_create`'s argument `pretrained`, or of a model's name.
    """
    source, state, file, hub, url = (entries.pop(key, None) for key in WEIGHTS)
    file = f"{LOCAL}{file}" if file and source == "local-dir" else file and str(file)
    return [place for place in (state, file, hub and f"{HUB}{hub}", url and str(url)) if place]


def _is_of_a_name(cfg: object) -> bool:
    """Whether a pretrained_cfg is that of a model's name such as `local-dir:folder`, whose weights timm reads.

    Of a hub's id, it is a whole config.json. One that lacks an entry may be the caller's, so config.json is read.
    """
    source = cfg.get("source") if isinstance(cfg, dict) else cfg.source
    whole = isinstance(cfg, dict) and cfg.keys() >= {"num_classes", "input_size", "crop_pct", "interpolation", "mean"}
    return source == "local-dir" or (source == "hf-hub" and whole)


def _classes_of(state: dict, place: str) -> int:
    from classification.checkpoint import HEAD, num_classes

    classes = num_classes(state)
    if classes is None and (head := [key for key in HEAD if key in state]):
        raise ValueError(f"{place}: its {head[0]} of shape {tuple(state[head[0]].shape)} is no head's")
    return classes or 0


def _given(cfg: object) -> dict:
    """Return the entries of timm's PretrainedCfg, or of a dict, that are not None.

    Of a PretrainedCfg, or a dict with all its entries, those that hold its default values or this registry's are left
    out: nobody gave them, and what a checkpoint says goes before them.
    """
    entries = cfg if isinstance(cfg, dict) else vars(cfg) if cfg is not None and not isinstance(cfg, str) else {}
    given = {key: value for key, value in entries.items() if value is not None}
    defaults = {key: value for key, value in vars(PretrainedCfg()).items() if value is not None}
    if not defaults.keys() <= given.keys():
        return given
    ours = [defaults, PRETRAINED_CFG]
    return {key: value for key, value in given.items() if not any(np.array_equal(d.get(key), value) for d in ours)}


def _read(
    pretrained: str, name: str, file: str | None = None, cache_dir: str | Path | None = None
) -> tuple[dict, dict]:
    """Return entries for timm's pretrained_cfg, including the weights, and arguments for the model.

    Args:
        pretrained: where the weights are.
        name: the size of the model.
        file: the name of the hub's file, if it is not timm's; a config that lies beside it is not of it.
        cache_dir: where a hub's files are kept, if not at its usual place.
    """
    if pretrained.startswith(HUB):
        repository = pretrained.removeprefix(HUB)
        config, architecture, model_args = {}, None, None
        if not file:
            try:
                config, architecture, model_args = load_model_config_from_hf(repository, cache_dir=cache_dir)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not _is_known_to_lack_config(repository, cache_dir):
                    raise  # the hub cannot be reached
                warnings.warn(f"{pretrained}: has no config.json ({error}); it is done without", stacklevel=2)
        if architecture not in (None, name):
            raise ValueError(f"{pretrained}: is a {architecture}, not a {name}: create that one")
        state = load_state_dict_from_hf(repository, *([file] if file else []), weights_only=True, cache_dir=cache_dir)
        described = {key: value for key, value in config.items() if value is not None and key != "source"}
        return {**described, "state_dict": state}, dict(model_args or {})
    if is_address(pretrained):
        return _from_address(pretrained, name)
    if pretrained.lower().startswith("file:"):  # timm would keep a copy under the base name, and read that from then on
        parts = urlparse(pretrained)
        if parts.netloc.lower() not in ("", "localhost"):
            raise ValueError(f"{pretrained}: names another machine, {parts.netloc!r}; write file:///path")
        pretrained = url2pathname(parts.path)
    if not Path(pretrained).is_file():
        raise FileNotFoundError(f"{pretrained}: no such checkpoint; a hub id is written {HUB}user/repository")
    # Imported here, because it imports the models. timm's own loader cannot read the configs in our checkpoints.
    from classification.checkpoint import class_names_of, read_checkpoint, state_dicts
    from classification.config import trained_with

    content = read_checkpoint(pretrained)
    state, config = state_dicts(content, pretrained)["model"], trained_with(content, pretrained)
    stem = state.get(f"{PRETRAINED_CFG['first_conv']}.weight")
    channels, size, method = 3 if stem is None else stem.shape[1], config.DATA.IMG_SIZE, config.DATA.INTERPOLATION
    found = dict(
        state_dict=state,
        input_size=(channels, size, size),
        pool_size=(-(-size // 32),) * 2,
        crop_pct=config.TEST.CROP_PCT,
        interpolation="bilinear" if method == "random" else method,  # as in evaluation
    )
    if names := class_names_of(content, pretrained):
        found["label_names"] = names
    return found, {}


def _is_known_to_lack_config(repository: str, cache_dir: str | Path | None) -> bool:
    """Whether the hub said earlier that this repository has no config.json."""
    repository, _, revision = repository.partition("@")
    found = try_to_load_from_cache(repository, "config.json", cache_dir=cache_dir, revision=revision or None)
    return found is _CACHED_NO_EXIST


def _from_address(address: str, name: str) -> tuple[dict, dict]:
    from classification.checkpoint_archive import is_momentary

    path = download(address)
    try:
        return _read(str(path), name)
    except UserError as error:
        if is_momentary(error):
            raise
        raise discard(address, error) from error


def _warn_of_timms_order(names: Sequence[str], path: str) -> None:
    """Warn if timm's readers of image folders number these classes otherwise: for them, 2 is before 10, a before B."""
    try:
        theirs = sorted(names, key=natural_key)
    except (TypeError, ValueError):  # of digits such as "²", for which timm's readers fail as well
        return
    if theirs != list(names):
        at = next(i for i, (a, b) in enumerate(zip(names, theirs, strict=True)) if a != b)
        warnings.warn(
            f"{path}: its class {at} is {names[at]!r}, but timm's readers of image folders number {theirs[at]!r} so. "
            "Before you give timm such folders, write pretrained_cfg['label_names'] to a .txt file, one name a line, "
            "and pass it as class_map (--class-map)",
            stacklevel=2,
        )


def _check_trunk(name: str, path: str, state: dict, sizes: dict) -> None:
    """Check that weights are usable and fit a model of these sizes. The head and the image channels may differ.

    Raises:
        ValueError: the weights are of another model, or no finite real numbers.
    """
    from classification.checkpoint import HEAD, check_weights, differences

    check_weights(state, path)
    with torch.device("meta"):
        model = SpatialMamba(**sizes)
    own = model.state_dict()
    stem = f"{PRETRAINED_CFG['first_conv']}.weight"
    other_channels = stem in state and state[stem].shape[1] != model.in_chans
    if found := differences(own, state, ignore=(*HEAD, *([stem] if other_channels else []))):
        raise ValueError(f"{path}: its weights are none of a {name}: {found}")


@register_model
def spatialmamba_micro(pretrained: bool | str | Path = False, **kwargs) -> SpatialMamba:
    """For tests and demos: dims 16, depths (1, 1, 2, 1)."""
    return _create("spatialmamba_micro", pretrained, **kwargs)


@register_model
def spatialmamba_tiny(pretrained: bool | str | Path = False, **kwargs) -> SpatialMamba:
    """Spatial-Mamba-T, 27 M parameters."""
    return _create("spatialmamba_tiny", pretrained, **kwargs)


@register_model
def spatialmamba_small(pretrained: bool | str | Path = False, **kwargs) -> SpatialMamba:
    """Spatial-Mamba-S, 43 M parameters."""
    return _create("spatialmamba_small", pretrained, **kwargs)


@register_model
def spatialmamba_base(pretrained: bool | str | Path = False, **kwargs) -> SpatialMamba:
    """Spatial-Mamba-B, 96 M parameters."""
    return _create("spatialmamba_base", pretrained, **kwargs)
