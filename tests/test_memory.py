"""The workspace cap holds for the whole process, and memory does not grow with the number of tokens."""

import sys

import pytest

from benchmarks.memory import MIB, measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark in /proc")


@pytest.mark.parametrize("provider", ["ours, 2^-10", "ours, exact"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_is_the_cap_however_many_tokens(provider, dtype):
    """Beyond inputs and gradients: at most 256 + 64 MiB, and no more for 16 times the tokens but a few bytes each."""
    few, many = (measure(provider, tokens, 32, 20_000, dtype) for tokens in (4_096, 65_536))
    assert many < (256 + 64) * MIB
    assert many - few < 16 * MIB  # the logits of the other 61,440 tokens would be 4.6 GiB


def test_the_measurement_sees_full_logits():
    assert measure("plain autograd", 4_096, 32, 20_000) > 4_096 * 20_000 * 4
