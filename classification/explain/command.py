"""The command line. It writes the figures of a model and some images, or serves the page."""

import argparse
import difflib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision import transforms
from tqdm import tqdm
from yacs.config import CfgNode

from classification.checkpoint import CFG_NODE, check_weights, read_checkpoint, variant_of, write_atomically
from classification.config import LARGEST_SIZE, default_config
from classification.data.build import eval_transform
from classification.data.images import read_image
from classification.errors import UserError, is_file, prepare_console, printable
from classification.explain.compute import (
    States,
    checked_index,
    checked_position,
    class_activation,
    effective_receptive_field,
    fixed_ssm,
    last_stage,
    no_class_activation,
    states,
)
from classification.explain.drawing import (
    Picture,
    draw_activation,
    draw_mixing,
    draw_receptive_fields,
    draw_states,
    picture_of,
)
from classification.export import read_model
from classification.models import VARIANTS, SpatialMamba

PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224")
BATCH = 8
LARGEST_PORT = 65535
INDICES = ("index", "indices", "idx", "idxs", "ids", "mask", "num_batches_tracked")  # ends of names of whole numbers


class Loaded(NamedTuple):
    """A classifier with its metadata.

    Attributes:
        model: the classifier, in evaluation mode.
        size: the model's name in `VARIANTS`.
        classes: the names of the classes, if the checkpoint has them.
        config: the config for evaluation.
        trained: whether the weights are from a checkpoint.
    """

    model: SpatialMamba
    size: str
    classes: list[str] | None
    config: CfgNode
    trained: bool


@dataclass
class Run:
    """The inputs of the figures: arguments, model, normalised images, the same images as they look, and their names."""

    args: argparse.Namespace
    loaded: Loaded
    images: Tensor
    pictures: list[Picture]
    names: list[str]

    @property
    def model(self) -> SpatialMamba:
        return self.loaded.model

    @property
    def size(self) -> str:
        return self.loaded.size

    @property
    def weights(self) -> str:
        return "trained" if self.loaded.trained else "at initialisation"

    def stage(self, least: int) -> int:
        """`--stage` if given; or else the last stage whose map has at least `least` rows and columns, or stage 0."""
        if self.args.stage is not None:
            return checked_index(self.args.stage, len(self.model.layers), "stage", "the model")
        return last_stage(self.images, len(self.model.layers), least)

    def block(self, stage: int) -> int:
        return checked_index(self.args.block, len(self.model.layers[stage].blocks), "block", f"stage {stage}")

    def batches(self, what: str) -> Iterator[Tensor]:
        return iter(tqdm(self.images.split(BATCH), desc=what, unit="batch", disable=None, leave=False))


Drawn = tuple[Figure, dict[str, np.ndarray]]


def _states(run: Run) -> Drawn:
    stage = run.stage(least=14)
    block = run.block(stage)
    parts = zip(*(states(run.model, batch, stage, block) for batch in run.batches("states")), strict=True)
    found = States(*map(torch.cat, parts))
    title = f"States of {run.size}, {run.weights}: stage {stage}, block {block}"
    figure = draw_states(run.pictures, found, title, run.names, run.args.colour, run.args.channels)
    return figure, {key: value.numpy() for key, value in found._asdict().items()}


def _erf(run: Run) -> Drawn:
    stage = run.stage(least=4)
    stride = 2 ** (stage + 2)
    size = [math.ceil(side / stride) for side in run.images.shape[2:]]
    position = checked_position(run.args.position, size, f"the map of stage {stage}")
    fields = {}
    for name, model in _compared(run):
        if name in fields:
            raise UserError(f"--beside: {_one_line(name)} is there twice; name it once")
        index = stage if isinstance(model, SpatialMamba) else _map_of_stride(model, stride, name)
        batches = run.batches(name.replace("\n", ", "))
        try:
            fields[name] = sum(effective_receptive_field(model, batch, position, index) for batch in batches).numpy()
        except UserError as error:  # a peer that rounds sizes down has a smaller map
            raise UserError(f"{_one_line(name)}: {error}") from error
        except Exception as error:  # timm's models raise any for a bad size
            if model is run.model:
                raise
            height, width = run.images.shape[2:]
            reason = str(error).partition("\n")[0]
            raise UserError(f"--beside {_one_line(name)}: cannot take images of {height}x{width} ({reason})") from error
    title = f"Effective receptive fields of a position at stride {stride}: sums over {_count(run.images)}"
    return draw_receptive_fields(fields, position, stride, title), {
        _one_line(name).replace(" ", "_"): scores for name, scores in fields.items()
    }


