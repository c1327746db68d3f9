"""The state scan of a selective state space model and the gated norm after it, as PyTorch operators."""

from selective_scan import flops
from selective_scan.decompositions import decompositions
from selective_scan.gate_ops import norm_gate
from selective_scan.loading import backends
from selective_scan.scan_ops import selective_scan_state

__all__ = ["backends", "decompositions", "flops", "norm_gate", "selective_scan_state"]

__version__ = "0.1.0"  # pyproject.toml reads it
