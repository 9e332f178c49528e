"""The one-pass linear head in plain torch: the CPU path, and the fallback everywhere.

The token weights w_t are known before the forward, so the logits of a chunk of C tokens can become the gradient of
L = -sum_t w_t log p_t(y_t) while they are still in the workspace, and are computed once:

    G_tv = dL/dlogits_tv = w_t (p_tv - [v = y_t]) = coef_t U_tv,    coef_t = w_t / s_t,   s_t = sum_v exp(z_tv - m_t)
    U_tv = exp(z_tv - m_t)  off the target,   U_ty = -sum_{v != y} exp(z_tv - m_t)  on it,         m_t = max_v z_tv

One buffer (C, V) holds logits, then U, whose target entry is a sum of small numbers and not p_y - 1: a token with
1 - p_y = 1e-9 still has an accurate gradient. coef_t multiplies rows of x and dx, never the buffer.

The steps of a chunk:

    logits      z = x W^T                   one matrix product into the buffer
    softmax     U, log p, energies          in row blocks that stay in the L2 cache, so that memory is passed over once
    gradient    dx = G W, dW += G^T x       dense, or active columns plus a rank-one tail (active_vocabulary.py)

Products and sums are float32 (float64 for float64 inputs) whatever the inputs' dtype; 16-bit weights are widened a tile
at a time. On the CPU this was measured on (AVX-512, no AMX) that is also the faster way: mm ran at 280 GFLOP/s in
float32 and at 130 in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from redi_kernels.active_vocabulary import MAX_OWN_TAILS, choose_columns, choose_own_tails

BLOCK_BYTES = 2 * 2**20  # rows of the buffer handled at a time: one core's L2 cache
MAX_CHUNK = 1024  # tokens: the more share a chunk, the more columns are active; products run at full speed well below
MAX_TAILS = 32  # rank-one tails that meet W and dW together


@dataclass(frozen=True)
class HeadOptions:
    """Logits are softcap(logit_scale * x W^T + bias), softcap(u) = c tanh(u / c); delta as in active_vocabulary.py."""

    logit_scale: float = 1.0
    logit_softcap: float | None = None
    ignore_index: int = -100
    delta: float = 0.0
    workspace_bytes: int = 256 * 2**20
    with_entropy: bool = False


class HeadResult(NamedTuple):
    """What one pass returns; None for what was not asked for."""

    logps: Tensor  # (T,) log p(y_t), 0 where unlabelled; float32 or float64
    entropies: Tensor | None  # (T,) nats, 0 where unlabelled
    dx: Tensor | None  # (T, H) gradient of hidden divided by dx_scale, in hidden's dtype
    dx_scale: float  # a power of two near the largest |w_t|: float16 cannot hold w_t = 1e-6 times a gradient
    dw: Tensor | None  # (V, H) float32 or float64
    db: Tensor | None  # (V,) float32 or float64
    active_share: Tensor  # () share of columns kept, averaged over the tokens that have a gradient
    max_tail_mass: Tensor  # () largest |a_t / w_t|: the part of a token's probability that a shared tail stands for
    workspace_bytes: int  # bytes of the buffers beyond inputs and results


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    options: HeadOptions,
    need_dx: bool = False,
    need_dw: bool = False,
    need_db: bool = False,
) -> HeadResult:
    """log p(y_t) of every labelled token and, where needed, the gradient of -sum_t w_t log p_t(y_t), in one pass.

    hidden (T, H); weight (V, H); bias (V,) or None; labels (T,) int64, the targets themselves; token_weights (T,), read
    only where a gradient is needed. A label outside [0, V) makes its log p, and the gradient, NaN. A token without a
    label costs nothing, one of weight 0 its logits only.
    """
    need_gradient = need_dx or need_dw or need_db
    labelled = labels != options.ignore_index
    weighted = labelled & (token_weights != 0) if need_gradient else torch.zeros_like(labelled)
    grad_rows, logp_rows = weighted.nonzero().squeeze(1), (labelled & ~weighted).nonzero().squeeze(1)
    largest = float(token_weights[grad_rows].abs().max()) if len(grad_rows) else 0.0
    scale = 2.0 ** round(math.log2(largest)) if 0 < largest < math.inf else 1.0

    one_pass = _OnePass(hidden, weight, bias, options, scale, max(len(grad_rows), len(logp_rows)))
    one_pass.allocate_gradients(need_dx, need_dw, need_db)
    for rows in one_pass.chunks(logp_rows):
        one_pass.softmax(rows, labels[rows])
    active_tokens = 0.0
    for rows in one_pass.chunks(grad_rows):
        targets = labels[rows]
        w = token_weights[rows].to(one_pass.dtype) / scale
        coef, energies = one_pass.softmax(rows, targets, w)
        active = choose_columns(energies, targets.clamp(0, len(weight) - 1), options.delta) if options.delta else None
        if active is None:
            one_pass.dense_gradient(rows, coef)
            active_tokens += len(rows)
        else:
            one_pass.active_gradient(rows, coef, w, active)
            active_tokens += len(rows) * len(active) / len(weight)
    one_pass.flush_tails()
    return HeadResult(
        one_pass.logps,
        one_pass.entropies,
        one_pass.dx,
        scale,
        one_pass.dw,
        one_pass.db,
        torch.tensor(active_tokens / max(1, len(grad_rows))),
        one_pass.max_tail_mass,
        one_pass.workspace_bytes,
    )


class _OnePass:
    """The buffers of one call, and the steps a chunk of tokens (`rows` (C,), indices into T) takes through them.

    Gradients are built divided by `scale`, which `dw` and `db` have back when they are added to.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions, scale: float, most_rows: int
    ):
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.new = {"dtype": self.dtype, "device": hidden.device}
        self.hidden, self.weight, self.options, self.scale = hidden, weight, options, scale
        self.bias = None if bias is None else bias.to(self.dtype)
        self.plan(most_rows)

        num_columns = len(weight)
        self.buffer = torch.empty(self.chunk, num_columns, **self.new)
        self.scratch = torch.empty(self.block, num_columns, **self.new)
        self.logps = torch.zeros(len(hidden), **self.new)
        self.entropies = torch.zeros(len(hidden), **self.new) if options.with_entropy else None
        self.max_tail_mass = torch.zeros((), **self.new)

    def plan(self, most_rows: int) -> None:
        """Divide the cap: an eighth for tiles of W, one for stacked tails, scratch rows, the rest for the buffer."""
        num_columns, hidden_size = self.weight.shape
        itemsize, cap = self.dtype.itemsize, self.options.workspace_bytes
        row = num_columns * itemsize
        self.block = max(1, min(BLOCK_BYTES, cap // 16) // row)
        scratch = (3 * self.block + 1) * row + 40 * num_columns  # squares, softcap, entropy; energies and their sort
        per_token = row + 4 * hidden_size * itemsize  # the buffer's row; x, coef x, dx and its cast
        self.chunk = min((cap - cap // 4 - scratch) // per_token, MAX_CHUNK)
        if self.chunk < 1:
            least = math.ceil((scratch + per_token) * 4 / 3 / 2**20)
            raise ValueError(
                f"workspace_bytes={cap} holds no row of logits of V={num_columns} columns: give at least {least} MiB"
            )
        self.chunk = max(1, math.ceil(most_rows / max(1, math.ceil(most_rows / self.chunk))))  # chunks of equal size
        per_tail = row + (self.chunk + 2) * hidden_size * itemsize  # its profile; at most one dx is kept for each
        self.max_tails = max(1, min(MAX_TAILS, cap // 8 // per_tail))
        self.tile = max(1, cap // 8 // ((self.chunk + 2 * hidden_size) * itemsize))
        self.workspace_bytes = (
            self.chunk * per_token
            + scratch
            + self.tile * (self.chunk + 2 * hidden_size) * itemsize
            + self.max_tails * per_tail
        )

    def allocate_gradients(self, need_dx: bool, need_dw: bool, need_db: bool) -> None:
        num_columns, hidden_size = self.weight.shape
        self.dx = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format) if need_dx else None
        self.dw = torch.zeros(num_columns, hidden_size, **self.new) if need_dw else None
        self.db = torch.zeros(num_columns, **self.new) if need_db else None
        # Tails wait here until they meet W: profiles q (max_tails, V), of which each chunk has n; and for each chunk
        # its rows (C,), the factors (C, n) of its q, factors^T x (n, H), and its dx so far (C, H).
        self.tail_q = torch.empty(self.max_tails if self.options.delta else 0, num_columns, **self.new)
        self.num_tails = 0
        self.tails: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """W in the dtype of the products: whole where it has it already, else widened a tile at a time."""
        if self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        for start in range(0, len(self.weight), self.tile):
            columns = slice(start, start + self.tile)
            yield columns, self.weight[columns].to(self.dtype)

    def softmax(self, rows: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits, then log p of `targets` (C,); with token_weights (C,) U is left in the buffer.

        Returns coef (C,) and energies (V,), the sums over the chunk of G^2; the latter are only filled where delta > 0.
        """
        num_columns, softcap = len(self.weight), self.options.logit_softcap
        z_chunk = self.buffer[: len(rows)]
        x = self.scaled_hidden(rows)
        for columns, tile in self.weight_tiles():
            torch.mm(x, tile.T, out=z_chunk[:, columns])

        bad = (targets < 0) | (targets >= num_columns)
        targets = targets.masked_fill(bad, 0).unsqueeze(1)
        coef, energies = torch.empty(len(rows), **self.new), torch.zeros(num_columns, **self.new)
        for block in self.blocks(rows):
            z, y, scratch = z_chunk[block], targets[block], self.scratch[: len(z_chunk[block])]
            if self.bias is not None:
                z += self.bias
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = 1 - z.square()  # d softcap(u) / du
                z.mul_(softcap)
            z_max = z.amax(1, keepdim=True)
            z_target = z.gather(1, y) - z_max
            z.sub_(z_max).exp_()
            exp_target = z.gather(1, y)
            z.scatter_(1, y, 0.0)
            rest = z.sum(1, keepdim=True)
            # The log of s = rest + exp_target, where exp_target is 1 for the likeliest token: accurate for s near 1.
            logp = z_target - torch.log1p(rest + (exp_target - 1))
            if self.entropies is not None:  # log s - sum_v p log exp(z - max)
                total = rest + exp_target
                weighted_log = torch.xlogy(z, z).sum(1, keepdim=True) + torch.xlogy(exp_target, exp_target)
                self.entropies[rows[block]] = (total.log() - weighted_log / total).squeeze(1)
            if token_weights is not None:
                z.scatter_(1, y, -rest)
                if softcap is not None:
                    z.mul_(slope)
                block_coef = token_weights[block] / (rest + exp_target).squeeze(1)
                coef[block] = block_coef
                if self.options.delta:
                    torch.mul(z, z, out=scratch)
                    energies.addmv_(scratch.T, block_coef.square())
            self.logps[rows[block]] = logp.squeeze(1).masked_fill(bad[block], torch.nan)
        coef.masked_fill_(bad, torch.nan)
        return coef, energies

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.chunk) if len(rows) else ()  # an empty tensor splits into one empty part

    def blocks(self, rows: Tensor) -> list[slice]:
        return [slice(start, start + self.block) for start in range(0, len(rows), self.block)]

    def scaled_hidden(self, rows: Tensor) -> Tensor:
        return self.hidden[rows].to(self.dtype) * self.options.logit_scale

    def store_dx(self, rows: Tensor, chunk_dx: Tensor) -> None:
        self.dx[rows] = (chunk_dx * self.options.logit_scale).to(self.dx.dtype)

    def dense_gradient(self, rows: Tensor, coef: Tensor) -> None:
        """dx = coef (U W), dW += U^T (coef x), db += U^T coef."""
        u = self.buffer[: len(rows)]
        if self.dx is not None:
            chunk_dx = torch.zeros(len(rows), self.hidden.shape[1], **self.new)
            for columns, tile in self.weight_tiles():
                chunk_dx.addmm_(u[:, columns], tile)
            self.store_dx(rows, chunk_dx.mul_(coef.unsqueeze(1)))
        if self.dw is not None:
            self.dw.addmm_(u.T, self.scaled_hidden(rows).mul_(coef.unsqueeze(1)), alpha=self.scale)
        if self.db is not None:
            self.db.addmv_(u.T, coef, alpha=self.scale)

    def active_gradient(self, rows: Tensor, coef: Tensor, token_weights: Tensor, active: Tensor) -> None:
        """The dense products on the active columns; the tails join the stack."""
        u = self.buffer[: len(rows)]
        x = self.scaled_hidden(rows)
        weighted_x = x * coef.unsqueeze(1)
        chunk_dx = torch.zeros_like(x) if self.dx is not None else None
        for columns in active.split(self.tile):
            u_active = u.index_select(1, columns)
            if self.dx is not None:
                chunk_dx.addmm_(u_active, self.weight.index_select(0, columns).to(self.dtype))
            if self.dw is not None:
                self.dw.index_add_(0, columns, u_active.T @ weighted_x, alpha=self.scale)
            if self.db is not None:
                self.db.index_add_(0, columns, u_active.T @ coef, alpha=self.scale)
        if self.dx is not None:
            chunk_dx.mul_(coef.unsqueeze(1))

        u.index_fill_(1, active, 0)  # what is left is the tail
        tail_sum = torch.empty_like(coef)
        for block in self.blocks(rows):
            tail_sum[block] = u[block].sum(1)
        a = coef * tail_sum
        own = choose_own_tails(a / token_weights, min(MAX_OWN_TAILS, self.max_tails - 1))
        a[own] = 0
        if self.num_tails + 1 + len(own) > self.max_tails:
            self.flush_tails()
        q = self.tail_q[self.num_tails : self.num_tails + 1 + len(own)]
        self.num_tails += len(q)
        q[0] = 0
        for block in self.blocks(rows):
            q[0].addmv_(u[block].T, coef[block] * a[block])
        q[0] /= a.square().sum().clamp(min=torch.finfo(self.dtype).tiny)
        q[1:] = u[own]
        factors = torch.zeros(len(rows), len(q), **self.new)  # the tail is factors @ q
        factors[:, 0] = a
        factors[own, torch.arange(1, len(q), device=own.device)] = coef[own]
        self.tails.append((rows, factors, factors.T @ x, chunk_dx))
        self.max_tail_mass = torch.maximum(self.max_tail_mass, (a / token_weights).abs().max())

    def flush_tails(self) -> None:
        """dx += factors (q W), dW += q^T (factors^T x) for all stacked chunks: W is read once, dW updated once."""
        if not self.tails:
            return
        q = self.tail_q[: self.num_tails]
        if self.dx is not None:
            q_w = torch.zeros(len(q), self.hidden.shape[1], **self.new)
            for columns, tile in self.weight_tiles():
                q_w.addmm_(q[:, columns], tile)
            per_chunk = q_w.split([factors.shape[1] for _, factors, _, _ in self.tails])
            for (rows, factors, _, chunk_dx), chunk_q_w in zip(self.tails, per_chunk, strict=True):
                self.store_dx(rows, chunk_dx.addmm_(factors, chunk_q_w))
        if self.dw is not None:
            self.dw.addmm_(q.T, torch.cat([s for _, _, s, _ in self.tails]), alpha=self.scale)
        if self.db is not None:
            self.db.addmv_(q.T, torch.cat([factors.sum(0) for _, factors, _, _ in self.tails]), alpha=self.scale)
        self.tails.clear()
        self.num_tails = 0
