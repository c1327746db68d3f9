_base_ = "./spatialmamba_tiny_8xb128_in1k.py"

model = dict(backbone=dict(dims=96, depths=(2, 4, 21, 5), drop_path_rate=0.5), head=dict(in_channels=768))
