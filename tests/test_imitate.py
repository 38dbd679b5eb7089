"""The cold start: the seed decides the weights, a policy is built once, and imitation learns responses only."""

import pytest
import tokenizers
import torch
from torch.nn import functional as F

import imitate as module
from imitate import imitate, warm_start
from policy import Dialogue, Policy, load_policy
from tiny import TinyConfig, tiny_policy

TINY = TinyConfig(vocab_size=320, hidden_size=16, layers=1, intermediate_size=32, batch_size=2)
TOLD = [["RULES OF THE GAME", "LEFT OR RIGHT", "left or right", *["ONCE MORE", "once more"] * n] for n in range(1, 5)]


def equal_weights(one: Policy, other: Policy) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def build(tmp_path):
    """build(definition, dialogues, ...) makes a warm start in tmp_path/cache."""

    def call(definition="coin", dialogues=TOLD, config=TINY, seed=0, cache="cache"):
        return warm_start({"world": definition}, lambda: dialogues, config, seed, tmp_path / cache)

    return call


def test_the_seed_alone_decides_the_weights():
    before = torch.random.get_rng_state()
    one, again, other = (tiny_policy(TOLD, TINY, seed) for seed in (0, 0, 1))
    assert equal_weights(one, again)
    assert not equal_weights(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's random numbers are used up


# ------------------------------------------------------------------------------------------------------- warm start


def test_a_warm_start_is_the_same_in_every_cache_built_once_and_then_plays_nothing(build, tmp_path):
    torch.manual_seed(1)
    one = build(cache="one")
    torch.manual_seed(2)
    other = build(cache="two/deep")
    assert one.name == other.name
    assert equal_weights(load_policy(str(one)), load_policy(str(other)))
    times = {path: path.stat().st_mtime_ns for path in (one, *one.iterdir())}
    assert warm_start({"world": "coin"}, None, TINY, 0, tmp_path / "one") == one  # None cannot be called
    assert {path: path.stat().st_mtime_ns for path in (one, *one.iterdir())} == times
    assert list((tmp_path / "one").iterdir()) == [one]


def test_every_part_of_the_definition_counts(build, monkeypatch):
    monkeypatch.setattr(module, "imitate", lambda *_: None)
    folders = [build(), build("house"), build(seed=1), build(config=TinyConfig(**vars(TINY) | {"learning_rate": 1e-3}))]
    monkeypatch.setattr(tokenizers, "__version__", "0.0.0")
    folders.append(build())
    assert len(set(folders)) == len(folders)


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(build, monkeypatch):
    """A folder that exists was taken for a whole one: after a kill while saving, every later run failed."""

    def killed(self, folder):
        self.model.save_pretrained(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            build()
    assert load_policy(str(build())).encode(["once"])


def test_two_runs_that_build_the_same_warm_start_both_succeed(build, tmp_path, monkeypatch):
    """The second one failed: a folder that is not empty cannot be replaced."""

    def meanwhile(*arguments):
        monkeypatch.setattr(module, "imitate", imitate)
        first.append(build())
        imitate(*arguments)

    first = []
    monkeypatch.setattr(module, "imitate", meanwhile)
    assert [build()] == first == list((tmp_path / "cache").iterdir())


# -------------------------------------------------------------------------------------------------------- imitation


def test_the_loss_of_imitation_is_over_the_sampled_tokens_only():
    """Checked against transformers' own loss with labels, one dialogue at a time, without padding."""
    policy = tiny_policy(TOLD, TINY, seed=0)
    rows = [policy.dialogue(texts) for texts in TOLD]
    assert len({len(ids) for ids, _ in rows}) > 1  # or no padding
    loss = F.cross_entropy(*module._sampled_logits_and_ids(policy, rows))
    number, expected = sum(sum(sampled) for _, sampled in rows), torch.zeros(())
    for ids, sampled in rows:
        labels = torch.tensor([[i if s else -100 for i, s in zip(ids, sampled, strict=True)]])
        expected = expected + policy.model(input_ids=torch.tensor([ids]), labels=labels).loss * sum(sampled) / number
    parameters = list(policy.model.parameters())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


@torch.inference_mode()
def losses(policy: Policy, dialogues: list[Dialogue]) -> tuple[float, float]:
    """Mean surprisal of the sampled and of the other tokens, in nats."""
    nll = {True: [], False: []}
    for ids, sampled in map(policy.dialogue, dialogues):
        logp = policy.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for s, value in zip(sampled[1:], logp.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist(), strict=True):
            nll[s].append(-value)
    return sum(nll[True]) / len(nll[True]), sum(nll[False]) / len(nll[False])


def test_imitation_learns_the_responses_and_not_the_observations():
    """Small letters are sampled and capital ones are not, so what is learned of one says nothing of the other: one
    loss falls below half and the other does not."""
    told = TOLD[:1] * 150
    policy = tiny_policy(told, TINY, seed=0)
    before = losses(policy, told[:1])
    imitate(policy, told, TINY)
    after = losses(policy, told[:1])
    assert after[0] < before[0] / 2
    assert after[1] > before[1] / 2
