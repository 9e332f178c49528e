import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redi_kernels.packing import first_fit_decreasing, pack_sequences


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.sampled_from([-100, 3, 4])), min_size=1, max_size=6),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_packing_keeps_every_sequence_whole(tokens, random):
    sequences = [([i for i, _ in pairs], [label for _, label in pairs], random.random() < 0.5) for pairs in tokens]
    batch = pack_sequences(sequences)

    lengths = batch.cu_seqlens.diff().tolist()
    assert batch.cu_seqlens[0] == 0
    assert lengths == sorted(lengths, reverse=True)
    assert batch.max_seqlen == max(lengths)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, sum(lengths))
    assert batch.labels.shape == (sum(lengths),)
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.labels.dtype == torch.int64
    assert (batch.cu_seqlens.dtype, batch.is_chosen.dtype) == (torch.int32, torch.bool)
    unpacked = [
        (ids.tolist(), labels.tolist(), is_chosen)
        for ids, labels, is_chosen in zip(
            batch.input_ids[0].split(lengths), batch.labels.split(lengths), batch.is_chosen.tolist(), strict=True
        )
    ]
    assert unpacked == sorted(sequences, key=lambda sequence: len(sequence[0]), reverse=True)  # a stable sort
    for positions, length in zip(batch.position_ids[0].split(lengths), lengths, strict=True):
        assert positions.tolist() == list(range(length))


def test_moving_a_batch_leaves_the_bounds_on_the_host():
    batch = pack_sequences([([1, 2], [-100, 2], True), ([3], [3], False)]).to("meta", non_blocking=True)
    assert {batch.input_ids.device.type, batch.position_ids.device.type, batch.labels.device.type} == {"meta"}
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.is_chosen.tolist() == [True, False]
    assert batch.max_seqlen == 2


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "at least one sequence"),
        ([([1], [1], True), ([], [], False)], "sequence 1 is empty"),
        ([([1], [1], True), ([1, 2], [2], False)], "sequence 1 has 2 input_ids but 1 labels"),
    ],
)
def test_what_cannot_be_packed_is_named(sequences, message):
    with pytest.raises(ValueError, match=message):
        pack_sequences(sequences)


def plain_first_fit_decreasing(lengths, capacity):
    bins = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for indices in bins:
            if sum(lengths[j] for j in indices) + lengths[i] <= capacity:
                indices.append(i)
                break
        else:
            bins.append([i])
    return bins


@given(
    st.integers(1, 30).flatmap(
        lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=40), st.just(capacity))
    )
)
def test_first_fit_decreasing_is_the_plain_algorithm(arguments):
    assert first_fit_decreasing(*arguments) == plain_first_fit_decreasing(*arguments)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 9, 2], "item 1 has 9 tokens, above the capacity of 8"), ([3, 0], "item 1 has length 0")],
)
def test_an_item_that_fits_no_bin_is_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        first_fit_decreasing(lengths, 8)
