"""Spatial-Mamba (arXiv 2410.15091): one raster scan, its states fused with their neighbours, in a four-stage backbone.

Read from top to bottom: the block's parts, the block, the stages, the classifier and its dense-task form, the sizes.
Tokens travel channels-last, (B, H, W, C); the scan and the fusion work on planes, (B, D, H, W). On a GPU, operators
join several modules: `fused_operators.py` says when.
Parameter names are those of the published checkpoints, which load strictly; weight decay rules match on them.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from dwconv2d import depthwise_residual_norm, depthwise_silu, mlp, state_fusion_output
from selective_scan import norm_gate, selective_scan_state
from timm import layers
from timm.layers import SelectAdaptivePool2d, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from classification.models.fused_operators import (
    ProjectedScan,
    apply,
    cast,
    fusible,
    fusible_mlp,
    has_fused_kernels,
    has_hooks,
    linear_relu,
    product,
)

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # initial step sizes, log-uniform (Mamba, arXiv 2312.00752, section 3.6)


def to_planes(tokens: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view."""
    return tokens.permute(0, 3, 1, 2)


def to_tokens(planes: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view."""
    return planes.permute(0, 2, 3, 1)


def _call(function: Callable, *inputs: Tensor | None):
    return function(*inputs)


def _checkpoint(function: Callable, *inputs: Tensor | None):
    """`function` of the inputs; the backward pass calls it again in place of keeping its activations."""
    return checkpoint(function, *inputs, use_reentrant=False)


POOLINGS = ("avg", "max", "avgmax", "")


def depthwise_conv(channels: int) -> nn.Conv2d:
    """Depthwise 3x3 convolution of planes (B, channels, H, W), padded with zeros to keep their size."""
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)


class ConvLayer(nn.Module):
    """Convolution, padded to keep ceil(size / stride), then batch norm and ReLU where asked."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_chans) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()  # not in place, which full backward hooks do not allow

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        # An adapter in its place may have no kernel size: it is not fusible.
        if fusible(x, convolutions=(conv,)) and conv.kernel_size == (1, 1) and to_tokens(x).is_contiguous():
            # On a GPU this is one product of tokens: cuDNN adds the bias in a pass of its own.
            tokens, weight = to_tokens(x), conv.weight.flatten(1)
            if self._has_relu_alone():
                return to_planes(linear_relu(tokens, weight, conv.bias))
            x = to_planes(F.linear(tokens, weight, conv.bias))
        else:
            x = conv(x)
        return self.act(self.norm(x))

    def _has_relu_alone(self) -> bool:
        is_alone = type(self.act) is nn.ReLU and type(self.norm) is nn.Identity
        return is_alone and not has_hooks(self.act) and not has_hooks(self.norm)


class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> tokens (B, ceil(H / 4), ceil(W / 4), dim)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        mid = dim // 2
        self.conv1 = ConvLayer(in_chans, mid, 3, stride=2)
        self.conv2 = nn.Sequential(ConvLayer(mid, mid, 3), ConvLayer(mid, mid, 3, act=False))
        self.conv3 = nn.Sequential(ConvLayer(mid, 4 * dim, 3, stride=2), ConvLayer(4 * dim, dim, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last, as tokens are, to the end; in words that torch.func.vmap knows.
        x = self.conv1(to_planes(to_tokens(x).contiguous()))
        x = x + self.conv2(x)
        return to_tokens(self.conv3(x))


class Downsample(nn.Module):
    """Tokens (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C), through 8 C channels."""

    def __init__(self, dim: int):
        super().__init__()
        wide = 8 * dim
        self.conv = nn.Sequential(
            ConvLayer(dim, wide, 1, bias=True, norm=False),
            ConvLayer(wide, wide, 3, stride=2, groups=wide, bias=True, norm=False),
            ConvLayer(wide, 2 * dim, 1, bias=True, act=False),
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = to_planes(x)
        is_plain = type(self.conv) is nn.Sequential and not has_hooks(self.conv)  # or its parts cannot stand for it
        if self.grad_checkpointing and torch.is_grad_enabled() and is_plain:
            # Only the wide layers: batch norm, if computed again, would count its batch twice.
            x = self.conv[2](_checkpoint(self._wide, x))
        else:
            x = self.conv(x)
        return to_tokens(x)

    def _wide(self, x: Tensor) -> Tensor:
        return self.conv[1](self.conv[0](x))


class StateFusion(nn.Module):
    """Parameters of structure-aware state fusion and the call that applies it with the observation equation."""

    def __init__(self, channels: int):
        super().__init__()
        # Published names. The dilations are built into the operator.
        self.kernel_3 = nn.Parameter(torch.ones(channels, 1, 3, 3))  # dilation 1
        self.kernel_3_1 = nn.Parameter(torch.ones(channels, 1, 3, 3))  # dilation 3
        self.kernel_3_2 = nn.Parameter(torch.ones(channels, 1, 3, 3))  # dilation 5
        self.alpha = nn.Parameter(torch.ones(3))

    def forward(self, h: Tensor, C: Tensor, D: Tensor, x: Tensor) -> Tensor:
        """States h (B, D, N, H, W), C (B, N, H, W), D (D,), x (B, D, H, W) -> y = sum_n C_n h'_n + D x, like x."""
        weights = (self.kernel_3, self.kernel_3_1, self.kernel_3_2, self.alpha, D)
        *kernels, D = (cast(w, h) for w in weights)  # float32 even in a model cast to 16 bits
        return state_fusion_output(h, *kernels, C, D, x)


class StructureAwareSSM(nn.Module):
    """The structure-aware state space model between two projections, gated: (B, H, W, dim) -> (B, H, W, dim).

    Args:
        dim: channels in and out; the state space model works on D = expand * dim.
        d_state: states N per channel.
        expand: D / dim.
    """

    def __init__(self, dim: int, d_state: int = 1, expand: int = 2):
        super().__init__()
        inner = expand * dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)

        # Bare parameters, not Linear layers: these are the published names.
        self.x_proj_weight = nn.Parameter(nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False).weight.detach())
        bound = self.dt_rank**-0.5
        self.dt_projs_weight = nn.Parameter(torch.empty(inner, self.dt_rank).uniform_(-bound, bound))
        self.dt_projs_bias = nn.Parameter(self._initial_dt_bias(inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.Ds = nn.Parameter(torch.ones(inner))

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = depthwise_conv(inner)
        self.state_fusion = StateFusion(inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    @staticmethod
    def _initial_dt_bias(channels: int) -> Tensor:
        """The bias for which softplus(bias) is log-uniform in [DT_MIN, DT_MAX]."""
        log_dt = torch.empty(channels).uniform_(math.log(DT_MIN), math.log(DT_MAX))
        dt = log_dt.exp().clamp(min=DT_FLOOR)
        return dt + torch.log(-torch.expm1(-dt))

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).chunk(2, dim=-1)
        if fusible(x, convolutions=(self.conv2d,), norms=(self.out_norm,)):
            uses = depthwise_silu(x, self.conv2d.weight, self.conv2d.bias, uses=3)  # (B, D, H, W), contiguous
            gated = norm_gate(self.fused_ssm(*uses), z, self.out_norm.weight, self.out_norm.bias, self.out_norm.eps)
        else:
            gated = self.gate(x, F.silu(z))
        return self.out_proj(gated)

    def gate(self, x: Tensor, z: Tensor) -> Tensor:
        """Tokens of the state space model of x, normalised, times z: (B, H, W, D) each."""
        x = F.silu(self.conv2d(to_planes(x)))  # (B, D, H, W), laid out as tokens
        return self.out_norm(to_tokens(self.ssm(x))) * z

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """weight (E, D) times each token of x (B, D, H, W) -> (B, E, H, W)."""
        if has_fused_kernels(x):
            # Cast before `product` expands it: autocast's own cast would copy it for each image.
            return product(weight.to(x.dtype), x.flatten(2)).unflatten(2, x.shape[2:])
        return (weight @ x.flatten(2)).unflatten(2, x.shape[2:])

    def ssm(self, x: Tensor) -> Tensor:
        """State transition, state fusion and observation: (B, D, H, W) -> (B, D, H, W)."""
        dt, B, C = self.select(x)
        h = self.transition(x, dt, B)
        return self.state_fusion(h, C, self.Ds, x)  # y = sum_n C_n h'_n + D x

    def fused_ssm(self, x: Tensor, scanned: Tensor, observed: Tensor) -> Tensor:
        """`ssm` for GPUs; autograd keeps less. Each of x's three uses has its own tensor, which gets its own gradient.

        Args:
            x: selects Delta, B and C.
            scanned, observed: x for the transition and x for the observation.
        """
        r, B, C = self._project_to_low_rank(x)
        x, r, B = (t.flatten(2) for t in (scanned, r, B))
        state_dtype = _at_least_float32(x)
        A_logs, delta_bias = self.A_logs.to(state_dtype), self.dt_projs_bias.to(state_dtype)
        h = apply(ProjectedScan, x, r, self.dt_projs_weight.to(r.dtype), A_logs, B, delta_bias)
        return self.state_fusion(h.unflatten(3, scanned.shape[2:]), C, self.Ds, observed)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input-dependent Delta (B, D, H, W), before its bias and softplus, B and C (B, N, H, W) from each token."""
        r, B, C = self._project_to_low_rank(x)
        return self.project(r, self.dt_projs_weight), B, C

    def _project_to_low_rank(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r (B, R, H, W), of which Delta is the second projection, B and C (B, N, H, W)."""
        n = self.d_state
        return self.project(x, self.x_proj_weight).split([self.dt_rank, n, n], dim=1)

    def transition(self, x: Tensor, dt: Tensor, B: Tensor) -> Tensor:
        """h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t in raster order, never below float32: (B, D, N, H, W)."""
        state_dtype = _at_least_float32(x)
        A_logs = self.A_logs.to(state_dtype)
        # The scan's kernels compute A. PyTorch would launch two kernels, and two more for the gradient.
        fused = has_fused_kernels(x)
        h = selective_scan_state(
            x.flatten(2),
            dt.flatten(2),
            A_logs if fused else -torch.exp(A_logs),
            B.flatten(2),
            delta_bias=self.dt_projs_bias.to(state_dtype),
            delta_softplus=True,
            A_is_log=fused,
        )
        height, width = x.shape[2:]
        return h.unflatten(3, (height, width))


class DropPath(layers.DropPath):
    """timm's DropPath for tokens (B, H, W, C), with the same random numbers.

    timm's divides in place, which torchvision's `create_feature_extractor` removes from the graph as dead code.
    """

    def factors(self, x: Tensor) -> Tensor | None:
        """Draw the factor of each image, (B,), 0 or 1 / (1 - drop_prob); None if no path is dropped."""
        keep = 1 - self.drop_prob
        if not self.training or keep == 1:
            return None
        factors = x.new_empty(x.shape[0]).bernoulli_(keep)
        return factors / keep if keep > 0 and self.scale_by_keep else factors

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors[:, None, None, None]


class Mlp(nn.Module):
    """Linear, GELU, Linear: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        if fusible_mlp(x, fc1, act, fc2):
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return fc2(act(fc1(x)))


class Block(nn.Module):
    """One Spatial-Mamba block on tokens (B, H, W, dim): position, state space model, position, MLP, each residual."""

    def __init__(self, dim: int, d_state: int = 1, expand: int = 2, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.cpe1 = depthwise_conv(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = StructureAwareSSM(dim, d_state, expand)  # the published name; it is no attention
        self.cpe2 = depthwise_conv(dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        # Each half is recomputed alone, so that the activations of one are gone before those of the other are there.
        call = _checkpoint if self.is_recomputed() else _call
        if self.fusible(x):
            return self.add(*call(self._fused_mlp_half, *call(self._fused_ssm_half, x)))
        return call(self._mlp_half, call(self._ssm_half, x))

    def is_recomputed(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def _ssm_half(self, x: Tensor) -> Tensor:
        x = x + to_tokens(self.cpe1(to_planes(x)))
        return x + self.drop_path(self.self_attention(self.ln_1(x)))

    def _mlp_half(self, x: Tensor) -> Tensor:
        x = x + to_tokens(self.cpe2(to_planes(x)))
        return x + self.drop_path(self.mlp(self.ln_2(x)))

    def fusible(self, x: Tensor) -> bool:
        is_plain = type(self.drop_path) is DropPath and not has_hooks(self.drop_path)
        return is_plain and fusible(x, convolutions=(self.cpe1, self.cpe2), norms=(self.ln_1, self.ln_2))

    def without_last_addition(
        self, x: Tensor, update: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply the block to x + scale * update, but leave out its last addition. The block must be fusible.

        Returns:
            x, update and scale: `add` combines them to the block's output.
        """
        return self._fused_mlp_half(*self._fused_ssm_half(x, update, scale))

    def _fused_ssm_half(
        self, x: Tensor, update: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, normed = self._position_and_norm(x, self.cpe1, self.ln_1, update, scale)
        update = self.self_attention(normed)
        return x, update, self.drop_path.factors(update)

    def _fused_mlp_half(self, x: Tensor, update: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x, normed = self._position_and_norm(x, self.cpe2, self.ln_2, update, scale)
        update = self.mlp(normed)
        return x, update, self.drop_path.factors(update)

    @staticmethod
    def add(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
        return x + update if scale is None else torch.addcmul(x, update, scale[:, None, None, None])

    @staticmethod
    def _position_and_norm(
        x: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm, update: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + scale * update, through the convolution and its residual, and its norm."""
        return depthwise_residual_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, update, scale)


class Stage(nn.Module):
    """Blocks, and the downsampling to the next stage. Dense tasks read the map between them."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def _blocks_out(self, x: Tensor) -> Tensor:
        if all(self._joins(x, block) for block in self.blocks):
            # The last addition of a block is left to the operator that the next block begins with.
            parts = self.blocks[0].without_last_addition(x)
            for block in self.blocks[1:]:
                parts = block.without_last_addition(*parts)
            x = Block.add(*parts)
        else:
            for block in self.blocks:
                x = block(x)
        return x

    @staticmethod
    def _joins(x: Tensor, block: nn.Module) -> bool:
        return type(block) is Block and not has_hooks(block) and not block.is_recomputed() and block.fusible(x)

    def forward(self, x: Tensor, with_map: bool = False, is_last: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the next stage's input; or `(map, input)` with `with_map`; or the map alone if the stage `is_last`."""
        x = self._blocks_out(x)
        if is_last:
            return x
        return (x, self.downsample(x)) if with_map else self.downsample(x)


class SpatialMamba(nn.Module):
    """Spatial-Mamba classifier: images (B, in_chans, H, W) of any size -> logits (B, num_classes).

    Args:
        in_chans: image channels.
        num_classes: size of the head; 0 for none, then `forward` returns pooled features (B, dims[-1]).
        depths: blocks in each stage.
        dims: channels in each stage, each double the one before; or the first stage's.
        d_state: states N per channel.
        expand: channels of the state space model over the block's.
        mlp_ratio: hidden channels of the MLP over the block's.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all blocks.
        global_pool: how the head pools tokens: "avg", "max", "avgmax" (their mean), or "" for not at all.

    Attributes:
        num_features: channels of `forward_features`; `head_hidden_size`, of what the head reads, is the same.
        feature_info: channels, stride and module of each stage's map, as timm describes them.

    Raises:
        ValueError: sizes that do not fit each other, or a pooling that does not exist; in `forward`, an image of the
            wrong rank or channel count.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 4, 8, 4),
        dims: Sequence[int] | int = 64,
        d_state: int = 1,
        expand: int = 2,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        _check_sizes(in_chans, num_classes, depths, dims, d_state, expand, mlp_ratio)
        if not (0 <= drop_rate < 1 and 0 <= drop_path_rate < 1):
            raise ValueError(f"drop_rate and drop_path_rate must be in [0, 1), got {drop_rate} and {drop_path_rate}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.depths = list(depths)
        self.dims = dims
        self.num_features = self.head_hidden_size = dims[-1]
        self.output_fmt = "NHWC"  # of forward_features
        self.feature_info = [
            dict(num_chs=dim, reduction=2 ** (i + 2), module=f"layers.{i}.blocks.{depth - 1}")
            for i, (dim, depth) in enumerate(zip(dims, depths, strict=True))
        ]
        self.patch_embed = Stem(in_chans, dims[0])
        self.layers = self._make_stages(d_state, expand, mlp_ratio, drop_path_rate)
        self._make_outputs(drop_rate, global_pool)
        self.apply(_init_weights)

    def _make_stages(self, d_state: int, expand: int, mlp_ratio: float, drop_path_rate: float) -> nn.ModuleList:
        total = sum(self.depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(self.dims, self.depths, strict=True)):
            blocks = [Block(dim, d_state, expand, mlp_ratio, next(rates)) for _ in range(depth)]
            stages.append(Stage(blocks, Downsample(dim) if i + 1 < len(self.dims) else nn.Identity()))
        return stages

    def _make_outputs(self, drop_rate: float, global_pool: str) -> None:
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(self.num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, freshly initialised head of `num_classes` (0 for none) in place.

        Args:
            num_classes: 0 for none, then `forward` returns what is pooled.
            global_pool: as for the class; None keeps it.

        Raises:
            ValueError: a pooling that does not exist.
        """
        if global_pool is not None:
            if global_pool not in POOLINGS:
                raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLINGS))}, got {global_pool!r}")
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt="NHWC")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.to(next(self.parameters())).train(self.training)  # its device and dtype
        _init_weights(self.head)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks and the wide layers between stages in the backward pass instead of storing activations."""
        for module in self.modules():
            if isinstance(module, Block | Downsample):
                module.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, ceil(H / 32), ceil(W / 32), dims[-1])."""
        x = self._embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens from `forward_features` -> logits (B, num_classes), or pooled (B, dims[-1]) if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Tensor | list[Tensor]]:
        """Stage outputs before downsampling, strides 4, 8, 16, 32, with timm's arguments and meaning.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to return; an int for the last so many, None for all; negative ones count from the end.
            norm: apply the final norm to the last stage's output.
            stop_early: do not compute stages past the last one returned; needs `intermediates_only`.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone, not `(forward_features(x), list)`.
            output_dict: return a dict of "image_intermediates", the list, and "image_features".

        Raises:
            ValueError: an index, format or combination that does not exist.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        if stop_early and not intermediates_only:
            raise ValueError("stop_early leaves no final features: it needs intermediates_only=True")
        wanted = _stage_indices(indices, len(self.layers))
        x = self._embed(x)
        maps = []
        for i, stage in enumerate(self.layers):
            is_last = stop_early and i == max(wanted)
            # Call the stage, not its parts, for hooks and wrappers of it.
            # By position: mmengine's activation_checkpointing passes no keywords on.
            out, x = (stage(x, False, True), None) if is_last else stage(x, True)
            if i in wanted:
                out = self.norm(out) if norm and i + 1 == len(self.layers) else out
                maps.append(to_planes(out) if output_fmt == "NCHW" else out)
            if is_last:
                break
        if output_dict:
            return {"image_intermediates": maps} | ({} if intermediates_only else {"image_features": self.norm(x)})
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, for good, what the maps of these stages do not need; returns the stages' indices.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: remove the final norm also if the last stage stays.
            prune_head: remove the head and its pooling also if the last stage stays.

        Raises:
            ValueError: a stage that does not exist.
        """
        kept = _stage_indices(indices, len(self.layers))
        shorter = max(kept) + 1 < len(self.layers)
        del self.layers[max(kept) + 1 :]
        self.layers[-1].downsample = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.dims[max(kept)]
        if shorter or prune_norm:
            self.norm = nn.Identity()
        if shorter or prune_head:
            self.reset_classifier(0, "")
        return kept

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[tuple[str, tuple[int, ...] | None]]]:
        """timm's expressions for groups of parameters, for layer decay: by block, or by stage if `coarse`."""
        with_the_last = (99999,)  # block before it: timm's number for that
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", with_the_last),
            (r"^norm", with_the_last),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else blocks)

    def no_weight_decay(self) -> set[str]:
        """Return no names: the recipe exempts one-dimensional parameters alone, and timm does that itself."""
        return set()

    def _embed(self, x: Tensor) -> Tensor:
        _check_images(x, self.in_chans)
        return self.patch_embed(x)


class SpatialMambaBackbone(SpatialMamba):
    """Dense-task form: images (B, in_chans, H, W) -> the maps of `out_indices`, strides 4, 8, 16, 32.

    Each map is (B, dims[i], ceil(H / 2^(i+2)), ceil(W / 2^(i+2))), through a LayerNorm `outnorm{i}` of its own. There
    is no final norm and no head, and no stage past the last of `out_indices`: its parameters would get no gradient.

    Args:
        out_indices: stages whose maps are returned; the rest of the arguments are `SpatialMamba`'s.
    """

    def __init__(
        self,
        in_chans: int = 3,
        depths: Sequence[int] = (2, 4, 8, 4),
        dims: Sequence[int] | int = 64,
        d_state: int = 1,
        expand: int = 2,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ):
        self.out_indices = _stage_indices(out_indices, len(depths))
        super().__init__(
            in_chans,
            num_classes=0,
            depths=depths,
            dims=dims,
            d_state=d_state,
            expand=expand,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
        )
        del self.layers[max(self.out_indices) + 1 :]
        self.layers[-1].downsample = nn.Identity()

    def _make_outputs(self, drop_rate: float, global_pool: str) -> None:
        self.norm = self.head = nn.Identity()
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", nn.LayerNorm(self.dims[i]))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise NotImplementedError("the dense-task form has no head; SpatialMamba has")

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.forward_intermediates(
            x, self.out_indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        norms = (getattr(self, f"outnorm{i}") for i in self.out_indices)
        return [to_planes(norm(m)).contiguous() for norm, m in zip(norms, maps, strict=True)]


def _check_images(x: Tensor, in_chans: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_chans or 0 in x.shape[2:]:
        raise ValueError(f"images must be (batch, {in_chans}, height, width), got shape {tuple(x.shape)}")


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# torch.fx records calls of these functions and does not trace into them, because they look at shapes and dtypes.
for _name in ("selective_scan_state", "state_fusion_output", "_at_least_float32", "cast", "_check_images"):
    torch.fx.wrap(_name)


def _check_sizes(
    in_chans: int,
    num_classes: int,
    depths: Sequence[int],
    dims: Sequence[int],
    d_state: int,
    expand: int,
    mlp_ratio: float,
) -> None:
    if len(depths) != len(dims) or not depths or min(depths) < 1:
        raise ValueError(f"depths and dims must name as many stages, each of at least one block: {depths}, {dims}")
    if dims[0] < 2 or dims[0] % 2 or any(b != 2 * a for a, b in pairwise(dims)):
        raise ValueError(f"dims must start even and double from stage to stage, got {list(dims)}")
    if min(in_chans, d_state, expand) < 1 or num_classes < 0:
        raise ValueError(
            "in_chans, d_state and expand must be at least 1, num_classes at least 0, "
            f"got {in_chans}, {d_state}, {expand} and {num_classes}"
        )
    if not 1 <= dims[0] * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio must leave each MLP a hidden channel, got {mlp_ratio}")


def _stage_indices(indices: int | Sequence[int] | None, stages: int) -> list[int]:
    if indices is None:
        indices = range(stages)
    elif isinstance(indices, int):
        if not 1 <= indices <= stages:
            raise ValueError(f"a number of last stages must lie in [1, {stages}], got {indices}")
        indices = range(stages - indices, stages)
    if not indices or any(not -stages <= i < stages for i in indices):
        raise ValueError(f"stage indices must lie in [{-stages}, {stages - 1}], got {indices}")
    return sorted({i % stages for i in indices})


def _init_weights(module: nn.Module) -> None:
    """Linear layers: truncated normal of standard deviation 0.02, bias 0. All else keeps PyTorch's default."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Published sizes, and `micro` for tests and the digits demo.
VARIANTS = {
    "spatialmamba_micro": dict(dims=16, depths=(1, 1, 2, 1)),
    "spatialmamba_tiny": dict(dims=64, depths=(2, 4, 8, 4)),
    "spatialmamba_small": dict(dims=64, depths=(2, 4, 21, 5)),
    "spatialmamba_base": dict(dims=96, depths=(2, 4, 21, 5)),
}
