"""States, the matrix and receptive fields by value, the model as it was afterwards, and the figures of the command."""

import argparse
import copy
import gc
import json
import sys
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from dwconv2d import state_fusion
from matplotlib.image import imread
from PIL import Image
from running import ROOT, run_command
from torch import nn

from classification import explain as explaining
from classification.checkpoint import save_checkpoint
from classification.errors import UserError
from classification.explain import (
    area_holding,
    class_activation,
    command,
    compute,
    draw_states,
    drawing,
    effective_receptive_field,
    mixing_matrix,
    mixing_row,
    picture_of,
    states,
    states_at,
)
from classification.models import (
    VARIANTS,
    SpatialMamba,
    SpatialMambaBackbone,
    optimise_for_cpu,
    spatialmamba_micro,
    spatialmamba_tiny,
)
from classification.models.spatialmamba import StateFusion

SIZES = [(36, 36), (45, 70), (61, 33)]  # maps of 9x9, 12x18 and 16x9, then 5x5, 6x9 and 8x5


def small_model(d_state: int = 1, classes: int = 5, **arguments) -> SpatialMamba:
    """Two stages whose weights and running statistics are none of the initial ones; in float64."""
    torch.manual_seed(0)
    model = SpatialMamba(num_classes=classes, depths=(1, 2), dims=4, d_state=d_state, **arguments).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_mean"))):
            tensor += 0.2 * torch.randn_like(tensor)
    return model


def fuse_nothing(model: SpatialMamba) -> None:
    """Give each fusion the kernel of one tap, in the middle."""
    for module in model.modules():
        if isinstance(module, StateFusion):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
            module.kernel_3.data[:, :, 1, 1] = 1
            module.alpha.data[0] = 1


# ----- the matrix


