"""Log-probs from hidden states: the numbers of `empg.token_logp_and_entropy`, without the (N, V) logits."""

import copy

import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from empg import token_logp_and_entropy
from engine import scorer
from engine.scorer import ScoringHead, make_scorable
from imitate import empty_model
from policy import PolicyError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # logits of several nats
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 97, (3, 12), generator=GENERATOR)
MASK = (torch.rand(3, 12, generator=GENERATOR) < 0.4) & (torch.arange(12) > 0)
WEIGHT = torch.randn(int(MASK.sum()), generator=GENERATOR)


def small(kind: str = "Qwen2", **changes):
    """A small random model of a family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SMALL | changes))


def plain(model, temperature: float = 1.0) -> torch.Tensor:
    """logp of the sampled tokens from the model's own logits."""
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    return token_logp_and_entropy(logits, IDS[:, 1:], temperature)[0][MASK[:, 1:]]


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Qwen3", "Gemma", "Mistral", "Olmo2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("elements", [1, 300, 2**26])  # a token or a word at a time, some, all at once
def test_values_and_gradients_are_those_of_the_formula_in_every_family(kind, tied, elements, monkeypatch):
    monkeypatch.setattr(scorer, "CHUNK_ELEMENTS", elements)
    model = small(kind, tie_word_embeddings=tied)
    names, before = [name for name, _ in model.named_parameters()], plain(model, 0.7)
    make_scorable(model)
    assert isinstance(model.lm_head, ScoringHead)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert [name for name, _ in model.named_parameters()] == names
    expected = plain(model, 0.7)
    torch.testing.assert_close(expected, before, rtol=0, atol=0)  # a call for logits is what it was
    logp = model(input_ids=IDS, sampled=MASK, temperature=0.7)
    torch.testing.assert_close(logp, expected)
    got, wanted = (torch.autograd.grad((x * WEIGHT).sum(), model.parameters()) for x in (logp, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("elements", [1, 7, 2**26])
def test_the_gradient_of_hidden_states_and_weight_is_the_finite_difference(elements, monkeypatch):
    monkeypatch.setattr(scorer, "CHUNK_ELEMENTS", elements)
    head = ScoringHead(3, 5, bias=False).double()
    hidden, ids = torch.randn(4, 3, dtype=torch.float64, generator=GENERATOR), torch.tensor([0, 4, 4, 2])
    hidden.requires_grad_()

    def logp(hidden, weight):
        return torch.func.functional_call(head, {"weight": weight}, (hidden, ids, 0.7))

    assert torch.autograd.gradcheck(logp, (hidden, head.weight))


@pytest.mark.parametrize("elements", [300, 2**26])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_plain_code(elements, monkeypatch):
    """The weight's gradient is written once. Added up over chunks in bfloat16 it would lose digits."""
    monkeypatch.setattr(scorer, "CHUNK_ELEMENTS", elements)
    ids, upstream = torch.randint(200, (64,), generator=GENERATOR), torch.randn(64, generator=GENERATOR)
    inputs = [torch.randn(*shape, generator=GENERATOR).bfloat16() for shape in ((64, 16), (200, 16))]

    def results(dtype, score):
        hidden, weight = (x.to(dtype).requires_grad_() for x in inputs)
        logp = score(hidden, weight, ids)
        gradients = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))
        return [x.double() for x in (logp, *gradients)]

    def of_logits(hidden, weight, ids):
        return token_logp_and_entropy(F.linear(hidden, weight)[None], ids[None])[0][0]

    truth, theirs = results(torch.float64, of_logits), results(torch.bfloat16, of_logits)
    ours = results(torch.bfloat16, scorer._Score.apply)
    for exact, a, b in zip(truth, ours, theirs, strict=True):
        assert (a - exact).norm() <= 1.2 * (b - exact).norm() + 1e-6


def test_a_banned_token_has_probability_0():
    head = ScoringHead(2, 4, bias=False)
    head.weight.data = torch.tensor([[1.0, 0.5], [0.0, 2.0], [float("-inf")] * 2, [1.0, 1.0]])
    hidden, ids = torch.tensor([[1.0, 2.0], [0.5, 0.25]]), torch.tensor([1, 2])
    logp = head(hidden, ids)
    torch.testing.assert_close(logp[None], token_logp_and_entropy(head(hidden)[None], ids[None])[0])
    assert logp[1] == float("-inf")


def test_no_sampled_token_still_gives_every_parameter_a_gradient():
    """DDP waits for the gradient of every parameter."""
    model = make_scorable(small())
    logp = model(input_ids=IDS, sampled=torch.zeros_like(MASK))
    assert logp.shape == (0,)
    logp.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_head_sees_each_sampled_token_once():
    model, rows = make_scorable(small()), []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(input_ids=IDS, sampled=MASK).sum().backward()
    assert rows == [MASK.sum()]


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.seen.update(x.numel() for x in (result if isinstance(result, tuple) else [result]) if torch.is_tensor(x))
        return result


@pytest.mark.parametrize("elements", [970, 2**26])
def test_no_tensor_of_all_logits_is_made_or_held(elements, monkeypatch):
    """Full-vocabulary log-probabilities of a whole batch took 80 GB."""
    monkeypatch.setattr(scorer, "CHUNK_ELEMENTS", elements)
    head, ids, held = ScoringHead(4, 97, bias=False), torch.randint(97, (50,), generator=GENERATOR), []
    hidden = torch.randn(50, 4, generator=GENERATOR, requires_grad=True)

    def hold(x):
        held.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x), Sizes() as sizes:
        head(hidden, ids, 0.7).sum().backward()
    assert sorted(held) == [50, 50, 50 * 4, 4 * 97]  # ids, log_norm, hidden states, weight
    assert max(sizes.seen) == min(elements, 50 * 97)  # the logits of 10 tokens, or of 10 words: here both are 970


def test_under_autocast_scores_have_the_precision_of_the_logits_there():
    model = make_scorable(small())
    exact = plain(model)
    score = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model))  # as Accelerate wraps a model
    logp = score(input_ids=IDS, sampled=MASK)
    assert logp.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logp, plain(model), rtol=1e-3, atol=1e-3)
    assert (logp - exact).abs().max() > 1e-3  # it was not computed in float32
    logp.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_a_copy_and_a_saved_model_are_models_of_their_own(tmp_path):
    model = make_scorable(small())
    assert make_scorable(model) is model
    other = copy.deepcopy(model)
    other.lm_head.weight.data.zero_()
    assert not torch.equal(*(x(input_ids=IDS, sampled=MASK) for x in (model, other)))
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    torch.testing.assert_close(opened(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert type(opened.lm_head) is torch.nn.Linear


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Gemma2", {}, "logits are not lm_head"),  # a cap
        ("MiniCPM3", {}, "logits are not lm_head"),  # a scale of what the head gets
        ("Cohere", {}, "logits are not lm_head"),  # a scale
        ("Granite", {"logits_scaling": 8.0}, "logits are not lm_head"),
        ("Phi", {}, "not a linear layer without bias"),
    ],
)
def test_a_model_that_computes_its_logits_in_another_way_is_refused(kind, changes, message):
    with pytest.raises(PolicyError, match=message):
        make_scorable(small(kind, **changes))
    with pytest.raises(PolicyError, match=message):  # as the dry run makes it
        make_scorable(empty_model(small(kind, **changes).config))
