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


@pytest.mark.parametrize("name", ["cpe1", "ln_1", "cpe2", "ln_2", "self_attention.conv2d", "self_attention.out_norm"])
@pytest.mark.parametrize("how", ["adapter", "hook", "pre-hook", "backward hook"])
def test_gives_way_to_the_modules(fused, name, how):
    """Whatever an operator would pass over is called."""
    block = randomise(Block(6)).eval()
    module = block.get_submodule(name)
    calls = []
    if how == "adapter":
        block.set_submodule(name, Adapter(module))
    elif how == "hook":
        module.register_forward_hook(lambda m, args, out: calls.append(name) or 2 * out)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda m, args: calls.append(name))
    else:
        module.register_full_backward_hook(lambda m, grads_in, grads_out: calls.append(name))
    x, weight = torch.randn(1, 5, 4, 6), torch.randn(1, 5, 4, 6)
    found = []
    for wanted in (False, True):
        fused(wanted)
        calls.clear()
        y = block(x.requires_grad_())
        (y * weight).sum().backward()
        assert how == "adapter" or calls == [name]
        found.append(y)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
