"""The block on a GPU joins modules into operators: it must give what the modules give, and give way to them."""

import copy
import itertools

import dwconv2d
import pytest
import torch
from torch import nn

from classification.models import fused_operators, optimise_for_cpu, spatialmamba
from classification.models.spatialmamba import Block, Downsample, SpatialMamba, Stage, StructureAwareSSM


@pytest.fixture
def fused(monkeypatch):
    """Calls `choose(True)` to have blocks take the operators on a CPU too, where plain PyTorch runs them."""

    def choose(wanted):
        for module in (spatialmamba, fused_operators):
            monkeypatch.setattr(module, "has_fused_kernels", lambda x: wanted)

    monkeypatch.setattr(fused_operators, "MLP_DTYPES", (torch.bfloat16, torch.float32, torch.float64))
    return choose


def randomise(module):
    """Parameters that are ones and zeros at first would hide which of them is used."""
    torch.manual_seed(1)
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return module


def results(module, x):
    """Without gradients and with them: the value, and all gradients of a weighted sum of it."""
    torch.manual_seed(2)  # stochastic depth draws
    with torch.no_grad():
        alone = module(x)
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    y = module(x)
    assert torch.equal(alone, y)
    grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *module.parameters()])
    return [y, *grads]


def stage(blocks, d_state=1, drop_path=0.0):
    return randomise(Stage([Block(6, d_state, drop_path=drop_path) for _ in range(blocks)], Downsample(6)))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("d_state", [1, 3])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_equals_the_modules(fused, train, d_state, checkpointing):
    """A stage, whose blocks leave their last addition to the next, and a block alone."""
    whole = stage(3, d_state, drop_path=0.5).double().train(train)
    for module in (*whole.blocks, whole.downsample):
        module.grad_checkpointing = checkpointing
    x = torch.randn(4, 7, 5, 6, dtype=torch.float64)
    for module in (whole, whole.blocks[0]):
        fused(False)
        expected = results(module, x)
        fused(True)
        names = ["value", "input", *(name for name, _ in module.named_parameters())]
        for name, a, b in zip(names, results(module, x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_model_compiles_whole_and_trains(fused):
    """In one graph, forward and backward, with the gradients of eager."""
    fused(True)
    model = randomise(SpatialMamba(dims=[8, 16], depths=[2, 1], num_classes=3, drop_path_rate=0.0)).train()
    images = torch.randn(2, 3, 33, 47)

    def gradients(call):
        model.zero_grad()
        logits = call(images)
        logits.square().sum().backward()
        return logits, [p.grad.clone() for p in model.parameters()]

    logits, expected = gradients(model)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled, actual = gradients(whole)
    torch.testing.assert_close(compiled, logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(actual, expected, strict=True):  # a bias before batch norm gets rounding errors alone
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item() + 1e-4)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(images), model(images), rtol=1e-4, atol=1e-4)


def test_linear_and_relu(fused):
    """A first convolution of a down-sampling under autocast: dtypes, values and gradients of its modules."""
    fused(True)
    layer = randomise(Downsample(6)).conv[0]
    x = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found = results(layer, x)
            fused(False)
            expected = results(layer, x)
            fused(True)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=(1e-6 if dtype is None else 1e-2) * b.abs().max().item())


