"""Print a detector's parameters and FLOPs: python tools/get_flops.py CONFIG [--shape 1280 800]"""

from classification.openmmlab.require import require

if __name__ == "__main__":
    require("mmdet")
    from classification.openmmlab.tools import get_flops

    get_flops("mmdet", (1280, 800))
