"""From rows to optimizer steps: which rows form a step, which rank trains them, and in which packed forwards.

Every rank computes the whole plan from the lengths of the rows, so all agree on it, and on the divisors of the loss, without
a word to each other. The order of an epoch follows from (seed, epoch) alone, so a resumed run sees the rows it would have.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from torch.utils.data import BatchSampler
from torch.utils.data import Dataset as TorchDataset

from redi_kernels.packing import PackedBatch, first_fit_decreasing, pack_sequences


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row: `packed` (N,) as it is packed (a pair: both traces, each with the prompt), `labelled` (N,) those
    of its completions that carry a loss."""

    packed: np.ndarray
    labelled: np.ndarray


@dataclass(frozen=True)
class Step:
    """One rank's share of one optimizer step; the counts are of the whole step, over all ranks."""

    forwards: list[list[int]]  # the rows of each forward; an empty one is a placeholder
    num_rows: int  # sequences (sft) or pairs (redi)
    num_labelled: int  # tokens that carry a loss
    num_tokens: int  # tokens in all


def row_lengths(rows: Dataset) -> RowLengths:
    """Lengths of tokenised rows (see `data.tokenize_rows`); a row without rejected_ids is one sequence, else a pair."""
    prompt, chosen, rejected = (
        np.diff(rows.data.column(name).combine_chunks().offsets.to_numpy())
        if rows._indices is None and False
        else np.array([len(ids) for ids in rows[name]])
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return RowLengths(packed=prompt + chosen + np.where(rejected > 0, prompt + rejected, 0), labelled=chosen + rejected)