def test_relu_of_a_product_keeps_nan(fused):
    """Otherwise the guard that skips updates after NaN would not see it. On a GPU, cuBLAS applies the ReLU."""
    fused(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = Downsample(16).conv[0].to(device).bfloat16()
    x = torch.randn(2, 16, 4, 5, dtype=torch.bfloat16, device=device).to(memory_format=torch.channels_last)
    x[1, 3, 2, 1] = torch.nan
    y = layer(x)
    assert y[1, :, 2, 1].isnan().all()
    assert y.isnan().sum() == y.shape[1]


def test_function_transforms_and_tracing(fused, tmp_path):
    """torch.func.vmap and grad, and a TorchScript file."""
    fused(True)
    model = randomise(SpatialMamba(dims=[8, 16], depths=[2, 1], num_classes=3)).eval()
    images = torch.randn(2, 3, 33, 47, requires_grad=True)
    expected = torch.autograd.grad(model(images).square().sum(), images)[0]
    images = images.detach()
    found = torch.func.grad(lambda images: model(images).square().sum())(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found = torch.func.vmap(lambda image: model(image[None])[0])(images)
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)
        torch.jit.trace(model, images).save(tmp_path / "model.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(images), model(images))


def test_step_sizes_are_not_kept(fused):
    """Of tensors as large as x, autograd keeps x and z (one tensor), SiLU's output, the states, y and the gated y."""
    fused(True)
    ssm = StructureAwareSSM(32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # keeps the storage alive, so that no other has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ssm(torch.randn(2, 5, 7, 32))
    of_x = 2 * 64 * 5 * 7
    sizes = [tensor.untyped_storage().nbytes() // 4 for tensor in kept.values()]
    assert sorted(size for size in sizes if size >= of_x) == [*[of_x] * 4, 2 * of_x]


class Adapter(nn.Module):
    """As parameter-efficient fine-tuning puts in a module's place."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


MODULES = [
    "blocks.0",
    "blocks.1",
    *("blocks.1." + n for n in ("cpe1", "ln_1", "cpe2", "ln_2", "drop_path")),
    *("blocks.1.self_attention." + n for n in ("conv2d", "out_norm")),
    *("blocks.1.mlp" + n for n in ("", ".fc1", ".act", ".fc2")),
    *("downsample.conv.0." + n for n in ("conv", "norm", "act")),
]
WAYS = ["identity", "adapter", "forward", "hook", "pre-hook", "backward hook", "hook of all modules"]


CHANGES_CHANNELS = ("downsample.conv.0.conv", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2")
CASES = [c for c in itertools.product(MODULES, WAYS) if c not in [(n, "identity") for n in CHANGES_CHANNELS]]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_gives_way_to_the_modules(fused, name, how):
    """Whatever an operator would pass over is called."""
    whole = stage(2, drop_path=0.1).double().eval()
    module = whole.get_submodule(name)
    calls, hooks = [], []

    def forward(*args):
        calls.append(name)
        return 2 * type(module).forward(module, *args)

    def hook(m, args, out):
        if m is module:
            calls.append(name)
            return 2 * out
        return None

    if how == "identity":  # as for a drop path that inference does not need
        whole.set_submodule(name, nn.Identity())
    elif how == "adapter":
        whole.set_submodule(name, Adapter(module))
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
    x = torch.randn(1, 5, 4, 6, dtype=torch.float64).requires_grad_()
    found = []
    for wanted, gradients in itertools.product((False, True), (True, False)):
        fused(wanted)
        calls.clear()
        with torch.set_grad_enabled(gradients):
            y = whole(x)
        if gradients:
            y.square().sum().backward()
        assert set(calls) == {name} or how in ("identity", "adapter") or (how == "backward hook" and not gradients)
        found.append(y)
    for handle in hooks:
        handle.remove()
    for y in found[1:]:
        torch.testing.assert_close(y, found[0], rtol=1e-9, atol=1e-11)


def test_gives_way_to_a_compiled_block(fused):
    """As compilation by region does: `block.compile()`."""
    whole, calls = stage(2).eval(), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph

    whole.blocks[1].compile(backend=backend)
    x = torch.randn(1, 5, 4, 6)
    expected = whole(x)
    calls.clear()
    torch._dynamo.reset()
    fused(True)
    torch.testing.assert_close(whole(x), expected, rtol=1e-4, atol=1e-4)
    assert calls


class Quantised(torch.Tensor):
    """As torchao makes weights: of twice what they hold for layers, and unknown to other operators."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in ("linear", "conv2d"):
            args = [2 * a.as_subclass(torch.Tensor) if isinstance(a, Quantised) else a for a in args]
        elif name in ("mlp", "depthwise_residual_norm"):
            raise NotImplementedError(name)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})


def without_parameters(block, name):
    if name == "no bias in the convolution":
        block.cpe1.bias = None
    elif name == "no affine norm":
        block.ln_1 = nn.LayerNorm(6, elementwise_affine=False)
    elif name == "no bias in the norm":
        block.self_attention.out_norm = nn.LayerNorm(12, bias=False)
    elif name == "no bias in the MLP":
        block.mlp.fc2.bias = None
    elif name == "GELU by tanh":
        block.mlp.act = nn.GELU(approximate="tanh")
    elif name == "no norms":  # another kind of module that has weight and bias, too
        block.ln_1, block.self_attention.out_norm = nn.Linear(6, 6), nn.Linear(12, 12)
    elif name == "other layers in the MLP":
        block.mlp.fc1, block.mlp.fc2 = nn.LayerNorm(6), nn.LayerNorm(6)
    elif name == "quantised":
        for layer in (block.cpe1, block.mlp.fc1, block.mlp.fc2):
            layer._parameters["weight"] = layer.weight.detach().as_subclass(Quantised)
    else:
        block.ln_2 = nn.LayerNorm((4, 6))


@pytest.mark.parametrize(
    "name",
    [
        *("no bias in the convolution", "no affine norm", "no bias in the norm", "norm over a row"),
        *("no bias in the MLP", "GELU by tanh", "no norms", "other layers in the MLP", "quantised"),
    ],
)
def test_modules_that_operators_do_not_have(fused, name):
    block = randomise(Block(6)).eval()
    without_parameters(block, name)
    x, found = torch.randn(1, 5, 4, 6), []
    for wanted in (False, True):
        fused(wanted)
        found.append(block(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("channels", "fuses"), [(64, True), (128, True), (192, False)])
def test_narrow_layers_of_16_bits_are_one_operator(monkeypatch, channels, fuses):
    """Under autocast or in a model of 16 bits, with and without gradients; the results are those of the layers."""
    calls = []
    monkeypatch.setattr(spatialmamba, "mlp", lambda *args: calls.append(1) or dwconv2d.mlp(*args))
    layers = randomise(spatialmamba.Mlp(channels, 100))
    x = torch.randn(2, 3, 5, channels)
    for model, images, autocast in ((layers, x, True), (copy.deepcopy(layers).bfloat16(), x.bfloat16(), False)):
        found = []
        for wanted in (False, True):
            for module in (spatialmamba, fused_operators):
                monkeypatch.setattr(module, "has_fused_kernels", lambda x, wanted=wanted: wanted)
            assert not calls
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(results(model, images))
        assert bool(calls) is fuses
        calls.clear()
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=1e-2 * b.abs().max().item())
    results(layers, x)  # in float32
    assert not calls
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((7, 5), (8, 0)):  # before sm_80, PyTorch's layers are as good
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert fused_operators._has_matrix_units(None) is (capability == (8, 0))


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


@pytest.mark.parametrize("how", ["fused", "cpu", "prepacked"])
@pytest.mark.parametrize("change", ["circular", "dilated", "own"])
def test_geometry_of_a_ready_model(fused, change, how):
    """Tools pad it circularly, for panoramas, or trade the last strides for dilation, for segmentation."""
    model = randomise(SpatialMamba(dims=[8, 16], depths=[1, 1], num_classes=3)).eval()
    changed = copy.deepcopy(model)
    if how != "fused":
        optimise_for_cpu(changed, prepack_weights=how == "prepacked")
    for one in (model, changed):
        for conv in (module for module in one.modules() if isinstance(module, nn.Conv2d)):
            if change == "circular":
                conv.padding_mode = "circular"
            elif change == "own":  # as image generators replace it for seamless tiles
                conv._conv_forward = lambda *args, conv=conv: 2 * nn.Conv2d._conv_forward(conv, *args)
            else:
                conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), tuple(k // 2 * 2 for k in conv.kernel_size)
    images = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        expected = model(images)
        fused(how == "fused")
        torch.testing.assert_close(changed(images), expected, rtol=1e-4, atol=1e-5)
