"""The objectives: how the equations of REDI and SFT become one weight per token.

REDI (arXiv:2505.24850, Eq. 5), over P pairs of a right and a wrong trace, y_w and y_l, of one problem x:

    L = 1/P sum_pairs [ -log p(y_w|x) / |y_w|  +  alpha log p(y_l|x) / |y_l| ]

is linear in the token log-probabilities, so L = -sum_t w_t log p_t with weights known before the forward pass:

    w_t = 1 / (P |y_w|)        on a chosen trace
    w_t = -alpha / (P |y_l|)   on a rejected trace,        0 elsewhere

where |y| counts the labelled tokens of a trace. `token_weights` in `fused_redi_loss` is that equation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from redi_kernels.linear_nll import head_options, sum_dtype, weighted_nll
from redi_kernels.torch_head import HeadResult


class HeadStats(NamedTuple):
    """Detached statistics of one call."""

    active_share: Tensor  # () share of the vocabulary's columns kept exactly in dL/dlogits; 1 in exact mode
    max_tail_mass: Tensor  # () largest part of one token's probability that a rank-one tail stands for
    workspace_bytes: int  # most memory held at a time beyond inputs, outputs and gradients
    chosen_entropy: Tensor | None  # () mean token entropy in nats of the chosen (in SFT: all) traces, if asked for
    rejected_entropy: Tensor | None  # () and of the rejected ones


class RediLossOutput(NamedTuple):
    loss: Tensor  # () float32, differentiable
    chosen_logps: Tensor  # (number of chosen sequences,) mean log p per token, in batch order, detached
    rejected_logps: Tensor  # (number of rejected sequences,) likewise
    stats: HeadStats


class SftLossOutput(NamedTuple):
    loss: Tensor  # () float32, differentiable
    logps: Tensor  # (S,) mean log p per token of each sequence, detached
    stats: HeadStats


def fused_redi_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    is_chosen: Tensor,
    *,
    alpha: float = 0.8,
    num_pairs: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    grad_tolerance: float | str = "auto",
    workspace_bytes: int = 256 * 2**20,
    with_entropy: bool = False,
    validate: bool | None = None,
    backend: str = "auto",
) -> RediLossOutput:
    """REDI's loss (Eq. 5 of the paper) of a packed batch, with its gradient, without full-vocabulary logits.

    Args:
        hidden: (T, H) or (1, T, H), final hidden states of S sequences laid end to end.
        weight: (V, H), the head; bias: (V,) or None.
        labels: (T,) int64 aligned with the input tokens as in Transformers; `ignore_index` on prompts. The label at t
            is predicted by the hidden state at t - 1 of the same sequence; a sequence's first label is never used.
        cu_seqlens: (S + 1,) integer, where sequences begin, from 0 to T; is_chosen: (S,) bool. On the host they are
            checked; on a device they are trusted.
        alpha: weight of the rejected traces, in [0, 1]; 0.8 is the paper's.
        num_pairs: the divisor P. None means the number of chosen sequences in this batch; give the number in the whole
            optimizer step to make micro-batches, however uneven, add up to one large batch. Sequences need not be
            paired. One without labelled tokens has log-probability 0, no gradient, and counts in the default P.
        with_entropy: also measure the mean token entropies.
        logit_scale, logit_softcap, grad_tolerance, workspace_bytes, validate, backend: as in `fused_weighted_nll`.

    Returns RediLossOutput(loss, chosen_logps, rejected_logps, stats).

    Raises ValueError or TypeError for an argument out of its range or inputs that do not fit each other.
    """
    if not 0 <= alpha <= 1:  # also refuses NaN
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    packed = _Packed(labels, cu_seqlens, ignore_index)
    if is_chosen.shape != (packed.num_seqs,) or is_chosen.dtype != torch.bool:
        got = f"{is_chosen.dtype} {tuple(is_chosen.shape)}"
        raise ValueError(f"is_chosen must be bool ({packed.num_seqs},), one per sequence, got {got}")
    is_chosen = is_chosen.to(labels.device)
    if num_pairs is None:
        num_pairs = int(is_chosen.sum())
        if num_pairs == 0:
            raise ValueError("no sequence is chosen, so num_pairs, the divisor of the loss, must be given")
    if not 0 < num_pairs < math.inf:
        raise ValueError(f"num_pairs must be positive, got {num_pairs}")

    sign = torch.ones_like(packed.num_labels).masked_fill(~is_chosen, -float(alpha))
    token_weights = (sign / (num_pairs * packed.num_labels.clamp(min=1)))[packed.sequence]
    options = head_options(
        hidden, logit_scale, logit_softcap, ignore_index, grad_tolerance, workspace_bytes, backend, with_entropy
    )
    loss, result = weighted_nll(hidden, weight, bias, packed.targets, token_weights, options, validate)
    logps = packed.mean_logps(result)
    return RediLossOutput(loss, logps[is_chosen], logps[~is_chosen], packed.stats(result, is_chosen))


def fused_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    num_tokens: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    grad_tolerance: float | str = "auto",
    workspace_bytes: int = 256 * 2**20,
    with_entropy: bool = False,
    validate: bool | None = None,
    backend: str = "auto",
) -> SftLossOutput:
    """Token-mean negative log-likelihood (Eq. 1 of the paper, averaged over tokens) of a packed batch.

    L = -1/N sum_t log p_t over the labelled tokens, with N = num_tokens: the number of labelled tokens in the whole
    optimizer step, so that micro-batches add up to one large batch; None means those of this batch (at least 1). A
    sequence's first label is never used and does not count. Other arguments as in `fused_redi_loss`.

    Returns SftLossOutput(loss, logps, stats). Raises ValueError or TypeError as `fused_redi_loss` does.
    """
    packed = _Packed(labels, cu_seqlens, ignore_index)
    if num_tokens is None:
        num_tokens = max(1, int(packed.num_labels.sum()))
    if not 0 < num_tokens < math.inf:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}")
    token_weights = packed.labelled.to(packed.num_labels.dtype) / num_tokens
    options = head_options(
        hidden, logit_scale, logit_softcap, ignore_index, grad_tolerance, workspace_bytes, backend, with_entropy
    )
    loss, result = weighted_nll(hidden, weight, bias, packed.targets, token_weights, options, validate)
    is_chosen = torch.ones(packed.num_seqs, dtype=torch.bool, device=labels.device)
    return SftLossOutput(loss, packed.mean_logps(result), packed.stats(result, is_chosen))


class RediLoss(nn.Module):
    """`fused_redi_loss` as a module: options at construction, tensors at the call."""

    def __init__(self, alpha: float = 0.8, **options: Any):
        super().__init__()
        self.options = {"alpha": alpha, **options}

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor,
        is_chosen: Tensor,
        *,
        num_pairs: float | None = None,
        bias: Tensor | None = None,
    ) -> RediLossOutput:
        return fused_redi_loss(
            hidden, weight, labels, cu_seqlens, is_chosen, num_pairs=num_pairs, bias=bias, **self.options
        )


class SftLoss(nn.Module):
    """`fused_sft_loss` as a module: options at construction, tensors at the call."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor,
        *,
        num_tokens: float | None = None,
        bias: Tensor | None = None,
    ) -> SftLossOutput:
        return fused_sft_loss(hidden, weight, labels, cu_seqlens, num_tokens=num_tokens, bias=bias, **self.options)