def _compared(run: Run) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, model), one at a time: an untrained model if the model is trained, the model, and its peers."""
    if run.loaded.trained:
        yield f"{run.size}\nat initialisation", load(run.size).model
    yield f"{run.size}\n{run.weights}", run.model
    for peer in run.args.beside:
        name, _, weights = peer.partition("=")
        yield f"{name}\n{'trained' if weights else 'at initialisation'}", _peer(name, weights, run.images)


def _one_line(name: str) -> str:
    return name.replace("\n", " ")


def _initialised(build: Callable[[], nn.Module]) -> nn.Module:
    """Return `build()`, run with a fixed seed. The random state of the process stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _peer(name: str, weights: str, images: Tensor) -> nn.Module:
    """A timm model, with random weights if no file of weights is given.

    Raises:
        UserError: there is no such model or file, or timm cannot make the model for these images and weights.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models(f"{name}*")[:3]
        raise UserError(f"--beside: timm has no model {name!r}" + (f"; it has {', '.join(close)}" if close else ""))
    if weights and not is_file(weights):
        raise UserError(f"{weights}: no such file of weights for {name}")
    arguments = {"img_size": tuple(images.shape[2:])} if name.startswith("swin") else {}
    if weights:  # `checkpoint_path` would not convert other parameter names or resize position tables
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    try:
        if weights and (classes := _classes_of(name, weights)):
            arguments["num_classes"] = arguments["pretrained_cfg_overlay"]["num_classes"] = classes
        return _initialised(lambda: timm.create_model(name, **arguments))
    except UserError:
        raise
    except Exception as error:  # timm's models and torch.load raise exceptions of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--beside {name}: cannot be made for these images and weights ({reason:.300})") from error


def _classes_of(name: str, weights: str) -> int | None:
    """The number of classes of a file of weights under timm's names; None if its head has another name.

    Raises:
        UserError: the file is damaged, its weights are no finite real numbers, or its objects claim more memory than it
            has data for.
    """
    # Before timm reads it without these checks; timm's train.py saves its arguments beside the weights.
    read_checkpoint(weights, stand_ins=(CFG_NODE, (argparse.Namespace, "argparse.Namespace")))
    head = timm.get_pretrained_cfg_value(name, "classifier")
    state = timm.models.load_state_dict(weights, weights_only=True)
    with torch.device("meta"):
        own = timm.create_model(name).state_dict()
    indices = {key for key, value in own.items() if _is_whole(value)}
    indices |= {key for key in state.keys() - own.keys() if key.endswith(INDICES)}  # timm renames or drops them
    passed = {key for key in indices & state.keys() if isinstance(state[key], Tensor) and _is_whole(state[key])}
    check_weights({key: value for key, value in state.items() if key not in passed}, weights, tied=True)
    bias = state.get(f"{head}.bias")  # a tuple of heads: none
    return None if bias is None else bias.shape[0]


def _is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _map_of_stride(model: nn.Module, stride: int, name: str) -> int:
    strides = [entry["reduction"] for entry in getattr(model, "feature_info", [])]
    if stride not in strides:
        raise UserError(f"--beside {_one_line(name)}: has no map of stride {stride}, only of {strides}")
    return len(strides) - 1 - strides[::-1].index(stride)


def _matrix(run: Run) -> Drawn:
    stage = run.stage(least=14)
    block = run.block(stage)
    channels = run.args.channels or None
    without, fused = [], []
    for batch in run.batches("matrix"):
        fixed = fixed_ssm(run.model, batch, stage, block, channels)
        query = checked_position(run.args.query, fixed.dt.shape[2:], f"the map of stage {stage}")
        without.append(fixed.row(query, fusion=False))
        fused.append(fixed.row(query))
    arrays = {"query": np.array(query), "scan": torch.cat(without).numpy(), "fused": torch.cat(fused).numpy()}
    which = f"channels {', '.join(map(str, channels))}" if channels else "all channels"
    title = f"What position {query[0]}, {query[1]} takes from the others: {run.size}, {run.weights}"
    title += f"\nstage {stage}, block {block}, {which}"
    stride = 2 ** (stage + 2)
    return draw_mixing(run.pictures, arrays["scan"], arrays["fused"], query, stride, title, run.names), arrays


def _cam(run: Run) -> Drawn:
    stage = run.stage(least=4)
    parts = zip(*(class_activation(run.model, batch, stage=stage) for batch in run.batches("cam")), strict=True)
    maps, classes, probabilities = (torch.cat(part).numpy() for part in parts)
    names = run.loaded.classes
    labels = [f"{names[c] if names else f'class {c}'}: {p[c]:.0%}" for c, p in zip(classes, probabilities, strict=True)]
    figure = draw_activation(
        run.pictures, maps, labels, f"Grad-CAM of {run.size}, {run.weights}: stage {stage}", run.names
    )
    return figure, {"maps": maps, "classes": classes, "probabilities": probabilities}


def _count(images: Tensor) -> str:
    return f"{len(images)} image{'s' if len(images) > 1 else ''}"


FIGURES: dict[str, Callable[[Run], Drawn]] = {"states": _states, "erf": _erf, "matrix": _matrix, "cam": _cam}


def load(source: str, weights: str = "model") -> Loaded:
    """Load a checkpoint's classifier, or make one of `VARIANTS` with a fixed initialisation.

    Raises:
        UserError: `source` is neither, the model does not take 3 channels, or `read_model` raises it.
    """
    if source in VARIANTS:
        model = _initialised(lambda: SpatialMamba(**VARIANTS[source])).eval()
        return Loaded(model, source, None, default_config(), False)
    if not is_file(source):
        raise UserError(f"{source}: no such checkpoint, nor one of the models {', '.join(VARIANTS)}")
    model, classes, config = read_model(source, weights)
    if model.in_chans != 3:
        raise UserError(f"{source}: takes images of {model.in_chans} channels, but figures need 3 channels")
    return Loaded(model, variant_of(model.state_dict()), classes, config, True)


def image_transform(config: CfgNode, size: int | str | None = None) -> Callable:
    """The evaluation transform of a config. `size` replaces the config's image size; "own" only normalises images."""
    if size == "own":
        normalise = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        return transforms.Compose([transforms.ToTensor(), normalise])
    if size is not None:
        config = config.clone()
        config.defrost()
        config.DATA.IMG_SIZE = size
    if config.DATA.IMG_SIZE > LARGEST_SIZE:
        raise UserError(
            f"the checkpoint is for images of {config.DATA.IMG_SIZE} pixels; pass --size, at most {LARGEST_SIZE}"
        )
    return eval_transform(config)


