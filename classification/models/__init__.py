"""The Spatial-Mamba backbone."""

from classification.models.cpu import optimise_for_cpu, undo_optimise_for_cpu
from classification.models.registry import (
    spatialmamba_base,
    spatialmamba_micro,
    spatialmamba_small,
    spatialmamba_tiny,
)
from classification.models.spatialmamba import VARIANTS, SpatialMamba, SpatialMambaBackbone

__all__ = [
    "VARIANTS",
    "SpatialMamba",
    "SpatialMambaBackbone",
    "optimise_for_cpu",
    "spatialmamba_base",
    "spatialmamba_micro",
    "spatialmamba_small",
    "spatialmamba_tiny",
    "undo_optimise_for_cpu",
]