class _Packed:
    """Sequences laid end to end: their targets, and sums over each of them."""

    def __init__(self, labels: Tensor, cu_seqlens: Tensor, ignore_index: int):
        num_tokens = labels.numel()
        if labels.dim() != 1:
            raise ValueError(f"labels must be (T,), got {tuple(labels.shape)}")
        check_cu_seqlens(cu_seqlens, num_tokens)
        cu_seqlens = cu_seqlens.to(labels.device, torch.int64)
        self.num_seqs = len(cu_seqlens) - 1
        self.sequence = torch.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)  # (T,) index of its sequence
        self.targets = labels.roll(-1)  # what position t predicts is the label at t + 1 ...
        self.targets[cu_seqlens[1:] - 1] = ignore_index  # ... but for the last of a sequence
        self.labelled = self.targets != ignore_index
        self.num_labels = self.sum(self.labelled)

    def sum(self, per_token: Tensor) -> Tensor:
        """(T,) -> (S,) sums over each sequence, in float64 where the device has it."""
        sums = torch.zeros(self.num_seqs, dtype=sum_dtype(per_token.device), device=per_token.device)
        return sums.index_add_(0, self.sequence, per_token.to(sums.dtype))

    def mean_logps(self, result: HeadResult) -> Tensor:
        return (self.sum(result.logps) / self.num_labels.clamp(min=1)).to(result.logps.dtype)

    def stats(self, result: HeadResult, is_chosen: Tensor) -> HeadStats:
        chosen_entropy = rejected_entropy = None
        if result.entropies is not None:
            entropies = self.sum(result.entropies)
            chosen_entropy, rejected_entropy = (
                entropies[which].sum() / self.num_labels[which].sum().clamp(min=1) for which in (is_chosen, ~is_chosen)
            )
        return HeadStats(
            result.active_share, result.max_tail_mass, result.workspace_bytes, chosen_entropy, rejected_entropy
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """ValueError unless cu_seqlens (S + 1,) runs from 0 to num_tokens, ascending; values are only read on the host."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be integers (S + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to T={num_tokens}, got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    if (cu_seqlens.diff() <= 0).any():
        where = int((cu_seqlens.diff() <= 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens must ascend, got {int(cu_seqlens[where])}, {int(cu_seqlens[where + 1])} at {where}"
        )
