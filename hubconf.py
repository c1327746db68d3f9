"""Models for `torch.hub.load(PATH, "spatialmamba_tiny", source="local", pretrained="/path/to/checkpoint.pth")`."""

dependencies = ["torch", "timm", "selective_scan", "dwconv2d"]

from classification.models import (  # noqa: E402, F401
    spatialmamba_base,
    spatialmamba_micro,
    spatialmamba_small,
    spatialmamba_tiny,
)
