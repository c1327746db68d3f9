_base_ = "./mask_rcnn_spatialmamba_fpn_coco_tiny_3x.py"

model = dict(backbone=dict(depths=(2, 4, 21, 5), drop_path_rate=0.3))
