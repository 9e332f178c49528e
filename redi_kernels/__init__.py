"""REDI's loss on packed right and wrong traces, without ever holding full-vocabulary logits.

losses.py             the REDI and SFT equations as token weights, on packed sequences
linear_nll.py         the core: a weighted negative log-likelihood of a linear head, loss and gradient in one pass
torch_head.py         that pass, chunk by chunk, in plain torch
active_vocabulary.py  which columns of the gradient are kept exactly, what replaces the others, and why that is sound
reference.py          all of it in float64, from the equations, with full logits
packing.py            sequences laid end to end, and which of them share a forward
varlen_attention.py   causal attention on them
"""

from redi_kernels.linear_nll import fused_token_logps, fused_weighted_nll
from redi_kernels.losses import (
    HeadStats,
    RediLoss,
    RediLossOutput,
    SftLoss,
    SftLossOutput,
    fused_redi_loss,
    fused_sft_loss,
)
from redi_kernels.packing import PackedBatch, first_fit_decreasing, pack_sequences
from redi_kernels.varlen_attention import varlen_attention

__all__ = [
    "HeadStats",
    "PackedBatch",
    "RediLoss",
    "RediLossOutput",
    "SftLoss",
    "SftLossOutput",
    "first_fit_decreasing",
    "fused_redi_loss",
    "fused_sft_loss",
    "fused_token_logps",
    "fused_weighted_nll",
    "pack_sequences",
    "varlen_attention",
]
