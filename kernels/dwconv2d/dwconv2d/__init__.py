"""State fusion of Spatial-Mamba and the dilated depthwise convolution under it, as PyTorch operators."""

from dwconv2d.ops import dilated_dwconv2d, state_fusion, state_fusion_output

__all__ = ["dilated_dwconv2d", "state_fusion", "state_fusion_output"]
