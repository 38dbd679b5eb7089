"""The cold start: the seed decides the weights, a policy is built once, and imitation learns responses only."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from accelerate import Accelerator
from conftest import without_locks
from torch.nn import functional as F

import imitate as module
from config import TrainConfig
from engine.checkpoint import CheckpointError
from eval import open_envs
from imitate import Imitation, imitate, warm_start
from policy import Dialogue, Policy, PolicyError, load_policy
from tiny import TinyConfig, tiny_policy

TINY = TinyConfig(vocab_size=320, hidden_size=16, layers=1, intermediate_size=32)
HOW = Imitation(learning_rate=4e-3, batch_size=2)
TOLD = [["RULES OF THE GAME", "LEFT OR RIGHT", "left or right", *["ONCE MORE", "once more"] * n] for n in range(1, 5)]


def equal_weights(one: Policy, other: Policy) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def build(tmp_path):
    """build(definition, cache) makes a warm start in tmp_path/cache."""

    def call(definition="coin", cache="cache"):
        def make() -> Policy:
            policy = tiny_policy(TOLD, TINY, seed=0)
            module.imitate(policy, TOLD, HOW)
            return policy

        return warm_start({"world": definition}, make, tmp_path / cache)

    return call


@pytest.fixture
def definition(tmp_path, monkeypatch):
    """definition(flags) is what names the folder of a cold start in the coin world. Nothing is imitated."""
    monkeypatch.setattr(module, "warm_start", lambda definition, make, cache: json.dumps(definition))

    def call(policy="tiny", accelerator=None, **flags):
        config = TrainConfig(**{"env": "coin", "policy": str(policy), "demonstrations": 8} | flags)
        (env,) = open_envs(config, 1, ["train"])
        return module.first_policy(config, accelerator or Accelerator(cpu=True), env)

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
    assert warm_start({"world": "coin"}, None, tmp_path / "one") == one  # None cannot be called
    assert {path: path.stat().st_mtime_ns for path in (one, *one.iterdir())} == times
    assert without_locks(tmp_path / "one") == [one]


def test_what_the_cold_start_depends_on_names_its_folder(build, definition, monkeypatch, tmp_path):
    """--example was not in the name: the tiny model of a run without an example was taken for one with it."""
    one, other = build(), build("house")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "__version__", "0.0.0")
        assert len({one, other, build()}) == 3
    load_policy(str(one)).save(tmp_path / "mine")
    flags = [{}, {"demonstrations": 12}, {"slip": 0.3}, {"seed": 1}, {"env_args": ["max_steps=3"]}, {"example": True}]
    flags += [{"imitation_rate": 1e-3}, {"imitation_passes": 3}]
    for policy, more in (("tiny", []), (tmp_path / "mine", [{"max_tokens": 500}, {"micro_batch_tokens": 999}])):
        names = [definition(policy, **changed) for changed in flags + more]
        assert len(set(names)) == len(names)
    before = definition(tmp_path / "mine")
    precision = SimpleNamespace(mixed_precision="bf16", device=torch.device("cpu"), is_main_process=True)
    assert definition(tmp_path / "mine", precision) != before
    assert definition("tiny", precision) == definition("tiny")  # it is the same wherever it is trained
    os.utime(tmp_path / "mine" / "model.safetensors", (1, 1))
    assert definition(tmp_path / "mine") != before


def test_a_pretrained_policy_imitates_only_if_it_is_told_to(definition, tmp_path):
    assert definition(tmp_path, demonstrations=None) == str(tmp_path)
    assert definition(tmp_path, demonstrations=0) == str(tmp_path)
    with pytest.raises(ValueError, match="demonstrations must be at least 4, got 0"):
        definition("tiny", demonstrations=0)


def test_what_training_would_refuse_is_refused_before_the_imitation(build, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "demonstrations", None)  # whoever plays them would call it
    flags = {"env": "coin", "policy": str(build()), "demonstrations": 8, "cache": str(tmp_path / "other")}
    config = TrainConfig(**flags, max_tokens=8193)
    with pytest.raises(PolicyError, match="8192 positions"):
        module.first_policy(config, Accelerator(cpu=True), open_envs(config, 1, [])[0])


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


def test_a_damaged_warm_start_is_made_anew(build, capsys):
    """With half of the weights zeroed the run went from 0 to 0 %, and its status was 0."""
    folder = build()
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(before[: len(before) // 2] + bytes(len(before) - len(before) // 2))
    assert build() == folder
    assert (folder / "model.safetensors").read_bytes() == before
    assert f"{folder} is damaged; making this warm start anew" in capsys.readouterr().out
    (folder / "tokenizer.json").unlink()
    assert load_policy(str(build())).encode(["once"])
    assert without_locks(folder.parent) == [folder]


def test_a_resumed_run_finds_the_policy_that_it_began_with_or_ends(definition, build, monkeypatch, tmp_path):
    """The reference of the KL term was read from the damaged folder."""
    link = tmp_path / "first_policy"
    link.symlink_to(build())
    config = TrainConfig(env="coin", demonstrations=8, kl_coef=0.1)
    (env,), accelerator = open_envs(config, 1, ["train"]), Accelerator(cpu=True)
    assert module.first_policy(config, accelerator, env, link) == str(link)
    monkeypatch.setattr(module, "cold_start", lambda *arguments: build())
    (link / "model.safetensors").write_bytes(b"damaged")
    assert module.first_policy(config, accelerator, env, link) == str(build())
    (link / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(module, "cold_start", lambda *arguments: build("house"))
    with pytest.raises(CheckpointError, match="would imitate another one"):
        module.first_policy(config, accelerator, env, link)
    (link / "sha256.json").unlink()  # as older runs have it
    assert module.first_policy(config, accelerator, env, link) == str(link)


def test_of_two_runs_that_need_the_same_warm_start_one_imitates(build, tmp_path, monkeypatch):
    """Both did, and the second one failed: a folder that is not empty cannot be replaced."""

    def meanwhile(*arguments):
        others.append(elsewhere.submit(build))
        imitate(*arguments)

    others = []
    monkeypatch.setattr(module, "imitate", meanwhile)
    with ThreadPoolExecutor() as elsewhere:
        assert [build()] == without_locks(tmp_path / "cache")
        (other,) = others
        assert [other.result()] == without_locks(tmp_path / "cache")


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


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_imitation_learns_the_responses_and_not_the_observations(precision):
    """Small letters are sampled and capital ones are not, so what is learned of one says nothing of the other: one
    loss falls below half and the other does not."""
    told = TOLD[:1] * 150
    policy = tiny_policy(told, TINY, seed=0)
    before = losses(policy, told[:1])
    imitate(policy, told, replace(HOW, mixed_precision=precision))
    after = losses(policy, told[:1])
    assert after[0] < before[0] / 2
    assert after[1] > before[1] / 2


def test_micro_batches_change_rounding_only_and_nothing_beyond_max_tokens_is_imitated():
    policies = [tiny_policy(TOLD, TINY, seed=0) for _ in range(4)]
    length = len(policies[0].dialogue(TOLD[0])[0])  # the shortest
    longer = [[*texts, "NOT THIS", "nor this"] for texts in TOLD[:1] * 4]
    imitate(policies[0], TOLD, HOW)
    imitate(policies[1], TOLD, replace(HOW, micro_batch_tokens=length))
    imitate(policies[2], TOLD[:1] * 4, HOW)
    imitate(policies[3], longer, replace(HOW, max_tokens=length))
    for one, other in zip(policies[0].model.parameters(), policies[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert not equal_weights(policies[0], tiny_policy(TOLD, TINY, seed=0))
    assert equal_weights(policies[2], policies[3])


def test_weights_that_are_not_finite_are_not_kept():
    with pytest.raises(SystemExit, match="not finite: lower --imitation_rate"):
        imitate(tiny_policy(TOLD, TINY, seed=0), TOLD * 9, replace(HOW, learning_rate=1e30))
