"""The sampler draws from softmax, and no shape, cache or weight type changes an episode.

A decode step on a GPU is a CUDA graph: of fixed shapes, at fixed addresses, without the host. These conditions are
tested on the CPU. Capture and replay need a GPU.
"""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from engine import sampler
from engine.ranks import sampling_weights
from engine.sampler import Sampler, SlotLayer, sample
from envs import make_envs
from episode import Episode, Task
from policy import Policy
from rollout import rollout

JUST_BELOW_1 = math.nextafter(1.0, 0.0)
STATIC = (4, 8, 3)  # rows and columns are rounded up to these, and every third decode step checks for the end
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def random_policy(config: type, house_policy: Policy) -> Policy:
    """Random weights of another architecture, with grouped key-value heads."""
    vocabulary = {"vocab_size": len(house_policy.tokenizer), "pad_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    settings = config(**SIZES, **vocabulary, num_key_value_heads=2, initializer_range=0.2)
    return Policy(AutoModelForCausalLM.from_config(settings), house_policy.tokenizer)


def play(policy: Policy, number: int = 7, steps: int = 3) -> list[Episode]:
    """Episodes of groups of four in the house. They have different numbers of steps."""
    envs = [make_envs("house", [f"max_steps={1 + i % steps}"], 1)[0] for i in range(7)]
    tasks = [Task("house", "eval", i // 4) for i in range(number)]
    return rollout(policy, envs, tasks, [(0, i) for i in range(number)], max_step_tokens=12, max_tokens=400)


def assert_same(played: list[Episode], expected: list[Episode], atol: float = 1e-4) -> None:
    """The same tokens, and the same numbers up to rounding."""
    assert [episode.ids for episode in played] == [episode.ids for episode in expected]
    for name in ("old_logp", "token_entropy"):
        for a, b in zip(played, expected, strict=True):
            torch.testing.assert_close(tensor(getattr(a, name)), tensor(getattr(b, name)), rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------- sampling


def test_sample_by_hand():
    # p = 0, 1/4, 0, 1/4, 1/4, 1/4, 0: exact bounds at 1/4, 1/2, 3/4, and a bound belongs to the token above it.
    logits = tensor([-math.inf, 0.0, -math.inf, 0.0, 0.0, 0.0, -math.inf])
    below = math.nextafter(0.25, 0)
    uniform = tensor([0.0, below, 0.25, 0.5, 0.75, JUST_BELOW_1], dtype=torch.float64)
    assert sample(logits.expand(6, 7), uniform, 1.0).tolist() == [1, 1, 3, 4, 5, 5]
    # Odds 1 to 2 become 1 to 4 at temperature 1/2: the bound moves from 1/3 to 1/5.
    logits, uniform = tensor([[0.0, math.log(2)]] * 2), tensor([0.19, 0.21], dtype=torch.float64)
    assert sample(logits, uniform, 0.5).tolist() == [0, 1]
    assert sample(logits, uniform, 1.0).tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_has_the_frequencies_of_softmax(temperature):
    """Chi-square test. One seed in a million would fail by chance; the seed is fixed."""
    logits, number = tensor([2.0, 1.0, 0.5, 0.0, -1.0]), 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(number))
    counts = sample(logits.expand(number, 5), uniform, temperature).bincount(minlength=5)
    weights = [math.exp(z / temperature) for z in logits.tolist()]
    expected = [number * w / sum(weights) for w in weights]
    chi_square = sum((n - e) ** 2 / e for n, e in zip(counts.tolist(), expected, strict=True))
    assert chi_square < stats.chi2.isf(1e-6, df=4)


def test_sample_reaches_every_token_behind_a_likely_one():
    """In float32 the cumulative probability stopped growing at 0.9999. Most of 150,000 rare tokens were never drawn."""
    rare = 149_999  # together 1 in 10,000: the first token has the odds of 9,999 times all of them
    logits = torch.zeros(1, 1 + rare)
    logits[0, 0] = math.log(9_999 * rare)
    tokens = tensor([1, 2, 75_000, 149_998, 149_999])
    uniform = 0.9999 + 0.0001 * (tokens.double() - 0.5) / rare  # in the middle of the token's share
    assert sample(logits.expand(5, -1), uniform, 1.0).tolist() == tokens.tolist()
    assert sample(logits.expand(2, -1), tensor([0.0, JUST_BELOW_1], dtype=torch.float64), 1.0).tolist() == [0, rare]


@pytest.mark.parametrize("impossible", [-math.inf, -2000.0])  # banned, or of a probability that underflows to 0
def test_sample_never_draws_a_token_of_probability_0(impossible):
    logits = torch.randn(150_000, generator=torch.Generator().manual_seed(0))
    banned = torch.arange(150_000) % 3 > 0
    banned[:1000] = banned[-1000:] = True
    logits[banned] = impossible
    drawn = sample(logits.expand(4, -1), tensor([0.0, 5e-324, 0.5, JUST_BELOW_1], dtype=torch.float64), 1.0)
    assert not banned[drawn].any()
    assert drawn[[0, 1, 3]].tolist() == [1002, 1002, 148_998]  # the first and the last possible one


# ---------------------------------------------------------------------------------------------- shapes of a GPU


@pytest.mark.parametrize("config", [None, Qwen2Config, LlamaConfig, Qwen3Config])
def test_rounded_shapes_and_rare_checks_change_nothing(config, house_policy, monkeypatch):
    policy = random_policy(config, house_policy) if config else house_policy  # the latter ends some of its responses
    expected = play(policy)
    monkeypatch.setitem(sampler.ROUNDING, "cpu", STATIC)
    shapes, forward = set(), policy.model.forward

    def watched(*args, **kwargs):
        shapes.add((len(kwargs["input_ids"]), kwargs["attention_mask"].shape[-1]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(policy.model, "forward", watched)
    assert_same(play(policy), expected)
    assert {columns % STATIC[1] for _, columns in shapes} == {0}


def test_a_decode_step_stays_in_its_place_in_memory_and_needs_nothing_of_the_host(house_policy, monkeypatch):
    """A CUDA graph repeats its kernels at the same addresses, without what Python decides between them."""
    expected = play(house_policy, steps=7)
    monkeypatch.setitem(sampler.ROUNDING, "cpu", (4, 64, 3))
    decode, steps, captured = Sampler._decode, [], []

    def watched(self, rows, columns):
        hidden = {name: self.__dict__.pop(name) for name in ("lengths", "columns", "rounding")}
        decode(self, rows, columns)
        self.__dict__ |= hidden
        assert not self.state.open[len(self.lengths) :].any()  # an open padding row would never end
        tensors = [*vars(self.state).values(), *(buffer for layer in self.cache.layers for buffer in layer.buffers)]
        addresses = tuple(part.data_ptr() for part in tensors)
        steps.append(addresses)
        if (rows, columns) not in self.graphs:
            self.graphs[rows, columns] = addresses  # in place of a graph that was captured now
            captured.append(addresses)
        assert self.graphs[rows, columns] == addresses

    monkeypatch.setattr(Sampler, "_decode", watched)
    assert_same(play(house_policy, steps=7), expected)
    assert len(set(captured)) > 1  # the cache grew
    assert len(steps) > 2 * len(captured)  # graphs are used again


def test_reading_in_parts_changes_nothing(house_policy, monkeypatch):
    expected = play(house_policy)
    monkeypatch.setattr(sampler, "READ_AT_ONCE", 100)
    assert_same(play(house_policy), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [None, Qwen2Config, LlamaConfig, Qwen3Config])
def test_a_gpu_plays_the_same_episodes_as_a_cpu(config, house_policy, monkeypatch):
    policy = random_policy(config, house_policy) if config else house_policy
    graphs, decode_or_replay = set(), Sampler._decode_or_replay

    def watched(self, rows, columns):
        decode_or_replay(self, rows, columns)
        graphs.update(self.graphs)

    monkeypatch.setattr(Sampler, "_decode_or_replay", watched)
    on_gpu = Policy(copy.deepcopy(policy.model).cuda(), policy.tokenizer)
    assert_same(play(on_gpu, number=20), play(policy, number=20), atol=1e-3)
    assert graphs


# -------------------------------------------------------------------------------------------- weights for sampling


def test_weights_cast_once_give_the_numbers_of_autocast(house_policy):
    """Autocast alone casts all weights of linear layers at every token."""
    model = house_policy.model
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = play(house_policy)
    with sampling_weights(model, "bf16"):
        assert (model.lm_head.weight.dtype, model.model.layers[0].mlp.up_proj.weight.dtype) == (torch.bfloat16,) * 2
        assert model.model.embed_tokens.weight.dtype == torch.float32  # autocast does not cast it either
        assert play(house_policy) == expected
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    with sampling_weights(model, "no"):
        assert play(house_policy) != expected


def test_the_cache_of_mixed_precision_holds_no_float32(house_policy, monkeypatch):
    """Keys came out of the rotary embedding in float32, and attention cast the whole cache at every token."""
    dtypes, update = set(), SlotLayer.update

    def watched(self, *states, **options):
        seen = update(self, *states, **options)
        dtypes.update(buffer.dtype for buffer in self.buffers)
        return seen

    monkeypatch.setattr(SlotLayer, "update", watched)
    with sampling_weights(house_policy.model, "bf16"):
        play(house_policy)
    assert dtypes == {torch.bfloat16}
