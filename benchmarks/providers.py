"""Who is measured: each provider computes sum_t w_t nll_t of a linear head and its gradients, by its own code.

A provider takes hidden (T, H), weight (V, H), both differentiable, labels (T,) and token_weights (T,), and returns the
loss (); one that is absent is None.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from redi_kernels import fused_weighted_nll

Provider = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return fused_weighted_nll(hidden, weight, labels, token_weights, grad_tolerance=2**-10)[0]


def ours_exact(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return fused_weighted_nll(hidden, weight, labels, token_weights, grad_tolerance=0)[0]


def plain_autograd(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    return (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * token_weights).sum()


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return (F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options) * token_weights).sum()


def liger_scaled_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
    return ((nll[0] if isinstance(nll, tuple) else nll) * token_weights).sum()


PROVIDERS: dict[str, Provider] = {
    "ours, 2^-10": ours,
    "ours, exact": ours_exact,
    "plain autograd": plain_autograd,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "Liger scaled cross-entropy": liger_scaled_cross_entropy,
}


def why_absent(name: str) -> str | None:
    """A reason to skip a provider on this machine, or None."""
    if name == "torch linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"F.linear_cross_entropy is not in torch {torch.__version__}: it came with 2.13"
    if name == "Liger scaled cross-entropy":
        try:
            from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # noqa: F401
        except ImportError as error:
            return f"liger-kernel >= 0.8.5 is not installed ({error})"
    return None
