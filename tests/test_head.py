"""The one-pass head against float64: values, gradients, the two guarantees, precision, memory and edge cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.inputs import head_inputs
from redi_kernels import fused_token_logps, fused_weighted_nll, reference
from redi_kernels.active_vocabulary import approximate_gradient, choose_columns
from redi_kernels.linear_nll import head_options, weighted_nll

EPS64 = torch.finfo(torch.float64).eps


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def redi_like_weights(num_tokens: int, length: int = 64, alpha: float = 0.8) -> torch.Tensor:
    """1/|y| on every other trace of `length` tokens, -alpha/|y| on those between."""
    chosen = torch.arange(num_tokens) // length % 2 == 0
    return torch.where(chosen, 1.0, -alpha).double() / length


def gradients(hidden, weight, labels, token_weights, bias=None, **options):
    """loss, logps and the gradients of hidden, weight and bias."""
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    bias = inputs[2] if bias is not None else None
    loss, logps = fused_weighted_nll(inputs[0], inputs[1], labels, token_weights, bias=bias, **options)
    return loss.detach(), logps, torch.autograd.grad(loss, inputs)


def reference_gradients(hidden, weight, labels, token_weights, bias=None, logit_scale=1.0, logit_softcap=None):
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    z = reference.logits(inputs[0], inputs[1], inputs[2] if bias is not None else None, logit_scale, logit_softcap)
    logps = reference.token_logps(z, labels)
    loss = -(token_weights.double() * logps).sum()
    return loss.detach(), logps.detach(), torch.autograd.grad(loss, inputs)


# --- exact mode ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    hidden_size=st.integers(1, 17),
    num_columns=st.integers(1, 70),
    with_bias=st.booleans(),
    logit_scale=st.sampled_from([1.0, 0.3]),
    logit_softcap=st.sampled_from([None, 4.0]),
    workspace=st.sampled_from([2**16, 2**18]),
    seed=st.integers(0, 10**6),
)
def test_exact_mode_is_the_reference_in_float64(
    num_tokens, hidden_size, num_columns, with_bias, logit_scale, logit_softcap, workspace, seed
):
    torch.manual_seed(seed)
    hidden = 2 * torch.randn(num_tokens, hidden_size, dtype=torch.float64)
    weight = torch.randn(num_columns, hidden_size, dtype=torch.float64)
    bias = torch.randn(num_columns, dtype=torch.float64) if with_bias else None
    labels = torch.randint(0, num_columns, (num_tokens,))
    labels[torch.rand(num_tokens) < 0.3] = -100
    token_weights = torch.randn(num_tokens, dtype=torch.float64)
    token_weights[torch.rand(num_tokens) < 0.2] = 0
    options = {"logit_scale": logit_scale, "logit_softcap": logit_softcap}

    loss, logps, grads = gradients(
        hidden, weight, labels, token_weights, bias, grad_tolerance=0, workspace_bytes=workspace, **options
    )
    expected_loss, expected_logps, expected = reference_gradients(
        hidden, weight, labels, token_weights, bias, **options
    )
    # A few hundred roundings of numbers of the logits' size, at most about 40.
    torch.testing.assert_close(logps, expected_logps, rtol=0, atol=1e4 * EPS64)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e5 * EPS64)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e5 * EPS64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_mode_is_as_accurate_as_the_dtype_allows(dtype):
    hidden, weight, labels = head_inputs(500, 48, 3001, entropy=0.3, roughness=1.0)
    hidden, weight, token_weights = hidden.to(dtype), weight.to(dtype), redi_like_weights(500)
    loss, logps, (dx, dw) = gradients(
        hidden, weight, labels, token_weights, grad_tolerance=0, workspace_bytes=3 * 2**20
    )
    expected_loss, expected_logps, (expected_dx, expected_dw) = reference_gradients(
        hidden, weight, labels, token_weights
    )
    # Products are float32 whatever the dtype: logits of size 30 carry a few times 30 * 2^-24; the loss is a sum of 500.
    assert float((logps - expected_logps).abs().max()) < 3e-5
    assert abs(float(loss - expected_loss)) < 3e-5
    # Gradients: float32 rounding of the softmax, then one rounding to the dtype of hidden or weight, at most eps / 2.
    tolerance = 2e-5 + torch.finfo(dtype).eps / 2
    assert dx.dtype == dw.dtype == dtype
    assert relative_error(dx, expected_dx) < tolerance
    assert relative_error(dw, expected_dw) < tolerance


def test_a_certain_token_keeps_an_accurate_gradient():
    """1 - p_y below 6e-8 is lost when p_y - 1 is formed in float32; here the target's entry is a sum."""
    torch.manual_seed(0)
    weight = torch.randn(50, 8)
    hidden = torch.nn.functional.normalize(weight[7:8]) * 8  # 1 - p_y is about 1e-9
    labels, token_weights = torch.tensor([7]), torch.ones(1)
    _, logps, (dx, _) = gradients(hidden, weight, labels, token_weights, grad_tolerance=0)
    _, expected_logps, (expected_dx, _) = reference_gradients(hidden, weight, labels, token_weights)
    assert -1e-8 < float(expected_logps) < 0
    # exp(z - max) carries |z - max| * 2^-24 relative error with |z - max| < 100; logits themselves as much again.
    assert abs(float(logps / expected_logps) - 1) < 1e-4
    assert relative_error(dx, expected_dx) < 1e-4


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen):
    torch.manual_seed(0)
    tensors = {
        "hidden": torch.randn(20, 8, dtype=torch.float64),
        "weight": torch.randn(30, 8, dtype=torch.float64),
        "bias": torch.randn(30, dtype=torch.float64),
    }
    labels, token_weights = torch.randint(0, 30, (20,)), torch.randn(20)
    _, _, everything = gradients(tensors["hidden"], tensors["weight"], labels, token_weights, tensors["bias"])
    inputs = {name: x.clone().requires_grad_(name != frozen) for name, x in tensors.items()}
    fused_weighted_nll(inputs["hidden"], inputs["weight"], labels, token_weights, bias=inputs["bias"])[0].backward()
    for name, expected in zip(tensors, everything, strict=True):
        if name == frozen:
            assert inputs[name].grad is None
        else:
            torch.testing.assert_close(inputs[name].grad, expected, rtol=0, atol=0)


