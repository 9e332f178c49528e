"""Which columns of a chunk's logit gradient are kept, and what replaces the rest.

A chunk of C tokens has the gradient G (C, V) = dL/dlogits, and its two products dx = G W and dW = G^T x cost twice
what the logits do. On reasoning traces the softmax is peaked, so nearly all of G's energy sits in few columns. Keep
those, the active set A, exactly, and replace the others, the tail, by one rank-one matrix:

    e_v = sum_t G_tv^2                                     energy of a column
    A   = the chunk's targets, and the columns of largest e_v, as many as it takes for
          sum_{v not in A} e_v <= delta^2 ||G||_F^2                                                            (1)
    a_t = sum_{v not in A} G_tv                            what the tail of row t sums to
    q_v = sum_t a_t G_tv / sum_t a_t^2    (v not in A)     tail profile, over the rows that share it
    G'  = G on A and on the few rows of largest |a_t / w_t|,  a q^T elsewhere                                  (2)

The bound (1) is one for the whole chunk, and a token much less certain than its neighbours may have most of its
probability in the tail, with another profile. Up to MAX_OWN_TAILS such tokens a chunk keep their own tail, exactly.

G' has two guarantees, whatever the model and whatever the inputs:

* ||G - G'||_F <= delta ||G||_F. The columns of a q^T are the least-squares fits of the columns of G_tail by multiples
  of a, so a q^T is the orthogonal projection of G_tail onto the matrices a r^T, and what a projection leaves over is no
  longer than what was projected: ||G_tail - a q^T||_F <= ||G_tail||_F <= delta ||G||_F by (1).
* Every row of G' sums to what that row of G sums to, which for a softmax is zero: sum_{v not in A} q_v =
  sum_t a_t (sum_{v not in A} G_tv) / sum_t a_t^2 = 1, so row t of the tail sums to a_t before and after. A direction
  shared by all rows of W therefore cancels in dx = G' W as it does in G W; a plain cut-off would leak a_t times that
  direction into every dx_t.

Both hold in exact arithmetic and are tested in float64; in float32 they hold up to rounding. With a logit softcap, G is
the gradient at the logits before the cap: its rows do not sum to zero, but the proof only uses that the sums agree.
Columns whose energy underflows (probabilities below 1e-19 in float32) count as tail.

Cost: 2THV + 4TH|A| flops, and 4HV for each rank-one tail, against 6THV dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Copying columns out of G and rows out of W costs more per column than a dense product does: above this share of the
# vocabulary the dense products are taken. A round number, not tuned.
DENSE_SHARE = 0.5
OWN_TAIL_MASS = 2.0**-4  # tail probability of a token above which it may keep a tail of its own
MAX_OWN_TAILS = 7  # a chunk: eight rank-one terms on 512 tokens are 3% of the logits' flops


def choose_columns(energies: Tensor, targets: Tensor, delta: float) -> Tensor | None:
    """The active set A of a chunk by (1), or None where the dense products are cheaper.

    energies (V,) e_v; targets (C,) int64; delta > 0. Returns ascending column indices (|A|,) int64; ties are broken by
    index. Non-finite energies give None: the dense products carry a NaN on into the gradient.
    """
    budget = delta**2 * energies.sum(dtype=torch.float64)
    candidates = energies.index_fill(0, targets, torch.inf)
    ascending, order = candidates.sort(stable=True)
    num_dropped = int((ascending.cumsum(0, dtype=torch.float64) <= budget).sum())
    num_columns = energies.numel()
    if num_columns - num_dropped > DENSE_SHARE * num_columns:
        return None
    return order[num_dropped:].sort().values


def choose_own_tails(tail_mass: Tensor, most: int = MAX_OWN_TAILS) -> Tensor:
    """Indices of the up to `most` tokens of largest |tail_mass| (C,) = |a_t / w_t| over OWN_TAIL_MASS."""
    mass, rows = tail_mass.abs().topk(min(most, len(tail_mass)))
    return rows[mass > OWN_TAIL_MASS]


def approximate_gradient(grad: Tensor, targets: Tensor, token_weights: Tensor, delta: float) -> Tensor:
    """G' of (2) from a whole G (C, V): the readable version that the chunked head is tested against."""
    active = choose_columns(grad.square().sum(0), targets, delta) if delta else None
    if active is None:
        return grad
    tail = grad.index_fill(1, active, 0)
    a = tail.sum(1)
    own = choose_own_tails(a / token_weights)
    tail[own], a[own] = 0, 0
    q = a @ tail / a.square().sum().clamp(min=torch.finfo(grad.dtype).tiny)
    return grad - tail + torch.outer(a, q)
