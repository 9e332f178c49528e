"""Causal attention over packed sequences of different lengths.

On a GPU that has them, fused variable-length kernels (flash-attn when installed, else torch's own); elsewhere
scaled_dot_product_attention sequence by sequence. None holds a T x T matrix, and the work is the sum of the squares
of the lengths, not the square of their sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Causal softmax attention within each of S packed sequences; returns (T, Hq, D).

    query (T, Hq, D), key and value (T, Hk, D) with Hq a multiple of Hk: query head h reads key head h // (Hq / Hk).
    cu_seqlens (S+1,) integer, on the host or on query's device: sequence s is rows cu_seqlens[s] to cu_seqlens[s+1];
    every row belongs to a sequence. max_seqlen: rows of the longest. scale: of query @ key, default 1 / sqrt(D).
    Any floating dtype, and autocast's under autocast. Differentiable once in query, key and value.

    Without a fused kernel cu_seqlens is read on the host (there it is checked too), and adjacent sequences of equal
    length are computed as one rectangular batch: many short sequences would otherwise cost a call each.

    Raises ValueError when Hq is no multiple of Hk, or when cu_seqlens is read and does not rise from 0 to T.
    """
    if query.shape[1] % key.shape[1] != 0:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads: "
            "the first must be a multiple of the second"
        )
    # Autocast knows scaled_dot_product_attention but none of the kernels below it, and a model under autocast mixes
    # dtypes here: a norm or rotary embedding leaves query and key in fp32 beside a value in bf16.
    device_type = query.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    if _has_fused_kernel(query, value):
        return _fused(query, key, value, cu_seqlens, max_seqlen, scale)
    return _per_sequence(query, key, value, cu_seqlens, scale)


def _per_sequence(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    if query.device.type != "cpu":
        # Off the CPU, scaled_dot_product_attention has no fused kernel for shared heads in fp32: it would fall back
        # to one that holds every L x L matrix.
        key, value = _repeat_heads(key, value, query.shape[1])
    outputs = []
    for start, count, length in _equal_length_runs(cu_seqlens, len(query)):
        stop = start + count * length
        rectangle = [x[start:stop].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value)]
        output = F.scaled_dot_product_attention(
            *rectangle, is_causal=True, scale=scale, enable_gqa=query.shape[1] != rectangle[1].shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _equal_length_runs(cu_seqlens: Tensor, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, sequences, length) of each run of adjacent sequences of one length; empty sequences are left out."""
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != num_rows or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the {num_rows} rows of query, got {bounds}")
    start = 0
    for length, run in groupby(lengths):
        count = sum(1 for _ in run)
        if length > 0:
            yield start, count, length
        start += count * length


def _has_fused_kernel(query: Tensor, value: Tensor) -> bool:
    # The limits shared by flash-attn 2 and torch's copy of it: Ampere or newer (AMD's numbers for the supported
    # architectures are above 8 too), 16-bit, one head size for all three, at most 256 and a multiple of 8.
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and value.shape[-1] == head_dim
        and head_dim <= 256
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _fused(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None
) -> Tensor:
    cu_seqlens = cu_seqlens.to(query.device, torch.int32, non_blocking=True)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    flash_attn_varlen_func = _flash_attn_varlen_func()
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(query, key, value, *lengths, softmax_scale=scale, causal=True)
    # Imported here because it brings in torch._dynamo, a second or more that a CPU user need not wait for.
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # since torch 2.12
        gqa = {"enable_gqa": True}
    else:
        gqa = {}
        key, value = _repeat_heads(key, value, query.shape[1])
    return varlen_attn(query, key, value, *lengths, scale=scale, window_size=(-1, 0), **gqa)  # (-1, 0) is causal


@cache
def _flash_attn_varlen_func() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _repeat_heads(key: Tensor, value: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    repeats = num_heads // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
