"""The state scan of a selective state space model, as a PyTorch operator."""

from selective_scan.loading import backends
from selective_scan.ops import selective_scan_state

__all__ = ["backends", "selective_scan_state"]

__version__ = "0.1.0"  # pyproject.toml reads it
