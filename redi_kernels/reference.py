"""The same quantities in float64 from the equations, with full logits: short enough to check against the paper by eye.

Nothing here is fast, and everything is differentiable by autograd. The tests compare the fused functions with these.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """softcap(logit_scale * x W^T + bias), (T, V) float64, of hidden (T, H) and weight (V, H)."""
    z = logit_scale * (hidden.double() @ weight.double().T)
    if bias is not None:
        z = z + bias.double()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_logps(z: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """log p(y_t), (T,) float64, of logits (T, V) and targets (T,); 0 where there is no target."""
    labelled = labels != ignore_index
    picked = z.log_softmax(-1).gather(1, labels.where(labelled, 0).unsqueeze(1)).squeeze(1)
    return picked.where(labelled, 0.0)


def sequence_logps(
    z: Tensor, labels: Tensor, cu_seqlens: Tensor, ignore_index: int = -100
) -> tuple[list[Tensor], list[int]]:
    """log p(y|x) and |y| of each packed sequence: labels are aligned with the input, z[t] predicts labels[t + 1]."""
    logps, lengths = [], []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        targets = labels[start + 1 : end]
        logps.append(token_logps(z[start : end - 1], targets, ignore_index).sum())
        lengths.append(int((targets != ignore_index).sum()))
    return logps, lengths


def redi_loss(
    z: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    is_chosen: Tensor,
    alpha: float = 0.8,
    num_pairs: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 5: 1/P [ sum over chosen of -log p(y_w|x)/|y_w|  +  alpha  sum over rejected of log p(y_l|x)/|y_l| ].

    Returns the loss and the mean log-probability per token of the chosen and of the rejected sequences.
    """
    logps, lengths = sequence_logps(z, labels, cu_seqlens, ignore_index)
    per_token = torch.stack([logp / max(1, length) for logp, length in zip(logps, lengths, strict=True)])
    chosen, rejected = per_token[is_chosen], per_token[~is_chosen]
    divisor = len(chosen) if num_pairs is None else num_pairs
    return (-chosen.sum() + alpha * rejected.sum()) / divisor, chosen, rejected


def sft_loss(
    z: Tensor, labels: Tensor, cu_seqlens: Tensor, num_tokens: float | None = None, ignore_index: int = -100
) -> Tensor:
    """Eq. 1 averaged over tokens: -1/N sum over sequences of log p(y|x)."""
    logps, lengths = sequence_logps(z, labels, cu_seqlens, ignore_index)
    return -torch.stack(logps).sum() / (max(1, sum(lengths)) if num_tokens is None else num_tokens)


def token_entropies(z: Tensor) -> Tensor:
    """-sum_v p_v log p_v in nats, (T,) float64, of logits (T, V)."""
    return torch.special.entr(z.softmax(-1)).sum(-1)
