# UPerNet, Spatial-Mamba-T: schedule, augmentation and optimiser are those of mmseg's Swin-T config.
# The published name says 4 GPUs with 4 images each; here, as in the recipe, it is 8 with 2: the same 16.
# Start from ImageNet weights: --cfg-options model.backbone.pretrained=CHECKPOINT
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(
    imports=["classification.models.openmmlab", "classification.openmmlab.transforms"], allow_failed_imports=False
)

checkpoint_file = None  # the base's is Swin's
model = dict(
    backbone=dict(
        _delete_=True,
        type="MM_SpatialMamba",
        dims=64,
        depths=(2, 4, 8, 4),
        d_state=1,
        drop_path_rate=0.2,
        out_indices=(0, 1, 2, 3),
        pretrained=None,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys={"norm": dict(decay_mult=0.0)}))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="CheckLabels", num_classes=150),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# Multi-scale testing, --tta: the mean over three scales of the single-scale size, each flipped and not.
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(int(2048 * r), int(512 * r)), keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [dict(type="RandomFlip", prob=p, direction="horizontal") for p in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]

# Each GPU has its own batch norm statistics in the backbone: their mean is what is validated, and saved.
custom_hooks = [dict(type="AverageBatchNorm")]
