"""Models for tests, none of whose values is trivial."""

import torch
from torch import nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fusion kernels, alpha and batch norm statistics are constant at first; make every value matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if "state_fusion" in name or "running_mean" in name:
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        elif "running_var" in name:
            value.copy_(1 + torch.rand(value.shape, generator=generator))
    return model
