"""State fusion of Spatial-Mamba, the depthwise convolutions around it and the MLP, as PyTorch operators."""

from dwconv2d import flops
from dwconv2d.decompositions import decompositions
from dwconv2d.loading import backends
from dwconv2d.mlp_ops import mlp
from dwconv2d.plane_ops import DilatedDWConv2d, dilated_dwconv2d, state_fusion, state_fusion_output
from dwconv2d.token_ops import depthwise_residual_norm, depthwise_silu

__all__ = [
    "DilatedDWConv2d",
    "backends",
    "decompositions",
    "depthwise_residual_norm",
    "depthwise_silu",
    "dilated_dwconv2d",
    "flops",
    "mlp",
    "state_fusion",
    "state_fusion_output",
]

__version__ = "0.1.0"  # pyproject.toml reads it
