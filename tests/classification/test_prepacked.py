"""Inference on a CPU by packed weights: values, when they are packed anew, and when they are not used."""

import copy
import io
import itertools

import pytest
import torch
from randomised import randomised
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from classification.models import cpu, optimise_for_cpu, prepacked, spatialmamba_micro, undo_optimise_for_cpu
from classification.models.spatialmamba import Block, ConvLayer, Mlp, StructureAwareSSM

pytestmark = pytest.mark.skipif(
    torch.bfloat16 not in prepacked.SUPPORTED, reason="oneDNN packs no weights in bfloat16 on this processor"
)
AUTOCAST = dict(device_type="cpu", dtype=torch.bfloat16)


def holding(model: nn.Module) -> nn.Module:
    return optimise_for_cpu(copy.deepcopy(model).eval(), prepack_weights=True)


def infer(model: nn.Module, x: Tensor, autocast: bool = True) -> Tensor:
    with torch.inference_mode(), torch.autocast(**AUTOCAST, enabled=autocast):
        return model(x)


def used(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module.__dict__.get("_prepacked")]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def with_gaps(module: nn.Module) -> nn.Module:
    """Return a copy whose parameters are slices, each with NaN between its numbers."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            apart = torch.full((*parameter.shape, 2), torch.nan, dtype=parameter.dtype)
            apart[..., 0] = parameter.detach()
            setattr(part, name, nn.Parameter(apart[..., 0]))
    return module


LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (2, 5, 7, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (3, 24)),
    "MLP": (lambda: Mlp(24, 96), (2, 5, 7, 24)),
    "state space model": (lambda: StructureAwareSSM(24), (2, 5, 7, 24)),
    "four states": (lambda: StructureAwareSSM(24, d_state=4), (1, 3, 4, 24)),
    "convolution, batch norm and ReLU": (lambda: ConvLayer(3, 24, 3, stride=2), (2, 3, 9, 11)),
    "1x1 without ReLU": (lambda: ConvLayer(24, 40, 1, bias=True, act=False), (2, 24, 5, 7)),
    "1x1 with ReLU": (lambda: ConvLayer(24, 40, 1, bias=True, norm=False), (2, 24, 5, 7)),
    "large state space model": (lambda: StructureAwareSSM(64), (1, 35, 36, 64)),
    "large depthwise": (lambda: nn.Conv2d(128, 128, 3, padding=1, groups=128), (2, 128, 27, 29)),
    "depthwise, stride 2": (lambda: ConvLayer(24, 24, 3, stride=2, groups=24, bias=True, norm=False), (2, 24, 5, 7)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, channels_last):
    """As near to float64 as the dtype allows, in any memory layout."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = randomised(make()).eval(), torch.randn(shape)
    if channels_last or kind == "large depthwise":  # of tokens alone
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if x.dim() == 4 else x.mT.contiguous().mT
    exact = copy.deepcopy(layer).double()(x.double()).detach()
    for dtype, autocast in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        if not autocast and dtype == torch.bfloat16 and "state" in kind:
            continue  # its parameters stay float32
        fast = holding(layer if autocast else copy.deepcopy(layer).to(dtype))
        y = infer(fast, x.to(dtype), autocast)
        expected = torch.bfloat16 if autocast else dtype
        assert bool(used(fast)) == (
            expected in prepacked.SUPPORTED and (kind, expected) != ("large depthwise", torch.float32)
        )
        assert y.dtype == expected
        assert y.shape == exact.shape
        assert error(y, exact) < (0.01 if expected == torch.bfloat16 else 1e-6)
        assert error(infer(with_gaps(fast), x.to(dtype), autocast), exact) < (
            0.01 if expected == torch.bfloat16 else 1e-6
        )


