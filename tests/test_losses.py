"""REDI and SFT on packed batches against the paper's equations in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redi_kernels import RediLoss, SftLoss, fused_redi_loss, fused_sft_loss, reference


def packed_problem(lengths, seed=0, hidden_size=7, num_columns=23, prompt=2):
    """hidden, weight (float64, differentiable), labels with `prompt` unlabelled tokens a sequence, cu_seqlens."""
    torch.manual_seed(seed)
    num_tokens = sum(lengths)
    hidden = torch.randn(num_tokens, hidden_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(num_columns, hidden_size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, num_columns, (num_tokens,))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for start in cu_seqlens[:-1].tolist():
        labels[start : start + prompt] = -100
    return hidden, weight, labels, cu_seqlens


def assert_same(got, expected):
    # Sums of at most a few hundred numbers of size 10 in float64.
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    alpha=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    num_pairs=st.sampled_from([None, 1, 7, 2.5]),
    prompt=st.integers(0, 4),
    data=st.data(),
)
def test_redi_loss_is_equation_5(lengths, alpha, num_pairs, prompt, data):
    """Any boundaries, sequences without labels (prompt >= length), unpaired batches, any divisor."""
    is_chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    if num_pairs is None:
        is_chosen[0] = True
    hidden, weight, labels, cu_seqlens = packed_problem(lengths, data.draw(st.integers(0, 1000)), prompt=prompt)
    out = fused_redi_loss(hidden, weight, labels, cu_seqlens, is_chosen, alpha=alpha, num_pairs=num_pairs)
    got = torch.autograd.grad(out.loss, (hidden, weight))

    z = reference.logits(hidden, weight)
    loss, chosen, rejected = reference.redi_loss(z, labels, cu_seqlens, is_chosen, alpha, num_pairs)
    expected = torch.autograd.grad(loss, (hidden, weight))
    assert_same(out.loss, loss)
    assert_same(out.chosen_logps, chosen.detach())
    assert_same(out.rejected_logps, rejected.detach())
    for grad, want in zip(got, expected, strict=True):
        assert_same(grad, want)


def test_equation_5_by_hand():
    """One pair whose every probability is known: the loss is written out here a second time, in numbers."""
    half, quarter = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    # Three columns with probabilities 1/2, 1/4, 1/4 at every position.
    hidden = torch.ones(7, 1)
    weight = torch.stack([half, quarter, quarter]).unsqueeze(1)
    labels = torch.tensor([-100, 0, 1, 0, -100, -100, 2])  # chosen: log p = -1, -2, -1 (times log 2); rejected: -2
    out = fused_redi_loss(hidden, weight, labels, torch.tensor([0, 4, 7]), torch.tensor([True, False]), alpha=0.5)
    log2 = float(torch.tensor(2.0).log())
    assert out.chosen_logps.tolist() == pytest.approx([-4 / 3 * log2], rel=1e-6)
    assert out.rejected_logps.tolist() == pytest.approx([-2 * log2], rel=1e-6)
    assert float(out.loss) == pytest.approx(4 / 3 * log2 - 0.5 * 2 * log2, rel=1e-6)


def test_sequence_boundaries_are_never_crossed():
    """The last token of a sequence predicts nothing, above all not the next one's first label."""
    hidden, weight, labels, cu_seqlens = packed_problem([3, 4], prompt=0)
    is_chosen = torch.tensor([True, False])
    before = fused_redi_loss(hidden, weight, labels, cu_seqlens, is_chosen)
    changed = labels.clone()
    changed[[0, 3]] = (changed[[0, 3]] + 1) % 23  # first labels
    after = fused_redi_loss(hidden, weight, changed, cu_seqlens, is_chosen)
    assert torch.equal(before.loss, after.loss)
    (grad,) = torch.autograd.grad(after.loss, hidden)
    assert (grad[[2, 6]] == 0).all()  # last positions
    assert (grad[[0, 1, 3, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize("loss_name", ["redi", "sft"])
def test_uneven_micro_batches_add_up_to_one_large_batch(loss_name):
    lengths = [9, 4, 11, 6, 3, 8, 5]
    is_chosen = torch.tensor([True, False, True, True, False, False, True])
    hidden, weight, labels, cu_seqlens = packed_problem(lengths)

    def loss_of(first, last, divisor):
        start, end = int(cu_seqlens[first]), int(cu_seqlens[last])
        arguments = (hidden[start:end], weight, labels[start:end], cu_seqlens[first : last + 1] - cu_seqlens[first])
        if loss_name == "redi":
            return fused_redi_loss(*arguments, is_chosen[first:last], num_pairs=divisor).loss
        return fused_sft_loss(*arguments, num_tokens=divisor).loss

    divisor = 4 if loss_name == "redi" else int((labels != -100).sum())
    whole = torch.autograd.grad(loss_of(0, 7, None), (hidden, weight))
    parts = [loss_of(0, 1, divisor), loss_of(1, 5, divisor), loss_of(5, 7, divisor)]  # the middle one: any mixture
    for got, expected in zip(torch.autograd.grad(sum(parts), (hidden, weight)), whole, strict=True):
        assert_same(got, expected)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    prompt=st.integers(0, 4),
    num_tokens=st.sampled_from([None, 3, 100]),
    seed=st.integers(0, 1000),
)
def test_sft_loss_is_the_token_mean(lengths, prompt, num_tokens, seed):
    hidden, weight, labels, cu_seqlens = packed_problem(lengths, seed, prompt=prompt)
    out = fused_sft_loss(hidden, weight, labels, cu_seqlens, num_tokens=num_tokens)
    z = reference.logits(hidden, weight)
    loss = reference.sft_loss(z, labels, cu_seqlens, num_tokens)
    assert_same(out.loss, loss)
    logps, counts = reference.sequence_logps(z, labels, cu_seqlens)
    assert_same(out.logps, torch.stack(logps).detach() / torch.tensor(counts).clamp(min=1))
    for got, want in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, loss)), strict=True):
        assert_same(got, want)


