"""One seeded generator of head inputs: hidden states, a head weight and labels whose softmax has a stated shape.

What an active-vocabulary head keeps depends on the softmax, and entropy alone does not determine it, so every figure of
speed or error names these parameters and the share of columns that was kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def head_inputs(
    num_tokens: int,
    hidden_size: int,
    num_columns: int,
    *,
    entropy: float = 0.25,
    tail_exponent: float = 1.5,
    roughness: float = 0.0,
    uncertain_share: float = 0.0,
    common: float = 0.0,
    labels: str = "sampled",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (T, H) float32, weight (V, H) float32, labels (T,) int64.

    Row v of W is a random unit vector and log(v + 1)^-tail_exponent in the last column, so ids are ordered by frequency
    as in a BPE vocabulary and the tail of every softmax falls like rank^-tail_exponent. A hidden state points at one
    token, itself drawn by rank^-1, with the one strength that makes the mean entropy `entropy` nats.

    Args:
        roughness: standard deviation of independent noise on every logit: tails then differ from token to token.
        uncertain_share: share of tokens that point half as strongly.
        common: length of a vector added to every row of W. It shifts all logits of a token alike, so no probability
            changes, but what a gradient leaks along it, dx shows.
        labels: "sampled" from the softmax, or its "argmax".
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, num_columns + 1, dtype=torch.float32)
    directions = torch.nn.functional.normalize(torch.randn(num_columns, hidden_size - 1, generator=generator))
    weight = torch.cat([directions, -tail_exponent * rank.log().unsqueeze(1)], 1)

    centre = torch.multinomial(1 / rank, num_tokens, replacement=True, generator=generator)
    noise = roughness * torch.randn(num_tokens, hidden_size - 1, generator=generator)
    uncertain = torch.rand(num_tokens, 1, generator=generator) < uncertain_share

    def hidden_at(strength: float) -> Tensor:
        pull = torch.where(uncertain, strength / 2, strength) * directions[centre]
        return torch.cat([pull + noise, torch.ones(num_tokens, 1)], 1)

    def mean_entropy(hidden: Tensor) -> float:
        return float(torch.special.entr((hidden @ weight.T).softmax(1)).sum(1).mean())

    weak, strong = 0.0, 200.0
    for _ in range(14):  # bisection to 200 / 2^14
        strength = (weak + strong) / 2
        weak, strong = (strength, strong) if mean_entropy(hidden_at(strength)[:256]) > entropy else (weak, strength)
    hidden = hidden_at(strong)

    targets = []
    for rows in hidden.split(256):
        p = (rows @ weight.T).softmax(1)
        targets.append(p.argmax(1) if labels == "argmax" else torch.multinomial(p, 1, generator=generator).squeeze(1))
    weight += common / hidden_size**0.5
    return hidden, weight, torch.cat(targets)
