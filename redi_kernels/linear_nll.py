"""Negative log-likelihoods of a linear head without its logits: the core under every objective of this library.

`fused_weighted_nll` is for objectives linear in the token log-probabilities, whose weights are known beforehand (SFT,
REDI): loss and gradients in one pass. `fused_token_logps` is for the others: it returns the log-probabilities, and its
backward is a second pass with the upstream gradient as the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from redi_kernels.torch_head import HeadOptions, HeadResult, linear_nll

DEFAULT_TOLERANCE = 2.0**-10  # of 16-bit compute: below what rounding G to 8 or 11 bits costs, table in docs/head.md


def fused_weighted_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    grad_tolerance: float | str = "auto",
    workspace_bytes: int = 256 * 2**20,
    validate: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """L = -sum_t w_t log p(y_t), its gradient computed in the same pass over the vocabulary.

    The logits of token t are softcap(logit_scale * W x_t + bias), with softcap(u) = c tanh(u / c), and are never held
    for more tokens than fit `workspace_bytes`. Any objective linear in log-probabilities is such a sum; w_t may have
    either sign and is a constant (no gradient flows to it).

    Args:
        hidden: (T, H) or (1, T, H), final hidden states.
        weight: (V, H), the head. May be frozen, tied, or of any strides; so may `hidden`.
        labels: (T,) int64, the targets themselves (nothing is shifted); `ignore_index` where there is none.
        token_weights: (T,) float. Tokens without a label cost nothing, tokens of weight 0 a forward only.
        bias: (V,) or None.
        grad_tolerance: delta, the relative Frobenius error that dL/dlogits may have per chunk (active_vocabulary.py);
            0 is the exact gradient; "auto" is 0 for float32 and float64 compute and 2^-10 for bfloat16 and float16. The
            loss and the log-probabilities are exact always.
        workspace_bytes: cap on the memory held beyond inputs, outputs and gradients.
        validate: check that labels lie in [0, V). None checks labels on the host only, since checking those on a device
            waits for it; an unchecked bad label makes the loss NaN.
        backend: "auto" or "torch".

    Returns:
        loss: () float32 (float64 for float64 inputs), differentiable in hidden, weight and bias. backward may run twice
            (the second time recomputes); create_graph raises RuntimeError.
        token_logps: (T,) of loss's dtype, log p(y_t), 0 where unlabelled; detached.

    Compute dtype: autocast's where it is enabled, else hidden's. dW is accumulated in float32 whatever the dtype.

    Raises:
        TypeError: dtypes that differ outside autocast, labels that are not int64, a differentiable token_weights.
        ValueError: shapes or devices that do not fit each other, a bad label, an option outside its range.
    """
    options = head_options(hidden, logit_scale, logit_softcap, ignore_index, grad_tolerance, workspace_bytes, backend)
    loss, result = weighted_nll(hidden, weight, bias, labels, token_weights, options, validate)
    return loss, result.logps


def fused_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    grad_tolerance: float | str = "auto",
    workspace_bytes: int = 256 * 2**20,
    validate: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """log p(y_t) of every token, (T,) float32 (float64 for float64 inputs), 0 where unlabelled, differentiable.

    Arguments as in `fused_weighted_nll`, whose one pass runs here in the backward, with minus the upstream gradient as
    the token weights; the logits are therefore computed twice in all.
    """
    options = head_options(hidden, logit_scale, logit_softcap, ignore_index, grad_tolerance, workspace_bytes, backend)
    hidden = check_inputs(hidden, weight, bias, labels, ignore_index, validate)
    return _TokenLogps.apply(hidden, weight, bias, labels, options)


def weighted_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    options: HeadOptions,
    validate: bool | None,
) -> tuple[Tensor, HeadResult]:
    """`fused_weighted_nll` for the losses built on it: also returns the head's statistics."""
    hidden = check_inputs(hidden, weight, bias, labels, options.ignore_index, validate)
    if token_weights.shape != labels.shape or token_weights.device != labels.device:
        raise ValueError(
            f"token_weights must be {tuple(labels.shape)} on {labels.device} like labels, "
            f"got {tuple(token_weights.shape)} on {token_weights.device}"
        )
    if token_weights.requires_grad:
        raise TypeError("token_weights are constants here; use fused_token_logps where they need a gradient")
    need_gradient = torch.is_grad_enabled()
    return _WeightedNll.apply(hidden, weight, bias, labels, token_weights, options, need_gradient)


