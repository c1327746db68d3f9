"""State fusion of Spatial-Mamba and the dilated depthwise convolution under it, as PyTorch operators."""

from dwconv2d.loading import backends
from dwconv2d.ops import DilatedDWConv2d, dilated_dwconv2d, state_fusion, state_fusion_output

__all__ = ["DilatedDWConv2d", "backends", "dilated_dwconv2d", "state_fusion", "state_fusion_output"]

__version__ = "0.1.0"  # pyproject.toml reads it
