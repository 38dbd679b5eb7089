"""Every formula of empg.py, in its order: arithmetic by hand, a loop oracle, invariants, finite differences.

The oracles loop over Python floats in ragged lists, without a tensor, so they cannot share a bug in masking or
broadcasting. Where nothing was sampled the tensors here hold nan or inf: whatever leaks turns a test red.
"""

import doctest
import math
import statistics

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

import empg

F64 = torch.float64
INF, NAN, LN2 = math.inf, math.nan, math.log(2)
QUICK = settings(derandomize=True, max_examples=40, deadline=None, database=None)

ENTROPY = st.integers(0, 30).map(lambda n: n / 10)
EPISODES = st.lists(st.lists(st.none() | ENTROPY, max_size=4), min_size=1, max_size=4)  # None: a step without tokens
ADVANTAGE = tensor([1.5, -2.0, 0.5, -1.0], dtype=F64)  # of up to four episodes
SETTINGS = st.sampled_from([(1.0, 1.0, 0.1), (0.5, 3.0, 0.5), (3.0, 0.0, 0.1), (0.0, 1.0, 0.0)])  # k, k_future, zeta
STEP_TOKENS = st.lists(st.lists(st.tuples(st.integers(-1, 3), ENTROPY), max_size=6), min_size=1, max_size=3)
# (log-ratio, advantage); no log-ratio lies on a bound of the clip widths in use. None: not sampled
TOKEN = st.tuples(st.sampled_from([-1.0, -0.3, -0.1, 0.0, 0.1, 0.22, 1.0]), st.sampled_from([-2.0, -0.5, 0.0, 1.0]))
TOKENS = st.lists(st.lists(st.none() | TOKEN, max_size=4), min_size=1, max_size=4)
AGGREGATION = st.sampled_from(["sequence", "token"])
WIDTHS = st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.5, 0.1)])  # clip_low, clip_high
LOGIT = st.floats(-30, 30)
LOGITS = st.lists(st.tuples(LOGIT, LOGIT | st.just(-INF), LOGIT | st.just(-INF)).map(list), min_size=1, max_size=4)

# ----------------------------------------------------------------------------------------------------------- helpers


def close(actual: Tensor, expected, **tolerance) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **tolerance)


def pad(rows: list[list], fill: float = NAN) -> Tensor:
    """Ragged rows as one (B, length) float64 tensor; `fill` for None and behind the end."""
    length = max(map(len, rows))
    full = [row + [None] * (length - len(row)) for row in rows]
    return tensor([[fill if x is None else x for x in row] for row in full], dtype=F64)


def steps(rows: list[list]) -> tuple[Tensor, Tensor]:
    """Values (B, S) with nan off valid, and valid (B, S)."""
    values = pad(rows)
    return values, ~values.isnan()


