"""AdamW with its parameter groups, and the learning rate: linear warm-up, then cosine, stepped every update."""

from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW
from yacs.config import CfgNode

REFERENCE_BATCH = 512  # the global batch that the config's learning rates are for


def build_optimizer(config: CfgNode, model: nn.Module, global_batch: int) -> AdamW:
    """AdamW. Weight decay spares 1-D parameters and biases, so `A_logs` and the fusion kernels do decay."""
    return AdamW(
        param_groups_weight_decay(model, config.TRAIN.WEIGHT_DECAY),
        lr=config.TRAIN.BASE_LR * global_batch / REFERENCE_BATCH,
        betas=tuple(config.TRAIN.OPTIMIZER.BETAS),
        eps=config.TRAIN.OPTIMIZER.EPS,
        fused=True,  # the same update in one pass over each parameter
    )


def build_scheduler(config: CfgNode, optimizer: AdamW, global_batch: int, updates_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up from WARMUP_LR over WARMUP_EPOCHS, then one cosine to MIN_LR, by update and not by epoch."""
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
