"""Convert weights from a checkpoint to a safetensors file, back, and to mmpretrain.

    python -m classification.convert ckpt.pth weights.safetensors [--weights model_ema]
    python -m classification.convert weights.safetensors weights.pth
    python -m classification.convert ckpt.pth mmpretrain.pth --to mmpretrain

The safetensors file holds one set of weights, the names of their classes, the size of the images and the like, and a
digest of all these, which is compared when the file is read. The .pth file holds the same except the digest, as
{"model": state dict, ...}; `--pretrained` of main.py takes both files. For mmpretrain, the .pth file holds
{"state_dict": ...} with the names of `configs/mmpretrain`. An existing file is not overwritten.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from safetensors.torch import save as safetensors_bytes

from classification.checkpoint import (
    CLASSES,
    SAFETENSORS,
    StateDict,
    class_names_of,
    read_checkpoint,
    save_checkpoint,
    state_dicts,
    tensors_digest,
    write_atomically,
)
from classification.config import CfgNode, evaluation_config_text, trained_with
from classification.errors import UserError, check_utf8, prepare_console, printable

MMPRETRAIN = "mmpretrain"
THEIRS = {"DATA.IMG_SIZE": 224, "DATA.INTERPOLATION": "bicubic", "TEST.CROP_PCT": 0.875}  # of configs/mmpretrain


def to_mmpretrain(state: StateDict) -> StateDict:
    """Rename a classifier's weights for mmpretrain's ImageClassifier.

    In mmpretrain, the norm before pooling is the norm of the backbone's only map, and the head is LinearClsHead's `fc`.
    """
    names = {"norm.": "backbone.outnorm3.", "head.": "head.fc."}

    def renamed(key: str) -> str:
        part = next((part for part in names if key.startswith(part)), "")
        return names.get(part, "backbone.") + key.removeprefix(part)

    return {renamed(key): value for key, value in state.items()}


def convert(source: Path, target: Path, weights: str = "model", to: str | None = None) -> int:
    """Write `weights` ("model" or "model_ema") of `source` to `target`. Return the number of tensors.

    Raises:
        UserError: `source` cannot be read or lacks these weights; `target` exists or is neither .safetensors nor .pth.
    """
    if target.suffix not in (SAFETENSORS, ".pth") or (to and target.suffix != ".pth"):
        raise UserError(f"{target}: must end in {'' if to else f'{SAFETENSORS} or '}.pth")
    if target.suffix == SAFETENSORS:
        check_utf8(target)  # or nothing reads it
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; remove it or name another file")
    content = read_checkpoint(source)
    found, names = state_dicts(content, source), class_names_of(content, source)
    config = evaluation_config_text(content, source)
    if weights not in found:
        raise UserError(f"{source}: holds no {weights}, only {', '.join(found)}")
    state = {name: tensor.resolve_conj().resolve_neg().contiguous().clone() for name, tensor in found[weights].items()}
    if target.suffix == SAFETENSORS:
        classes = {} if names is None else {CLASSES: json.dumps(names)}
        texts = classes | ({} if config is None else {"config": config})
        metadata = {"format": "pt", **texts, "sha256": tensors_digest(state, "".join(texts.values()))}
        write_atomically(target, lambda file: file.write(safetensors_bytes(state, metadata)))
    elif to == MMPRETRAIN:
        _say_how_evaluated(trained_with(content, str(source)))
        meta = {} if names is None else {"dataset_meta": {CLASSES: names}}
        save_checkpoint({"meta": meta, "state_dict": to_mmpretrain(state)}, target)
    else:
        further = {CLASSES: names, "config": config}
        save_checkpoint({"model": state} | {key: value for key, value in further.items() if value is not None}, target)
    return len(state)


def _say_how_evaluated(config: CfgNode) -> None:
    """Print the evaluation settings that differ from mmpretrain's configs, which are for the published weights.

    mmpretrain's checkpoints have no place for these settings.
    """
    images = {"DATA.IMG_SIZE": config.DATA.IMG_SIZE, "DATA.INTERPOLATION": config.DATA.INTERPOLATION}
    found = images | {"TEST.CROP_PCT": config.TEST.CROP_PCT}
    others = [f"{key} {found[key]} ({value} there)" for key, value in THEIRS.items() if found[key] != value]
    if others:
        text = (
            f"evaluated with {', '.join(others)}, which the file does not say: set them in the test pipeline of "
            f"mmpretrain's config, whose values are those of configs/{MMPRETRAIN}"
        )
        print(printable(text))


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert weights between .pth and .safetensors.", allow_abbrev=False)
    parser.add_argument("source", type=Path, help="checkpoint or safetensors file")
    parser.add_argument("target", type=Path, help="file to write, .safetensors or .pth")
    parser.add_argument("--weights", choices=("model", "model_ema"), default="model", help="which of a checkpoint's")
    parser.add_argument("--to", choices=(MMPRETRAIN,), help="by whose names; ours by default")
    args = parser.parse_args()
    prepare_console()
    try:
        count = convert(args.source, args.target, args.weights, args.to)
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    print(printable(f"wrote {args.target}: {count} tensors of {args.weights}"))


if __name__ == "__main__":
    main()