def test_alpha_0_is_length_normalised_sft_and_rejected_tokens_cost_no_gradient():
    hidden, weight, labels, cu_seqlens = packed_problem([6, 8])
    is_chosen = torch.tensor([True, False])
    out = fused_redi_loss(hidden, weight, labels, cu_seqlens, is_chosen, alpha=0)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    sft = fused_sft_loss(hidden[:6], weight, labels[:6], cu_seqlens[:2])
    assert_same(out.loss, sft.loss)
    assert (grad[6:] == 0).all()
    assert float(out.rejected_logps) < 0  # still measured


def test_stats_entropy_share_and_workspace():
    hidden, weight, labels, cu_seqlens = packed_problem([6, 8, 5])
    is_chosen = torch.tensor([True, False, False])
    out = fused_redi_loss(hidden[None], weight, labels, cu_seqlens, is_chosen, with_entropy=True, grad_tolerance=0)
    entropies = reference.token_entropies(reference.logits(hidden, weight)).detach()
    # Positions 1 to 4 of the first, 1 to 6 and 1 to 3 of the others predict labels: prompts are two tokens long.
    assert_same(out.stats.chosen_entropy, entropies[1:5].mean())
    assert_same(out.stats.rejected_entropy, torch.cat([entropies[7:13], entropies[15:18]]).mean())
    assert out.stats.active_share == 1
    assert 0 < out.stats.workspace_bytes <= 256 * 2**20


def test_modules_are_the_functions():
    hidden, weight, labels, cu_seqlens = packed_problem([6, 8])
    is_chosen = torch.tensor([True, False])
    redi = RediLoss(alpha=0.3, logit_scale=0.5)(hidden, weight, labels, cu_seqlens, is_chosen, num_pairs=3)
    assert torch.equal(
        redi.loss,
        fused_redi_loss(hidden, weight, labels, cu_seqlens, is_chosen, alpha=0.3, logit_scale=0.5, num_pairs=3).loss,
    )
    sft = SftLoss(logit_softcap=2.0)(hidden, weight, labels, cu_seqlens, num_tokens=5)
    assert torch.equal(
        sft.loss, fused_sft_loss(hidden, weight, labels, cu_seqlens, logit_softcap=2.0, num_tokens=5).loss
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"is_chosen": torch.tensor([True])}, ValueError, r"is_chosen must be bool \(2,\)"),
        ({"is_chosen": torch.tensor([1, 0])}, ValueError, "is_chosen must be bool"),
        ({"is_chosen": torch.tensor([False, False])}, ValueError, "num_pairs"),
        ({"num_pairs": 0}, ValueError, "num_pairs must be positive"),
        ({"cu_seqlens": torch.tensor([1, 6, 14])}, ValueError, "from 0 to T=14, got 1 to 14"),
        ({"cu_seqlens": torch.tensor([0, 6, 13])}, ValueError, "from 0 to T=14, got 0 to 13"),
        ({"cu_seqlens": torch.tensor([0, 6, 6, 14])}, ValueError, "ascend, got 6, 6 at 1"),
        ({"cu_seqlens": torch.tensor([[0, 14]])}, ValueError, "cu_seqlens must be integers"),
        ({"cu_seqlens": torch.tensor([0.0, 14.0])}, ValueError, "cu_seqlens must be integers"),
        ({"labels": torch.full((14,), 23)}, ValueError, r"outside \[0, 23\)"),
        ({"labels": torch.zeros(1, 14, dtype=torch.int64)}, ValueError, r"labels must be \(T,\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    hidden, weight, labels, cu_seqlens = packed_problem([6, 8])
    arguments = {"cu_seqlens": cu_seqlens, "labels": labels, "is_chosen": torch.tensor([True, False]), **change}
    with pytest.raises(error, match=message):
        fused_redi_loss(hidden, weight, **arguments)


def test_the_library_needs_neither_transformers_nor_triton():
    code = (
        "import sys\n"
        "for name in ('transformers', 'triton', 'datasets', 'accelerate', 'flash_attn'): sys.modules[name] = None\n"
        "import redi_kernels, redi_kernels.reference, torch\n"
        "h, w = torch.randn(4, 3), torch.randn(5, 3)\n"
        "print(redi_kernels.fused_sft_loss(h, w, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4])).loss.item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0