def read_images(paths: Sequence[str], transform: Callable) -> Tensor:
    """Normalised images (B, 3, H, W).

    Raises:
        UserError: there are no images, one cannot be read, or they differ in size.
    """
    if not paths:
        raise UserError("no images: name at least one after the model")
    images = [transform(read_image(path)) for path in paths]
    sizes = [tuple(image.shape[1:]) for image in images]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            own, first = (f"{height}x{width}" for height, width in (size, sizes[0]))
            raise UserError(f"{path}: is {own}, but {paths[0]} is {first}; pass --size with a number of pixels")
    return torch.stack(images)


def explain(args: argparse.Namespace) -> None:
    """Write the figures that `args` asks for.

    Raises:
        UserError: bad input of any kind.
    """
    wanted = args.figures or list(FIGURES)
    for path in args.images:
        if os.path.realpath(path) in {os.path.realpath(args.out / f"{name}.png") for name in wanted}:
            raise UserError(f"{path}: a figure of this name would be written over it; name another folder by --out")
    loaded = load(args.source, args.weights)
    images = read_images(args.images, image_transform(loaded.config, args.size))
    names = ["/".join(Path(path).with_suffix("").parts[-2:])[-16:] for path in args.images]
    run = Run(args, loaded, images, [picture_of(image) for image in images], names)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be made ({error}); name another folder") from error
    for name in wanted:
        if name == "cam" and not args.figures and (reason := no_class_activation(loaded.model)):
            print(printable(f"cam is not drawn: {reason}"))
            continue
        figure, arrays = FIGURES[name](run)
        _write(args.out, name, figure, arrays | {"images": images.numpy()})


