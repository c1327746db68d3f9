"""Test a segmenter: python tools/test.py CONFIG CHECKPOINT [--tta] [--show-dir DIR] [--out DIR] [--cfg-options ...]"""

from classification.openmmlab.require import require

if __name__ == "__main__":
    require("mmseg")
    from classification.openmmlab.tools import test

    test("mmseg")
