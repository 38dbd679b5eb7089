"""The sampler draws from softmax, and no shape, cache or weight type changes an episode.

A decode step on a GPU is a CUDA graph: of fixed shapes, at fixed addresses, without the host. These conditions are
tested on the CPU. Capture and replay need a GPU.
"""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from engine import sampler
from engine.ranks import sampling_weights
from engine.sampler import Memory, Sampler, SlotLayer, sample
from envs import make_envs
from episode import Episode, Task
from policy import Policy
from rollout import rollout

DECODE = Sampler._decode
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


class CpuGraph:
    """In place of a CUDA graph: repeats a decode step if all tensors are where they were when it was captured."""

    def __init__(self, by: Sampler, *shape: int):
        self.step, self.memory, self.weights = partial(DECODE, by, *shape), by.memory, by.policy.model.parameters
        self.captured = self.addresses()

    def addresses(self) -> list[int]:
        tensors = [part for part in vars(self.memory).values() if isinstance(part, torch.Tensor)]
        tensors += [buffer for layer in self.memory.cache.layers for buffer in layer.buffers] + [*self.weights()]
        return [part.data_ptr() for part in tensors]

    def replay(self) -> None:
        assert self.addresses() == self.captured
        self.step()


@pytest.fixture
def captures(monkeypatch) -> list[tuple]:
    """Decode steps are captured on a CPU, too: temperature, rows and columns of each capture."""
    captured = []

    def capture(self, rows: int, columns: int) -> CpuGraph:
        captured.append((self.temperature, rows, columns))
        return CpuGraph(self, rows, columns)

    def without_the_host(self, rows: int, columns: int) -> None:
        hidden = {name: self.__dict__.pop(name) for name in ("lengths", "rounding")}
        DECODE(self, rows, columns)
        self.__dict__ |= hidden
        assert not self.memory.open[len(self.lengths) :].any()  # an open padding row would never end

    monkeypatch.setattr(Sampler, "_decode", without_the_host)
    monkeypatch.setattr(Sampler, "_capture", capture)
    monkeypatch.setattr(sampler, "CAPTURED", ("cpu",))
    monkeypatch.setitem(sampler.ROUNDING, "cpu", (4, 64, 3))
    return captured


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_shape_is_captured_once_in_a_run_and_replays_play_the_same_episodes(precision, house_policy, captures):
    """Cache, buffers and cast weights were new for each rollout, so that each iteration captured every shape again."""
    policy = Policy(copy.deepcopy(house_policy.model), house_policy.tokenizer)

    def rollouts() -> list[list[Episode]]:
        """Two with an update between them."""
        played = []
        for number, scale in ((7, 1.0), (2, 1.01)):
            with torch.no_grad():
                policy.model.lm_head.weight.mul_(scale)
            with sampling_weights(policy.model, precision):
                played.append(play(policy, number, steps=7))
        with torch.no_grad():
            policy.model.lm_head.weight.copy_(house_policy.model.lm_head.weight)
        return played

    kept = rollouts()
    first = len(captures)
    assert first == len(set(captures)) > 3
    assert [len(policy.memory.cache.layers), policy.capture_seconds > 0] == [2, True]
    again = rollouts()
    assert len(captures) == first
    assert again == kept
    policy.memory = None
    sampler.CAPTURED = ()
    for one, other in zip(rollouts(), kept, strict=True):
        assert_same(one, other)
    assert len(captures) == first
    assert policy.memory is None  # on a CPU the update has room


