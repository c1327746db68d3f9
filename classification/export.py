"""A checkpoint as an ONNX file, or as a program of torch.export, that needs nothing of this repository to run.

    python -m classification.export ckpt.pth model.onnx
    python -m classification.export ckpt.pth model.pt2 --dynamic batch size

The input is images (batch, channels, height, width), normalised as in training; the output is logits. The operators of
selective_scan and dwconv2d are written out in standard ones. What was written is run, and compared with the model,
before it gets its name. An existing file is not overwritten. ONNX needs the packages onnx, onnxscript and onnxruntime.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import dwconv2d
import selective_scan
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from yacs.config import CfgNode

from classification.checkpoint import (
    CLASSES,
    class_names_of,
    load_weights,
    num_classes,
    read_checkpoint,
    state_dicts,
    variant_of,
)
from classification.config import trained_with
from classification.errors import UserError, escape_on_streams, printable
from classification.models import VARIANTS, SpatialMamba, undo_optimise_for_cpu

ONNX, PT2 = ".onnx", ".pt2"
NEEDED_FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")
LARGEST, MOST = 8192, 1024  # pixels of a side, images of a batch
SMALLEST = 33  # pixels of a side that may be chosen: below, the last map is one token, another graph
EXAMPLE = 64  # pixels, to trace what a checkpoint of smaller images does with any size
TOLERANCE = 1e-4  # of the largest logit
STEM = "patch_embed.conv1.conv.weight"  # whose second size is the images' channels


def export(model: SpatialMamba, size: int = 224, dynamic: Sequence[str] = (), strict: bool = False) -> ExportedProgram:
    """`torch.export` of the model in evaluation mode, decomposed into standard operators.

    Args:
        model: any form of it, after `optimise_for_cpu` too; left in evaluation mode.
        size: height and width of the images, 1 to `LARGEST`; `SMALLEST` to `LARGEST` if "size" is dynamic.
        dynamic: of "batch" and "size", what a user may choose: 1 to `MOST` images, `SMALLEST` to `LARGEST` pixels.
        strict: as of `torch.export.export`.

    Raises:
        UserError: images that are too small or too large.
    """
    smallest = SMALLEST if "size" in dynamic else 1
    if not smallest <= size <= LARGEST:
        other = " with --dynamic size" if "size" in dynamic else ""
        raise UserError(f"--size is {size}, but must be {smallest} to {LARGEST}{other}")
    dimensions = {0: Dim("batch", max=MOST)} if "batch" in dynamic else {}
    if "size" in dynamic:
        dimensions |= {2: Dim("height", min=SMALLEST, max=LARGEST), 3: Dim("width", min=SMALLEST, max=LARGEST)}
    # Sizes that differ, for equal ones would be taken for one; but what is fixed is as asked for.
    shape = (2 if "batch" in dynamic else 1, model.in_chans, size, size + 32 * ("size" in dynamic))
    # Without the derivative of each scan, which would be traced as well.
    with torch.no_grad(), _plain_layers(model):
        program = torch.export.export(model.eval(), (torch.zeros(shape),), dynamic_shapes=(dimensions,), strict=strict)
        return program.run_decompositions({**selective_scan.decompositions(), **dwconv2d.decompositions()})


@contextlib.contextmanager
def _plain_layers(model: torch.nn.Module) -> Iterator[None]:
    """PyTorch's own layers, and those of `optimise_for_cpu` again after: these choose by size, so a graph would too."""
    classes = [(module, type(module)) for module in model.modules()]
    undo_optimise_for_cpu(model)
    try:
        yield
    finally:
        for module, its_class in classes:
            module.__class__ = its_class


def read_model(path: str | Path, weights: str = "model") -> tuple[SpatialMamba, list[str] | None, CfgNode]:
    """The classifier that a checkpoint is of, the names of its classes if it has them, and how it was evaluated.

    Raises:
        UserError: it cannot be read, does not hold these weights, or is of none of `VARIANTS`.
    """
    content = read_checkpoint(path)
    found = state_dicts(content, path)
    if weights not in found:
        raise UserError(f"{path}: holds no {weights}, only {', '.join(found)}")
    state = found[weights]
    stem = state.get(STEM)
    in_chans = max(1, stem.shape[1]) if stem is not None and stem.dim() == 4 else 3
    name = variant_of(state, in_chans)
    if name is None:
        raise UserError(f"{path}: is of none of the sizes {', '.join(VARIANTS)}")
    model = SpatialMamba(in_chans, num_classes=num_classes(state) or 0, **VARIANTS[name])
    load_weights(model, state, path)
    return model.eval(), class_names_of(content, path), trained_with(content, str(path))


