"""Train a segmenter: python tools/train.py CONFIG [--work-dir DIR] [--resume [CKPT]] [--amp] [--cfg-options K=V ...]"""

from classification.openmmlab.require import require

if __name__ == "__main__":
    require("mmseg")
    from classification.openmmlab.tools import train

    train("mmseg")