@pytest.mark.parametrize("d_state", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_matrix_times_x_is_the_blocks_y(size, d_state):
    model, images = small_model(d_state), torch.randn(2, 3, *size, dtype=torch.float64)
    for place in ((0, 0), (1, -1)):
        x, _, _, y = states(model, images, *place)
        matrix = mixing_matrix(model, images, *place)
        assert matrix.shape == (2, x.shape[1], *2 * (x[0, 0].numel(),))
        torch.testing.assert_close((matrix @ x.flatten(2)[..., None])[..., 0], y.flatten(2), rtol=1e-12, atol=1e-12)
        assert matrix.triu(1).abs().max() > 1e-3  # the fusion brings what comes later in raster order

    scan = mixing_matrix(model, images, 0, 0, fusion=False)
    assert not scan.triu(1).any()
    fuse_nothing(model)  # in the first block, whose x comes before any fusion
    x, _, _, y = states(model, images, 0, 0)
    torch.testing.assert_close((scan @ x.flatten(2)[..., None])[..., 0], y.flatten(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixing_matrix(model, images, 0, 0), scan, rtol=1e-12, atol=1e-12)


def by_the_formula(ssm: nn.Module, x: torch.Tensor, channel: int, fusion: bool) -> torch.Tensor:
    """M of one image as the paper's equations have it, position by position; x (D, H, W)."""
    _, height, width = x.shape
    length, n = height * width, ssm.d_state
    tokens = x.flatten(1)
    low, B, C = (ssm.x_proj_weight @ tokens).split([ssm.dt_rank, n, n])
    dt = F.softplus(ssm.dt_projs_weight @ low + ssm.dt_projs_bias[:, None])[channel]
    matrix = ssm.Ds[channel] * torch.eye(length, dtype=x.dtype)
    fused = torch.eye(length, dtype=x.dtype)
    if fusion:
        fused.zero_()
        kernels = (ssm.state_fusion.kernel_3, ssm.state_fusion.kernel_3_1, ssm.state_fusion.kernel_3_2)
        for kernel, alpha, dilation in zip(kernels, ssm.state_fusion.alpha, (1, 3, 5), strict=True):
            for i in range(length):
                for row in range(3):
                    for column in range(3):
                        y = min(max(i // width + dilation * (row - 1), 0), height - 1)  # the border is repeated
                        z = min(max(i % width + dilation * (column - 1), 0), width - 1)
                        fused[i, y * width + z] += alpha * kernel[channel, 0, row, column]
    for state in range(n):
        passed = torch.zeros(length, length, dtype=x.dtype)
        decay = torch.exp(-dt * ssm.A_logs[channel, state].exp())
        for j in range(length):
            value = dt[j] * B[state, j]
            for i in range(j, length):
                value = value * decay[i] if i > j else value
                passed[i, j] = value
        matrix = matrix + C[state][:, None] * (fused @ passed)
    return matrix


@torch.no_grad()
@pytest.mark.parametrize("d_state", [1, 2])
def test_matrix_is_the_formulas_and_its_taps_stand_where_they_must(d_state):
    model, images = small_model(d_state), torch.randn(1, 3, 45, 50, dtype=torch.float64)
    ssm, x = model.layers[0].blocks[0].self_attention, states(model, images, 0).x[0]
    for fusion in (False, True):
        found = mixing_matrix(model, images, 0, 0, channels=(5, -2), fusion=fusion)[0]
        for matrix, channel in zip(found, (5, 6), strict=True):
            torch.testing.assert_close(matrix, by_the_formula(ssm, x, channel, fusion), rtol=1e-10, atol=1e-14)

    # Where nothing is left of a state after one step, the fusion alone joins positions: 25 of them inside.
    ssm.A_logs.fill_(20)
    (matrix,) = mixing_matrix(model, images, 0, 0, channels=3)[0]
    height, width = x.shape[1:]
    assert (height, width) == (12, 13)
    torch.testing.assert_close(matrix, by_the_formula(ssm, x, 3, fusion=True), rtol=1e-10, atol=1e-14)
    rows = (matrix != 0).unflatten(1, (height, width)).unflatten(0, (height, width))
    taps = {(d * a, d * b) for d in (1, 3, 5) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert {(y - 5, x - 6) for y, x in rows[5, 6].nonzero().tolist()} == taps
    assert len(taps) == 25
    corner = {(max(a, 0), max(b, 0)) for a, b in taps}
    assert set(map(tuple, rows[0, 0].nonzero().tolist())) == corner
    (scan,) = mixing_matrix(model, images, 0, 0, channels=3, fusion=False)[0]
    assert torch.equal(scan != 0, torch.eye(len(scan), dtype=torch.bool))


def test_a_row_is_the_matrixs(monkeypatch):
    """Of a float32 model, with kernels for the CPU too, in chunks of columns that do not divide their number."""
    model, images = spatialmamba_micro(num_classes=3).train(), torch.randn(2, 3, 72, 100)
    monkeypatch.setattr(compute, "COLUMNS_AT_ONCE", 5 * 2 * 18 * 25)
    for swapped in (model, optimise_for_cpu(model)):
        for fusion in (True, False):
            matrix = mixing_matrix(swapped, images, 0, 0, [30, 2], fusion)
            row = mixing_row(swapped, images, 0, 0, (17, 3), [30, 2], fusion)
            assert row.dtype == matrix.dtype == torch.float64
            torch.testing.assert_close(row.flatten(2), matrix[:, :, 17 * 25 + 3], rtol=1e-12, atol=1e-14)
    assert torch.equal(mixing_row(model, images, 0, 0), mixing_row(model, images, 0, 0, (9, 12)))
    with pytest.raises(UserError, match=r"2 x 32 matrices of 180x180 positions take 500\.\d GiB; name fewer channels"):
        mixing_matrix(model, torch.zeros(2, 3, 720, 720), 0, 0)


# ----- states


def test_states_leave_the_model_as_it_was():
    """In training and in evaluation mode, by one forward pass, also where it fails on the way."""
    model, images = small_model(2, drop_rate=0.5, drop_path_rate=0.5), torch.randn(2, 3, 45, 70, dtype=torch.float64)
    model.train()(images).sum().backward()
    evaluated = states_at(model.eval(), images, [(0, 0), (-1, -1)])
    assert not any(module.training for module in model.modules())
    model.train()
    model.layers[0].eval()  # as where stages are frozen
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    values = {key: value.clone() for key, value in model.state_dict().items()}

    trained = states_at(model, images, [(0, 0), (-1, -1)])
    for one, other in zip(evaluated, trained, strict=True):
        assert all(map(torch.equal, one, other))
    mixing_matrix(model, images[:1, :, :16, :16], 0, 0)
    effective_receptive_field(model, images)
    with pytest.raises(ValueError, match=r"images must be \(batch, 3"):
        states(model, images[:, :2])

    def fail(module, inputs):
        raise RuntimeError("on the way")

    handle = model.layers[1].blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        states(model, images, 1, 0)
    handle.remove()

    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_states_are_what_passes_through_the_block():
    model, images = small_model(2).eval(), torch.randn(2, 3, 45, 70, dtype=torch.float64)
    block = model.layers[1].blocks[0].self_attention
    normed = []
    handle = block.out_norm.register_forward_hook(lambda module, inputs, output: normed.append(inputs[0]))
    x, h, fused, y = states(model, images, 1, 0)
    handle.remove()
    assert x.shape == y.shape == (2, 16, 6, 9)
    assert h.shape == fused.shape == (2, 16, 2, 6, 9)
    assert torch.equal(y.permute(0, 2, 3, 1), normed[0])
    assert len(normed) == 1  # a single forward pass
    fusion = block.state_fusion
    kernels = fusion.kernel_3, fusion.kernel_3_1, fusion.kernel_3_2, fusion.alpha
    torch.testing.assert_close(fused, state_fusion(h, *kernels))
    torch.testing.assert_close(block.ssm(x), y)
    torch.testing.assert_close(block.transition(x, *block.select(x)[:2]), h)


def test_states_in_other_forms_of_the_model():
    images = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    model = spatialmamba_micro().eval()
    expected = states(model, images, 1)
    backbone = SpatialMambaBackbone(**VARIANTS["spatialmamba_micro"], out_indices=(1,)).eval()
    backbone.load_state_dict(model.state_dict(), strict=False)
    features = timm.create_model("spatialmamba_micro", features_only=True).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    for other in (backbone, features, nn.ModuleDict({"backbone": backbone})):
        assert all(map(torch.equal, states(other, images, 1), expected))
    with pytest.raises(UserError, match="Linear: holds no Spatial-Mamba"):
        states(nn.Linear(2, 2), images)


def test_in_inference_mode():
    """As a server calls them, with images of its own."""
    model, images = spatialmamba_micro(num_classes=3).eval(), torch.randn(1, 3, 40, 40)
    functions = [
        lambda x: states(model, x, 0).fused,
        lambda x: mixing_matrix(model, x, 1, 0, 0),
        lambda x: mixing_row(model, x, 0, 0),
        lambda x: effective_receptive_field(model, x),
    ]
    if not explaining.no_class_activation(model):
        functions.append(lambda x: class_activation(model, x, stage=0)[0])
    for function in functions:
        expected = function(images)
        with torch.inference_mode():
            assert torch.equal(function(images.clone()), expected)
            assert torch.equal(function(images), expected)
            assert torch.is_inference_mode_enabled()
        with torch.no_grad():
            assert torch.equal(function(images), expected)
            assert not torch.is_grad_enabled()


def test_memory_returns():
    model, images = spatialmamba_micro().eval(), torch.randn(1, 3, 64, 64)
    found = states(model, images, 0)
    references = [weakref.ref(tensor) for tensor in found]
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in found]
    gc.collect()
    gc.disable()  # so that references in a circle would stay
    try:
        assert all(reference() is not None for reference in references)
        del found
        assert all(reference() is None for reference in (*references, *storages))
        before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        mixing_row(model, images, 0, 0)
        effective_receptive_field(model, images)
        assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) == before
    finally:
        gc.enable()


# ----- effective receptive field


class TwoMaps(nn.Module):
    """Two linear maps, of planes, or of tokens as timm's `output_fmt` says."""

    def __init__(self, output_fmt: str = "NCHW"):
        super().__init__()
        self.output_fmt = output_fmt
        self.near = nn.Conv2d(3, 4, 1, bias=False)
        self.far = nn.Conv2d(3, 4, (5, 3), padding=(2, 1), stride=2, bias=False)

    def forward(self, x):
        maps = [self.near(x), self.far(x)]
        return [m.permute(0, 2, 3, 1) for m in maps] if self.output_fmt == "NHWC" else maps


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_receptive_field_of_a_known_kernel(output_fmt):
    """Of each channel's kernel the sum, of its magnitude the sum over colours and images; cut at the border."""
    model, images = TwoMaps(output_fmt), torch.randn(3, 3, 18, 12)
    magnitudes = model.far.weight.detach().sum(0).abs().sum(0).double() * len(images)
    expected = torch.zeros(18, 12, dtype=torch.float64)
    expected[10 - 2 : 10 + 3, 6 - 1 : 6 + 2] = magnitudes  # the centre of 9x6 is (4, 3): with the padding, row 8
    expected = expected.roll(-2, 0)
    torch.testing.assert_close(effective_receptive_field(model, images), expected, rtol=1e-6, atol=0)
    corner = torch.zeros(18, 12, dtype=torch.float64)
    corner[:3, :2] = magnitudes[2:, 1:]
    torch.testing.assert_close(effective_receptive_field(model, images, (0, 0), stage=1), corner, rtol=1e-6, atol=0)
    single = effective_receptive_field(model, images, (17, 2), stage=-2)
    assert single.nonzero().tolist() == [[17, 2]]
    assert single[17, 2].item() == pytest.approx(3 * model.near.weight.sum(0).abs().sum().item())
    assert area_holding(single, 1.0) == 1 / (18 * 12)
    with pytest.raises(UserError, match="Sequential returns no map; pass its backbone"):
        effective_receptive_field(nn.Sequential(model.near, nn.Flatten()), images)
    with pytest.raises(UserError, match="no stage 2: the model has stages 0 to 1"):
        effective_receptive_field(model, images, stage=2)
    with pytest.raises(UserError, match="no position 9 0: the map has rows 0 to 8 and columns 0 to 5"):
        effective_receptive_field(model, images, (9, 0))


def test_drawn_matrices_have_the_positions_pixels_outlined():
    """Also where the image's side is no multiple of the stride."""
    rows = [np.ones((2, 3, 3))]
    figure = explaining.draw_mixing([np.zeros((33, 33, 3), np.uint8)], rows, rows, (2, 1), 16)
    (box,) = figure.axes[0].patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (15.5, 31.5, 16, 16)


def test_drawn_receptive_fields_have_the_positions_pixels_outlined():
    scores = np.ones((96, 64))
    figure = explaining.draw_receptive_fields({"one": scores, "other": scores}, (2, 1), 32)
    for ax in figure.axes[:2]:
        (outline,) = ax.patches
        assert (outline.get_xy(), outline.get_width(), outline.get_height()) == ((31.5, 63.5), 32, 32)
        assert ax.get_xlim() == (-0.5, 63.5)


def test_area_that_holds_a_share():
    scores = torch.tensor([[1.0, 8.0], [0.0, 1.0]])
    held = {share: area_holding(scores, share) for share in (0.2, 0.8, 0.81, 0.9, 1.0)}
    assert held == {0.2: 0.25, 0.8: 0.25, 0.81: 0.5, 0.9: 0.5, 1.0: 0.75}
    assert area_holding(torch.full((10, 10), 0.1), 0.2) == 0.2
    for share in (0, 1.1, -1, float("nan")):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            area_holding(scores, share)
    for bad in (torch.zeros(2, 2), -scores, scores * float("nan")):
        with pytest.raises(UserError, match="must be finite and not negative"):
            area_holding(bad, 0.5)


@torch.no_grad()
def forgetful(model: SpatialMamba) -> SpatialMamba:
    """The model with scans that remember nothing: h_t = Delta_t B_t x_t."""
    changed = copy.deepcopy(model)
    for name, parameter in changed.named_parameters():
        if name.endswith("A_logs"):
            parameter.fill_(20)
    return changed


def test_receptive_field_at_initialisation_is_what_the_scan_makes_it():
    """The scan of T's first stage brings all that lies above, and below nothing that the rest does not reach.

    Of 193 pixels, the middle one is what each strided convolution is centred on.
    """
    torch.manual_seed(0)
    model, images = spatialmamba_tiny(), torch.randn(1, 3, 193, 193)
    # Four convolutions of the stem, then two blocks of three 3x3 convolutions and the fusion, which reaches 5.
    reach = (1 + 2 + 2 + 2) + 4 * 2 * (1 + 1 + 5 + 1)
    first = effective_receptive_field(model, images, stage=0)
    assert (first[: 96 - reach] > 0).all()
    assert not first[96 + reach + 1 :].any()
    without = effective_receptive_field(forgetful(model), images, stage=0).nonzero()
    assert without.amin(0).tolist() == [96 - reach] * 2
    assert without.amax(0).tolist() == [96 + reach] * 2


def test_receptive_field_in_a_cell_is_where_convolutions_are_centred():
    """At even sizes it leans to the left and above, whatever the scan remembers: not the scan makes that.

    A strided 3x3 convolution is centred on a cell's first pixel, a patch of ConvNeXt on the cell's middle.
    """

    def leanings(model: nn.Module, size: int) -> torch.Tensor:
        """How much more lies above than below, and left than right, of the middle of the centre's cell."""
        scores = effective_receptive_field(model, images[..., :size, :size])
        cell = size // 32 // 2 * 32  # its first pixel
        before, after = (cell, cell + 32) if size % 32 == 0 else (cell, cell + 1)
        return torch.stack([s[:before].sum() / s[after:].sum() for s in (scores, scores.T)]).log()

    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    models = [spatialmamba_micro() for _ in range(4)]
    found = torch.stack([leanings(model, 224) for model in models]).mean(0)
    assert found.min() > 0.1, found
    forgotten = torch.stack([leanings(forgetful(model), 224) for model in models]).mean(0)
    torch.testing.assert_close(found, forgotten, rtol=0, atol=0.05)
    centred = torch.stack([leanings(model, 193) for model in models]).mean(0)
    assert centred.abs().max() < 0.1, centred

    scores = effective_receptive_field(timm.create_model("convnext_tiny"), images)
    cells = scores.unfold(0, 32, 32).unfold(1, 32, 32).sum((2, 3))
    assert cells[3, 3] > 0.99 * cells.sum()


# ----- class activation


def test_class_activation_is_grad_cams():
    """By hand: weights are the gradient's means over positions, the map is what they sum up to, if positive."""
    pytest.importorskip("pytorch_grad_cam", reason="pip install -r requirements-explain.txt")
    model, images = small_model().float().train(), torch.randn(2, 3, 64, 96)
    model(images).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.requires_grad_(False)  # as a frozen model's
    maps, classes, probabilities = class_activation(model, images, stage=0)
    assert model.training
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(classes, model(images).argmax(1))
        torch.testing.assert_close(probabilities, model(images).softmax(1))

    chosen = [4, -2]
    maps, classes, _ = class_activation(model, images, chosen, stage=-2)
    assert classes.tolist() == [4, 3]
    kept = []
    handle = model.layers[0].blocks[0].register_forward_hook(lambda m, i, o: kept.append(o))
    logits = model(images.clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 4] + logits[1, 3], kept[0])
    weights = gradient.mean((1, 2), keepdim=True)
    by_hand = (weights * kept[0].detach()).sum(-1).relu()
    by_hand = by_hand - by_hand.amin((1, 2), keepdim=True)
    by_hand = by_hand / by_hand.amax((1, 2), keepdim=True)
    by_hand = F.interpolate(by_hand[:, None], (64, 96), mode="bilinear")[:, 0]
    by_hand = by_hand - by_hand.amin((1, 2), keepdim=True)
    torch.testing.assert_close(maps, by_hand / by_hand.amax((1, 2), keepdim=True), rtol=0, atol=1e-3)

    def fail(module, inputs):
        raise IndexError("on the way")

    handle = model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(IndexError, match="on the way"):
        class_activation(model, images)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())
    half = spatialmamba_micro(num_classes=3).bfloat16()
    maps, classes, probabilities = class_activation(half, images.bfloat16(), stage=0)
    assert (maps.dtype, probabilities.dtype) == (torch.float32, torch.float32)
    assert torch.equal(classes, probabilities.argmax(1))
    assert maps.isfinite().all()
    with pytest.raises(UserError, match="no class 5: the model has classes 0 to 4"):
        class_activation(model, images, [0, 5])
    model.reset_classifier(0)
    with pytest.raises(UserError, match="no class activation: the model has no head"):
        class_activation(model, images)


# ----- the command


@pytest.fixture
def explain(monkeypatch, capsys):
    """The command in this process; a refusal raises SystemExit with its message. Returns what was printed."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["explain", *map(str, arguments)])
        explaining.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(1)
    content = {"model": spatialmamba_micro(num_classes=10).state_dict(), "config": "DATA: {IMG_SIZE: 48}"}
    save_checkpoint(content | {"classes": [f"digit {i}" for i in range(10)]}, tmp_path / "micro.pth")
    return tmp_path / "micro.pth"


@pytest.fixture
def pictures(few_digits):
    """Two files of real images."""
    return [next((few_digits / "val" / label).iterdir()) for label in ("3", "8")]


def test_command(explain, checkpoint, pictures, tmp_path):
    out = tmp_path / "new" / "figures"
    out_text = explain(checkpoint, *pictures, "--out", out, "--beside", "swin_tiny_patch4_window7_224", "convnext_atto")
    names = ["states", "erf", "matrix", *(["cam"] if "cam.png" in out_text else [])]
    assert out_text.count("\n") == 2 * len(names) + ("cam is not drawn" in out_text)
    for name in names:
        picture = imread(out / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert np.std(picture[..., :3]) > 0.05  # not blank

    loaded = explaining.load(str(checkpoint))
    assert loaded.classes[3] == "digit 3"
    model, images = loaded.model, torch.from_numpy(np.load(out / "states.npz")["images"])
    assert images.shape == (2, 3, 48, 48)  # as the checkpoint is evaluated
    stored = np.load(out / "states.npz")
    for key, value in states(model, images, 0, 0)._asdict().items():
        assert np.array_equal(stored[key], value)
    stored = np.load(out / "matrix.npz")
    assert stored["query"].tolist() == [6, 6]
    np.testing.assert_allclose(stored["fused"], mixing_row(model, images, 0, 0), rtol=1e-12)
    np.testing.assert_allclose(stored["scan"], mixing_row(model, images, 0, 0, fusion=False), rtol=1e-12)
    stored = np.load(out / "erf.npz")
    fields = [f"{n}_at_initialisation" for n in ("spatialmamba_micro", "swin_tiny_patch4_window7_224", "convnext_atto")]
    assert set(stored) == {"images", "spatialmamba_micro_trained", *fields}
    np.testing.assert_allclose(
        stored["spatialmamba_micro_trained"], effective_receptive_field(model, images, stage=1), rtol=1e-5, atol=1e-12
    )
    fresh = effective_receptive_field(explaining.load("spatialmamba_micro").model, images, stage=1)
    np.testing.assert_allclose(stored[fields[0]], fresh, rtol=1e-5, atol=1e-12)


def test_options_of_the_command(explain, pictures, tmp_path, monkeypatch):
    """Of a size at its initialisation: images of their own size, chosen places, channels and colours."""
    monkeypatch.setattr(command, "BATCH", 1)  # so that parts are put together
    files = []
    for i, picture in enumerate(pictures):
        files.append(tmp_path / f"wide {i} $x$.png")
        Image.open(picture).resize((90, 50)).save(files[-1])
    common = ["spatialmamba_micro", *files, "--size", "own", "--out", tmp_path]
    explain(*common, "--figures", "states", "matrix", "--stage", 2, "--block", 0, "--channels", 7, -1, "--query", 3, 5)
    stored = np.load(tmp_path / "matrix.npz")
    assert stored["fused"].shape == (2, 2, 4, 6)
    assert stored["query"].tolist() == [3, 5]
    model = explaining.load("spatialmamba_micro").model
    images = torch.from_numpy(stored["images"]).split(1)  # float32 rounds otherwise in a batch of two
    rows = np.concatenate([mixing_row(model, image, 2, 0, (3, 5), (7, 127)) for image in images])
    np.testing.assert_allclose(stored["fused"], rows, rtol=1e-12)
    tall = imread(tmp_path / "states.png")
    explain(*common, "--figures", "states", "--colour", "pca", "--stage", -1)
    assert imread(tmp_path / "states.png").shape[0] < tall.shape[0]  # a row for each image, not for each channel
    peer = timm.create_model("convnext_atto", num_classes=3)  # fine-tuned
    torch.save(
        {"state_dict": peer.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "peer.pth"
    )  # as timm does
    explain(*common, "--figures", "erf", "--position", 1, 2, "--beside", f"convnext_atto={tmp_path / 'peer.pth'}")
    stored = np.load(tmp_path / "erf.npz")
    assert set(stored) == {"images", "spatialmamba_micro_at_initialisation", "convnext_atto_trained"}
    images = torch.from_numpy(stored["images"])
    expected = effective_receptive_field(model, images, (1, 2), 2)  # of 4x6, the last that is not smaller
    np.testing.assert_allclose(stored["spatialmamba_micro_at_initialisation"], expected, rtol=1e-5, atol=1e-12)
    expected = effective_receptive_field(peer, images, (1, 2), 2)
    np.testing.assert_allclose(stored["convnext_atto_trained"], expected, rtol=1e-5, atol=1e-12)


def test_principal_components_do_not_depend_on_the_order_of_images():
    found = states(spatialmamba_micro().eval(), torch.randn(2, 3, 64, 64), 1)
    maps, explained = drawing._principal_components(found.h.numpy())
    swapped, again = drawing._principal_components(found.h.numpy()[::-1])
    np.testing.assert_allclose(maps, swapped[::-1], atol=1e-6)
    assert maps.shape == (2, 8, 8, 3)
    assert 0.2 < explained <= 1
    assert again == pytest.approx(explained)
    figure = draw_states([picture_of(torch.zeros(3, 64, 64))] * 2, found, channels=[3])
    assert len(figure.axes) == 2 * 5


def test_figures_are_written_whole_or_not_at_all(explain, checkpoint, pictures, tmp_path, monkeypatch):
    explain(checkpoint, *pictures, "--out", tmp_path, "--figures", "matrix")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(SystemExit) as ended:
        explain(checkpoint, *pictures, "--out", tmp_path, "--figures", "matrix")
    assert ended.value.code == 130
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after["matrix.npz"] == before["matrix.npz"]


def test_command_as_a_user_runs_it(checkpoint, pictures, tmp_path):
    arguments = ["--out", tmp_path / "figures", "--figures", "states", "matrix"]
    done = run_command("python", "-m", "classification.explain", checkpoint, *pictures, *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 4


STATES, MATRIX, ERF = (["--figures", name] for name in ("states", "matrix", "erf"))
BAD = {  # further images, options, and the message
    "stage": ([], [*STATES, "--stage", "-5"], "no stage -5: the model has stages 0 to 3"),
    "block": ([], [*STATES, "--stage", "2", "--block", "2"], "no block 2: stage 2 has blocks 0 to 1"),
    "channel": ([], [*STATES, "--channels", "3", "32"], "no channel 32: the block has channels 0 to 31"),
    "channel of the matrix": ([], [*MATRIX, "--channels", "32"], "no channel 32: the block has channels 0 to 31"),
    "query": ([], [*MATRIX, "--query", "3", "12"], "no position 3 12: the map of stage 0 has rows 0 to 11"),
    "position": ([], [*ERF, "--position", "6", "0"], "no position 6 0: the map of stage 1 has rows 0 to 5"),
    "position of a peer": (
        [], [*ERF, "--position", "3", "0", "--size", "50", "--beside", "convnext_atto"],
        "convnext_atto at initialisation: no position 3 0: the map has rows 0 to 2",
    ),
    "peer": ([], [*ERF, "--beside", "convnext_tyni"], "timm has no model 'convnext_tyni'; it has convnext_tiny"),
    "peer that takes no such size": (
        [], [*ERF, "--size", "3", "--beside", "convnext_atto"],
        r"--beside convnext_atto at initialisation: cannot take images of 3x3 \(",
    ),
    "peer twice": (
        [], [*ERF, "--beside", "convnext_atto", "convnext_atto"], "convnext_atto at initialisation is there twice"
    ),
    "peer's weights": ([], [*ERF, "--beside", "convnext_atto=no.pth"], r"no\.pth: no such file of weights"),
    "no state dict": ([], [*ERF, "--beside", "test_vit={folder}/net.pth"], r"net\.pth: its weights hold 'net', which"),
    "other weights": ([], [*ERF, "--beside", "convnext_atto={checkpoint}"], "--beside convnext_atto: cannot be made"),
    "peer of more memory than its file": (
        [], [*ERF, "--beside", "convnext_atto={folder}/claims.pth"], r"claims\.pth: holds pickled objects, which",
    ),
    "peer's booleans": (
        [], [*ERF, "--beside", "test_vit={folder}/bool.pth"], r"bool\.pth: its weights hold 'pos_embed', which is of",
    ),
    "peer's integers under its authors' names": (
        [], [*ERF, "--beside", "convnext_atto={folder}/gamma.pth"], r"weights hold 'stages\.0\.0\.gamma', which is of",
    ),
    "peer of other strides": (
        [], [*ERF, "--beside", "vit_tiny_patch16_224", "--size", "224"], r"has no map of stride 32, only of \[16, 16",
    ),
    "sizes": (["{folder}/wide.png"], [*STATES, "--size", "own"], r"wide\.png: is 20x30, but .* is 32x32; pass --size"),
    "image": (["{checkpoint}"], STATES, r"micro\.pth: cannot be read as an image"),
    "no such image": (["{folder}/no.png"], STATES, r"no\.png: cannot be read as an image \(\[Errno 2\] No such file"),
    "folder": ([], [*STATES, "--out", "{checkpoint}/figures"], r"micro\.pth/figures: cannot be made"),
    "file": ([], [*STATES, "--out", "{folder}/taken"], r"states\.png: cannot be written"),
    "image of a figure's name": (
        ["{folder}/states.png"], [*STATES, "--out", "{folder}/./"], r"states\.png: a figure of this name would be"
    ),
}  # fmt: skip


class Claims:
    """Is read as two gigabytes."""

    def __reduce__(self) -> tuple:
        return bytearray, (2 * 10**9,)


@pytest.mark.parametrize(("images", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(images, options, message, explain, checkpoint, pictures, tmp_path):
    (tmp_path / "taken/states.png").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "wide.png")
    torch.save({"head.fc.bias": Claims()}, tmp_path / "claims.pth")
    torch.save({"net": {"pos_embed": torch.ones(1)}, "epoch": 3}, tmp_path / "net.pth")
    torch.save({"pos_embed": torch.ones(1, 5, 64, dtype=torch.bool)}, tmp_path / "bool.pth")
    torch.save({"attn.index": torch.ones(2).int(), "stages.0.0.gamma": torch.ones(2).int()}, tmp_path / "gamma.pth")
    images, options = (
        [word.format(checkpoint=checkpoint, folder=tmp_path) for word in words] for words in (images, options)
    )
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        explain(checkpoint, *pictures, *images, "--out", tmp_path / "out", *options)


def test_bad_models_and_packages(explain, pictures, tmp_path, monkeypatch, capsys):
    rest = [*pictures, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"micro: no such checkpoint, nor one of the models spatialmamba_micro, "):
        explain("micro", *rest)
    save_checkpoint({"model": small_model().float().state_dict()}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match=r"other\.pth: is of none of the sizes spatialmamba_micro"):
        explain(tmp_path / "other.pth", *rest)
    with pytest.raises(SystemExit, match="no images: name at least one after the model"):
        explain("spatialmamba_micro", "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        explain("spatialmamba_micro", *rest, "--size", "large")
    assert "must be 'own' or a number of pixels up to 4096, got 'large'" in capsys.readouterr().err
    for missing in ("pytorch_grad_cam", "cv2"):
        for name in [n for n in sys.modules if n.partition(".")[0] == "pytorch_grad_cam"]:
            monkeypatch.delitem(sys.modules, name)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(SystemExit, match=r"no class activation: pytorch-grad-cam is missing .*; pip install"):
                explain("spatialmamba_micro", *rest, "--figures", "cam")
    assert not (tmp_path / "out/cam.png").exists()
    module, field = sys.modules["classification.explain.command"], effective_receptive_field

    def breaks(model, *arguments):  # as timm's Hiera does
        return field(model, *arguments) if isinstance(model, SpatialMamba) else [].view(1)

    monkeypatch.setattr(module, "effective_receptive_field", breaks)
    message = r"--beside convnext_atto at initialisation: cannot take images of 64x64 \('list' object has no attribute"
    with pytest.raises(SystemExit, match=message):
        explain("spatialmamba_micro", *rest, *ERF, "--size", "64", "--beside", "convnext_atto")


def test_pinned_once():
    """pyproject's extra and the file that `make test` installs name the same release."""
    pinned = (ROOT / "requirements-explain.txt").read_text()
    assert (
        json.dumps(next(line for line in pinned.splitlines() if line.startswith("grad-cam")))
        in (ROOT / "pyproject.toml").read_text()
    )
