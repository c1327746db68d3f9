"""Print a segmenter's parameters and FLOPs: python tools/get_flops.py CONFIG [--shape 512 2048]"""

from classification.openmmlab.require import require

if __name__ == "__main__":
    require("mmseg")
    from classification.openmmlab.tools import get_flops

    get_flops("mmseg", (512, 2048))
