"""Proposition 1, measured: the mean squared norm of the score, by autograd on sampled words, beside the formula.

    python -m docs.lab.score_norm

A policy over 8 words gives one word the probability p and divides the rest equally. The first column of numbers is p.
"""

import torch

from empg import expected_score_norm, token_logp_and_entropy

WORDS, SAMPLES = 8, 20_000


def measure(p: float) -> tuple[float, float, float]:
    """Entropy in nats, the mean of ||d log pi(a) / d z||^2 over SAMPLES sampled words a, and what the formula says."""
    logits = torch.tensor([p] + [(1 - p) / (WORDS - 1)] * (WORDS - 1)).log()  # (V,)
    words = torch.distributions.Categorical(logits=logits).sample((SAMPLES, 1))  # (B, 1), one token each
    z = logits.expand(SAMPLES, 1, WORDS).clone().requires_grad_()  # (B, 1, V)
    logp, entropy = token_logp_and_entropy(z, words)
    (score,) = torch.autograd.grad(logp.sum(), z)  # (B, 1, V)
    return float(entropy[0, 0]), float(score.square().sum(-1).mean()), float(expected_score_norm(logits))


def main() -> None:
    torch.manual_seed(0)
    print("    p   entropy   measured   formula")
    for p in (1 / 8, 0.5, 0.7437, 0.9, 0.99):
        entropy, measured, formula = measure(p)
        print(f"{p:.3f}   {entropy:7.3f}   {measured:8.3f}   {formula:7.3f}")


if __name__ == "__main__":
    main()