def write_onnx(program: ExportedProgram, target: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a program of any model as ONNX, with inputs `images` and outputs `logits`."""
    with contextlib.redirect_stdout(io.StringIO()):  # its exporter reports its steps
        onnx_program = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
        )
    onnx_program.model.metadata_props.update(metadata or {})
    onnx_program.save(target, external_data=False)


def write(program: ExportedProgram, target: Path, names: list[str] | None = None) -> Callable[[Tensor], Tensor]:
    """Write a program to `target`, .onnx or .pt2, with the names of its classes; returns what runs the file."""
    text = json.dumps(names or [])
    if target.suffix == PT2:
        torch.export.save(program, target, extra_files={f"{CLASSES}.json": text})
        return torch.export.load(target).module()
    write_onnx(program, target, {CLASSES: text})
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def difference(model: SpatialMamba, run: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, ...]]) -> float:
    """The largest difference of logits on random images of these shapes, as a share of the largest logit.

    Infinite where a logit of either is not finite.
    """
    torch.manual_seed(0)
    largest = 0.0
    with torch.inference_mode():
        for shape in shapes:
            images = torch.randn(shape)
            expected = model(images)
            found = ((run(images.clone()) - expected).abs().max() / expected.abs().max()).item()
            largest = max(largest, found if math.isfinite(found) else math.inf)
    return largest


def export_checkpoint(
    source: Path, target: Path, weights: str = "model", size: int | None = None, dynamic: Sequence[str] = ()
) -> float:
    """Write `weights` of `source` to `target`; returns the largest difference from the model, relative.

    Without `size`, the images are of the size that main.py trained it on; of other checkpoints, 224.

    Raises:
        UserError: `source` cannot be read; `target` exists, is neither .onnx nor .pt2, or cannot be written; a package
            is missing; or what was written computes something else.
    """
    if target.suffix not in (ONNX, PT2):
        raise UserError(f"{target}: must end in {ONNX} or {PT2}")
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; remove it or name another file")
    if not target.parent.is_dir():  # asked before the minutes of an export
        raise UserError(f"{target}: cannot be written, for {target.parent} is no folder")
    missing = [name for name in NEEDED_FOR_ONNX if target.suffix == ONNX and find_spec(name) is None]
    if missing:
        raise UserError(f"{ONNX} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    model, names, config = read_model(source, weights)
    if size is None:
        size = max(config.DATA.IMG_SIZE, EXAMPLE) if "size" in dynamic else config.DATA.IMG_SIZE
    program = export(model, size, dynamic)
    shapes = [(1, model.in_chans, size, size)]
    if dynamic:
        height, width = (size + 23, size + 6) if "size" in dynamic else (size, size)
        shapes.append((3 if "batch" in dynamic else 1, model.in_chans, height, width))
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            written = Path(folder, target.name)
            found = difference(model, write(program, written, names), shapes)
            if not found <= TOLERANCE:
                raise UserError(f"{target}: not written, for it differs from the model by {found:.1e}")
            written.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error})") from error
    return found


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps quiet what the exporters log and warn of their own graphs; afterwards the process logs as before."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint as ONNX or torch.export's program.", allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="checkpoint or safetensors file")
    parser.add_argument("target", type=Path, help=f"file to write, {ONNX} or {PT2}")
    parser.add_argument("--weights", choices=("model", "model_ema"), default="model", help="which of a checkpoint's")
    parser.add_argument("--size", type=int, help="height and width of the images; as trained, or else 224")
    parser.add_argument("--dynamic", nargs="+", choices=("batch", "size"), default=(), help="what may be others later")
    args = parser.parse_args()
    escape_on_streams()
    try:
        with _without_remarks():
            found = export_checkpoint(args.source, args.target, args.weights, args.size, args.dynamic)
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    print(
        printable(
            f"wrote {args.target}, of {args.weights}: its logits differ from the model's by {found:.1e} of the largest"
        )
    )


if __name__ == "__main__":
    main()
