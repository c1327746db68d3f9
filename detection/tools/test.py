"""Test a detector: python tools/test.py CONFIG CHECKPOINT [--show-dir DIR] [--out PKL] [--cfg-options K=V ...]"""

from classification.openmmlab.require import require

if __name__ == "__main__":
    require("mmdet")
    from classification.openmmlab.tools import test

    test("mmdet")
