"""The block on a GPU joins modules into operators: it must give what the modules give, and give way to them."""

import pytest
import torch
from torch import nn

from classification.models import spatialmamba
from classification.models.spatialmamba import Block, SpatialMamba


@pytest.fixture
def fused(monkeypatch):
    """Calls `choose(True)` to have blocks take the operators on a CPU too, where plain PyTorch runs them."""

    def choose(wanted):
        monkeypatch.setattr(spatialmamba, "has_fused_kernels", lambda x: wanted)

    return choose


def randomise(module):
    """Parameters that are ones and zeros at first would hide which of them is used."""
    torch.manual_seed(1)
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return module


def results(module, x, weight):
    torch.manual_seed(2)  # stochastic depth draws
    x = x.clone().requires_grad_()
    y = module(x)
    grads = torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])
    return [y, *grads]


@pytest.mark.parametrize("d_state", [1, 3])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_equals_the_modules(fused, train, d_state):
    block = randomise(Block(6, d_state, drop_path=0.5)).double().train(train)
    x, weight = (torch.randn(4, 7, 5, 6, dtype=torch.float64) for _ in range(2))
    fused(False)
    expected = results(block, x, weight)
    fused(True)
    names = ["value", "input", *(name for name, _ in block.named_parameters())]
    for name, a, b in zip(names, results(block, x, weight), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_model_compiles_whole_and_trains(fused):
    """In one graph, forward and backward, with the gradients of eager."""
    fused(True)
    model = randomise(SpatialMamba(dims=[8, 16], depths=[1, 1], num_classes=3, drop_path_rate=0.0)).train()
    images = torch.randn(2, 3, 33, 47)

    def gradients(call):
        model.zero_grad()
        logits = call(images)
        logits.square().sum().backward()
        return logits, [p.grad.clone() for p in model.parameters()]

    logits, expected = gradients(model)
    compiled, actual = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(actual, expected, strict=True):  # a bias before batch norm gets rounding errors alone
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item() + 1e-4)


class Adapter(nn.Module):
    """As parameter-efficient fine-tuning puts in a module's place."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


MODULES = ["cpe1", "ln_1", "cpe2", "ln_2", "drop_path", "self_attention.conv2d", "self_attention.out_norm"]
WAYS = ["adapter", "forward", "hook", "pre-hook", "backward hook", "hook of all modules"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("how", WAYS)
def test_gives_way_to_the_modules(fused, name, how):
    """Whatever an operator would pass over is called."""
    block = randomise(Block(6, drop_path=0.1)).eval()
    module = block.get_submodule(name)
    calls, hooks = [], []

    def forward(*args):
        calls.append(name)
        return 2 * type(module).forward(module, *args)

    def hook(m, args, out):
        if m is module:
            calls.append(name)
            return 2 * out
        return None

    if how == "adapter":
        block.set_submodule(name, Adapter(module))
    elif how == "forward":
        module.forward = forward
    elif how == "hook":
        hooks.append(module.register_forward_hook(hook))
    elif how == "pre-hook":
        hooks.append(module.register_forward_pre_hook(lambda m, args: calls.append(name)))
    elif how == "backward hook":
        hooks.append(module.register_full_backward_hook(lambda m, grads_in, grads_out: calls.append(name)))
    else:
        hooks.append(torch.nn.modules.module.register_module_forward_hook(hook))
    x, weight = torch.randn(1, 5, 4, 6), torch.randn(1, 5, 4, 6)
    found = []
    for wanted in (False, True):
        fused(wanted)
        calls.clear()
        y = block(x.requires_grad_())
        (y * weight).sum().backward()
        assert how == "adapter" or set(calls) == {name}
        found.append(y)
    for handle in hooks:
        handle.remove()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def without_parameters(block, name):
    if name == "no bias in the convolution":
        block.cpe1.bias = None
    elif name == "no affine norm":
        block.ln_1 = nn.LayerNorm(6, elementwise_affine=False)
    elif name == "no bias in the norm":
        block.self_attention.out_norm = nn.LayerNorm(12, bias=False)
    else:
        block.ln_2 = nn.LayerNorm((4, 6))


@pytest.mark.parametrize(
    "name", ["no bias in the convolution", "no affine norm", "no bias in the norm", "norm over a row"]
)
def test_modules_that_operators_do_not_have(fused, name):
    block = randomise(Block(6)).eval()
    without_parameters(block, name)
    x, found = torch.randn(1, 5, 4, 6), []
    for wanted in (False, True):
        fused(wanted)
        found.append(block(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_has_a_mode_of_its_own(fused):
    """As Monte Carlo dropout sets it."""
    block = randomise(Block(6, drop_path=0.5)).eval()
    block.drop_path.train()
    x, found = torch.randn(8, 5, 4, 6), []
    for wanted in (False, True):
        fused(wanted)
        torch.manual_seed(0)
        found.append(block(x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0], block.eval()(x))
