"""Where values stop being finite, and what becomes of the rest."""

import pytest
import torch

from classification.compiling import uncompiled
from classification.guards import NonFiniteError, NonFiniteGuard, first_non_finite
from classification.models import spatialmamba_micro


@pytest.fixture
def model():
    torch.manual_seed(0)
    return spatialmamba_micro(num_classes=4).train()


def spoil(module, value=torch.nan):
    """Its output gets one value that is not finite."""

    def hook(module, inputs, output):
        output = output.clone()
        output[(-1,) * output.ndim] = value
        return output

    return module.register_forward_hook(hook)


@pytest.mark.parametrize(
    "name", ["patch_embed.conv2.1.conv", "layers.1.blocks.0.mlp.fc1", "layers.2.downsample", "head"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_first_layer_is_named(model, name, value):
    images = torch.randn(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert first_non_finite(model, lambda: model(images)) is None
    spoil(model.get_submodule(name), value)
    assert first_non_finite(model, lambda: model(images)) == name
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_parameters_without_a_module_are_those_of_their_block(model):
    with torch.no_grad():
        model.layers[2].blocks[1].self_attention.Ds[3] = torch.nan
    assert first_non_finite(model, lambda: model(torch.randn(2, 3, 32, 32))).startswith("layers.2.blocks.1.self_att")


def update(model, guard) -> torch.Tensor:
    guard.snapshot()
    model.zero_grad()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    return guard.flag(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def test_a_fault_that_is_gone_is_still_traced_to_its_block(model, caplog):
    guard = NonFiniteGuard(model, limit=5)
    assert update(model, guard) == 0
    hook = spoil(model.layers[1].blocks[0].ln_2)
    assert update(model, guard) == 1
    hook.remove()
    assert update(model, guard) == 0
    assert guard.report("here", lambda: model(torch.randn(2, 3, 32, 32))) is True
    assert "here: gradients are not finite, so 1 update(s) were skipped, 0 in a row and 1 in all" in caplog.text
    assert "that of layers.1.blocks.0" in caplog.text
    assert guard.report("here") is False


def test_the_layer_of_a_compiled_model_is_named(model, caplog):
    """The hooks that look for it come after the model was compiled."""
    guard = NonFiniteGuard(model, limit=5, probe=False)
    model.compile(backend="eager")
    assert update(model, guard) == 0
    with torch.no_grad():
        model.layers[1].blocks[0].mlp.fc2.weight.fill_(3e38)
    assert update(model, guard) == 1

    def again():
        with uncompiled(model):
            model(torch.randn(2, 3, 32, 32))

    guard.report("here", again)
    assert "the first output that is not finite is that of layers.1.blocks.0.mlp.fc2" in caplog.text


def test_batch_norm_statistics_are_put_back(model):
    guard = NonFiniteGuard(model, limit=5)
    update(model, guard)
    before = {k: v.clone() for k, v in model.named_buffers() if v.is_floating_point()}
    spoil(model.patch_embed.conv1.conv)
    update(model, guard)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers() if k in before)


def test_gradients_alone_are_named(model):
    guard = NonFiniteGuard(model, limit=1)

    def spoil_gradient(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda g: g * torch.nan)

    model.norm.register_forward_hook(spoil_gradient)
    update(model, guard)
    with pytest.raises(NonFiniteError, match=r"outputs are finite, the gradient of norm.bias \(\d+ in all\) is not"):
        guard.report("here", lambda: model(torch.randn(2, 3, 32, 32)))