@pytest.mark.parametrize("dtype", prepacked.SUPPORTED)
@pytest.mark.parametrize(("dim", "d_state", "shape"), [(24, 1, (2, 5, 7)), (24, 2, (1, 1, 6)), (64, 1, (1, 35, 36))])
def test_blocks(dim, d_state, shape, dtype, monkeypatch):
    """Where a block is one function, and where it is called layer by layer: hooks, modes, settings, changes."""
    torch.manual_seed(0)
    block, x = randomised(Block(dim, d_state, drop_path=0.9)).eval(), torch.randn(*shape, dim).to(dtype)
    fast = holding(block)
    half = dtype == torch.bfloat16

    def check(one_function: bool = True) -> Tensor:
        fast.__dict__.pop("_prepacked", None)
        y = infer(fast, x, half)
        assert ("_prepacked" in fast.__dict__) == one_function
        assert torch.equal(y, infer(fast, x, half))
        exact = undo_optimise_for_cpu(copy.deepcopy(fast)).double()(x.double()).detach()
        assert y.dtype == dtype
        assert error(y, exact) < (0.02 if half else 1e-6)
        return y

    y = check()
    assert error(infer(with_gaps(fast), x, half), y.double()) < (0.01 if half else 1e-6)
    hooks = [layer.register_forward_hook(lambda *_: None) for layer in (fast.mlp.act, fast.self_attention)]
    assert error(check(one_function=False), y.double()) < (0.02 if half else 1e-6)
    for hook in hooks:
        hook.remove()
    x = x.transpose(1, 2).contiguous().transpose(1, 2)  # as of a view of planes
    check()
    fast.ln_1.eps, fast.self_attention.out_norm.eps = 1.0, 3.0
    assert not torch.equal(check(), y)
    with torch.no_grad():
        for parameter in fast.parameters():
            before = infer(fast, x, half)
            parameter.mul_(-1.5).add_(0.25)
            assert not torch.equal(infer(fast, x, half), before)
    check()
    fast.mlp.act.approximate = "tanh"
    check(one_function=False)
    fast.mlp.act.approximate = "none"
    fast.drop_path.train()
    fast.__dict__.pop("_prepacked", None)
    infer(fast, x, half)
    assert "_prepacked" not in fast.__dict__
    fast.drop_path.eval()
    fast.cpe2.padding_mode = "circular"
    check(one_function=False)
    fast.cpe2.padding_mode = "zeros"
    check()
    seen, ssm = [], fast.self_attention
    ssm.transition = lambda *inputs: seen.append(inputs) or type(ssm).transition(ssm, *inputs)
    check(one_function=False)
    assert seen
    del ssm.transition
    with monkeypatch.context() as patched:  # of the class, before or after the call of optimise_for_cpu
        patched.setattr(type(fast.mlp), "forward", lambda mlp, x: 2 * mlp.fc2(mlp.act(mlp.fc1(x))))
        assert not torch.equal(check(one_function=False), y)
        assert type(holding(nn.Linear(3, 3))) is nn.Linear
    check()
    made = fast.keep

    def slowly(name: object, make, sources: list) -> tuple:
        def change() -> object:  # by another thread
            weights = make()
            fast.mlp.fc2.weight.data.mul_(3)
            return weights

        return made(name, change, sources)

    fast.__dict__.pop("_prepacked")
    fast.keep = slowly
    infer(fast, x, half)
    del fast.keep
    y = infer(fast, x, half)
    assert torch.equal(check(), y)
    bias = fast.mlp.fc2.bias.requires_grad_(False).data
    fast.mlp.fc2.bias.data = bias.view(torch.int32)  # the same memory, shape and version
    with pytest.raises(RuntimeError):
        infer(fast, x, half)
    fast.mlp.fc2.bias.data = bias
    weight = fast.mlp.fc1.weight.detach().clone()
    del fast.mlp.fc1.weight
    fast.mlp.fc1.register_buffer("weight", weight)  # as tools do that freeze it: its changes are seen
    y = check(one_function=False)
    fast.mlp.fc1.weight.mul_(-2)
    assert not torch.equal(infer(fast, x, half), y)
    del fast.mlp.fc1.weight
    fast.mlp.fc1.weight = nn.Parameter(weight)
    check(one_function=False)  # for the order of its parameters is another
    mlp = fast.mlp
    fast.mlp = torch.jit.script(nn.Sequential(nn.Identity()))
    infer(fast, x, half)
    fast.mlp = mlp
    with pytest.raises(RuntimeError, match=r"normalized_shape|groups|channels"):
        infer(fast, x[..., 1:], half)
    fast.self_attention.Ds = nn.Parameter(torch.ones(3))
    with pytest.raises((RuntimeError, ValueError), match="D"):
        infer(fast, x, half)


