# ImageNet-1K with mmpretrain, 8 GPUs with 128 images each: the recipe of configs/spatialmamba as far as it goes there.
# Crops, RandAugment, erasing, mixup, cutmix, label smoothing and AdamW are those of its Swin-T config.
# What it has not: MESA, the loss from the EMA model's softmax. Mixed precision is its --amp. Batch norm is each GPU's
# own, and its statistics are averaged before validation, as by main.py; sync_bn="torch" has it synchronised. The EMA
# model has the model's latest statistics; main.py averages them over time, as it averages the weights.
_base_ = "mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"

custom_imports = dict(imports=["classification.models.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_SpatialMamba",
        dims=64,
        depths=(2, 4, 8, 4),
        d_state=1,
        drop_path_rate=0.2,
        out_indices=(3,),  # its norm is the one before pooling
    ),
    head=dict(in_channels=512),
)
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    # Decay for all but biases and 1-D parameters.
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    # By iteration, where the base has it by epoch. Its end is that of train_cfg.max_epochs: change both.
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
custom_hooks = [dict(type="AverageBatchNorm"), dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL")]
