"""The backbone against the published layout, golden values of an independent implementation, and itself."""

import collections
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import GOLDEN, LAYOUT, fill, image
from randomised import randomised
from torch import Tensor, nn

from classification import models
from classification.models import (
    VARIANTS,
    SpatialMamba,
    SpatialMambaBackbone,
    optimise_for_cpu,
    spatialmamba_micro,
    spatialmamba_tiny,
)
from classification.models.spatialmamba import Block, StructureAwareSSM

PARAMETERS = {"tiny": 26_748_862, "small": 43_074_280, "base": 95_745_592}


def relative(actual: Tensor, expected: Tensor | np.ndarray) -> float:
    expected = torch.as_tensor(expected)
    return ((actual.detach() - expected).norm() / expected.norm()).item()


# ----- the published model


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_state_dict_is_the_published_one(size):
    name = f"spatialmamba_{size}"
    with torch.device("meta"):
        classifier = getattr(models, name)()
        backbone = SpatialMambaBackbone(**VARIANTS[name])
    for model, key in ((classifier, size), (backbone, f"{size}_backbone")):
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == LAYOUT[key]
        # An optimizer's saved state goes by position, so the order matters too.
        assert list(model.state_dict()) == list(LAYOUT[key])
    assert sum(p.numel() for p in classifier.parameters()) == PARAMETERS[size]


@pytest.mark.parametrize("size", ["224x224", "160x256"])
def test_golden_logits_in_evaluation(size):
    model = fill(spatialmamba_tiny()).eval()
    with torch.no_grad():
        logits = model(image(2, *map(int, size.split("x"))))
    assert relative(logits, GOLDEN[f"tiny/eval/{size}"]) < 1e-4


