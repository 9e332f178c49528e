"""Relative errors of dx and dW against float64, by entropy, labels and tail: the table of docs/head.md.

python -m benchmarks.errors
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import head_inputs
from redi_kernels.linear_nll import head_options, weighted_nll

SHAPE = (1024, 128, 8192)  # T, H, V
TOLERANCE = 2**-10
TAILS = {  # arguments of head_inputs, and whether one token is made uniform
    "smooth": ({"tail_exponent": 1.5}, False),
    "rough": ({"tail_exponent": 1.5, "roughness": 2.0, "common": 50.0}, False),
    "smooth, one uniform token": ({"tail_exponent": 1.5}, True),
}


def gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """dx, dW and the share of columns kept."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    options = head_options(hidden, 1.0, None, -100, tolerance, 256 * 2**20, "auto")
    loss, result = weighted_nll(hidden, weight, None, labels, token_weights, options, None)
    loss.backward()
    return hidden.grad, weight.grad, float(result.active_share)


def eager_gradients(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * token_weights).sum().backward()
    return hidden.grad, weight.grad


def errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    pairs = zip(got[:2], expected[:2], strict=True)
    return " / ".join(f"{float((g.double() - e).norm() / e.norm()):.0e}" for g, e in pairs)


def main() -> None:
    print("| entropy | labels | tail | kept | float32 at 2^-10, dx / dW | bfloat16 at 2^-10 | bfloat16 eager |")
    print("|--:|---|---|--:|--:|--:|--:|")
    token_weights = torch.where(torch.arange(SHAPE[0]) // 64 % 2 == 0, 1.0, -0.8) / 64
    for entropy in (0.03, 0.1, 0.3, 1.0, 4.0):
        for label_kind in ("sampled", "argmax"):
            for tail, (arguments, uniform) in TAILS.items():
                hidden, weight, labels = head_inputs(*SHAPE, entropy=entropy, labels=label_kind, **arguments)
                if uniform:
                    hidden[7] = 0
                exact = gradients(hidden.double(), weight.double(), labels, token_weights, 0)
                ours = gradients(hidden, weight, labels, token_weights, TOLERANCE)
                narrow = hidden.bfloat16(), weight.bfloat16()
                exact_narrow = gradients(*(x.double() for x in narrow), labels, token_weights, 0)
                ours_narrow = gradients(*narrow, labels, token_weights, TOLERANCE)
                eager = eager_gradients(*narrow, labels, token_weights)
                print(
                    f"| {entropy} | {label_kind} | {tail} | {ours[2]:.1%} | {errors(ours, exact)} "
                    f"| {errors(ours_narrow, exact_narrow)} | {errors(eager, exact_narrow)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
