"""Training and evaluation of Spatial-Mamba, and the backbone for detection and segmentation."""

__version__ = "0.1.0"  # pyproject.toml reads it
