"""Write a checkpoint as an ONNX file or a program of torch.export, which runs without this repository.

    python -m classification.export ckpt.pth model.onnx
    python -m classification.export ckpt.pth model.pt2 --dynamic batch size

The input is images (batch, channels, height, width), normalised as in training; the output is logits. Standard
operators replace the operators of selective_scan and dwconv2d. Before the written file gets its name, it is run and
compared with the model. An existing file is not overwritten. ONNX needs the packages onnx, onnxscript and onnxruntime.
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
from classification.config import LARGEST_SIZE, trained_with
from classification.errors import UserError, check_utf8, prepare_console, printable
from classification.models import VARIANTS, SpatialMamba, undo_optimise_for_cpu

ONNX, PT2 = ".onnx", ".pt2"
NEEDED_FOR_ONNX = ("onnx", "onnxscript", "onnxruntime")
LARGEST, MOST = 8192, 1024  # pixels of a side, images of a batch
SMALLEST = 33  # pixels of a dynamic side: with fewer, the last map is a single token, which needs another graph
EXAMPLE = 64  # least pixels of a side when tracing with a dynamic size
TOLERANCE = 1e-4  # as a share of the largest logit
STEM = "patch_embed.conv1.conv.weight"  # its second dimension is the number of channels of the images


def export(model: SpatialMamba, size: int = 224, dynamic: Sequence[str] = (), strict: bool = False) -> ExportedProgram:
    """Export the model in evaluation mode with `torch.export`, decomposed into standard operators.

    Args:
        model: the model, also after `optimise_for_cpu`; afterwards its modules have the modes that they had.
        size: height and width of the images, 1 to `LARGEST`; `SMALLEST` to `LARGEST` if "size" is dynamic.
        dynamic: "batch", "size" or both: the program then takes 1 to `MOST` images, or sides of `SMALLEST` to `LARGEST`
            pixels.
        strict: as in `torch.export.export`.

    Raises:
        UserError: `size` is too small or too large.
    """
    smallest = SMALLEST if "size" in dynamic else 1
    if not smallest <= size <= LARGEST:
        other = " with --dynamic size" if "size" in dynamic else ""
        raise UserError(f"--size is {size}, but must be {smallest} to {LARGEST}{other}")
    dimensions = {0: Dim("batch", max=MOST)} if "batch" in dynamic else {}
    if "size" in dynamic:
        dimensions |= {2: Dim("height", min=SMALLEST, max=LARGEST), 3: Dim("width", min=SMALLEST, max=LARGEST)}
    # Dynamic height and width must differ in the example, or torch.export would treat them as one size.
    shape = (2 if "batch" in dynamic else 1, model.in_chans, size, size + 32 * ("size" in dynamic))
    # no_grad keeps the derivative of each scan out of the trace.
    with torch.no_grad(), _plain_layers(model), _in_evaluation(model):
        program = torch.export.export(model, (torch.zeros(shape),), dynamic_shapes=(dimensions,), strict=strict)
        return program.run_decompositions({**selective_scan.decompositions(), **dwconv2d.decompositions()})


@contextlib.contextmanager
def _in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _plain_layers(model: torch.nn.Module) -> Iterator[None]:
    """Replace the layers of `optimise_for_cpu` by PyTorch's own layers, and restore them afterwards.

    The layers of `optimise_for_cpu` choose their computation by size, so a traced graph would depend on the size.
    """
    classes = [(module, type(module)) for module in model.modules()]
    undo_optimise_for_cpu(model)
    try:
        yield
    finally:
        for module, its_class in classes:
            module.__class__ = its_class


def read_model(path: str | Path, weights: str = "model") -> tuple[SpatialMamba, list[str] | None, CfgNode]:
    """Read a checkpoint: return the classifier, the names of its classes or None, and the config of its evaluation.

    Raises:
        UserError: the checkpoint cannot be read, does not hold these weights, or fits none of `VARIANTS`.
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
    """Write a program of any model as ONNX: its input is `images`, its output `logits`; several are `output_0`, ..."""
    count = len(program.graph_signature.user_outputs)
    names = ["logits"] if count == 1 else [f"output_{i}" for i in range(count)]
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its steps
        onnx_program = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=names
        )
    onnx_program.model.metadata_props.update(metadata or {})
    onnx_program.save(target, external_data=False)


def write(program: ExportedProgram, target: Path, names: list[str] | None = None) -> Callable[[Tensor], Tensor]:
    """Write a program and its class names to `target`, .onnx or .pt2. Return a function that runs the file."""
    text = json.dumps(names or [])
    if target.suffix == PT2:
        content = io.BytesIO()  # on a full disk, torch.export's own writer aborts the process
        torch.export.save(program, content, extra_files={f"{CLASSES}.json": text})
        target.write_bytes(content.getbuffer())
        return torch.export.load(target).module()
    write_onnx(program, target, {CLASSES: text})
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def difference(model: SpatialMamba, run: Callable[[Tensor], Tensor], shapes: Sequence[tuple[int, ...]]) -> float:
    """Return the largest difference of logits on random images of these shapes, as a share of the largest logit.

    The result is infinite if a logit of the model or of `run` is not finite.
    """
    torch.manual_seed(0)
    largest = 0.0
    with torch.inference_mode():
        for shape in shapes:
            images = torch.randn(shape)
            expected = model(images)
            logits = run(images.clone())
            equal = torch.equal(logits, expected)  # all are 0 if the head is
            found = 0.0 if equal else ((logits - expected).abs().max() / expected.abs().max()).item()
            largest = max(largest, found if math.isfinite(found) else math.inf)
    return largest


def export_checkpoint(
    source: Path, target: Path, weights: str = "model", size: int | None = None, dynamic: Sequence[str] = ()
) -> float:
    """Write `weights` of `source` to `target`. Return the `difference` between the written file and the model.

    Without `size`, the images have the size that main.py trained the model on; for other checkpoints, 224.

    Raises:
        UserError: `source` cannot be read; `target` exists, is neither .onnx nor .pt2, or cannot be written; a package
            is missing; or the logits of the written file differ from the model's.
    """
    if target.suffix not in (ONNX, PT2):
        raise UserError(f"{target}: must end in {ONNX} or {PT2}")
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; remove it or name another file")
    check_utf8(target)
    if not target.parent.is_dir():  # an export takes minutes, so check this first
        raise UserError(f"{target}: cannot be written, for {target.parent} is no folder")
    missing = [name for name in NEEDED_FOR_ONNX if target.suffix == ONNX and find_spec(name) is None]
    if missing:
        raise UserError(f"{ONNX} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    model, names, config = read_model(source, weights)
    if size is None:
        if config.DATA.IMG_SIZE > LARGEST_SIZE:
            raise UserError(f"{source}: is for images of {config.DATA.IMG_SIZE} pixels; pass --size")
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
    """Silence the exporters' log messages and warnings about their own graphs; then let the process log as before."""
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
    prepare_console()
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
