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

HUB = "hf-hub:"
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
        ValueError: `pretrained=True` without weights, an empty path, or weights that are not of this model.
    """
    if pretrained == "":  # as of a variable that is not set
        raise ValueError("pretrained is empty: name a checkpoint, or leave it out")
    pretrained = str(pretrained) if isinstance(pretrained, str | Path) else bool(pretrained)
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    given = _given(kwargs.get("pretrained_cfg"))
    new_head = any((one.get("num_classes") or 0) < 0 for one in (given, overlay))
    base = {}
    if pretrained and given and not _is_of_a_name(kwargs["pretrained_cfg"]):
        kwargs.pop("pretrained_cfg")  # it goes over the registry's, which names the layers
        base = given
    if pretrained is True:
        base, overlay = {}, base | overlay
        source, file = _take_source(overlay)
    else:
        source, file = pretrained, {**base, **overlay}.get("hf_hub_filename")
    if source and (base.get("state_dict") or overlay.get("state_dict")):
        raise ValueError(f"{source}: a state_dict is given too; name one of them")
    if source:
        found, model_args = _source(source, name, file, kwargs.get("cache_dir"))
        if overlay.get("label_offset"):
            model_args.pop("num_classes", None)
        overlay, kwargs = base | found | overlay, model_args | kwargs
    elif pretrained and not _names_weights(kwargs.get("pretrained_cfg")) and not _names_weights(overlay):
        raise ValueError(
            f"no weights are published for {name} where timm finds them: pass pretrained='/path/to/checkpoint.pth', "
            "pretrained='hf-hub:user/repository', or checkpoint_path"
        )
    if "state_dict" in overlay:  # timm loads without strictness if the number of classes differs
        from classification.checkpoint import check_weights

        check_weights(overlay["state_dict"], source or "state_dict")
        if pretrained and given.get("source"):  # as of local-dir:, whose weights are not used
            overlay = {"label_names": None, "label_descriptions": None} | overlay
            if not new_head:
                _check_head(source or "state_dict", overlay["state_dict"], kwargs)
        if pretrained:
            overlay["source"] = None
        sizes = {key: kwargs[key] for key in ("in_chans", *SIZES) if key in kwargs}
        _check_trunk(name, source or "state_dict", overlay["state_dict"], {**VARIANTS[name], **sizes})
        if new_head:  # timm's train.py says -1
            overlay["num_classes"] = -1
        elif pretrained and not overlay.get("label_offset"):  # with which timm cuts off the first classes
            overlay |= _classes_of(overlay["state_dict"])  # timm drops a head of another number than it expects
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
    names = model.pretrained_cfg.get("label_names")
    numbers = {getattr(model, "num_classes", 0), model.pretrained_cfg.get("num_classes")}
    if pretrained and isinstance(names, list | tuple) and numbers == {len(names)}:
        _warn_of_timms_order(names, source or model.pretrained_cfg.get("file") or name)
    return model


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


def _is_of_a_name(cfg: object) -> bool:
    """Whether a pretrained_cfg is that of a model's name such as `local-dir:folder`, whose weights timm reads."""
    source = _given(cfg).get("source")
    return bool(source) and (source != "hf-hub" or (isinstance(cfg, dict) and "num_classes" in cfg))


def _take_source(overlay: dict) -> tuple[str | None, str | None]:
    """Remove the checkpoint from an overlay.

    Returns: it, in the form of `_create`'s argument `pretrained`; and the name of the hub's file, if one is given. Both
        are None if the overlay holds the weights themselves.
    """
    overlay.pop("source", None)
    if overlay.get("state_dict"):
        return None, None
    if overlay.get("file"):
        return str(overlay.pop("file")), None
    if overlay.get("hf_hub_id"):
        return f"{HUB}{overlay.pop('hf_hub_id')}", overlay.pop("hf_hub_filename", None)
    return overlay.pop("url", None) or None, None


def _classes_of(state: dict) -> dict[str, int]:
    from classification.checkpoint import num_classes

    return dict(num_classes=num_classes(state) or 0)


def _source(
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
            except LocalEntryNotFoundError:  # the hub cannot be reached
                raise
            except EntryNotFoundError as error:
                warnings.warn(f"{pretrained}: has no config.json ({error}); it is done without", stacklevel=2)
        if architecture not in (None, name):
            raise ValueError(f"{pretrained}: is a {architecture}, not a {name}: create that one")
        state = load_state_dict_from_hf(repository, *([file] if file else []), weights_only=True, cache_dir=cache_dir)
        found = {**config, **_classes_of(state), "source": None, "state_dict": state}
        return found, dict(model_args or {})
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
        **_classes_of(state),
        state_dict=state,
        input_size=(channels, size, size),
        pool_size=(-(-size // 32),) * 2,
        crop_pct=config.TEST.CROP_PCT,
        interpolation="bilinear" if method == "random" else method,  # as in evaluation
    )
    if names := class_names_of(content, pretrained):
        found["label_names"] = names
    return found, {}


def _from_address(address: str, name: str) -> tuple[dict, dict]:
    from classification.checkpoint_archive import is_momentary

    path = download(address)
    try:
        return _source(str(path), name)
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
    """Check that weights fit a model of these sizes. The head and the number of image channels may differ.

    Raises:
        ValueError: the weights are of another model.
    """
    from classification.checkpoint import HEAD, differences

    with torch.device("meta"):
        model = SpatialMamba(**sizes)
    own = model.state_dict()
    stem = f"{PRETRAINED_CFG['first_conv']}.weight"
    other_channels = stem in state and state[stem].shape[1] != model.in_chans
    if found := differences(own, state, ignore=(*HEAD, *([stem] if other_channels else []))):
        raise ValueError(f"{path}: its weights are none of a {name}: {found}")


def _check_head(path: str, state: dict, kwargs: dict) -> None:
    """Check that weights have the classes of a model's name such as `local-dir:folder`, unless the user says otherwise.

    timm mixes the arguments of the name with those that the user gives, so that equal ones may be either's.

    Raises:
        ValueError: the numbers differ.
    """
    of_name = (kwargs.get("pretrained_model_args") or {}).get("num_classes")
    classes = _classes_of(state)["num_classes"]
    differs = of_name == kwargs.get("num_classes") != classes
    if of_name and classes and differs and not kwargs.get("features_only"):
        raise ValueError(
            f"{path}: has {classes} classes, but the model's name says {of_name}: pass num_classes={classes}, or "
            "pretrained_cfg_overlay=dict(num_classes=-1) for a new head"
        )


def _names_weights(cfg: object) -> bool:
    given = _given(cfg)
    return any(given.get(key) for key in ("url", "file", "state_dict", "hf_hub_id", "source"))


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
