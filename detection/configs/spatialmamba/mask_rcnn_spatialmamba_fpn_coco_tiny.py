# Mask R-CNN, Spatial-Mamba-T, 1x: the schedule, augmentation and optimiser are those of mmdet's Swin-T config.
# Start from ImageNet weights: --cfg-options model.backbone.pretrained=CHECKPOINT
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

custom_imports = dict(imports=["classification.models.openmmlab"], allow_failed_imports=False)

pretrained = None  # the base's is Swin's
model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_SpatialMamba",
        dims=64,
        depths=(2, 4, 8, 4),
        d_state=1,
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        pretrained=pretrained,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys={"norm": dict(decay_mult=0.0)}))

# Each GPU has its own batch norm statistics: their mean is what is validated and saved. And a NaN loss ends the run.
custom_hooks = [dict(type="SyncBuffersHook"), dict(type="CheckInvalidLossHook", interval=50)]
