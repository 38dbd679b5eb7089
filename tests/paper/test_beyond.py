"""Credit beyond the paper: entropy by rank, and the bonus kept to groups whose rewards differ."""

import doctest
from types import SimpleNamespace

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from config import TrainConfig
from empg import group_advantages, modulation
from paper import beyond

QUICK = settings(derandomize=True, max_examples=40, deadline=None, database=None)
ENTROPIES = st.lists(st.lists(st.none() | st.integers(0, 30).map(lambda n: n / 10), max_size=4), min_size=1, max_size=4)
CONFIG = TrainConfig(group_size=2, k=1.5, k_future=0.5, zeta=0.3)
VALID = tensor([[True, True, True], [True, True, False], [True, True, True], [True, False, False]])
ENTROPY = tensor([[0.1, 9.0, 0.3], [0.3, 0.2, 0.0], [0.7, 0.4, 0.1], [0.5, 0.0, 0.0]])  # one step is far off
BATCH = SimpleNamespace(reward=tensor([1.0, 0.0, 1.0, 1.0]))  # the second group's rewards are equal
ADVANTAGE = group_advantages(BATCH.reward, 2)


def centred(values: Tensor) -> Tensor:
    return torch.where(VALID, values - values[VALID].mean(), 0)


@QUICK
@given(rows=ENTROPIES)
@example(rows=[[2.0]])
@example(rows=[[None]])
def test_rank_entropy_is_the_share_of_the_other_steps_with_less(rows):
    width, values = max(map(len, rows)), [h for row in rows for h in row if h is not None]

    def share(h: float | None) -> float:
        others = sum((x < h) + (x == h) / 2 for x in values) - 0.5 if h is not None else 0  # itself is no other
        return others / max(1, len(values) - 1)

    padded = [row + [None] * (width - len(row)) for row in rows]
    entropy = tensor([[float("nan") if h is None else h for h in row] for row in padded], dtype=torch.float64)
    expected = tensor([[share(h) for h in row] for row in padded], dtype=torch.float64)
    torch.testing.assert_close(beyond.rank_entropy(entropy, ~entropy.isnan()), expected)


def test_credit_by_rank_is_empg_with_another_h_norm():
    made = beyond.credit_by_rank(CONFIG, BATCH, ADVANTAGE, ENTROPY, VALID)
    # Sorted: 0.1 twice, 0.2, 0.3 twice, 0.4, 0.5, 0.7, 9.0. The share of the eight others with less, ties half.
    rank = tensor([[0.5, 8.0, 3.5], [3.5, 2.0, 0.0], [7.0, 5.0, 0.5], [6.0, 0.0, 0.0]]) / 8
    torch.testing.assert_close(made.norm_entropy, rank)
    assert (made.base is ADVANTAGE, made.entropy is ENTROPY, made.valid is VALID) == (True, True, True)
    confidence = torch.exp(-1.5 * rank)
    torch.testing.assert_close(made.g, torch.where(VALID, confidence / confidence[VALID].mean(), 0))
    clear = torch.exp(-0.5 * rank)
    f = torch.zeros(4, 3)
    f[0, 0], f[0, 1], f[1, 0], f[2, 0], f[2, 1] = clear[0, 1], clear[0, 2], clear[1, 1], clear[2, 1], clear[2, 2]
    torch.testing.assert_close(made.f, f)
    torch.testing.assert_close(made.advantage, centred(ADVANTAGE[:, None] * made.g + 0.3 * f))


def test_the_bonus_is_kept_to_groups_whose_rewards_differ():
    paper = modulation(ADVANTAGE, ENTROPY, VALID, k=1.5, k_future=0.5, zeta=0.3)
    made = beyond.credit_where_rewards_differ(CONFIG, BATCH, ADVANTAGE, ENTROPY, VALID)
    assert torch.equal(made.f[:2], paper.f[:2])
    assert paper.f[2:].any()
    assert not made.f[2:].any()
    assert torch.equal(made.g, paper.g)
    torch.testing.assert_close(made.advantage, centred(ADVANTAGE[:, None] * paper.g + 0.3 * made.f))
    left = made.advantage[2:][VALID[2:]]
    assert torch.equal(left, left[:1].expand_as(left))  # all that is left there is the centring


@QUICK
@given(groups=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3), min_size=1, max_size=4))
def test_rewards_differ_where_a_group_has_more_than_one(groups):
    expected = [len(set(group)) > 1 for group in groups for _ in group]
    assert beyond.rewards_differ(tensor([r for group in groups for r in group]), 3).tolist() == expected


def test_examples_in_docstrings_hold():
    result = doctest.testmod(beyond)
    assert result.attempted > 0
    assert result.failed == 0
