"""The Spatial-Mamba backbone."""

from classification.models.spatialmamba import (
    VARIANTS,
    SpatialMamba,
    SpatialMambaBackbone,
    spatialmamba_base,
    spatialmamba_micro,
    spatialmamba_small,
    spatialmamba_tiny,
)

__all__ = [
    "VARIANTS",
    "SpatialMamba",
    "SpatialMambaBackbone",
    "spatialmamba_base",
    "spatialmamba_micro",
    "spatialmamba_small",
    "spatialmamba_tiny",
]
