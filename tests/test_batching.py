"""Steps: every row once an epoch over any number of ranks, true divisors, forwards within the token budget."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from redi_train.batching import StepDataset, StepSampler, check_max_tokens


def rows(lengths):
    """Pairs of prompt, chosen and rejected lengths, in tokens of which each tells where it comes from."""
    pairs = [
        {
            "row": i,
            "prompt_ids": [1000 * i + 1] * prompt,
            "chosen_ids": [1000 * i + 2] * chosen,
            "rejected_ids": [1000 * i + 3] * rejected,
            "num_tokens": prompt + chosen + (prompt + rejected if rejected else 0),
            "num_labelled": chosen + rejected,
        }
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ]
    return Dataset.from_list(pairs)


def samplers(dataset, world_size, **options):
    columns = [np.array(dataset[name]) for name in ("num_tokens", "num_labelled")]
    return [StepSampler(*columns, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=23)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(1, 4), st.integers(28, 60), st.integers(0, 3))
def test_an_epoch_is_every_row_once_whatever_the_ranks(lengths, global_batch_size, world_size, max_tokens, epoch):
    dataset = rows(lengths)
    ranks = samplers(dataset, world_size, global_batch_size=global_batch_size, max_tokens=max_tokens, seed=7)
    alone = samplers(dataset, 1, global_batch_size=global_batch_size, max_tokens=max_tokens, seed=7)[0]
    for sampler in (*ranks, alone):
        sampler.set_epoch(epoch)
    trained = []
    steps = list(zip(*ranks, alone, strict=True))
    assert len(steps) == len(alone) == -(-len(lengths) // global_batch_size)
    for *shares, whole in steps:
        shares, whole = [share for (share,) in shares], whole[0]
        of_ranks = [row for share in shares for forward in share.forwards for row in forward]
        of_one = [row for forward in whole.forwards for row in forward]
        assert sorted(of_ranks) == sorted(of_one)  # the step is the same rows on any number of ranks
        assert len({len(share.forwards) for share in shares}) == 1  # so that collectives match
        for share in (*shares, whole):
            assert share.num_rows == len(of_one)
            assert share.num_labelled == sum(sum(lengths[row][1:]) for row in of_one)
            assert share.num_tokens == sum(dataset[row]["num_tokens"] for row in of_one)
            assert all(sum(dataset[row]["num_tokens"] for row in forward) <= max_tokens for forward in share.forwards)
        trained += of_ranks
    assert sorted(trained) == list(range(len(lengths)))


def test_the_order_follows_from_seed_and_epoch():
    dataset = rows([(1, 1, 1)] * 50)

    def order(seed, epoch):
        (sampler,) = samplers(dataset, 1, global_batch_size=4, max_tokens=4, seed=seed)
        sampler.set_epoch(epoch)
        return [row for (step,) in sampler for forward in step.forwards for row in forward]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert order(0, 0) != sorted(order(0, 0))


def test_a_forward_holds_both_traces_of_each_pair_and_labels_only_completions():
    dataset = rows([(2, 3, 1), (1, 2, 4)])
    ((step,),) = samplers(dataset, 1, global_batch_size=2, max_tokens=100)[0]
    (batch,) = StepDataset(dataset)[step]["forwards"]
    found = set()
    for start, end, is_chosen in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], batch.is_chosen, strict=True):
        ids, labels = batch.input_ids[0, start:end].tolist(), batch.labels[start:end].tolist()
        found.add((tuple(ids), tuple(labels), bool(is_chosen)))
    assert found == {
        ((1, 1, 2, 2, 2), (-100, -100, 2, 2, 2), True),
        ((1, 1, 3), (-100, -100, 3), False),
        ((1001, 1002, 1002), (-100, 1002, 1002), True),
        ((1001, 1003, 1003, 1003, 1003), (-100, 1003, 1003, 1003, 1003), False),
    }


def test_a_rank_without_rows_gets_a_placeholder_without_labels():
    dataset = rows([(2, 3, 0)])
    steps = [step for sampler in samplers(dataset, 3, global_batch_size=4, max_tokens=9) for (step,) in sampler]
    batches = [StepDataset(dataset)[step]["forwards"] for step in steps]
    assert [[batch.input_ids.numel() for batch in forwards] for forwards in batches] == [[5], [1], [1]]
    assert [(forwards[0].labels == -100).all().item() for forwards in batches] == [False, True, True]


def test_a_row_over_the_budget_is_named():
    dataset = rows([(2, 3, 0), (2, 4, 5), (2, 4, 3)]).select([1, 2])
    check_max_tokens(dataset, 13)
    with pytest.raises(ValueError, match="row 1 of the data has 13 tokens, more than --max_tokens 12"):
        check_max_tokens(dataset, 12)