def test_another_temperature_response_length_or_place_of_the_weights_is_captured_again(house_policy, captures):
    policy, prompt = Policy(copy.deepcopy(house_policy.model), house_policy.tokenizer), [[5, 6, 7]]

    @torch.inference_mode()
    def respond(temperature: float = 1.0, tokens: int = 4, rows: int = 1) -> Memory:
        by = Sampler(policy, prompt * rows, temperature, tokens, 100)
        by.respond(prompt * rows, torch.full((rows, tokens), 0.5, dtype=torch.float64))
        return by.memory

    first = respond()
    assert (respond(), len(captures)) == (first, 1)
    assert (respond(temperature=0.5), len(captures)) == (first, 2)
    assert (respond(), len(captures)) == (first, 2)
    longer = respond(tokens=5)
    assert longer is not first
    wider = respond(tokens=5, rows=5)
    assert wider is not longer
    assert respond(tokens=5) is wider
    policy.model.model.norm.weight = torch.nn.Parameter(policy.model.model.norm.weight.clone())
    assert respond(tokens=5) is not wider


def test_nothing_is_captured_with_sharded_weights(house_policy, captures, monkeypatch):
    """They are gathered at new addresses for each rollout."""
    monkeypatch.setattr(sampler, "FSDPModule", torch.nn.Module)
    policy = Policy(house_policy.model, house_policy.tokenizer)
    assert_same(play(policy), play(house_policy))
    assert (captures, policy.memory) == ([], None)


def test_a_decode_step_reads_the_keys_of_a_group_of_queries_once(house_policy, monkeypatch):
    """transformers sees the queries of a group as rows of one head. If it repeated the keys, a step would read more."""
    policy, shapes, attention = random_policy(Qwen2Config, house_policy), set(), F.scaled_dot_product_attention

    def watched(query, key, value, **options):
        if query.shape[1:3] != (4, key.shape[2]):  # not a prompt
            shapes.add((query.shape[1:], key.shape[1]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    play(policy)
    assert ((2, 2, 8), 2) in shapes  # two heads of keys, each with two queries of size 8
    assert not [shape for shape, _ in shapes if shape[1] == 1]


def test_reading_in_parts_changes_nothing(house_policy, monkeypatch):
    expected = play(house_policy)
    monkeypatch.setattr(sampler, "READ_AT_ONCE", 100)
    assert_same(play(house_policy), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [None, Qwen2Config, LlamaConfig, Qwen3Config])
def test_a_gpu_plays_the_same_episodes_as_a_cpu(config, house_policy):
    """Twice: the second time all graphs are there, and other weights are in their place."""
    policy = random_policy(config, house_policy) if config else house_policy
    on_gpu = Policy(copy.deepcopy(policy.model).cuda(), policy.tokenizer)
    with torch.no_grad():
        on_gpu.model.lm_head.weight.mul_(0.9)
    play(on_gpu, number=20)
    graphs, seconds = dict(on_gpu.memory.graphs), on_gpu.capture_seconds
    assert graphs
    with torch.no_grad():
        on_gpu.model.lm_head.weight.copy_(policy.model.lm_head.weight)
    expected = play(policy, number=20)
    assert_same(play(on_gpu, number=20), expected, atol=1e-3)
    seen, seconds = on_gpu.memory.graphs, on_gpu.capture_seconds
    assert_same(play(on_gpu, number=20), expected, atol=1e-3)
    assert (on_gpu.memory.graphs, on_gpu.capture_seconds) == (seen, seconds)
    assert graphs.items() <= seen.items()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [Qwen2Config, GPT2Config])  # autocast itself casts the weights of the latter
def test_graphs_that_outlive_a_rollout_read_the_new_weights_in_bf16(config, house_policy):
    kept, fresh = (Policy(random_policy(config, house_policy).model.cuda(), house_policy.tokenizer) for _ in range(2))
    with sampling_weights(kept.model, "bf16"):
        before = play(kept)
    with torch.no_grad():
        for policy in (kept, fresh):
            for weight in policy.model.parameters():
                weight.mul_(1.1)
    played = []
    for policy in (kept, fresh):
        with sampling_weights(policy.model, "bf16"):
            played.append(play(policy))
    assert kept.capture_seconds > 0
    assert_same(*played, atol=1e-2)
    assert played[0] != before


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
