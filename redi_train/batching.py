"""From rows to optimizer steps: which rows form a step, which rank trains them, and in which packed forwards.

Every rank computes the whole plan from the lengths of the rows, so all agree on it, and on the divisors of the loss,
without a word to each other. The order of an epoch follows from (seed, epoch) alone, so a resumed run sees the rows it
would have.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from datasets import Dataset
from torch.utils.data import BatchSampler
from torch.utils.data import Dataset as TorchDataset

from redi_kernels import PackedBatch, first_fit_decreasing, pack_sequences


@dataclass(frozen=True)
class Step:
    """One rank's share of one optimizer step. The counts are those of the whole step, over all ranks."""

    forwards: list[list[int]]  # the rows of each forward; none in a placeholder
    num_rows: int  # pairs (redi) or sequences (sft)
    num_labelled: int  # tokens that carry a loss
    num_tokens: int  # tokens in all


class StepBatch(TypedDict):
    """What the data loader yields: a Step with its forwards packed."""

    forwards: list[PackedBatch]
    num_rows: int
    num_labelled: int
    num_tokens: int


class StepSampler(BatchSampler):
    """The steps of one epoch for one rank.

    A random permutation of the rows, drawn from (seed, epoch), is cut into steps of `global_batch_size` rows; the last
    step takes what is left. Rank r of R trains rows r, r + R, ... of each step, so over the ranks no row is repeated
    or dropped, and a rank has none when a step has fewer rows than ranks. Each rank's rows are packed
    first-fit-decreasing into forwards of at most `max_tokens`, a pair in one forward. All ranks run the same number of
    forwards, with placeholders where a rank has fewer, so that collectives inside a forward (FSDP gathers weights
    there) meet their counterparts.

    Args:
        num_tokens (N,), num_labelled (N,): tokens of each row as packed, and those of them that carry a loss.

    As a batch sampler it yields lists of one Step; DataLoader then asks the dataset for that one "row".
    """

    def __init__(
        self,
        num_tokens: np.ndarray,
        num_labelled: np.ndarray,
        *,
        global_batch_size: int,
        max_tokens: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.num_tokens = num_tokens
        self.num_labelled = num_labelled
        self.global_batch_size = global_batch_size
        self.max_tokens = max_tokens
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.num_tokens) // self.global_batch_size)

    def __iter__(self) -> Iterator[list[Step]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.num_tokens))
        for start in range(0, len(order), self.global_batch_size):
            yield [self._plan(order[start : start + self.global_batch_size])]

    def _plan(self, rows: np.ndarray) -> Step:
        packings = [self._pack(rows[rank :: self.world_size]) for rank in range(self.world_size)]
        mine = packings[self.rank]
        return Step(
            forwards=mine + [[]] * (max(map(len, packings)) - len(mine)),
            num_rows=len(rows),
            num_labelled=int(self.num_labelled[rows].sum()),
            num_tokens=int(self.num_tokens[rows].sum()),
        )

    def _pack(self, rows: np.ndarray) -> list[list[int]]:
        bins = first_fit_decreasing(self.num_tokens[rows].tolist(), self.max_tokens)
        return [rows[indices].tolist() for indices in bins]


class StepDataset(TorchDataset):
    """Tokenised rows (see `data.tokenize_rows`) as packed steps: `dataset[step]` is a StepBatch."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: Step) -> StepBatch:
        return {
            "forwards": [self._pack(rows) for rows in step.forwards],
            "num_rows": step.num_rows,
            "num_labelled": step.num_labelled,
            "num_tokens": step.num_tokens,
        }

    def _pack(self, rows: list[int]) -> PackedBatch:
        if not rows:
            return pack_sequences([([0], [-100], True)])
        sequences = []
        for row in self.rows.select(rows):
            for completion, is_chosen in ((row["chosen_ids"], True), (row["rejected_ids"], False)):
                if completion:
                    labels = [-100] * len(row["prompt_ids"]) + completion
                    sequences.append((row["prompt_ids"] + completion, labels, is_chosen))
        return pack_sequences(sequences)


def check_max_tokens(rows: Dataset, max_tokens: int) -> None:
    """Raise ValueError, naming the row, when one is too long for a forward of `max_tokens`."""
    num_tokens = np.asarray(rows.with_format("numpy")["num_tokens"])
    longest = int(num_tokens.argmax())
    if num_tokens[longest] > max_tokens:
        raise ValueError(
            f"row {rows[longest]['row']} of the data has {num_tokens[longest]} tokens, more than --max_tokens "
            f"{max_tokens}; raise --max_tokens, or lower the limits on its length so that it is dropped."
        )
