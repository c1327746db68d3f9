"""The scan in terms of PyTorch's standard operators, so that exported programs run without this package.

    table = torch.export.default_decompositions()
    table.update(selective_scan.decompositions())
    program = torch.export.export(model, (images,)).run_decompositions(table)

The number of tokens may be unknown while the program is exported.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_scan.scan_reference import check_inputs, expand_groups, rates, state_dtype

CHUNK = 32  # tokens of a chunk, if the total number is unknown


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """Decompositions for `torch.export.ExportedProgram.run_decompositions`.

    The table has `selective_scan_state` alone. `norm_gate` is for a GPU and has none.

    The scan becomes two calls of `torch.ops.higher_order.scan`, which ONNX has as Scan. The first runs within all
    chunks of tokens at once, the second over the chunks. A chunk has sqrt(L) of L tokens, which gives the fewest steps,
    or `CHUNK` tokens if L is unknown. There are no quotients, so decays may underflow.
    """
    return {torch.ops.selective_scan.selective_scan_state.default: _selective_scan_state}


def _selective_scan_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    A_is_log: bool = False,
) -> Tensor:
    check_inputs(u, delta, A, B, delta_bias)
    dtype = state_dtype(u)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        # Softplus is written out, because runtimes have no fast kernel for it.
        dt = dt.clamp(min=0) + torch.log1p(torch.exp(-dt.abs()))
    drive = (dt * u.to(dtype)).unsqueeze(2) * expand_groups(B, u.shape[1]).to(dtype)
    return _scan(dt.unsqueeze(2) * rates(A, A_is_log).unsqueeze(-1), drive)


def _scan(log_decay: Tensor, drive: Tensor) -> Tensor:
    """h_t = exp(log_decay_t) h_{t-1} + drive_t along the last dimension of (B, D, N, L)."""
    batch, channels, states, length = drive.shape
    chunk, chunks = _chunks_of_known(length) if isinstance(length, int) else _chunks_of_unknown(length)

    def by_token(t: Tensor) -> Tensor:
        """(chunk, B, D, N, chunks): the scanned dimension comes first."""
        padded = F.pad(t, (0, chunk * chunks - length))
        return _dense(padded.view(batch, channels, states, chunks, chunk).permute(4, 0, 1, 2, 3))

    log_decay, drive = by_token(log_decay), by_token(drive)
    first = drive.new_zeros(drive.shape[1:])
    last, within = torch.ops.higher_order.scan(_next_token, [first], [log_decay.exp(), drive], ())
    products = log_decay.cumsum(0).exp()  # of the decays from the start of each chunk on
    ends = [_dense(t.permute(3, 0, 1, 2)) for t in (products[-1], last)]
    _, before = torch.ops.higher_order.scan(_next_chunk, [first[..., 0]], ends, ())
    h = within + products * before.permute(1, 2, 3, 0)
    return _dense(h.permute(1, 2, 3, 4, 0)).view(batch, channels, states, chunk * chunks)[..., :length]


def _chunks_of_known(length: int) -> tuple[int, int]:
    """Tokens of a chunk, and number of chunks."""
    chunk = math.isqrt(length - 1) + 1
    return chunk, -(-length // chunk)


def _chunks_of_unknown(length: torch.SymInt) -> tuple[int, torch.SymInt]:
    """The same, with at least two chunks: a size that may be 1 would need another graph. They hold all tokens."""
    return CHUNK, length // CHUNK + 2


def _next_token(h: Tensor, decay: Tensor, drive: Tensor) -> list[Tensor]:
    """Step all chunks by one token. Each chunk begins with a zero state."""
    h = h * decay + drive
    return [h, h.clone()]  # an operator's results may not share memory


def _next_chunk(before: Tensor, decay: Tensor, last: Tensor) -> list[Tensor]:
    """Step by one chunk, and return the state that enters the chunk."""
    return [before * decay + last, before.clone()]


def _dense(t: Tensor) -> Tensor:
    """A contiguous copy. `contiguous` would instead ask whether an unknown size is 1."""
    return t.clone(memory_format=torch.contiguous_format)
