"""Peak memory of one forward + backward of the head, beyond inputs and gradients, against the number of tokens.

    python -m benchmarks.memory

Every measurement runs in a process of its own (Linux only: it resets and reads the kernel's high-water mark of the
resident set). A small warm-up call comes first, so that thread pools and libraries are loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.providers import PROVIDERS, why_absent

MIB = 2**20


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: memory is measured on Linux only")


def measure_here(provider: str, num_tokens: int, hidden_size: int, num_columns: int, dtype: torch.dtype) -> int:
    """Bytes beyond inputs and gradients that one call held at its peak."""

    def problem(tokens: int, columns: int):
        torch.manual_seed(0)
        hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_()
        weight = (torch.randn(columns, hidden_size) / 4).to(dtype).requires_grad_()
        return hidden, weight, torch.randint(0, columns, (tokens,)), torch.randn(tokens)

    PROVIDERS[provider](*problem(64, 512)).backward()
    inputs = problem(num_tokens, num_columns)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    if provider.startswith("ours") and dtype != torch.float32:
        gradients += inputs[1].numel() * 4  # dW is accumulated in float32
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_bytes("VmRSS")
    PROVIDERS[provider](*inputs).backward()
    return resident_bytes("VmHWM") - before - gradients


def measure(provider: str, num_tokens: int, hidden_size: int, num_columns: int, dtype: str = "float32") -> int:
    """`measure_here` in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one"]
    command.append(json.dumps([provider, num_tokens, hidden_size, num_columns, dtype]))
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return int(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    if arguments.one:
        provider, *shape, dtype = json.loads(arguments.one)
        print(measure_here(provider, *shape, getattr(torch, dtype)))
        return
    print(f"MiB beyond inputs and gradients, H={arguments.hidden_size} V={arguments.vocab_size} {arguments.dtype}")
    print("| provider | " + " | ".join(f"T={tokens}" for tokens in arguments.tokens) + " |")
    print("|---" * (len(arguments.tokens) + 1) + "|")
    for provider in PROVIDERS:
        if why_absent(provider):
            continue
        row = [
            measure(provider, tokens, arguments.hidden_size, arguments.vocab_size, arguments.dtype) / MIB
            for tokens in arguments.tokens
        ]
        print(f"| {provider} | " + " | ".join(f"{mib:.0f}" for mib in row) + " |", flush=True)


if __name__ == "__main__":
    main()
