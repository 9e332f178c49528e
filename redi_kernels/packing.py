"""Packing: sequences of any length side by side in one row of tokens, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """S sequences of T tokens in all, laid out in descending length.

    input_ids    (1, T) int64
    position_ids (1, T) int64, restarting at 0 in every sequence
    labels       (T,) int64, aligned with input_ids as in Transformers (not shifted); -100 = no loss
    cu_seqlens   (S+1,) int32 on the host: sequence s is the tokens cu_seqlens[s] to cu_seqlens[s+1]
    max_seqlen   tokens of the longest sequence
    is_chosen    (S,) bool on the host
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    is_chosen: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch with its tokens on `device`; cu_seqlens and is_chosen stay on the host, where they are read."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
        )


def pack_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int], bool]]) -> PackedBatch:
    """Concatenate sequences `(input_ids, labels, is_chosen)`, longest first, equal lengths in the order given.

    Equal lengths are adjacent so that attention can treat them as one rectangular batch.

    Raises ValueError when there is no sequence, a sequence is empty, or its labels and input_ids differ in length.
    """
    if not sequences:
        raise ValueError("there is nothing to pack: pack_sequences needs at least one sequence")
    for i, (input_ids, labels, _) in enumerate(sequences):
        if len(input_ids) == 0:
            raise ValueError(f"sequence {i} is empty: drop it before packing")
        if len(labels) != len(input_ids):
            raise ValueError(
                f"sequence {i} has {len(input_ids)} input_ids but {len(labels)} labels: "
                "give one label per token, -100 where there is no loss"
            )
    ordered = sorted(sequences, key=lambda sequence: -len(sequence[0]))
    lengths = [len(input_ids) for input_ids, _, _ in ordered]
    return PackedBatch(
        input_ids=torch.tensor([list(chain.from_iterable(input_ids for input_ids, _, _ in ordered))]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        labels=torch.tensor(list(chain.from_iterable(labels for _, labels, _ in ordered))),
        cu_seqlens=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
        max_seqlen=lengths[0],
        is_chosen=torch.tensor([bool(is_chosen) for _, _, is_chosen in ordered]),
    )


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins of `capacity` tokens: longest first, each into the first bin with room for it.

    Returns the indices in each bin. Ties go by index, so the result depends on the arguments alone. At most
    11/9 OPT + 6/9 bins (Dósa, 2007); O(n log n) time.

    Raises ValueError when a length is below 1 or above the capacity.
    """
    for i, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"item {i} has length {length}: lengths must be at least 1")
        if length > capacity:
            raise ValueError(
                f"item {i} has {length} tokens, above the capacity of {capacity}: raise the capacity or drop the item"
            )
    bins: list[list[int]] = [[] for _ in lengths]
    # A complete binary tree over as many empty bins as there are items: leaf `leaves + b` is the room left in bin b,
    # a node the most room left below it, so going left whenever there is room on the left finds the first bin.
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[i] else 2 * node + 1
        bins[node - leaves].append(i)
        room[node] -= lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [indices for indices in bins if indices]