@pytest.mark.parametrize("size", [(33, 47), (96, 64)])
def test_model(size):
    torch.manual_seed(0)
    model = randomised(spatialmamba_micro(num_classes=7)).eval()
    x = torch.randn(2, 3, *size)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    plain, fast = infer(optimise_for_cpu(copy.deepcopy(model)), x), holding(model)
    assert error(infer(fast, x), exact) < max(1.5 * error(plain, exact), 0.01)
    assert {name for name, module in model.named_modules() if type(module) is Block} <= {*used(fast)}
    assert len(used(fast)) > 15
    again = infer(fast, x)
    assert torch.equal(again, infer(fast, x))
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert error(infer(fast, x, autocast=False), exact) < 1e-5


def test_changes_are_seen(monkeypatch):
    torch.manual_seed(0)
    layer = ConvLayer(24, 40, 1)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), layer, nn.Flatten(2), nn.Linear(35, 8)).eval()
    fast, x = holding(model), torch.randn(2, 3, 7, 9)
    linear = fast[3]

    def check() -> None:
        fresh = holding(fast)
        assert not used(fresh)  # copies hold nothing
        y = infer(fast, x)
        assert torch.equal(y, infer(fresh, x))
        assert not torch.equal(y, check.before)
        check.before = y

    check.before = torch.zeros(2, 40, 8)
    check()
    with torch.no_grad():
        linear.weight.mul_(2)
        check()
        linear.bias.add_(1)
        check()
        fast[1].norm.running_mean.add_(1)
        check()
        fast[1].norm.weight.mul_(3)
        check()
    fast.load_state_dict({name: -value for name, value in fast.state_dict().items()}, strict=False)
    fast[1].norm.running_var.abs_()
    check()
    fast.load_state_dict({k: v.clone().abs() for k, v in fast.state_dict().items()}, assign=True)
    check()
    for _ in range(3):
        linear.weight = nn.Parameter(torch.randn(8, 35))
        check()
    fast.train()
    fast(x).square().sum().backward()
    torch.optim.SGD(fast.parameters(), 0.1).step()
    fast.eval()
    check()
    linear.weight.data.mul_(2)  # which PyTorch does not count
    check()
    for place in (0, linear.weight.numel() // 2, -1):
        linear.weight.data.flatten()[place] += 9
        check()
    linear.weight.data[0, 34] += 9  # of which only eval() or train() tells
    fast.eval()
    check()
    linear.weight.data = torch.randn(8, 35)
    check()
    fast[1].norm.eps = 1
    check()
    linear.weight = nn.Parameter(linear.weight.detach().flatten().view(35, 8).T)  # the same memory in other order
    check()
    linear.weight.grad = torch.zeros_like(linear.weight)
    linear.weight.grad[1, 1] = 1
    torch.optim.SGD([linear.weight], 9, fused=True).step()  # which PyTorch does not count either
    check()
    file = io.BytesIO()
    torch.save(fast, file)
    monkeypatch.setattr(prepacked, "steps", prepacked.Steps())  # as in a process that has not called `optimise_for_cpu`
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    infer(loaded, x)
    loaded[3].weight.grad = torch.zeros_like(loaded[3].weight)
    loaded[3].weight.grad[1, 1] = 1
    torch.optim.SGD([loaded[3].weight], 9, fused=True).step()
    assert torch.equal(infer(loaded, x), infer(holding(loaded), x))
    parametrised = nn.utils.parametrizations.spectral_norm(copy.deepcopy(linear))
    infer(parametrised, x.new_ones(2, 35))
    copy.deepcopy(parametrised)
    undo_optimise_for_cpu(fast)
    assert not used(fast)
    assert type(fast[1]) is ConvLayer
    assert type(fast[3]) is nn.Linear


@pytest.mark.parametrize("prepack_weights", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(nn.Linear, "forward"), (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.ReLU, "forward")],
)
def test_methods_that_were_replaced_on_a_class(kind, name, prepack_weights, monkeypatch):
    """By whoever instruments all layers of a kind, after the model was optimised or before."""
    torch.manual_seed(0)
    model, x = randomised(spatialmamba_micro(num_classes=7)).eval(), torch.randn(1, 3, 33, 47)
    fast, own = optimise_for_cpu(copy.deepcopy(model), prepack_weights), getattr(kind, name)
    before = infer(fast, x)
    monkeypatch.setattr(kind, name, lambda module, *inputs: 0.5 * own(module, *inputs))
    expected = infer(model, x).double()
    assert error(before, expected) > 0.06
    assert error(infer(fast, x), expected) < 0.03
    assert error(infer(optimise_for_cpu(model, prepack_weights), x), expected) < 0.03


