"""Forward + backward of the head, one weight per token: time of every provider in one run.

    pytest benchmarks/test_head.py --benchmark-only [--sizes small]

Each group is one shape and dtype and names its inputs and the share of columns that the 2^-10 provider kept; numbers in
brackets are ratios to the group's fastest.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.inputs import head_inputs
from benchmarks.providers import PROVIDERS, plain_autograd, why_absent
from redi_kernels.linear_nll import head_options, weighted_nll

ENTROPY, TAIL_EXPONENT = 0.25, 1.5  # nats; 0.25 is the paper's SFT model on training traces
SIZES = {  # (T, H, V)
    "full": [(4096, 384, 16384), (1024, 896, 151936)],  # a small model; the head of Qwen2.5-0.5B
    "small": [(128, 32, 1000)],
}
OVER_A_MINUTE = {("torch linear_cross_entropy", SIZES["full"][1])}  # a call; timed once, without a warm-up


@cache
def problem(shape: tuple[int, int, int], dtype: torch.dtype):
    """hidden, weight, labels, token_weights, and the share of columns kept at 2^-10."""
    hidden, weight, labels = head_inputs(*shape, entropy=ENTROPY, tail_exponent=TAIL_EXPONENT)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    trace = torch.arange(shape[0]) // 64  # right and wrong traces of 64 tokens in turn
    token_weights = torch.where(trace % 2 == 0, 1.0, -0.8) / 64
    options = head_options(hidden, 1.0, None, -100, 2**-10, 256 * 2**20, "auto")
    with torch.enable_grad():
        result = weighted_nll(hidden, weight, None, labels, token_weights, options, None)[1]
    return hidden, weight, labels, token_weights, float(result.active_share)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", SIZES[metafunc.config.getoption("--sizes")], ids="T{0[0]}-H{0[1]}-V{0[2]}".format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_backward(benchmark, shape, dtype, provider):
    if reason := why_absent(provider):
        pytest.skip(reason)
    hidden, weight, labels, token_weights, active_share = problem(shape, dtype)
    benchmark.group = (
        f"head forward + backward, T={shape[0]} H={shape[1]} V={shape[2]} {str(dtype).removeprefix('torch.')}, "
        f"{ENTROPY} nats, tail exponent {TAIL_EXPONENT}: {active_share:.1%} of columns kept at 2^-10"
    )
    benchmark.name = provider
    benchmark.extra_info.update(provider=provider, active_share=active_share, torch=torch.__version__)

    def step():
        hidden.grad = weight.grad = None
        PROVIDERS[provider](hidden, weight, labels, token_weights).backward()

    if (provider, shape) in OVER_A_MINUTE:
        benchmark.pedantic(step)
    else:
        benchmark.pedantic(step, rounds=3 if shape[2] > 100_000 else 5, warmup_rounds=1)

    if provider.startswith("ours") and dtype == torch.float32:
        ours = hidden.grad
        hidden.grad = weight.grad = None
        plain_autograd(hidden, weight, labels, token_weights).backward()
        error = float((ours - hidden.grad).norm() / hidden.grad.norm())
        benchmark.extra_info["dx_error"] = error
        assert error < 1e-2, f"wrong, so not worth timing: dx errs by {error}"