class ProductCounter(TorchDispatchMode):
    """Counts the multiplications of every matrix product."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_unlabelled_tokens_cost_nothing():
    """Matrix products see labelled rows only, and products for a gradient only those with a weight."""
    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    labels = torch.randint(0, 64, (100,))
    labels[10:] = -100
    token_weights = torch.ones(100)
    token_weights[5:] = 0

    with ProductCounter() as counter:
        fused_weighted_nll(hidden, weight, labels, token_weights)[0].backward()
    assert counter.multiplications == (10 + 5 + 5) * 64 * 8  # logits of 10 tokens; dx and dW of 5


def test_no_labelled_token_at_all():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss, logps = fused_weighted_nll(hidden, weight, torch.full((5,), -100), torch.ones(5))
    loss.backward()
    assert loss == 0
    assert (logps == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_strided_inputs():
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 30, dtype=torch.float64).T, torch.randn(40, 16, dtype=torch.float64)[:, ::2]
    labels, token_weights = torch.randint(0, 40, (30,)), torch.randn(30)
    _, _, got = gradients(hidden, weight, labels, token_weights)
    strided_hidden, strided_weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    assert not strided_hidden.is_contiguous()
    assert not strided_weight.is_contiguous()
    fused_weighted_nll(strided_hidden, strided_weight, labels, token_weights)[0].backward()
    _, _, expected = reference_gradients(hidden, weight, labels, token_weights)
    for grads in (got, (strided_hidden.grad, strided_weight.grad)):
        for grad, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, want, rtol=0, atol=1e4 * EPS64)


# --- autograd ------------------------------------------------------------------------------------------------------


def small_problem(dtype=torch.float64):
    torch.manual_seed(1)
    hidden = torch.randn(12, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(25, 6, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, 25, (12,)), torch.randn(12)


@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_upstream_gradient_and_second_backward(upstream):
    hidden, weight, labels, token_weights = small_problem()
    _, _, (dx, dw) = gradients(hidden, weight, labels, token_weights)
    loss, _ = fused_weighted_nll(hidden, weight, labels, token_weights)
    (upstream * loss).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, upstream * dx, rtol=1e-12, atol=0)
    (upstream * loss).backward()
    torch.testing.assert_close(hidden.grad, 2 * upstream * dx, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(weight.grad, 2 * upstream * dw, rtol=1e-12, atol=1e-15)


def test_the_weight_gradient_is_the_accumulator_itself():
    """A copy of dW would be the largest tensor of the step: autograd must take the buffer over."""
    hidden, weight, labels, token_weights = small_problem(torch.float32)
    loss, _ = fused_weighted_nll(hidden, weight, labels, token_weights)
    buffer = loss.grad_fn.gradients.dw.data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == buffer


def test_create_graph_raises():
    hidden, weight, labels, token_weights = small_problem()
    loss, _ = fused_weighted_nll(hidden, weight, labels, token_weights)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(fused_token_logps(hidden, weight, labels).sum(), hidden, create_graph=True)


def test_no_grad_computes_no_gradient():
    hidden, weight, labels, token_weights = small_problem()
    with torch.no_grad(), ProductCounter() as counter:
        loss, _ = fused_weighted_nll(hidden, weight, labels, token_weights)
    assert not loss.requires_grad
    assert counter.multiplications == 12 * 25 * 6  # the logits
    torch.testing.assert_close(loss, reference_gradients(hidden, weight, labels, token_weights)[0])


def test_logps_are_detached_and_tied_weights_add_up():
    hidden, weight, labels, token_weights = small_problem()
    tied = weight[:12] * 1.0 + hidden.detach()  # a graph in which weight is used twice
    loss, logps = fused_weighted_nll(tied, weight, labels, token_weights)
    assert not logps.requires_grad
    loss.backward()
    expected_weight = weight.detach().clone().requires_grad_()
    z = reference.logits(expected_weight[:12] * 1.0 + hidden.detach(), expected_weight)
    (-(token_weights * reference.token_logps(z, labels)).sum()).backward()
    torch.testing.assert_close(weight.grad, expected_weight.grad, rtol=1e-10, atol=1e-13)


def test_token_logps_under_any_upstream_gradient():
    hidden, weight, labels, _ = small_problem()
    labels[3] = -100
    bias = torch.randn(25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused_token_logps(h, w, labels, bias=b, logit_scale=0.7, logit_softcap=3.0).square(),
        (hidden, weight, bias),
    )
    logps = fused_token_logps(hidden, weight, labels)
    torch.testing.assert_close(logps, reference.token_logps(reference.logits(hidden, weight), labels))


def test_autocast_decides_the_compute_dtype():
    hidden, weight, labels = head_inputs(256, 32, 2000, entropy=0.3)
    token_weights = redi_like_weights(256)
    exact = gradients(hidden, weight, labels, token_weights, grad_tolerance=0)[2][0]
    approximate = gradients(hidden, weight, labels, token_weights, grad_tolerance=2**-10)[2][0]
    assert not torch.equal(exact, approximate)
    assert torch.equal(gradients(hidden, weight, labels, token_weights)[2][0], exact)  # "auto" in float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = gradients(hidden, weight, labels, token_weights)[2][0]
        mixed = gradients(hidden.bfloat16(), weight, labels, token_weights)[2][1]
    assert torch.equal(autocast, approximate)
    assert autocast.dtype == mixed.dtype == torch.float32


# --- float16 and extremes ------------------------------------------------------------------------------------------


def test_float16_with_tiny_weights_and_a_loss_scale():
    """w_t = 1e-6 times a probability underflows in float16, whose least number is 6e-8: a loss scale must help."""
    hidden, weight, labels = head_inputs(300, 32, 1500, entropy=1.0)
    hidden, weight = hidden.half().requires_grad_(), weight.half().requires_grad_()
    token_weights = redi_like_weights(300) * 1e-4
    loss, _ = fused_weighted_nll(hidden, weight, labels, token_weights, grad_tolerance=0)
    (65536.0 * loss).backward()
    _, _, (expected_dx, expected_dw) = reference_gradients(hidden, weight, labels, token_weights * 65536)
    # One or two roundings to 11 bits: eps / 2 = 4.9e-4 each.
    assert relative_error(hidden.grad, expected_dx) < 1e-3
    assert relative_error(weight.grad, expected_dw) < 1e-3


def test_huge_and_minus_infinite_logits():
    hidden = torch.tensor([[300.0, 0.0], [-300.0, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    bias = torch.tensor([0.0, 0.0, -torch.inf])  # a masked column
    labels, token_weights = torch.tensor([1, 1]), torch.ones(2)
    for tolerance in (0, 2**-10):
        _, logps, grads = gradients(hidden, weight, labels, token_weights, bias, grad_tolerance=tolerance)
        assert logps.tolist() == [-600.0, 0.0]
        assert grads[0].tolist() == [[2.0, 0.0], [0.0, 0.0]]
        assert all(torch.isfinite(grad).all() for grad in grads)


def test_unchecked_bad_label_makes_loss_and_gradient_nan():
    hidden, weight, labels, token_weights = small_problem()
    labels[4] = 25
    for tolerance in (0, 2**-10):
        loss, logps, (dx, dw) = gradients(
            hidden, weight, labels, token_weights, validate=False, grad_tolerance=tolerance
        )
        assert loss.isnan()
        assert logps.isnan().nonzero().tolist() == [[4]]
        assert dx[4].isnan().all()
        assert dw.isnan().any()


# --- active columns ------------------------------------------------------------------------------------------------

SHAPES = [  # tail exponent, roughness, common direction, one uniform row
    (1.5, 0.0, 0.0, False),
    (1.0, 1.0, 0.0, False),
    (1.5, 2.0, 50.0, False),
    (1.5, 0.0, 50.0, True),
]
CASES = list(itertools.product([0.03, 0.1, 0.3, 1.0, 4.0], ["sampled", "argmax"], SHAPES))


def softmax_case(entropy, labels, shape, num_tokens=1024, hidden_size=64, num_columns=4096):
    tail_exponent, roughness, common, uniform_row = shape
    hidden, weight, labels = head_inputs(
        num_tokens,
        hidden_size,
        num_columns,
        entropy=entropy,
        tail_exponent=tail_exponent,
        roughness=roughness,
        common=common,
        labels=labels,
    )
    if uniform_row:
        hidden[7] = 0
    return hidden, weight, labels


@pytest.mark.parametrize(("entropy", "labels", "shape"), CASES)
def test_both_guarantees_in_float64(entropy, labels, shape):
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in softmax_case(entropy, labels, shape))
    token_weights = redi_like_weights(len(labels))
    z = hidden @ weight.T
    grad = (z.softmax(1) - torch.nn.functional.one_hot(labels, z.shape[1])) * token_weights.unsqueeze(1)
    for delta in (2**-6, 2**-10):
        approximate = approximate_gradient(grad, labels, token_weights, delta)
        # Rounding: energies near the budget are sums of 10^3 terms, rows sums of 4096 terms of size |w_t|.
        assert relative_error(approximate, grad) <= delta * (1 + 1e-9)
        row_sums = approximate.sum(1) - grad.sum(1)
        assert float((row_sums / token_weights).abs().max()) < 4096 * EPS64


@pytest.mark.parametrize(("entropy", "labels", "shape"), CASES[:: len(SHAPES) + 1])
def test_the_head_is_the_naive_approximation(entropy, labels, shape):
    """One chunk of the fused head against G' W and G'^T x of the readable version, in float64, with bias and scale."""
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in softmax_case(entropy, labels, shape))
    token_weights = redi_like_weights(len(labels))
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
    z = reference.logits(hidden, weight, bias, 0.9)
    grad = (z.softmax(1) - torch.nn.functional.one_hot(labels, z.shape[1])) * token_weights.unsqueeze(1)
    approximate = approximate_gradient(grad, labels, token_weights, 2**-8)
    _, _, (dx, dw, db) = gradients(hidden, weight, labels, token_weights, bias, logit_scale=0.9, grad_tolerance=2**-8)
    assert relative_error(dx, 0.9 * approximate @ weight) < 1e-10
    assert relative_error(dw, 0.9 * approximate.T @ hidden) < 1e-10
    assert relative_error(db, approximate.sum(0)) < 1e-10


@pytest.mark.parametrize(("entropy", "labels", "shape"), CASES)
def test_gradient_errors_at_the_default_tolerance(entropy, labels, shape):
    """At 2^-10 dx and dW err by at most 1e-2; with bfloat16 inputs by at most 1.5 times the eager path + 2.5e-3."""
    hidden, weight, labels = softmax_case(entropy, labels, shape)
    token_weights = redi_like_weights(len(labels))
    _, _, exact = reference_gradients(hidden, weight, labels, token_weights)
    _, _, got = gradients(hidden, weight, labels, token_weights, grad_tolerance=2**-10, workspace_bytes=16 * 2**20)
    assert max(relative_error(g, e) for g, e in zip(got, exact, strict=True)) < 1e-2

    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    _, _, exact = reference_gradients(hidden, weight, labels, token_weights)
    _, _, got = gradients(hidden, weight, labels, token_weights)
    nll = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    eager = torch.autograd.grad((nll * token_weights).sum(), (hidden, weight))
    for ours, theirs, want in zip(got, eager, exact, strict=True):
        assert relative_error(ours, want) < 1.5 * relative_error(theirs, want) + 2.5e-3


def test_tolerance_with_a_softcap():
    """The guarantee is about the gradient before the cap; the loss is exact, dx and dW err like without."""
    hidden, weight, labels = softmax_case(0.3, "sampled", SHAPES[1])
    token_weights = redi_like_weights(len(labels))
    options = {"logit_softcap": 30.0}
    expected_loss, _, exact = reference_gradients(hidden, weight, labels, token_weights, **options)
    loss, _, got = gradients(hidden, weight, labels, token_weights, grad_tolerance=2**-10, **options)
    assert abs(float(loss - expected_loss)) < 1e-4
    for ours, want in zip(got, exact, strict=True):
        assert 0 < relative_error(ours, want) < 1e-2


def test_tolerance_zero_is_the_dense_head_bit_for_bit():
    hidden, weight, labels = softmax_case(4.0, "sampled", SHAPES[1])
    token_weights = redi_like_weights(len(labels))
    exact = gradients(hidden, weight, labels, token_weights, grad_tolerance=0)
    # Rough tails at 4 nats keep more than half of the columns at 2^-10: the chunk takes the dense products.
    flat = gradients(hidden, weight, labels, token_weights, grad_tolerance=2**-10)
    assert all(torch.equal(a, b) for a, b in zip(exact[2], flat[2], strict=True))
    peaked = softmax_case(0.3, "sampled", SHAPES[0])
    for case, share in (((hidden, weight, labels), 1.0), (peaked, None)):
        options = head_options(case[0], 1.0, None, -100, 2**-10, 2**28, "auto")
        stats = weighted_nll(case[0].requires_grad_(), case[1], None, case[2], token_weights, options, None)[1]
        assert stats.active_share == share if share else 0 < stats.active_share < 0.2


def test_columns_are_chosen_by_energy_with_ties_by_index():
    energies = torch.tensor([1.0, 1.0, 8.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0])
    # Budget 0.5^2 * 14.5 = 3.625: the 0 and the 0.5 that are no targets, and the first three such 1.0, are dropped.
    chosen = choose_columns(energies, torch.tensor([5, 8]), 0.5)
    assert chosen.tolist() == [2, 5, 6, 7, 8]
    assert choose_columns(energies * torch.nan, torch.tensor([5]), 0.5) is None


# --- workspace and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0, 2**-10])
def test_chunking_under_the_cap_changes_nothing_beyond_rounding(tolerance):
    hidden, weight, labels = softmax_case(0.3, "sampled", SHAPES[1])
    hidden, weight = hidden.double(), weight.double()
    token_weights = redi_like_weights(len(labels))
    _, _, exact = reference_gradients(hidden, weight, labels, token_weights)
    for workspace_bytes in (2**20, 2**22, 2**28):
        options = head_options(hidden, 1.0, None, -100, tolerance, workspace_bytes, "auto")
        stats = weighted_nll(hidden, weight, None, labels, token_weights, options, None)[1]
        assert stats.workspace_bytes <= workspace_bytes
        _, _, got = gradients(
            hidden, weight, labels, token_weights, grad_tolerance=tolerance, workspace_bytes=workspace_bytes
        )
        bound = 1e-2 if tolerance else 1e-12
        assert max(relative_error(g, e) for g, e in zip(got, exact, strict=True)) < bound


def test_workspace_too_small_says_what_it_needs():
    hidden, weight, labels, token_weights = small_problem()
    with pytest.raises(ValueError, match="at least 1 MiB"):
        fused_weighted_nll(hidden, weight, labels, token_weights, workspace_bytes=100)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.full((12,), 25)}, ValueError, r"labels\[0\] = 25 is outside \[0, 25\)"),
        ({"labels": torch.full((12,), -1)}, ValueError, r"labels\[0\] = -1 is outside"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, ValueError, r"labels must be \(T,\) = \(12,\)"),
        ({"labels": torch.zeros(12, dtype=torch.int32)}, TypeError, "int64"),
        ({"weight": torch.randn(25, 7, dtype=torch.float64)}, ValueError, "weight"),
        ({"weight": torch.randn(25, 6)}, TypeError, "one dtype outside autocast"),
        ({"token_weights": torch.ones(11)}, ValueError, "token_weights"),
        ({"token_weights": torch.ones(12, requires_grad=True)}, TypeError, "fused_token_logps"),
        ({"bias": torch.ones(24, dtype=torch.float64)}, ValueError, r"bias must be \(V,\)"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale"),
        ({"grad_tolerance": 1.0}, ValueError, "grad_tolerance"),
        ({"grad_tolerance": "exact"}, ValueError, "grad_tolerance"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"hidden": torch.randn(2, 12, 6, dtype=torch.float64)}, ValueError, r"hidden must be \(T, H\) or \(1, T, H\)"),
        ({"hidden": torch.zeros(12, 6, dtype=torch.int64)}, TypeError, "floating point"),
        ({"weight": torch.randn(25, 6, dtype=torch.float64, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_input_is_named(change, error, message):
    hidden, weight, labels, token_weights = small_problem()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "token_weights": token_weights, **change}
    with pytest.raises(error, match=message):
        fused_weighted_nll(**arguments)