def _write(folder: Path, name: str, figure: Figure, arrays: dict[str, np.ndarray]) -> None:
    for path, write in (
        (folder / f"{name}.png", lambda file: figure.savefig(file, format="png")),
        (folder / f"{name}.npz", lambda file: np.savez_compressed(file, **arrays)),
    ):
        write_atomically(path, write)
        print(printable(f"wrote {path}"))


def _size(text: str) -> int | str:
    if text == "own":
        return text
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"must be 'own' or a number of pixels up to {LARGEST_SIZE}, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"must be a number up to {LARGEST_PORT}, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line. `explain` takes the namespace that it returns."""
    found = argparse.ArgumentParser(
        prog="python -m classification.explain",
        description="Draw what a model sees in images, as PNG, and write the arrays as .npz.",
        allow_abbrev=False,
    )
    found.add_argument("source", metavar="CHECKPOINT|MODEL", help=f"a checkpoint, or one of {', '.join(VARIANTS)}")
    found.add_argument("images", nargs="*", metavar="IMAGE", help="image files; figures except erf have a row for each")
    found.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures")
    found.add_argument("--serve", action="store_true", help="instead of --out: serve a local page for dropped images")
    found.add_argument("--port", type=_port, help="port of the page; 0 takes any free port")
    found.add_argument("--figures", nargs="+", choices=tuple(FIGURES), help="by default all that can be drawn")
    found.add_argument("--weights", choices=("model", "model_ema"), default="model", help="weights of the checkpoint")
    found.add_argument(
        "--size", type=_size, help="image size: pixels, or 'own'; by default the checkpoint's evaluation size"
    )
    found.add_argument("--stage", type=int, help="by default the last stage whose map is large enough to see")
    found.add_argument("--block", type=int, default=-1, help="for states and matrix; by default the last of the stage")
    found.add_argument("--colour", choices=("mean", "pca"), default="mean", help="how states are coloured")
    found.add_argument("--channels", type=int, nargs="+", default=[], help="for states and matrix; by default all")
    found.add_argument("--query", type=int, nargs=2, metavar=("Y", "X"), help="position in the map, for matrix")
    found.add_argument("--position", type=int, nargs=2, metavar=("Y", "X"), help="position in the map, for erf")
    found.add_argument(
        "--beside", nargs="*", default=PEERS, metavar="NAME[=WEIGHTS]", help="timm models to draw beside it, for erf"
    )
    return found


def _serve(args: argparse.Namespace) -> None:
    from classification.explain import page  # not at the top: `page` imports this module

    loaded = load(args.source, args.weights)
    title = f"{loaded.size}, {Path(args.source).name if loaded.trained else 'at initialisation'}"
    page.serve(page.Viewer(loaded, args.size), title, page.PORT if args.port is None else args.port)


def _parse_args() -> argparse.Namespace:
    found = parser()
    args = found.parse_args()
    if args.serve and (args.images or args.out):
        found.error("--serve takes no images and no --out: you drop images on the page")
    if not args.serve and not args.out:
        found.error("--out DIR is needed for the figures, or --serve for the page")
    if not args.serve and args.port is not None:
        found.error("--port goes with --serve")
    return args


def main() -> None:
    args = _parse_args()
    prepare_console()
    try:
        (_serve if args.serve else explain)(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