def test_not_where_it_would_be_missed():
    """Gradients, other dtypes, transforms, what counts or traces, and hooks of layers that would be left out."""
    torch.manual_seed(0)
    model, x = holding(randomised(spatialmamba_micro(num_classes=7))), torch.randn(2, 3, 33, 47)
    linear, tokens = model.head, torch.randn(2, 128)
    with torch.autocast(**AUTOCAST, cache_enabled=False):  # or it would hide weights from torch.jit.trace
        model(x).sum().backward()
        assert linear.weight.grad is not None
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(x)
        assert counted.get_total_flops() > 1e6
        with torch.no_grad():
            torch.func.vmap(linear)(tokens)
            torch.func.jvp(linear, (tokens,), (tokens,))
            torch.jit.trace(linear, tokens, check_trace=False)
    copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.float16):
            linear(tokens)
        with pytest.raises(RuntimeError, match=r"same dtype|but got|expected"):
            linear(tokens.bfloat16())
        with torch.autocast(**AUTOCAST), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(tokens[:, 1:])
    assert not used(model)

    seen = []
    block = model.layers[0].blocks[0]
    hooked = [block.mlp.act, block.self_attention.in_proj, model.patch_embed.conv1.norm, model.patch_embed.conv1.act]
    for module in hooked:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    infer(model, x)
    assert {*seen} == {*hooked}


def test_what_the_plain_layers_refuse():
    layer = holding(nn.Linear(24, 8))
    layer.bias = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"size of tensor|expand|bias"):
        infer(layer, torch.ones(2, 24))
    layer.bias = nn.Parameter(torch.ones(()))  # F.linear adds it to each
    assert torch.equal(
        infer(layer, torch.ones(2, 24)), infer(undo_optimise_for_cpu(copy.deepcopy(layer)), torch.ones(2, 24))
    )
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"storage|not allocated"):
        infer(layer, torch.ones(2, 24))
    with torch.inference_mode():  # a weight whose changes PyTorch does not count
        layer = holding(nn.Linear(24, 8))
    infer(layer, torch.ones(2, 24))
    assert not used(layer)
    layer = holding(ConvLayer(3, 8, 3))
    layer.norm.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        infer(layer, torch.ones(1, 3, 8, 8))


def test_nan_is_not_hidden():
    """oneDNN's own ReLU makes NaN 0."""
    x = torch.randn(1, 3, 32, 32)
    x[0, 1, 5, 6] = torch.nan
    assert infer(holding(spatialmamba_micro(num_classes=7)), x).isnan().all()
    layer = holding(ConvLayer(3, 8, 1, norm=False))
    assert infer(layer, x)[0, :, 5, 6].isnan().all()
    assert type(layer.conv) is cpu.CpuPointwiseConv2d


def test_compiled():
    torch.manual_seed(0)
    model, x = holding(randomised(Mlp(24, 96))), torch.randn(2, 5, 24)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode(), torch.autocast(**AUTOCAST):
        assert error(compiled(x), model(x).double()) < 0.01
