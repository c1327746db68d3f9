_base_ = "./upernet_spatialmamba_4xb4-160k_ade20k-512x512_tiny.py"

model = dict(backbone=dict(depths=(2, 4, 21, 5), drop_path_rate=0.3))
