"""Every test here runs once for each backend: the compiled kernels, plain PyTorch, and Triton's interpreter."""

import math
import random

import pytest
import torch
from kernel_backends import BACKENDS, running_on
from kernel_backends import interpreted as is_interpreted
from selective_scan import selective_scan_state
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

FORWARD = torch.ops.selective_scan.selective_scan_state
BACKWARD = torch.ops.selective_scan.selective_scan_state_backward
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]

# batch, channels, states, length, groups of B (None: B has no group dimension)
# The last ones are for the CUDA kernels: sets of rows that fill a block, several chunks of a row, a block's passes.
SIZES = [
    (1, 1, 1, 1, None),
    (2, 3, 16, 1, 1),
    (2, 8, 2, 2, 4),
    (1, 24, 1, 7, None),
    (2, 3, 2, 31, 3),
    (2, 1, 16, 49, None),
    (2, 8, 1, 63, 1),
    (3, 3, 2, 196, None),
    (1, 24, 16, 1023, 8),
    (1, 3, 1, 3136, 3),
    (2, 100, 1, 49, None),
    (2, 40, 1, 196, 2),
    (1, 3, 2, 2049, None),
    (1, 16, 1, 3585, 2),
    *([(16, 1024, 1, 196, None)] if torch.cuda.is_available() else []),
]


@pytest.fixture(scope="module", params=BACKENDS, autouse=True)
def backend(request):
    """The name of the backend that the operators run on while the test does."""
    with running_on(request.param, "selective_scan"):
        yield request.param


@pytest.fixture
def interpreted(backend) -> bool:
    """Whether a program takes a tenth of a second, and sizes must be small."""
    return is_interpreted(backend)


def make_inputs(
    batch=2, channels=6, states=2, length=7, groups=None, bias=True, softplus=True, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    state = torch.promote_types(dtype, torch.float32)
    delta = torch.randn(batch, channels, length, dtype=dtype)
    inputs = dict(
        u=1 + torch.randn(batch, channels, length, dtype=dtype),
        delta=delta if softplus else delta.abs(),
        A=-2 * torch.rand(channels, states, dtype=state),
        B=1 + torch.randn(batch, *([groups] if groups else []), states, length, dtype=dtype),
    )
    return inputs | (dict(delta_bias=torch.rand(channels, dtype=state)) if bias else {})


def exact_scan(u, delta, A, B, delta_bias=None, delta_softplus=False, A_is_log=False):
    """The recurrence as it is written, one token after the other."""
    if A_is_log:
        A = -torch.exp(A)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    B = B[:, None] if B.dim() == 3 else B
    B = B.repeat_interleave(u.shape[1] // B.shape[1], dim=1)
    h, states = 0, []
    for u_t, dt, B_t in zip(u.unbind(-1), delta.unbind(-1), B.unbind(-1), strict=True):
        h = torch.exp(dt[..., None] * A) * h + (dt * u_t)[..., None] * B_t
        states.append(h)
    return torch.stack(states, -1)


def make_grad(inputs):
    b, d, length = inputs["u"].shape
    return 1 + torch.randn(b, d, inputs["A"].shape[1], length, dtype=inputs["A"].dtype)


# ----- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "B{}-D{}-N{}-L{}-G{}".format(*s))
@pytest.mark.float32_in_interpreter
def test_sizes(compare, size, dtype, interpreted):
    batch, channels, states, length, groups = size
    if interpreted:
        length, channels = min(length, 200 if states == 1 else 67), min(channels, 8)  # still more than a chunk of 64
        groups = groups and min(groups, 4)  # a program each
    inputs = make_inputs(batch, channels, states, length, groups, dtype=dtype)
    assert selective_scan_state(**inputs).dtype == inputs["A"].dtype
    compare(selective_scan_state, exact_scan, inputs, delta_softplus=True)


@pytest.mark.parametrize("size", [(2, 40, 1, 196, 2), (1, 16, 1, 3585, 2), (1, 24, 2, 1023, None)], ids=str)
def test_sizes_of_channels_last(compare, size, interpreted):
    batch, channels, states, length, groups = size
    inputs = make_inputs(batch, channels, states, min(length, 67) if interpreted else length, groups)
    inputs |= {name: inputs[name].mT.contiguous().mT for name in ("u", "delta", "B")}
    compare(selective_scan_state, exact_scan, inputs, delta_softplus=True)


@pytest.mark.parametrize("groups", [None, 1, 3, 6])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "no_softplus"])
@pytest.mark.parametrize("is_log", [True, False], ids=["A_is_log", "A"])
def test_options(compare, groups, bias, softplus, is_log):
    inputs = make_inputs(length=33, groups=groups, bias=bias, softplus=softplus)
    if is_log:  # rates from 0.1 to 5
        inputs["A"] = torch.empty_like(inputs["A"]).uniform_(-2.3, 1.6)
    compare(selective_scan_state, exact_scan, inputs, delta_softplus=softplus, A_is_log=is_log)


