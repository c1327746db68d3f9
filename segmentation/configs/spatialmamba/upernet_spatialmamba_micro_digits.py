# UPerNet on digits scenes, from scratch, in minutes on a CPU:
# python -m classification.data.digits_scenes DATA_ROOT --layout ade20k
_base_ = "./upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny.py"

classes = ("background", *"0123456789")
palette = [(0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48)]
palette += [(145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212)]
size = (128, 128)
batch_norm = dict(type="BN")
# Six sevenths of the pixels are background; digits are learned in minutes if they weigh as much.
loss = dict(class_weight=[0.1] + [1.0] * (len(classes) - 1))

model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(dims=16, depths=(1, 1, 2, 1), drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[16, 32, 64, 128], channels=64, num_classes=len(classes), norm_cfg=batch_norm, loss_decode=loss
    ),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=len(classes), norm_cfg=batch_norm, loss_decode=loss),
)

data_root = "data/digits_scenes_ade20k/"
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", reduce_zero_label=False)]
train_pipeline = [
    *load,
    dict(type="CheckLabels", num_classes=len(classes)),
    dict(type="RandomResize", scale=size, ratio_range=(1.0, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=size),
    dict(type="PackSegInputs"),  # no flips: digits have none
]
test_pipeline = [load[0], dict(type="Resize", scale=size, keep_ratio=True), load[1], dict(type="PackSegInputs")]
tta_pipeline = [
    load[0],
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(int(128 * r), int(128 * r)), keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [load[1]],
            [dict(type="PackSegInputs")],
        ],
    ),
]
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=False,
)
train_dataloader = dict(batch_size=8, num_workers=2, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(batch_size=1, num_workers=2, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=30, end=max_iters, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=dict(max_norm=5.0))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=200, max_keep_ckpts=2))
steps = ["classification.openmmlab.transforms", "classification.openmmlab.drawing_mmseg"]
custom_imports = dict(imports=["classification.models.openmmlab", *steps])
visualizer = dict(type="EnlargedSegVisualizer", alpha=0.3, background=0)  # label 0 gets neither colour nor name
randomness = dict(seed=0)