class _WeightedNll(torch.autograd.Function):
    """Loss and gradients in one pass; the backward only multiplies by the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weights, options, need_gradient):
        need = [need_gradient and needed for needed in ctx.needs_input_grad[:3]]
        result = _linear_nll(hidden, weight, bias, labels, token_weights, options, need)
        ctx.save_for_backward(hidden, weight, bias, labels, token_weights)
        ctx.options, ctx.gradients = options, result if any(need) else None
        total = sum_dtype(hidden.device)
        loss = -(token_weights.to(total) * result.logps.to(total)).sum().to(result.logps.dtype)
        return loss, result._replace(dx=None, dw=None, db=None)

    @staticmethod
    def backward(ctx, grad_loss, _):
        _refuse_create_graph()
        hidden, weight, bias, labels, token_weights = ctx.saved_tensors
        # The buffers are handed over, so that weight.grad is dW itself and not a copy; a second backward computes anew.
        result, ctx.gradients = ctx.gradients, None
        if result is None:
            result = _linear_nll(hidden, weight, bias, labels, token_weights, ctx.options, ctx.needs_input_grad[:3])
        return (*_scaled_gradients(result, grad_loss), None, None, None, None)


class _TokenLogps(torch.autograd.Function):
    """Log-probabilities only; the backward is one weighted pass with weights minus the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options):
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options = options
        return _linear_nll(hidden, weight, bias, labels, None, options, [False] * 3).logps

    @staticmethod
    def backward(ctx, grad_logps):
        _refuse_create_graph()
        result = _linear_nll(*ctx.saved_tensors, -grad_logps, ctx.options, ctx.needs_input_grad[:3])
        return (*_scaled_gradients(result, None), None, None)


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, in which sums over tens of thousands of tokens lose nothing, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _linear_nll(hidden, weight, bias, labels, token_weights, options, need) -> HeadResult:
    """The head outside autocast, which would narrow the float32 products."""
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_nll(hidden, weight, bias, labels, token_weights, options, *need)


def _scaled_gradients(result: HeadResult, upstream: Tensor | None) -> list[Tensor | None]:
    """dx, dw, db times `upstream` (None is 1). On the host an upstream of exactly 1 skips the pass over dW."""
    if upstream is not None and upstream.device.type == "cpu" and upstream.item() == 1:
        upstream = None
    for grad in (result.dw, result.db):
        if grad is not None and upstream is not None:
            grad.mul_(upstream)
    if result.dx is not None and (result.dx_scale != 1 or upstream is not None):
        result.dx.mul_(result.dx_scale if upstream is None else upstream * result.dx_scale)
    return [result.dx, result.dw, result.db]


def _refuse_create_graph() -> None:
    if torch.is_grad_enabled():  # inside a backward: create_graph=True
        raise RuntimeError("redi_kernels' losses have no second derivative: call backward without create_graph")


def head_options(
    hidden: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    grad_tolerance: float | str,
    workspace_bytes: int,
    backend: str,
    with_entropy: bool = False,
) -> HeadOptions:
    """Check the options every loss shares, and resolve "auto"; errors are ValueErrors."""
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend must be 'auto' or 'torch', got {backend!r}")
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap must be positive or None, got {logit_softcap}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if grad_tolerance == "auto":
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        grad_tolerance = DEFAULT_TOLERANCE if dtype in (torch.bfloat16, torch.float16) else 0.0
    elif not (isinstance(grad_tolerance, (int, float)) and 0 <= grad_tolerance < 1):
        raise ValueError(f"grad_tolerance must be 'auto' or in [0, 1), got {grad_tolerance!r}")
    return HeadOptions(
        logit_scale, logit_softcap, ignore_index, float(grad_tolerance), int(workspace_bytes), with_entropy
    )


def check_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, validate: bool | None
) -> Tensor:
    """Raise TypeError or ValueError for inputs that do not fit each other; returns hidden as (T, H)."""
    if hidden.dim() == 3 and hidden.shape[0] == 1:
        hidden = hidden.squeeze(0)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (T, H) or (1, T, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be (T,) = ({hidden.shape[0]},), got {tuple(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    tensors = [hidden, weight, labels] if bias is None else [hidden, weight, labels, bias]
    if len({x.device for x in tensors}) > 1:
        raise ValueError(f"inputs must be on one device, got {[str(x.device) for x in tensors]}")
    floats = [x.dtype for x in tensors if x is not labels]
    if not all(dtype.is_floating_point for dtype in floats):
        raise TypeError(f"hidden, weight and bias must be floating point, got {floats}")
    if len(set(floats)) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"hidden, weight and bias must have one dtype outside autocast, got {floats}")
    if validate or (validate is None and labels.device.type == "cpu"):
        bad = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
        if bad.any():
            where = int(bad.nonzero()[0])
            raise ValueError(
                f"labels[{where}] = {int(labels[where])} is outside [0, {weight.shape[0]}) and not {ignore_index}"
            )
    return hidden