def tokens(rows: list[list]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp (a leaf), old_logp, advantage, mask (B, L) of tokens (log_ratio, advantage), None where not sampled."""
    logp = pad([[t and t[0] - 1.5 for t in row] for row in rows], NAN).requires_grad_()
    old_logp = pad([[t and -1.5 for t in row] for row in rows], INF)
    advantage = pad([[t and t[1] for t in row] for row in rows], -INF)
    return logp, old_logp, advantage, pad([[t and 1 for t in row] for row in rows], 0).bool()


# ------------------------------------------------------------------------------------- EMPG: modulation by step entropy


@QUICK
@given(rows=STEP_TOKENS)
@example(rows=[[(-1, 0.0)], []])  # S = 0
@example(rows=[[], []])  # L = 0
def test_step_entropy_is_the_mean_over_sampled_tokens_and_spread_the_way_back(rows):
    """Tokens of the observation counted as uncertainty of the policy: here every one of them holds nan."""
    step_ids = pad([[s for s, _ in row] for row in rows], -1).long()
    token_entropy = pad([[h if s >= 0 else NAN for s, h in row] for row in rows])
    entropy, valid = empg.step_entropy(token_entropy, step_ids)
    width = max((s + 1 for row in rows for s, _ in row), default=0)
    means = [{t: statistics.fmean(h for s, h in row if s == t) for t in {s for s, _ in row} - {-1}} for row in rows]
    close(entropy, pad([[m.get(t) for t in range(width)] for m in means], 0))
    assert valid.tolist() == [[t in m for t in range(width)] for m in means]
    expected = pad([[m.get(s) for s, _ in row] for row, m in zip(rows, means, strict=True)], 0)
    close(empg.spread(entropy.where(valid, NAN), step_ids), expected)


def test_normalize_entropy_is_min_max_over_the_steps_of_the_batch():
    """Each rank took its own min and max: its surest step got H_norm 0, however unsure beside the others."""
    # (H - 1) / (5 - 1): 0, 1/4, 1/2, 1; the 99 is off valid.  H = 0 and 1e-8: 1e-8 / (1e-8 + 1e-8) = 1/2.
    valid = tensor([[True, True, False], [True, True, False]])
    entropy = tensor([[1.0, 2.0, 99.0], [3.0, 5.0, NAN]], dtype=F64)
    close(empg.normalize_entropy(entropy, valid), [[0.0, 0.25, 0.0], [0.5, 1.0, 0.0]])
    close(empg.normalize_entropy(tensor([[0.0, 1e-8]], dtype=F64), valid[:1, :2]), [[0.0, 0.5]])


def test_g_is_exp_of_minus_k_h_over_its_mean_and_f_that_of_the_next_step():
    """Each rank took its own mean: the scales of an unsure rank were 1 on average, not below."""
    # exp(-H) = 1, 1/2, mean 3/4: g = 4/3, 2/3.  k = 2: 1, 1/4, mean 5/8: g = 8/5, 2/5.
    norm_entropy, valid = steps([[0.0, None], [LN2]])
    close(empg.gradient_scale(norm_entropy, valid), [[4 / 3, 0.0], [2 / 3, 0.0]])
    close(empg.gradient_scale(norm_entropy, valid, k=2), [[1.6, 0.0], [0.4, 0.0]])
    # f of the next step: exp(-ln 2) = 1/2, exp(0) = 1. No next step (one-step episodes too), or one without tokens: 0.
    norm_entropy, valid = steps([[1.0, LN2, 0.0], [0.3, None, 0.3], [0.3]])
    close(empg.clarity_bonus(norm_entropy, valid), [[0.5, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    close(empg.clarity_bonus(norm_entropy, valid, k_future=2.0)[0], [0.25, 1.0, 0.0])


def test_modulate_is_a_g_plus_zeta_f_minus_its_mean_over_steps():
    """A variant multiplied the whole batch by each step's g in turn: every step ended up with the product."""
    # H_norm = 0, 1/2 | 1; with k = k' = 2 ln 2: exp(-k H_norm) = 1, 1/2 | 1/4, mean 7/12, g = 12/7, 6/7 | 3/7,
    # f = 1/2, 0 | 0.  A = 1 | -1, zeta = 0.2: A_mod = 12/7 + 1/10, 6/7 | -3/7, mean 5/7 + 1/30.
    entropy, valid = steps([[1.0, 2.0], [3.0]])
    advantage = tensor([1.0, -1.0], dtype=F64)
    final = empg.modulate(advantage, entropy, valid, k=2 * LN2, k_future=2 * LN2, zeta=0.2)
    close(final, [[1 + 1 / 15, 1 / 7 - 1 / 30], [-8 / 7 - 1 / 30, 0.0]])
    # Without g and f the base advantage returns, centred over steps. Two steps each: the mean is 0, so the base itself.
    # Three steps and one: the mean over steps is (3 - 1) / 4 = 1/2; over episodes it would be 0.
    for rows, final in (
        ([[1.0, 2.0], [4.0, 3.0]], [[1.0, 1.0], [-1.0, -1.0]]),
        ([[1.0, 2.0, 3.0], [4.0]], [[0.5, 0.5, 0.5], [-1.5, 0.0, 0.0]]),
    ):
        close(empg.modulate(advantage, *steps(rows), k=0.0, zeta=0.0), final)


def loop_modulation(rows: list[list], k: float, k_future: float, zeta: float) -> list[Tensor]:
    """H_norm, g, f, the modulated and the final advantage, step by step; 0 where a step has no tokens."""
    h = {(i, t): x for i, row in enumerate(rows) for t, x in enumerate(row) if x is not None}
    low, high = min(h.values(), default=0), max(h.values(), default=0)
    norm = {step: (x - low) / (high - low + 1e-8) for step, x in h.items()}
    g = {step: math.exp(-k * x) / statistics.fmean(math.exp(-k * y) for y in norm.values()) for step, x in norm.items()}
    f = {(i, t): math.exp(-k_future * norm[i, t + 1]) if (i, t + 1) in norm else 0.0 for i, t in norm}
    modulated = {(i, t): ADVANTAGE[i].item() * g[i, t] + zeta * f[i, t] for i, t in norm}
    final = {step: a - statistics.fmean(modulated.values()) for step, a in modulated.items()}
    places = [[(i, t) for t in range(len(row))] for i, row in enumerate(rows)]
    return [pad([[x.get(step) for step in row] for row in places], 0) for x in (norm, g, f, modulated, final)]


@QUICK
@given(rows=EPISODES, options=SETTINGS)
@example(rows=[[1.0], [2.0]], options=(1.0, 1.0, 0.1))  # one-step episodes: no bonus
@example(rows=[[0.7, 0.7], [0.7]], options=(1.0, 1.0, 0.1))  # all equal: H_norm = 0, g = 1, f = 1
@example(rows=[[None, None], [None]], options=(1.0, 1.0, 0.1))  # no valid step
@example(rows=[[], []], options=(1.0, 1.0, 0.1))  # S = 0
def test_h_norm_g_f_and_the_final_advantage_match_loops(rows, options):
    (entropy, valid), (k, k_future, zeta) = steps(rows), options
    norm, g, f, modulated, final = loop_modulation(rows, *options)
    close(empg.normalize_entropy(entropy, valid), norm)
    close(empg.gradient_scale(norm.where(valid, NAN), valid, k=k), g)
    close(empg.clarity_bonus(norm.where(valid, NAN), valid, k_future=k_future), f)
    close(empg.center(modulated.where(valid, NAN), valid), final)
    close(empg.modulate(ADVANTAGE[: len(rows)], entropy, valid, k=k, k_future=k_future, zeta=zeta), final)
    made = empg.modulation(ADVANTAGE[: len(rows)], entropy, valid, k=k, k_future=k_future, zeta=zeta)
    for actual, expected in zip((made.norm_entropy, made.g, made.f, made.advantage), (norm, g, f, final), strict=True):
        close(actual, expected)
    assert torch.equal(made.base, ADVANTAGE[: len(rows)])
    assert made.entropy is entropy
    assert made.valid is valid


@QUICK
@given(rows=EPISODES, a=st.floats(0.1, 10), b=st.floats(-10, 10), order=st.permutations(range(4)))
def test_invariants_of_the_modulation(rows, a, b, order):
    (entropy, valid), advantage = steps(rows), ADVANTAGE[: len(rows)]
    # H_norm is in [0, 1] and knows neither scale nor offset. eps moves it by at most eps / (max - min), and
    # max - min is 0 or at least 0.1, then 0.01 after scaling.
    norm = empg.normalize_entropy(entropy, valid)
    assert ((norm >= 0) & (norm <= 1)).all()
    close(empg.normalize_entropy(a * entropy + b, valid), norm, rtol=0, atol=1.1e-6)
    # g is positive, 1 on average and smaller where the entropy is higher; k = 0: g = 1.
    g = empg.gradient_scale(norm, valid)[valid]
    assert (g > 0).all()
    close(g.sum(), float(valid.sum()))
    assert torch.equal(norm[valid][:, None] > norm[valid], g[:, None] < g)
    assert (empg.gradient_scale(norm, valid, k=0.0) == valid).all()
    # The final advantage has mean 0 over steps, and depends neither on the order of episodes nor on padding.
    final = empg.modulate(advantage, entropy, valid)
    close(final, loop_modulation(rows, k=1.0, k_future=1.0, zeta=0.1)[-1])  # the defaults
    close(final.sum(), 0.0)
    order = [i for i in order if i < len(rows)]
    close(empg.modulate(advantage[order], entropy[order], valid[order]), final[order])
    padded = steps([row + [None] * (2 + entropy.shape[1] - len(row)) for row in rows])
    close(empg.modulate(advantage, *padded)[:, : entropy.shape[1]], final)


# -------------------------------------------------------------------------------------------------------- GRPO and DAPO


def test_group_advantages_are_r_minus_mean_over_std():
    # r = 1, 0, 0, 0: mean 1/4, sample variance (9 + 1 + 1 + 1) / 16 / 3 = 1/4: (r - 1/4) / (1/2 + eps).
    reward = tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 4.0, 4.0], dtype=F64)
    close(empg.group_advantages(reward, 4, eps=0.0)[:4], [1.5, -0.5, -0.5, -0.5])
    close(empg.group_advantages(reward, 4, eps=0.5)[:4], [0.75, -0.25, -0.25, -0.25])
    close(empg.group_advantages(reward, 4, divide_by_std=False), [0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1])
    # r = 0 and sqrt 2 * 1e-6: sample std 1e-6, so half of the 1 / sqrt 2 that a negligible eps would leave.
    close(empg.group_advantages(tensor([0.0, 2**0.5 * 1e-6], dtype=F64), 2), [-(2**-1.5), 2**-1.5])


