"""Shows what a model sees: states before and after fusion, effective receptive fields, its matrix, class activation.

    python -m classification.explain output/spatialmamba_micro/digits/best.pth image.png --out figures
    python -m classification.explain spatialmamba_tiny *.jpg --out figures --figures states erf --size own
    python -m classification.explain output/spatialmamba_micro/digits/best.pth --serve

The first two commands write one PNG and one .npz of arrays for each of `FIGURES`. The third serves a local page. The
first argument is a checkpoint, or the name of a size, which is drawn at its initialisation. The functions take images
of any size and leave the model as it was: they add hooks to plain modules, remove them, and run in evaluation mode.
"""

from classification.explain.command import FIGURES, Loaded, image_transform, load, main
from classification.explain.compute import (
    FixedSSM,
    States,
    area_holding,
    backbone_of,
    block_at,
    class_activation,
    effective_receptive_field,
    fixed_ssm,
    last_stage,
    mixing_matrix,
    mixing_row,
    no_class_activation,
    states,
    states_at,
)
from classification.explain.drawing import (
    Picture,
    draw_activation,
    draw_mixing,
    draw_receptive_fields,
    draw_states,
    picture_of,
)

__all__ = [
    "FIGURES",
    "FixedSSM",
    "Loaded",
    "Picture",
    "States",
    "area_holding",
    "backbone_of",
    "block_at",
    "class_activation",
    "draw_activation",
    "draw_mixing",
    "draw_receptive_fields",
    "draw_states",
    "effective_receptive_field",
    "fixed_ssm",
    "image_transform",
    "last_stage",
    "load",
    "main",
    "mixing_matrix",
    "mixing_row",
    "no_class_activation",
    "picture_of",
    "states",
    "states_at",
]