def test_defaults_are_no_bias_and_no_softplus(check):
    inputs = make_inputs(bias=False, softplus=False, dtype=torch.float64)
    check(selective_scan_state(**inputs), exact_scan(**inputs))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_operator(check, evaluate, dtype, bias):
    """Called by itself it has every input's dtype, and the gradient for delta_bias even where there is no bias."""
    inputs = make_inputs(length=31, groups=2, bias=bias, dtype=dtype)
    grad = make_grad(inputs)
    with_bias = {"delta_bias": torch.zeros_like(inputs["A"][:, 0])} | inputs
    wide = {name: with_bias[name].double() for name in ("u", "delta", "A", "B", "delta_bias")}
    _, expected = evaluate(exact_scan, wide, dict(delta_softplus=True), grad.double())
    for name, actual in zip(wide, BACKWARD(grad, **inputs, delta_softplus=True), strict=True):
        assert actual.dtype == with_bias[name].dtype, name
        check(actual, expected[f"gradient of {name}"], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.float32_in_interpreter
def test_stiff_decays(compare, dtype):
    """Steps from 0, where the state stays, to delta |A| = 1e4, where nothing of it is left."""
    inputs = make_inputs(length=63, bias=False, dtype=dtype)
    steps = torch.tensor([0, 1e-3, 1, 30, 90, 300, 1e4])
    inputs["delta"] = steps[torch.randint(len(steps), inputs["delta"].shape)].to(dtype)
    inputs["A"] = -torch.rand_like(inputs["A"]).clamp(0.5)
    # As large a drive at every step, or the largest steps would be all that the relative error sees.
    inputs["u"] = inputs["u"] / inputs["delta"].clamp(1)
    compare(selective_scan_state, exact_scan, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The second number is a step that keeps s, half of it in delta and half in the bias, exact in every dtype.
@pytest.mark.parametrize(("s", "step"), [(-700, 2), (-50, 1 / 8), (20, 1 / 16), (50, 1 / 8), (700, 2)])
@pytest.mark.float32_in_interpreter
def test_softplus_far_from_zero(compare, s, step, dtype):
    inputs = make_inputs(length=31, dtype=dtype)
    inputs["delta"] = s / 2 + step * torch.randint(-8, 8, inputs["delta"].shape).to(dtype)
    inputs["delta_bias"] = torch.full_like(inputs["delta_bias"], s / 2)
    # Neither float16's overflow nor float32's underflow, in gradients as small as softplus(s) squared.
    scale = 1e4 if s < 0 else 1 / 16
    inputs["u"], inputs["B"] = scale * inputs["u"], scale * inputs["B"]
    inputs["A"] = inputs["A"] / max(s, 1)
    compare(selective_scan_state, exact_scan, inputs, delta_softplus=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", ["constant", "varied"])
@pytest.mark.float32_in_interpreter
def test_slow_decays(compare, dtype, steps, interpreted):
    """States that last for a thousand tokens: every rounding of a decay next to 1 would be felt as often."""
    inputs = make_inputs(1, 2, 1, 200 if interpreted else 3136, bias=False, dtype=dtype)
    inputs["A"] = -torch.ones_like(inputs["A"])
    inputs["delta"] = torch.ones_like(inputs["delta"]) if steps == "constant" else 1 + torch.rand_like(inputs["delta"])
    inputs["delta"] *= 1.01e-3  # float32 rounds its decay by nearly half a unit: 200 tokens feel it
    compare(selective_scan_state, exact_scan, inputs)


def test_outlier_is_forgotten(check, backend):
    """A huge state, and then a decay that leaves nothing of it: the ones after are exact by themselves."""
    inputs = make_inputs(1, 3, 1, 64, bias=False, softplus=False)
    inputs["u"][..., 7] = 1e6
    inputs["delta"][..., 9], inputs["A"] = 40, torch.full_like(inputs["A"], -1)
    h, exact = selective_scan_state(**inputs), exact_scan(**{name: t.double() for name, t in inputs.items()})
    check(h[..., 9:].contiguous(), exact[..., 9:])


@pytest.mark.parametrize("delta", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "no_softplus"])
def test_non_finite_delta(delta, softplus):
    """It reaches the states after it and no others; a step of softplus(-inf) = 0 reaches none."""
    inputs = make_inputs(2, 5, 2, 70, softplus=softplus)
    expected = selective_scan_state(**inputs, delta_softplus=softplus)
    inputs["delta"][1, 3, 40] = delta
    h = selective_scan_state(**inputs, delta_softplus=softplus)
    if softplus and delta == -math.inf:
        assert h.isfinite().all()
        torch.testing.assert_close(h[1, 3, :, 40], h[1, 3, :, 39])
    else:
        assert not h[1, 3, :, 40 : None if math.isnan(delta) else 41].isfinite().any()
    h[1, 3, :, 40:] = expected[1, 3, :, 40:]
    torch.testing.assert_close(h, expected, rtol=0, atol=0)


# ----- random cases


def random_inputs(seed: int, largest: int, layouts: dict) -> tuple[dict[str, torch.Tensor], dict[str, bool]]:
    """Inputs of up to about `largest` states, in any dtype and layout, with steps from tiny to stiff; and options."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, channels = rng.choice([0, 1, 1, 2, 2, 3]), rng.choice([1, 2, 3, 7, 8, 15, 16, 17, 24, 33, 64])
    states = rng.choice([1, 1, 1, 2, 3, 5, 16])
    most = max(largest // (max(batch, 1) * channels * states), 1)
    length = round(math.exp(rng.uniform(0, math.log(most))))
    groups = rng.choice([None, *(g for g in range(1, channels + 1) if channels % g == 0)])
    softplus, dtype = rng.random() < 0.6, rng.choice(DTYPES)
    inputs = make_inputs(batch, channels, states, length, groups, rng.random() < 0.5, softplus, dtype)
    slow = dtype != torch.float64  # else the exact scan, which multiplies by decays next to 1, is the less exact one
    if softplus:
        inputs["delta"] += rng.choice([*([-9, -6] if slow else []), -2, 0, 3])
    else:
        inputs["delta"] *= 10 ** rng.uniform(-4 if slow else -1, 1)
        inputs["u"] /= inputs["delta"].clamp(1)
    inputs["A"] *= 10 ** rng.uniform(-2 if slow else 0, 1)
    is_log = rng.random() < 0.3
    if is_log:
        inputs["A"] = (-inputs["A"]).clamp(1e-6).log()
    views = {name: rng.choice(list(layouts.values()))(t) if t.numel() else t for name, t in inputs.items()}
    return views, dict(delta_softplus=softplus, A_is_log=is_log)


@pytest.mark.parametrize("part", range(4))
def test_random_cases(request, evaluate, check, layouts, interpreted, part):
    """`--random-cases 2000` for all that are asked of a release."""
    cases = request.config.getoption("--random-cases") // (20 if interpreted else 1)
    for seed in range(part, cases, 4):
        inputs, options = random_inputs(seed, 300 if interpreted else 20000, layouts)
        grad, actual = evaluate(selective_scan_state, inputs, options)
        wide = {name: t.double() for name, t in inputs.items()}
        _, exact = evaluate(exact_scan, wide, options, grad.double())
        for name in exact:
            check(actual[name], exact[name], name if name == "value" else f"seed {seed}: {name}")


# ----- worked by hand


def row(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[None, None]


def test_three_steps_by_hand():
    """Decays 1/2, 1/4, 1/2 and drives 1, 4, 6: h = 1, then 1/4 + 4, then 4.25 / 2 + 6."""
    u, delta, B = row(1, 2, 3).requires_grad_(), row(1, 2, 1).requires_grad_(), row(1, 1, 2).requires_grad_()
    A = torch.tensor([[-math.log(2)]], dtype=torch.float64, requires_grad=True)
    h = selective_scan_state(u, delta, A, B)
    torch.testing.assert_close(h, row(1, 4.25, 8.125)[None])

    h[..., -1].sum().backward()  # reaches the three states as 1/8, 1/2 and 1
    torch.testing.assert_close(u.grad, row(1 / 8, 1, 2))
    torch.testing.assert_close(B.grad, row(1 / 8, 2, 3))
    torch.testing.assert_close(A.grad, torch.tensor([[2.375]], dtype=torch.float64))
    torch.testing.assert_close(delta.grad, row(1 / 8, 1 - math.log(2) / 8, 6 - 2.125 * math.log(2)))


@pytest.mark.parametrize("length", [1023, 3136])
def test_state_kept_over_a_whole_row_by_hand(length):
    """Steps of 0 after the first neither forget nor add: every state is B u of the first, and so every gradient's."""
    u = torch.full((1, 1, length), 3.0, requires_grad=True)
    delta = torch.zeros(1, 1, length).index_fill(2, torch.tensor(0), 1)
    h = selective_scan_state(u, delta, -torch.ones(1, 1), torch.full((1, 1, length), 2.0))
    assert h.eq(6).all()
    h.sum().backward()
    assert torch.equal(u.grad, 2 * length * delta)


def test_softplus_of_zero_by_hand():
    """softplus(0) = log 2, so that A = -1 halves the state."""
    one, A = row(1, 1, 1), torch.tensor([[-1.0]], dtype=torch.float64)
    bias = torch.tensor([-5.0], dtype=torch.float64)
    h = selective_scan_state(one, row(5, 5, 5), A, one, bias, delta_softplus=True)
    torch.testing.assert_close(h[0], math.log(2) * row(1, 1.5, 1.75))


def test_consecutive_channels_share_a_group_by_hand():
    one = torch.ones(1, 4, 1)
    h = selective_scan_state(one, one, -torch.ones(4, 1), torch.tensor([2.0, 3.0]).view(1, 2, 1, 1))
    assert h.flatten().tolist() == [2, 2, 3, 3]


# ----- layouts, transforms, tools


def test_views(check, evaluate, layout):
    inputs = make_inputs(channels=4, length=9, groups=2)
    grad = layout(make_grad(inputs))
    views = {name: layout(t) for name, t in inputs.items()}
    copies = {name: t.contiguous() for name, t in views.items()}
    _, actual = evaluate(selective_scan_state, views, dict(delta_softplus=True), grad)
    _, expected = evaluate(selective_scan_state, copies, dict(delta_softplus=True), grad.contiguous())
    for name in expected:
        check(actual[name], expected[name], name)


@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "no_softplus"])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.long_in_interpreter
def test_gradcheck(groups, length, softplus, interpreted):
    inputs = make_inputs(1, 2 if interpreted else 4, 2, length, groups, softplus=softplus, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(selective_scan_state, (*leaves, softplus, groups is None))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.long_in_interpreter
def test_opcheck(layout, groups, dtype):
    inputs = {name: layout(t) for name, t in make_inputs(groups=groups, dtype=dtype).items()}
    grad = layout(make_grad(inputs))
    options = dict(delta_softplus=True, A_is_log=groups is None)
    opcheck(BACKWARD, (grad, *inputs.values()), options)
    opcheck(FORWARD, tuple(t.requires_grad_() for t in inputs.values()), options)


@pytest.mark.long_in_interpreter
def test_opcheck_without_bias():
    inputs = make_inputs(bias=False, length=1)
    opcheck(BACKWARD, (make_grad(inputs), *inputs.values()))
    opcheck(FORWARD, tuple(t.requires_grad_() for t in inputs.values()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"], indirect=True)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_compile(check, evaluate, layout, bias):
    torch.compiler.reset()
    inputs, options = {name: layout(t) for name, t in make_inputs(bias=bias).items()}, dict(delta_softplus=True)
    grad, expected = evaluate(selective_scan_state, inputs, options)
    _, actual = evaluate(torch.compile(selective_scan_state, fullgraph=True), inputs, options, grad)
    for name in expected:
        check(actual[name], expected[name], name)


def test_compile_once_for_every_length(check):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selective_scan_state, fullgraph=True, dynamic=True, backend=counter)
    for size in [(2, 6, 3, 7), (5, 8, 4, 31)]:
        inputs = make_inputs(*size)
        check(compiled(**inputs), selective_scan_state(**inputs))
    assert counter.frame_count == 1


class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(6, 2))

    def forward(self, u, delta, B):
        return selective_scan_state(u, delta, -self.A_log.exp(), B, delta_softplus=True)


def test_export(check):
    inputs = make_inputs(bias=False)
    args, model = (inputs["u"], inputs["delta"], inputs["B"]), Scan()
    exported = torch.export.export(model, args)
    assert any(node.target is FORWARD.default for node in exported.graph.nodes)
    check(exported.module()(*args), model(*args))


def assert_alike(fake, real):
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_gradients_are_laid_out_as_activations():
    inputs = make_inputs(channels=6, length=9)
    inputs["u"] = inputs["u"].mT.contiguous().mT
    grad_u, grad_delta, *_ = BACKWARD(make_grad(inputs), **inputs)
    assert grad_u.stride() == inputs["u"].stride()
    assert grad_delta.stride() == inputs["delta"].stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_tensors(layout, dtype):
    """The fake kernels promise what the real ones do."""
    inputs = {name: layout(t) for name, t in make_inputs(dtype=dtype, groups=2).items()}
    meta = {name: t.to("meta") for name, t in inputs.items()}
    assert_alike(selective_scan_state(**meta), selective_scan_state(**inputs))
    grad = layout(make_grad(inputs))
    for fake, real in zip(BACKWARD(grad.to("meta"), **meta), BACKWARD(grad, **inputs), strict=True):
        assert_alike(fake, real)


# ----- autocast


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast(check, evaluate, half, compiled):
    """Activations and their gradients pass through the autocast dtype; A, delta_bias and the states do not."""
    torch.compiler.reset()
    inputs, options = make_inputs(length=31, groups=2), dict(delta_softplus=True)
    operator = torch.compile(selective_scan_state, fullgraph=True) if compiled else selective_scan_state
    with torch.autocast(torch.get_default_device().type, half):
        grad, actual = evaluate(operator, inputs, options)
    rounded = {name: (t if name in ("A", "delta_bias") else t.to(half)).double() for name, t in inputs.items()}
    _, expected = evaluate(exact_scan, rounded, options, grad.double())
    for name, result in actual.items():
        assert result.dtype == torch.float32
        activation = name in ("gradient of u", "gradient of delta", "gradient of B")
        check(result.to(half) if activation else result, expected[name], name)


def test_autocast_leaves_float64_alone(compare):
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        compare(selective_scan_state, exact_scan, make_inputs(dtype=torch.float64), delta_softplus=True)


def test_autocast_widens_rates_and_bias_of_16_bits():
    """As in a model whose parameters were cast to 16 bits."""
    inputs = make_inputs(dtype=torch.bfloat16)
    narrow = inputs | {name: inputs[name].bfloat16() for name in ("A", "delta_bias")}
    wide = narrow | {name: narrow[name].float() for name in ("A", "delta_bias")}
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert torch.equal(selective_scan_state(**narrow), selective_scan_state(**wide))


# ----- edges, errors, repeatability


def test_empty_batch(evaluate):
    _, results = evaluate(selective_scan_state, make_inputs(batch=0, groups=2), dict(delta_softplus=True))
    assert results["value"].shape == (0, 6, 2, 7)
    assert results["gradient of u"].shape == (0, 6, 7)
    assert results["gradient of A"].eq(0).all()
    assert results["gradient of delta_bias"].eq(0).all()


def test_second_derivative_is_refused():
    inputs = make_inputs(bias=False)
    u = inputs.pop("u").requires_grad_()
    (grad,) = torch.autograd.grad(selective_scan_state(u, **inputs).square().sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_transforms_of_torch_func():
    """Gradients of each sample at once are those of one after the other."""
    samples = [list(make_inputs().values()) for _ in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*samples, strict=True)]
    loss = lambda *t: selective_scan_state(*t, delta_softplus=True).square().sum()  # noqa: E731
    found = torch.func.vmap(torch.func.grad(loss, tuple(range(5))))(*stacked)
    for i, inputs in enumerate(samples):
        expected = torch.autograd.grad(loss(*[t.requires_grad_() for t in inputs]), inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b)
    twice = torch.func.grad(lambda u: torch.func.grad(loss)(u, *samples[0][1:]).sum())
    with pytest.raises(NotImplementedError, match="second derivative"):
        twice(samples[0][0])


def test_forward_mode_is_refused():
    inputs = make_inputs()
    u = inputs.pop("u")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda t: selective_scan_state(t, **inputs), (u,), (torch.ones_like(u),))


