"""mmcv's operators on mmcv-lite, by what they compute; full mmcv passes the same comparisons."""

import importlib.machinery
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT

pytest.importorskip("mmcv", reason="make install-openmmlab")
import mmcv
from mmcv import _ext
from mmcv.ops import ModulatedDeformConv2d, RoIAlign, batched_nms, modulated_deform_conv2d, nms, roi_align

from classification.errors import UserError
from classification.openmmlab import require
from classification.openmmlab.checks import check_operators

LITE = hasattr(_ext, "INSTALL_FULL")
only_lite = pytest.mark.skipif(not LITE, reason="full mmcv is installed")
FOLDER = ROOT / "classification/openmmlab/mmcv_ext"


def random_boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * 12
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * 20], dim=1)


def kept(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int) -> list[int]:
    """By the definition, one box after the other."""
    left = []
    for i in scores.argsort(descending=True).tolist():
        for j in left:
            size = (
                torch.minimum(boxes[i, 2:], boxes[j, 2:]) - torch.maximum(boxes[i, :2], boxes[j, :2]) + offset
            ).clamp(0)
            areas = [(boxes[k, 2:] - boxes[k, :2] + offset).prod() for k in (i, j)]
            if size.prod() / (sum(areas) - size.prod()) > threshold:
                break
        else:
            left.append(i)
    return left


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_nms(threshold, offset):
    torch.manual_seed(offset)
    boxes, scores = random_boxes(80), torch.rand(80)
    found, indices = nms(boxes, scores, threshold, offset=offset)
    expected = kept(boxes, scores, threshold, offset)
    assert 5 < len(expected) < 80
    assert indices.tolist() == expected
    assert torch.equal(found, torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_at_the_threshold():
    """The threshold is a float32, as mmcv's is: an overlap of as much is not above it, and the box stays."""
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])  # IoU 0.3, in float32 above 0.3
    assert (torch.tensor(3.0) / 10).item() > 0.3
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.3)[1].tolist() == [0, 1]


def test_nms_of_nothing_of_classes_and_of_16_bits():
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5)[1].shape == (0,)
    boxes, scores = random_boxes(30), torch.rand(30)
    classes = torch.arange(30) % 3
    _, found = batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.4))
    for c in range(3):
        own = (classes == c).nonzero()[:, 0]
        assert [i for i in found.tolist() if i % 3 == c] == own[kept(boxes[own], scores[own], 0.4, 0)].tolist()
    if LITE:  # full mmcv has none
        assert torch.equal(nms(boxes, scores.bfloat16(), 0.4)[1], nms(boxes, scores.bfloat16().float(), 0.4)[1])