def test_golden_backbone_maps():
    model = fill(SpatialMambaBackbone(**VARIANTS["spatialmamba_tiny"])).eval()
    with torch.no_grad():
        maps = model(image(1, 224, 320))
    for i, m in enumerate(maps):
        assert m.shape == (1, 64 * 2**i, 224 // 2 ** (i + 2), 320 // 2 ** (i + 2))
        sample = m[0, :: max(1, m.shape[1] // 16), ::4, ::4]
        assert relative(sample, GOLDEN[f"tiny/backbone/224x320/{i}"]) < 1e-4


def test_golden_training_pass():
    model = fill(spatialmamba_tiny()).train()
    logits = model(image(4, 64, 96))
    assert relative(logits, GOLDEN["tiny/train/64x96"]) < 1e-4
    target = np.random.RandomState(3).standard_normal(tuple(logits.shape)).astype(np.float32)
    (logits * torch.from_numpy(target)).sum().backward()

    expected = dict(
        zip(GOLDEN["tiny/train/64x96/gradnames"].tolist(), GOLDEN["tiny/train/64x96/gradnorms"], strict=True)
    )
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert set(norms) == set(expected)
    compared = {name: norm for name, norm in expected.items() if norm > 1e-4}
    assert len(compared) > 500
    wrong = {n: (norms[n], norm) for n, norm in compared.items() if abs(norms[n] - norm) > 1e-3 * norm}
    assert not wrong


def test_initialisation_follows_the_recipe():
    torch.manual_seed(0)
    ssm = StructureAwareSSM(dim=64, d_state=4)
    assert torch.equal(ssm.A_logs, torch.tensor([1.0, 2.0, 3.0, 4.0]).log().repeat(128, 1))
    assert torch.all(ssm.Ds == 1)
    assert all(torch.all(p == 1) for p in ssm.state_fusion.parameters())
    assert ssm.dt_projs_bias.shape == (128,)
    log_dt = F.softplus(StructureAwareSSM._initial_dt_bias(10**5)).log()  # uniform from 1e-3 to 0.1
    ends_and_middle = torch.stack([log_dt.min(), log_dt.max(), log_dt.mean()]).exp()
    torch.testing.assert_close(ends_and_middle, torch.tensor([1e-3, 0.1, 1e-2]), rtol=2e-2, atol=0)
    assert ssm.dt_projs_weight.abs().max() <= 4**-0.5  # R = 64 / 16
    model = spatialmamba_micro()
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.all(model.head.bias == 0)


# ----- the mathematics, written the slow way


def slow_ssm(ssm: StructureAwareSSM, x: Tensor) -> Tensor:
    """`StructureAwareSSM.ssm` as DESIGN.md writes it: a loop over tokens, three padded convolutions."""
    b, d, height, width = x.shape
    n, r = ssm.d_state, ssm.dt_rank
    tokens = x.flatten(2)
    dt, B, C = torch.einsum("rd,bdl->brl", ssm.x_proj_weight, tokens).split([r, n, n], dim=1)
    delta = F.softplus(torch.einsum("dr,brl->bdl", ssm.dt_projs_weight, dt) + ssm.dt_projs_bias[:, None])
    A = -torch.exp(ssm.A_logs)
    h, states = torch.zeros(b, d, n, dtype=x.dtype), []
    for t in range(height * width):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[:, None, :, t] * tokens[:, :, t, None]
        states.append(h)
    planes = torch.stack(states, -1).unflatten(-1, (height, width))
    y = ssm.Ds[:, None, None] * x
    kernels = (ssm.state_fusion.kernel_3, ssm.state_fusion.kernel_3_1, ssm.state_fusion.kernel_3_2)
    for i in range(n):
        for alpha, kernel, k in zip(ssm.state_fusion.alpha, kernels, (1, 3, 5), strict=True):
            padded = F.pad(planes[:, :, i], (k, k, k, k), mode="replicate")
            y = y + C[:, i].unflatten(-1, (height, width))[:, None] * alpha * F.conv2d(
                padded, kernel, dilation=k, groups=d
            )
    return y


@pytest.mark.parametrize("d_state", [1, 3], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("plane", [(1, 1), (1, 5), (3, 7)], ids=lambda p: f"{p[0]}x{p[1]}")
def test_ssm_equals_the_loop_with_every_gradient(d_state, plane):
    torch.manual_seed(0)
    ssm = randomised(StructureAwareSSM(dim=8, d_state=d_state)).double()
    x = torch.randn(2, 16, *plane, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 16, *plane, dtype=torch.float64)
    # The gate, its projections and the output norm lie outside `ssm`.
    parameters = [p for n, p in ssm.named_parameters() if not n.startswith(("in_proj", "conv2d", "out_"))]
    results = []
    for function in (ssm.ssm, lambda x: slow_ssm(ssm, x)):
        y = function(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *parameters])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ----- nothing goes stale, and both modes agree


def assert_modes_agree(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs and gradients are equal in evaluation and training (no drop path, batch norm frozen)."""
    results = []
    for mode in (False, True):
        model.train(mode)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        out = model(x)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    return results[0][0]


def test_modes_agree_across_steps_copies_and_loads():
    torch.manual_seed(0)
    model, x = randomised(spatialmamba_micro(num_classes=7)), torch.randn(2, 3, 41, 57)
    before = assert_modes_agree(model, x)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(x).square().sum().backward()
    optimizer.step()
    stepped = assert_modes_agree(model, x)
    assert not torch.allclose(stepped, before, rtol=1e-3)

    copied = copy.deepcopy(model)
    assert torch.equal(assert_modes_agree(copied, x), stepped)

    other = randomised(spatialmamba_micro(num_classes=7), seed=1)
    assert not torch.allclose(assert_modes_agree(other, x), stepped, rtol=1e-3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(assert_modes_agree(other, x), stepped)


def test_gradient_checkpointing_changes_nothing():
    """But that blocks and the wide layers between stages are computed twice."""
    torch.manual_seed(0)
    model, x = randomised(spatialmamba_micro(num_classes=7, drop_path_rate=0.5)), torch.randn(4, 3, 33, 47)
    calls = collections.Counter()
    for name, module in model.named_modules():
        if name.endswith(("self_attention", "mlp", "downsample.conv.0", "downsample.conv.1")):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    results = []
    for enable in (False, True):
        torch.manual_seed(1)
        model.set_grad_checkpointing(enable)
        calls.clear()
        out = model(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        assert set(calls.values()) == {1 + enable}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(9, 7), (40, 33)], ids=["few_tokens", "many_tokens"])
def test_block_compiles_whole_and_agrees(size):
    """By the modules of a CPU: of PyTorch's own, inductor of 2.11 cannot order strides of a second, dynamic size."""
    torch.manual_seed(0)
    block = optimise_for_cpu(randomised(Block(16)))
    x = torch.randn(2, *size, 16, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True)
    results = []
    for function in (block, compiled):
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    for a, b in zip(*results, strict=True):  # gradients are sums of thousands of terms, which all but cancel in places
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * b.abs().max().item())


def test_one_graph_serves_all_batches_and_sizes():
    graphs = []
    block = Block(16).eval()
    count = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    compiled = torch.compile(block, backend=count, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, height, width in ((2, 9, 7), (3, 8, 12), (5, 40, 33), (2, 31, 64), (4, 64, 31), (8, 5, 6)):
            x = torch.randn(batch, height, width, 16)
            assert torch.equal(compiled(x), block(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("optimise", [False, True], ids=["plain", "optimised"])
def test_gradients_of_each_image_by_torch_func(optimise):
    torch.manual_seed(0)
    model = randomised(spatialmamba_micro(num_classes=3)).eval()
    if optimise:
        optimise_for_cpu(model)
    parameters = dict(model.named_parameters())
    images, labels = torch.randn(3, 3, 40, 33), torch.tensor([0, 2, 1])

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
    for i, (one, label) in enumerate(zip(images, labels, strict=True)):
        expected = torch.autograd.grad(loss(parameters, one, label), list(parameters.values()))
        for a, b in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5 * b.abs().max().item() + 1e-7)


# ----- dtypes


def test_double_and_half_models_agree_with_float32():
    torch.manual_seed(0)
    model, x = randomised(spatialmamba_micro(num_classes=7)).eval(), torch.randn(2, 3, 32, 48)
    exact = copy.deepcopy(model).double()(x.double())
    assert exact.dtype == torch.float64
    assert relative(model(x), exact.float()) < 1e-5
    low = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative(low.float(), exact.float()) < 0.05


def test_states_stay_float32_under_autocast(monkeypatch):
    seen = []
    original = models.spatialmamba.state_fusion_output

    def spy(h, *rest):
        seen.append((h.dtype, rest[-1].dtype))
        return original(h, *rest)

    monkeypatch.setattr(models.spatialmamba, "state_fusion_output", spy)
    torch.manual_seed(0)
    model, x = randomised(spatialmamba_micro(num_classes=7)).eval(), torch.randn(2, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert seen == [(torch.float32, torch.bfloat16)] * 5
    assert relative(low.float(), model(x)) < 0.05


# ----- the interface


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 65), (97, 50)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_image_size(size):
    torch.manual_seed(0)
    model = spatialmamba_micro(num_classes=3).eval()
    features, maps = model.forward_intermediates(torch.randn(2, 3, *size))
    expected = size
    for i, m in enumerate(maps):
        for _ in range(2 if i == 0 else 1):
            expected = tuple(-(-s // 2) for s in expected)
        assert m.shape == (2, 16 * 2**i, *expected)
    assert features.shape == (2, *expected, 128)
    assert torch.isfinite(model.forward_head(features)).all()


def test_forward_intermediates_has_timms_meaning():
    torch.manual_seed(0)
    model, x = randomised(spatialmamba_micro(num_classes=3)).eval(), torch.randn(2, 3, 40, 56)
    features, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(features, model.forward_features(x))
    assert torch.equal(maps[-1].permute(0, 2, 3, 1), features)
    last_two = model.forward_intermediates(x, 2, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last_two[0].permute(0, 3, 1, 2), maps[2])
    first = model.forward_intermediates(x, [0, -3], stop_early=True, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(first, maps[:2], strict=True)] == [True, True]


def test_backbone_maps_are_the_classifiers_through_their_norms():
    torch.manual_seed(0)
    classifier = randomised(spatialmamba_micro()).eval()
    backbone = SpatialMambaBackbone(**VARIANTS["spatialmamba_micro"], out_indices=(1, 3)).eval()
    missing, unexpected = backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert missing == ["outnorm1.weight", "outnorm1.bias", "outnorm3.weight", "outnorm3.bias"]
    assert set(unexpected) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    x = torch.randn(1, 3, 45, 61)
    maps = classifier.forward_intermediates(x, [1, 3], intermediates_only=True)
    for actual, m in zip(backbone(x), maps, strict=True):
        assert actual.is_contiguous()
        expected = F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(actual, expected)


def test_head_and_pre_logits():
    model, x = spatialmamba_micro(num_classes=0).eval(), torch.randn(2, 3, 32, 32)
    pooled = model(x)
    torch.testing.assert_close(pooled, model.forward_features(x).mean((1, 2)))
    model.reset_classifier(5)
    assert model.head.training == model.training
    assert model.get_classifier() is model.head
    torch.testing.assert_close(model(x), F.linear(pooled, model.head.weight, model.head.bias))
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), pooled)


def test_drop_path_grows_linearly_over_all_blocks():
    model = spatialmamba_micro(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 1), dims=(16, 32, 64)), "depths and dims"),
        (dict(depths=(1, 0), dims=(16, 32)), "at least one block"),
        (dict(depths=(1, 1), dims=(16, 48)), "double"),
        (dict(d_state=0), "d_state"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpatialMamba(**arguments)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="dim_inner"):
        spatialmamba_micro(dim_inner=3)


def test_wrong_images_are_refused():
    model = spatialmamba_micro(num_classes=3)
    for shape in ((2, 1, 32, 32), (3, 32, 32), (2, 3, 0, 32)):
        with pytest.raises(ValueError, match=r"images must be \(batch, 3, height, width\), got shape"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(torch.zeros(2, 3, 32, 32), output_fmt="NLC")
    with pytest.raises(ValueError, match=r"\[-4, 3\]"):
        model.forward_intermediates(torch.zeros(2, 3, 32, 32), indices=[4])
    with pytest.raises(ValueError, match="stop_early"):
        model.forward_intermediates(torch.zeros(2, 3, 32, 32), stop_early=True)


def test_empty_batch():
    assert spatialmamba_micro(num_classes=4).eval()(torch.randn(0, 3, 33, 47)).shape == (0, 4)


def test_what_no_output_needs_is_not_built():
    """All that is left gets a gradient, or DistributedDataParallel stops; and the maps are those of all four stages."""
    torch.manual_seed(0)
    whole = SpatialMambaBackbone(**VARIANTS["spatialmamba_micro"]).eval()
    images = torch.randn(2, 3, 64, 64)
    for wanted in ((0,), (0, 1, 2), (1, 2), (0, 1, 2, 3)):
        backbone = SpatialMambaBackbone(**VARIANTS["spatialmamba_micro"], out_indices=wanted).eval()
        backbone.load_state_dict({k: v for k, v in whole.state_dict().items() if k in backbone.state_dict()})
        maps = backbone(images)
        sum(m.square().sum() for m in maps).backward()
        assert all(p.grad is not None for p in backbone.parameters())
        for i, map_ in zip(wanted, maps, strict=True):
            assert torch.equal(map_, whole(images)[i])