@pytest.mark.parametrize("value", [None, [1.0], torch.eye(3).to_sparse()], ids=["None", "list", "sparse"])
@pytest.mark.parametrize("argument", ["u", "delta", "A", "B", "delta_bias"])
def test_arguments_that_are_no_dense_tensors(argument, value):
    if argument == "delta_bias" and value is None:
        return
    with pytest.raises(TypeError, match=rf"^{argument} must be a"):
        selective_scan_state(**make_inputs() | {argument: value})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float64], ids=str)
@pytest.mark.parametrize("argument", ["u", "delta", "A", "B", "delta_bias"])
def test_autocast_hides_no_wrong_dtype(argument, dtype):
    inputs = make_inputs()
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16), pytest.raises(TypeError, match=r"^(u|delta|A|B|delta_bias) must be"):
        selective_scan_state(**inputs | {argument: inputs[argument].to(dtype)})


BAD = {
    "u_rank": (ValueError, r"^u\b", dict(u=torch.ones(6, 7))),
    "u_integer": (TypeError, r"^u\b", dict(u=torch.ones(2, 6, 7, dtype=torch.int64))),
    "u_complex": (TypeError, r"^u\b", dict(u=torch.ones(2, 6, 7, dtype=torch.complex64))),
    "delta_shape": (ValueError, r"^delta\b", dict(delta=torch.ones(2, 6, 8))),
    "delta_broadcast": (ValueError, r"^delta\b", dict(delta=torch.ones(2, 1, 7))),
    "delta_dtype": (TypeError, r"^delta\b", dict(delta=torch.ones(2, 6, 7).half())),
    "A_rank": (ValueError, r"^A\b", dict(A=torch.ones(6))),
    "A_channels": (ValueError, r"^A\b", dict(A=torch.ones(5, 2))),
    "A_transposed": (ValueError, r"^A\b", dict(A=torch.ones(2, 6))),
    "A_half": (TypeError, r"^A\b", dict(A=torch.ones(6, 2).half())),
    "A_of_activations": (
        TypeError,
        r"^A\b",
        dict(
            u=torch.ones(2, 6, 7).half(),
            delta=torch.ones(2, 6, 7).half(),
            A=torch.ones(6, 2).half(),
            B=torch.ones(2, 2, 7).half(),
        ),
    ),
    "A_double": (TypeError, r"^A\b", dict(A=torch.ones(6, 2).double())),
    "B_rank_2": (ValueError, r"^B\b", dict(B=torch.ones(2, 7))),
    "B_rank_5": (ValueError, r"^B\b", dict(B=torch.ones(2, 1, 1, 2, 7))),
    "B_batch": (ValueError, r"^B\b", dict(B=torch.ones(1, 2, 7))),
    "B_states": (ValueError, r"^B\b", dict(B=torch.ones(2, 3, 7))),
    "B_length": (ValueError, r"^B\b", dict(B=torch.ones(2, 2, 6))),
    "B_groups_not_dividing": (ValueError, r"^B\b", dict(B=torch.ones(2, 4, 2, 7))),
    "B_more_groups_than_channels": (ValueError, r"^B\b", dict(B=torch.ones(2, 12, 2, 7))),
    "B_no_groups": (ValueError, r"^B\b", dict(B=torch.ones(2, 0, 2, 7))),
    "B_dtype": (TypeError, r"^B\b", dict(B=torch.ones(2, 2, 7).bfloat16())),
    "delta_bias_shape": (ValueError, r"^delta_bias\b", dict(delta_bias=torch.ones(1))),
    "delta_bias_rank": (ValueError, r"^delta_bias\b", dict(delta_bias=torch.ones(6, 1))),
    "delta_bias_dtype": (TypeError, r"^delta_bias\b", dict(delta_bias=torch.ones(6).double())),
    "no_states": (ValueError, "states", dict(A=torch.ones(6, 0), B=torch.ones(2, 0, 7))),
    "no_tokens": (ValueError, "length", dict(u=torch.ones(2, 6, 0), delta=torch.ones(2, 6, 0), B=torch.ones(2, 2, 0))),
    "no_channels": (
        ValueError,
        "channels",
        dict(u=torch.ones(2, 0, 7), delta=torch.ones(2, 0, 7), A=torch.ones(0, 2), delta_bias=torch.ones(0)),
    ),
}


CALLS = {
    "forward": selective_scan_state,
    "backward": lambda **inputs: BACKWARD(torch.ones(2, 6, 2, 7), **inputs),
    "fake": lambda **inputs: FORWARD(**{name: t.to("meta") for name, t in inputs.items()}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change, call):
    with pytest.raises(error, match=message):
        call(**make_inputs() | change)


@pytest.mark.parametrize("name", ["delta", "A", "B", "delta_bias"])
def test_inputs_on_two_devices(name):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        selective_scan_state(**inputs | {name: inputs[name].to("meta")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(evaluate, threads, dtype, interpreted):
    """Across runs and numbers of threads; large enough for PyTorch to use them."""
    size = (2, 10, 1, 67) if interpreted else (4, 48, 2, 196)
    inputs, options, results = make_inputs(*size, groups=2, dtype=dtype), dict(delta_softplus=True), []
    grad = make_grad(inputs)
    for count in (1, 2, 2):
        threads(count)
        results.append(evaluate(selective_scan_state, inputs, options, grad)[1])
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name