def averages(maps, rois, size, scale, ratio, aligned):
    """RoIAlign by its definition: the mean of bilinear samples in each bin of each RoI."""
    height, width = maps.shape[2:]
    result = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - 0.5 * aligned for corner in corners)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        bins = []
        for row in range(size):
            for column in range(size):
                ny, nx = (ratio or -(-h // size), ratio or -(-w // size))
                total = 0
                for iy in range(int(ny)):
                    for ix in range(int(nx)):
                        y = y1 + (row + (iy + 0.5) / ny) * h / size
                        x = x1 + (column + (ix + 0.5) / nx) * w / size
                        if -1 <= y <= height and -1 <= x <= width:
                            total = total + bilinear(maps[int(image)], max(y, 0), max(x, 0))
                bins.append(total / (ny * nx) + torch.zeros(maps.shape[1], dtype=maps.dtype))
        result.append(torch.stack(bins, 1).view(-1, size, size))
    return torch.stack(result)


def bilinear(plane, y, x):
    top, left = min(int(y), plane.shape[1] - 1), min(int(x), plane.shape[2] - 1)
    bottom, right = min(top + 1, plane.shape[1] - 1), min(left + 1, plane.shape[2] - 1)
    dy, dx = (y - top) * (bottom > top), (x - left) * (right > left)
    upper = plane[:, top, left] * (1 - dx) + plane[:, top, right] * dx
    lower = plane[:, bottom, left] * (1 - dx) + plane[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(ratio, aligned):
    """Values and gradients against the definition, in float64."""
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 12, 9, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(
        [[0, 1, 2, 20, 30], [1, 5.5, 0.25, 17.5, 11], [1, -4, -4, 50, 60], [0, 8, 8, 8.5, 8.5]]
    ).double()
    ours = RoIAlign(3, spatial_scale=0.25, sampling_ratio=ratio, aligned=aligned)(maps, rois)
    expected = averages(maps, rois, 3, 0.25, ratio, aligned)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(ours)
    actual, exact = (torch.autograd.grad((result * weights).sum(), maps)[0] for result in (ours, expected))
    torch.testing.assert_close(actual, exact)


@only_lite
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_roi_align_of_16_bits(dtype, autocast):
    """mmdet hands maps and RoIs of 16 bits over under AMP; what is returned is the rounded result of float32."""
    maps = torch.randn(1, 4, 16, 16).to(dtype).requires_grad_()
    rois = torch.tensor([[0, 3, 3, 40, 50.0]]).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = roi_align(maps, rois, 7, 0.25, 0)
    assert ours.dtype == dtype
    exact = maps.detach().float().requires_grad_()
    expected = roi_align(exact, rois.float(), 7, 0.25, 0)
    assert torch.equal(ours, expected.to(dtype))
    ours.float().square().sum().backward()
    (expected.to(dtype).float().square().sum()).backward()
    assert torch.equal(maps.grad, exact.grad.to(dtype))


@only_lite
def test_what_is_missing_is_named():
    maps, rois = torch.randn(1, 4, 8, 8), torch.tensor([[0, 1, 1, 6, 6.0]])
    with pytest.raises(NotImplementedError, match=r"roi_align with pool_mode='max': install full mmcv: pip uninstall"):
        roi_align(maps, rois, 2, 1.0, 0, "max")
    layer = ModulatedDeformConv2d(4, 4, 3, padding=1)
    offset, mask = torch.zeros(1, 18, 8, 8), torch.ones(1, 9, 8, 8)
    with pytest.raises(NotImplementedError, match="no operator modulated_deform_conv_forward of mmcv's: install full"):
        modulated_deform_conv2d(maps, offset, mask, layer.weight, layer.bias, 1, 1)
    with pytest.raises(
        UserError, match=r"model\.1 is a ModulatedDeformConv2d, which mmcv-lite has no operator for; inst"
    ):
        check_operators(torch.nn.Sequential(RoIAlign(7), layer))
    check_operators(torch.nn.Sequential(RoIAlign(7)))


def test_full_mmcv_goes_first(tmp_path):
    """Python's own order: what is compiled before what is not."""
    compiled = tmp_path / f"_ext{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    for path in (tmp_path / "_ext.py", compiled):
        path.touch()
    assert importlib.machinery.PathFinder.find_spec("_ext", [str(tmp_path)]).origin == str(compiled)


def test_the_wheel_is_one_file(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--target", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, FOLDER], check=True, env={"PATH": ""})
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")]
    assert files == ["mmcv/_ext.py"]


def test_old_and_new_mmcv_side_by_side(monkeypatch):
    versions = {"mmcv-full": "1.7.2", "mmcv-lite": "2.1.0"}

    def version(name):
        if name in versions:
            return versions[name]
        raise require.PackageNotFoundError(name)

    monkeypatch.setattr(require, "version", version)
    with pytest.raises(
        SystemExit, match=r"^error: mmcv-lite 2\.1\.0 and mmcv-full 1\.7\.2 lie in one folder: pip uninst"
    ):
        require.require("mmdet")
    versions["mmcv-full"] = "2.1.0"
    require.require("mmdet")


def test_versions_agree():
    assert Path(mmcv.__file__).parent == Path(_ext.__file__).parent
    pinned = f"mmcv-lite=={mmcv.__version__}"
    assert pinned in (FOLDER / "pyproject.toml").read_text()
    assert f"\n{pinned}\n" in (ROOT / "requirements-openmmlab.txt").read_text()