@QUICK
@given(groups=st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_group_advantages_match_loops(groups):
    advantage = empg.group_advantages(tensor(groups, dtype=F64).flatten(), 3)
    close(advantage, [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-6) for g in groups for r in g])
    close(empg.group_advantages(tensor(groups).flatten(), 3), advantage.float())  # integer rewards


@pytest.mark.filterwarnings("error")  # the std of a group of one
@pytest.mark.parametrize("reward", [0.0, 0.1, -0.3])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_group_advantages_of_equal_rewards_are_exactly_zero(reward, group_size):
    """A group that always or never succeeds gave 0 / 0 = nan, and the rounding of 3 * 0.1 blown up by 1 / eps."""
    assert empg.group_advantages(torch.full((2 * group_size,), reward), group_size).tolist() == [0.0] * 2 * group_size


@pytest.mark.filterwarnings("error")  # the std of a group of none
@QUICK
@given(data=st.data(), groups=st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_group_advantages_of_the_rows_that_are_kept_match_loops(data, groups):
    """Episodes that an environment had aborted counted as failures, in mean and std of their group, too."""
    keep = [[data.draw(st.booleans()) for _ in group] for group in groups]
    expected = []
    for group, kept in zip(groups, keep, strict=True):
        left = [r for r, k in zip(group, kept, strict=True) if k]
        mean, std = (statistics.mean(left), statistics.stdev(left)) if len(left) > 1 else (0, 0)
        expected += [(r - mean) / (std + 1e-6) if k and len(left) > 1 else 0 for r, k in zip(group, kept, strict=True)]
    reward, keep = tensor(groups, dtype=F64).flatten(), tensor(keep).flatten()
    close(empg.group_advantages(reward, 3, keep=keep), expected)
    close(empg.group_advantages(reward.where(keep, math.nan), 3, keep=keep), expected)
    assert torch.equal(empg.group_advantages(reward, 3, keep=torch.ones_like(keep)), empg.group_advantages(reward, 3))
    whole, divided = (empg.group_advantages(reward, 3, keep=k, divide_by_std=False) for k in (None, keep))
    assert torch.equal(whole, divided) or not keep.all()


def loop_loss(rows: list[list], low: float, high: float, aggregation: str) -> tuple[float, Tensor]:
    """The surrogate by its cases instead of a min, and its derivative in every logp."""
    sampled = {(i, j): token for i, row in enumerate(rows) for j, token in enumerate(row) if token}
    loss, grad = 0.0, [[0.0] * len(row) for row in rows]
    for (i, j), (log_ratio, advantage) in sampled.items():
        own = sum(row == i for row, _ in sampled)
        weight = 1 / len(sampled) if aggregation == "token" else 1 / own / len(rows)
        ratio = math.exp(log_ratio)
        bound, beyond = (1 + high, ratio > 1 + high) if advantage > 0 else (1 - low, ratio < 1 - low)
        loss -= weight * advantage * (bound if beyond else ratio)
        grad[i][j] = 0.0 if beyond else -weight * advantage * ratio
    return loss, pad(grad, 0)


def test_policy_loss_is_minus_the_smaller_of_ratio_a_and_clipped_ratio_a():
    # Row 0: ratio 3/2, A = 2 bounded at 1.2 * 2 = 2.4, at 1.28 * 2 = 2.56 in DAPO; ratio 1/2, A = 2: 1.
    # Row 1: ratio 1/2, A = -1 bounded at -0.8.  Over sequences (GRPO, default): -((2.4 + 1) / 2 - 0.8) / 2 = -0.45.
    # Over tokens (DAPO): -(2.56 + 1 - 0.8) / 3 = -0.92.
    # kl_old is the sum of ratio - 1 - ln ratio: (1/2 - ln 3/2) + 2 * (-1/2 + ln 2).
    batch = tokens([[(math.log(1.5), 2.0), None, (-LN2, 2.0)], [(-LN2, -1.0)]])
    loss, metrics = empg.policy_loss(*batch, clip_high=0.28, aggregation="token")
    close(loss, -0.92)
    close(empg.policy_loss(*batch)[0], -0.45)
    assert [int(metrics[name]) for name in ("tokens", "clip_low", "clip_high")] == [3, 1, 1]
    close(metrics["kl_old"], 2 * LN2 - math.log(1.5) - 0.5)


@QUICK
@given(rows=TOKENS, widths=WIDTHS, aggregation=AGGREGATION, size=st.integers(1, 4))
@example(rows=[[None, None], []], widths=(0.2, 0.2), aggregation="sequence", size=2)  # nothing sampled: 0
@example(rows=[[None, None], []], widths=(0.2, 0.28), aggregation="token", size=2)
@example(rows=[[(-1.0, 0.0), (1.0, 0.0)]], widths=(0.2, 0.28), aggregation="token", size=1)  # without advantage
def test_policy_loss_and_gradient_match_loops_for_any_micro_batch_split(rows, widths, aggregation, size):
    """At ratio 1 the gradient is REINFORCE's, -A; beyond the bound that binds it is 0.

    exp(inf) * 0 is nan: multiplied by the mask after exp, one padded position spoilt the batch. A mean of micro-batch
    means weighs a token by the company that it keeps: the normalizer comes from outside.
    """
    (low, high), batch = widths, tokens(rows)
    normalizer = empg.loss_normalizer(batch[3], aggregation)
    options = {"clip_low": low, "clip_high": high, "aggregation": aggregation, "normalizer": normalizer}
    micro_batches = zip(*(part.split(size) for part in batch), strict=True)
    losses, metrics = zip(*(empg.policy_loss(*part, **options) for part in micro_batches), strict=True)
    expected, expected_grad = loop_loss(rows, low, high, aggregation)
    close(sum(losses), expected)
    close(torch.autograd.grad(sum(losses), batch[0])[0], expected_grad)
    metrics = {name: sum(part[name] for part in metrics) for name in metrics[0]}
    sampled = [token for row in rows for token in row if token]
    assert metrics["tokens"] == len(sampled)
    assert metrics["clip_low"] == sum(log_ratio < math.log(1 - low) and a < 0 for log_ratio, a in sampled)
    assert metrics["clip_high"] == sum(log_ratio > math.log(1 + high) and a > 0 for log_ratio, a in sampled)
    close(metrics["kl_old"], sum(math.exp(log_ratio) - 1 - log_ratio for log_ratio, _ in sampled))


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_policy_loss_of_a_far_off_ratio_is_finite(advantage):
    """exp(100) overflows in float32; min() would hide it in the loss and multiply it by 0 in the gradient: nan."""
    logp = tensor([[0.0, -1.0]]).requires_grad_()
    loss, _ = empg.policy_loss(logp, tensor([[-100.0, -1.0]]), tensor([[advantage] * 2]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


@QUICK
@given(rows=EPISODES)
@example(rows=[[1.0, 2.0, 3.0], [4.0]])  # (2 + 4) / 2 = 3 over sequences, 10 / 4 over tokens
def test_aggregate_is_the_mean_over_sequences_or_over_tokens(rows):
    values, mask = steps(rows)
    sampled = [[v for v in row if v is not None] for row in rows]
    means, count = [statistics.fmean(row or [0.0]) for row in sampled], sum(map(len, sampled))
    for aggregation, total, number in (("sequence", sum(means), len(rows)), ("token", sum(map(sum, sampled)), count)):
        assert empg.loss_normalizer(mask, aggregation) == max(1, number)
        close(empg.aggregate(values, mask, aggregation), total / max(1, number))
        close(empg.aggregate(values, mask, aggregation, max(1, number)), total / max(1, number))
        close(empg.aggregate(values, mask, aggregation, 8), total / 8)


@QUICK
@given(logp=st.floats(-20, 0), delta=st.floats(-10, 10))
@example(logp=-2 * LN2, delta=LN2)  # 2 - ln 2 - 1; the other way round it would be 1/2 + ln 2 - 1
@example(logp=-1.0, delta=0.0)
def test_kl_k3_is_exp_d_minus_d_minus_1_and_0_only_at_equality(logp, delta):
    k3 = empg.kl_k3(tensor([logp], dtype=F64), tensor([logp + delta], dtype=F64))
    close(k3, [math.exp(delta) - delta - 1])
    assert k3 > 0 if abs(delta) > 1e-6 else k3 >= 0  # below, d^2 / 2 drowns in the rounding of d
    far = torch.tensor([-120.0, -0.1, -1e30], requires_grad=True)
    k3 = empg.kl_k3(far, torch.tensor([-0.1, -120.0, -0.1]))  # at 89 nats exp overflowed, and its gradient was -inf
    k3.sum().backward()
    close(k3, torch.tensor([math.exp(20) - 21, 118.9, math.exp(20) - 21]))
    assert far.grad.tolist() == [0, 1, 0]
    near = torch.linspace(-1e-3, 1e-3, 2001)  # in float32 d^2 / 2 is here as small as the rounding of exp(d)
    assert (empg.kl_k3(torch.zeros(2001), near) >= 0).all()


def test_soft_overlong_penalty_is_0_then_linear_then_minus_1():
    # Nothing up to 100 - 20 = 80, then 1/20 a token: 81 costs 0.05, 95 costs 0.75, 100 and more cost 1.
    penalty = empg.soft_overlong_penalty(tensor([0, 80, 81, 95, 100, 101]), limit=100, buffer=20)
    close(penalty, [0.0, 0.0, -0.05, -0.75, -1.0, -1.0])
    close(empg.soft_overlong_penalty(tensor([0, 1, 2]), limit=2, buffer=2), [0.0, -0.5, -1.0])


# ------------------------------------------------------------------------------ Proposition 1, log-probability, entropy


def loop_softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    return [w / math.fsum(weights) for w in weights]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logp_entropy_and_score_norm_of_a_half_and_two_quarters(temperature):
    """A project logged -log p of the sampled token as "entropy": a rare token of a sure policy looked unsure."""
    # p = 1/2, 1/4, 1/4, and 0 for a banned token: log p(1) = -ln 4; H = 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2;
    # score norm 1 - 1/4 - 2 * 1/16 = 5/8; d log p(1) = (1_1 - p) / T.  Logits times T undo the temperature.
    logits = (temperature * tensor([[[0.5, 0.25, 0.25, 0.0]]], dtype=F64).log()).requires_grad_()
    logp, entropy = empg.token_logp_and_entropy(logits, tensor([[1]]), temperature)
    close(logp, [[-2 * LN2]])
    close(entropy, [[1.5 * LN2]])
    close(empg.expected_score_norm(logits / temperature), [[0.625]])
    grad = torch.autograd.grad(logp.sum(), logits)[0]
    close(grad * temperature, [[[-0.5, 0.75, -0.25, 0.0]]])


@QUICK
@given(rows=LOGITS, temperature=st.sampled_from([0.5, 1.0, 3.0]))
@example(rows=[[5.0, 5.0, 5.0], [0.0, 0.0, -INF]], temperature=1.0)  # uniform: ln 3, and ln 2 with one banned
def test_logp_entropy_and_score_norm_match_loops_and_bounds(rows, temperature):
    logits = tensor([[row] * 3 for row in rows], dtype=F64, requires_grad=True)  # (B, 3, V = 3), to sample each token
    ids = torch.arange(3).repeat(len(rows), 1)
    logp, entropy = empg.token_logp_and_entropy(logits, ids, temperature)
    ps = [loop_softmax(row, temperature) for row in rows]
    close(logp.exp(), ps, rtol=1e-9, atol=0)
    close(entropy, [[-sum(x * math.log(x) for x in p if x > 0)] * 3 for p in ps])
    assert ((entropy >= -1e-12) & (entropy <= math.log(3) + 1e-12)).all()
    # Proposition 1: the mean squared norm of the gradient with respect to logits / temperature.
    score = temperature * torch.autograd.grad(logp.sum(), logits)[0]
    norm = empg.expected_score_norm(logits[:, 0] / temperature)
    close(norm, (logp.exp() * score.square().sum(-1)).sum(-1))
    assert ((norm >= -1e-12) & (norm <= 2 / 3 + 1e-12)).all()


def test_the_gradient_of_logp_is_the_finite_difference():
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 4, 3, dtype=F64).requires_grad_(), torch.randint(3, (3, 4))
    assert torch.autograd.gradcheck(lambda z: empg.token_logp_and_entropy(z, ids, 0.7)[0], (logits,))


def test_bf16_logits_are_computed_in_float32():
    torch.manual_seed(0)
    half, ids = torch.randn(2, 3, 5).bfloat16().requires_grad_(), torch.randint(5, (2, 3))
    full = half.detach().float().requires_grad_()
    (logp, entropy), expected = (empg.token_logp_and_entropy(z, ids) for z in (half, full))
    close(torch.stack([logp, entropy]), torch.stack(expected), rtol=0, atol=0)  # values, and float32
    grad, expected_grad = (torch.autograd.grad(x.sum(), z)[0] for x, z in ((logp, half), (expected[0], full)))
    assert torch.equal(grad, expected_grad.bfloat16())


# ----------------------------------------------------------------------------------- gradients, bad input, docstrings


def test_only_logp_carries_a_gradient():
    leaf, mask = torch.rand(2, 3, requires_grad=True), torch.ones(2, 3).bool()
    logp, entropy = empg.token_logp_and_entropy(leaf[..., None].expand(2, 3, 4), mask.long())
    assert logp.requires_grad
    norm, ids = empg.normalize_entropy(leaf, mask), torch.zeros(2, 3, dtype=torch.long)
    constants = [entropy, empg.step_entropy(leaf, ids)[0], norm, empg.modulate(leaf[:, 0], leaf, mask)]
    constants += [empg.gradient_scale(leaf, mask), empg.clarity_bonus(leaf, mask), empg.center(leaf, mask)]
    constants += [empg.spread(leaf, ids), empg.group_advantages(leaf[0], 3)]
    for made in (empg.modulation(leaf[:, 0], leaf, mask), empg.no_modulation(leaf[:, 0], leaf, mask)):
        constants += [getattr(made, name) for name in ("norm_entropy", "g", "f", "advantage")]
    logp = torch.zeros(2, 3, requires_grad=True)
    loss, metrics = empg.policy_loss(logp, leaf, leaf * 2, mask)
    assert not any(constant.requires_grad for constant in [*constants, *metrics.values()])
    assert torch.autograd.grad(loss, [leaf], allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("function", "shapes", "options"),
    [
        (empg.step_entropy, [(2, 3), (2, 4)], {}),
        (empg.step_entropy, [(3,), (3,)], {}),
        (empg.normalize_entropy, [(2, 3), (1, 3)], {}),
        (empg.gradient_scale, [(2, 3), (2, 1)], {}),
        (empg.clarity_bonus, [(2, 3), (2, 4)], {}),
        (empg.modulate, [(3,), (2, 4), (2, 4)], {}),
        (empg.modulation, [(3,), (2, 4), (2, 4)], {}),
        (empg.center, [(2, 3), (2, 1)], {}),
        (empg.spread, [(1, 3), (2, 3)], {}),
        (empg.group_advantages, [(7,)], {"group_size": 2}),
        (empg.group_advantages, [(2, 2)], {"group_size": 2}),
        (empg.policy_loss, [(2, 3), (2, 3), (2, 1), (2, 3)], {}),
        (empg.aggregate, [(2, 3), (1, 3)], {"aggregation": "token"}),
        (empg.token_logp_and_entropy, [(2, 3, 4), (2, 4)], {}),
        (empg.token_logp_and_entropy, [(3, 4), (3,)], {}),
    ],
)
def test_wrong_shapes_are_named(function, shapes, options):
    with pytest.raises(ValueError, match=r"must (be|have) .*; got ") as error:
        function(*(torch.zeros(shape, dtype=torch.bool) for shape in shapes), **options)
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: empg.spread(torch.zeros(1, 2), tensor([[0, 1, 2]])), r"step_ids go up to 2, .* is \(1, 2\)"),
        (lambda: empg.token_logp_and_entropy(torch.zeros(1, 1, 2), tensor([[0]]), 0.0), "temperature .* got 0"),
        (lambda: empg.aggregate(torch.zeros(1, 1), tensor([[True]]), "mean"), "'sequence' or 'token', got 'mean'"),
        (lambda: empg.aggregate(torch.zeros(1, 1), tensor([[True]]), "mean", 1), "'sequence' or 'token', got 'mean'"),
        (lambda: empg.soft_overlong_penalty(tensor([1]), limit=10, buffer=11), "limit 10, got 11"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_in_docstrings_hold():
    result = doctest.testmod(empg)
    assert result.attempted > 0
    assert result.failed == 0
