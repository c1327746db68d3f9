"""AdamW with its parameter groups and saved moments, and the learning rate: per update, linear warm-up, then cosine."""

from collections import Counter
from itertools import chain, permutations

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW
from yacs.config import CfgNode

from classification.checkpoint import moment_like, squares_are_lost

REFERENCE_BATCH = 512  # the global batch that the config's learning rates are for


def build_optimizer(config: CfgNode, model: nn.Module, global_batch: int) -> AdamW:
    """Build AdamW. Only 1-D parameters and biases have no weight decay; `A_logs` and the fusion kernels have it."""
    return AdamW(
        param_groups_weight_decay(model, config.TRAIN.WEIGHT_DECAY),
        lr=config.TRAIN.BASE_LR * global_batch / REFERENCE_BATCH,
        betas=tuple(config.TRAIN.OPTIMIZER.BETAS),
        eps=config.TRAIN.OPTIMIZER.EPS,
        fused=True,  # makes the same update in one pass over each parameter
    )


def load_moments(optimizer: AdamW, saved: dict) -> None:
    """Load moments and step counts; learning rate, decay and other options stay as the present config sets them.

    The saved groups may have another order than ours, as the authors' groups do: each of our groups takes the saved
    group whose moments have the shapes of its parameters. Moments are copied to the layout of their parameter, because
    the fused update reads them in that layout without checking.

    Raises:
        ValueError: the groups or moments do not fit these parameters, are not dense, real and finite, or have been
            stored in a coarser dtype.
    """
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), t) for k, t in _OPTIMIZER_STATE.items()):
        raise ValueError("it is not {'state': {...}, 'param_groups': [...]}")
    state, groups = saved["state"], [_indices(group) for group in saved["param_groups"]]
    parameters = [group["params"] for group in optimizer.param_groups]
    if len(groups) != len(parameters):
        raise ValueError(f"it has {len(groups)} groups, not {len(parameters)}")
    if twice := [index for index, count in Counter(chain(*groups)).items() if count > 1]:
        raise ValueError(f"its groups list parameter {twice[0]} twice")
    in_order = next((g for g in permutations(groups) if _fit(g, parameters, state)), None)
    if in_order is None:
        _complain(groups, parameters, state)
    own = optimizer.state_dict()["param_groups"]
    indices = [i for group in in_order for i in group]
    moments = {
        index: {
            key: moment_like(_prototype(key, parameter), _value(key, state[index]), f"{key} of parameter {index}")
            for key in _MOMENTS
        }
        for index, parameter in zip(indices, (p for group in parameters for p in group), strict=True)
    }
    if odd := [m["step"].item() for m in moments.values() if not 0 <= m["step"] <= MOST_STEPS]:
        raise ValueError(f"a step count is {odd[0]:.6g}, not 0 to {MOST_STEPS}")
    if any(m["step"] == 0 and m["exp_avg_sq"].any() for m in moments.values()):
        raise ValueError("a step count is 0, but there are moments")
    if any((m["exp_avg_sq"] < 0).any() for m in moments.values()):
        raise ValueError("a mean of squared gradients (exp_avg_sq) is negative")
    if any(squares_are_lost(m["exp_avg"], m["exp_avg_sq"]) for m in moments.values()):
        raise ValueError("a mean of squared gradients (exp_avg_sq) is 0, but that of gradients (exp_avg) is not")
    new = [{**mine, "params": theirs} for mine, theirs in zip(own, in_order, strict=True)]
    optimizer.load_state_dict({"state": moments, "param_groups": new})


MOST_STEPS = 2**24  # PyTorch counts them in float32, which holds no odd number above
_OPTIMIZER_STATE = {"state": dict, "param_groups": list}
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _value(key: str, moments: dict) -> object:
    """Return a saved moment or step count; PyTorch before 1.12 saved step counts as plain numbers, not tensors."""
    value = moments[key]
    counted = key == "step" and type(value) in (int, float) and not abs(value) >= 2**63
    return torch.tensor(float(value)) if counted else value


def _prototype(key: str, parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros((), dtype=torch.float32, device=parameter.device) if key == "step" else parameter.detach()


def _indices(group: object) -> list[int]:
    indices = group.get("params") if isinstance(group, dict) else None
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise ValueError("a group of it has no list of parameters")
    return indices


def _fit(groups: tuple[list[int], ...], parameters: list[list[nn.Parameter]], state: dict) -> bool:
    """Return whether the moments of each saved group have the shapes of the parameters of our group at its place."""
    return all(
        len(indices) == len(ours) and all(_shape(state, i) == p.shape for i, p in zip(indices, ours, strict=True))
        for indices, ours in zip(groups, parameters, strict=True)
    )


def _shape(state: dict, index: int) -> torch.Size | None:
    moments = state.get(index)
    values = [moments.get(key) for key in _MOMENTS[1:]] if isinstance(moments, dict) else [None]
    dense = all(
        isinstance(value, torch.Tensor) and not value.is_nested for value in values
    )  # a nested one has no shape
    shapes = {value.shape for value in values} if dense else {None}
    return shapes.pop() if len(shapes) == 1 else None


def _complain(groups: list[list[int]], parameters: list[list[nn.Parameter]], state: dict) -> None:
    """Raise a ValueError that names the first moments that do not fit, in the order of groups in which most fit."""
    if sorted(map(len, groups)) != sorted(map(len, parameters)):
        raise ValueError(f"its groups have {[len(g) for g in groups]} parameters, not {[len(p) for p in parameters]}")
    best = max(permutations(groups), key=lambda order: sum(a == b for a, b in _shapes(order, parameters, state)))
    flat = [i for group in best for i in group]
    index = next(i for i, (a, b) in zip(flat, _shapes(best, parameters, state), strict=False) if a != b)
    raise ValueError(f"moments of parameter {index} are not of its shape")


def _shapes(groups: tuple[list[int], ...], parameters: list[list[nn.Parameter]], state: dict) -> list[tuple]:
    flat = [i for group in groups for i in group], [p for group in parameters for p in group]
    return [(_shape(state, i), p.shape) for i, p in zip(*flat, strict=False)]


def build_scheduler(config: CfgNode, optimizer: AdamW, global_batch: int, updates_per_epoch: int) -> CosineLRScheduler:
    """Build the schedule: linear warm-up from WARMUP_LR over WARMUP_EPOCHS, then one cosine to MIN_LR, per update.

    Update k uses the schedule's rate at max(k - 1, 0), as in the authors' code, which steps the schedule after each
    update with the number of that update.
    """
    scale = global_batch / REFERENCE_BATCH
    warmup = config.TRAIN.WARMUP_EPOCHS * updates_per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=config.TRAIN.EPOCHS * updates_per_epoch - warmup,
        lr_min=config.TRAIN.MIN_LR * scale,
        warmup_lr_init=config.TRAIN.WARMUP_LR * scale,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
