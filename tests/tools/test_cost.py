"""The dry run: its formula is held to what PyTorch keeps and allocates, its presets to the settings that they name."""

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from config import TrainConfig, parse_config
from engine import sampler
from engine.sampler import Sampler
from engine.scorer import make_scorable
from imitate import empty_model
from policy import Policy, PolicyError
from tests import sweep_architectures as sweep
from tools import cost, speed
from update import make_learner

ROOT = Path(__file__).parents[2]

# From the models' cards: billions of parameters.
PUBLISHED = {
    "Qwen/Qwen2.5-1.5B-Instruct": (1.54, Qwen2Config, (1536, 8960, 28, 12, 2, 151936, True)),
    "Qwen/Qwen2.5-7B-Instruct": (7.61, Qwen2Config, (3584, 18944, 28, 28, 4, 152064, False)),
    "Qwen/Qwen2.5-32B-Instruct": (32.5, Qwen2Config, (5120, 27648, 64, 40, 8, 152064, False)),
    "meta-llama/Llama-3.1-8B-Instruct": (8.03, LlamaConfig, (4096, 14336, 32, 32, 8, 128256, False)),
}


def model_config(kind: type, width: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool):
    return kind(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


# ---------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(("billions", "kind", "sizes"), PUBLISHED.values(), ids=PUBLISHED)
def test_parameters_are_those_of_the_models_cards(billions, kind, sizes):
    shape = cost.shape_of(empty_model(model_config(kind, *sizes)))
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def kept(layers: int, compute: int, checkpointing: bool, tokens: int = 192) -> int:
    """Bytes that PyTorch keeps for the backward pass of a small model, without weights and their casts."""
    config = model_config(Qwen2Config, 256, 640, layers, 4, 2, 128, True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    weights = {parameter.shape for parameter in model.parameters()} | {
        p.T.shape for p in model.parameters() if p.dim() > 1
    }
    storages = {}

    def keep(tensor):
        if tensor.shape not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == 2),
    ):
        model.base_model(input_ids=torch.randint(128, (1, tokens)), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values()) / tokens


@pytest.mark.parametrize("compute", [4, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_layer_are_what_pytorch_keeps(compute, checkpointing):
    of_a_layer = (kept(4, compute, checkpointing) - kept(2, compute, checkpointing)) / 2
    shape = cost.Shape(parameters=0, body=0, layers=1, width=256, inner=640, keys=128, vocabulary=0)
    settings = TrainConfig(gradient_checkpointing=checkpointing, micro_batch_tokens=10**6, max_tokens=10**6)
    one, two = (
        cost.memory(settings, replace(shape, layers=layers), 1, compute)["update"]["activations"] / 10**6
        for layers in (1, 2)
    )
    assert of_a_layer == pytest.approx(two - one, rel=0.01)


def test_weights_gradients_and_moments_are_what_a_learner_allocates(house_policy, tmp_path):
    settings = TrainConfig(kl_coef=0.1)
    house_policy.save(tmp_path)
    learner = make_learner(settings, Accelerator(cpu=True), str(tmp_path), str(tmp_path))
    model = learner.policy.model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = [part[name] for part in learner.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    always = cost.memory(settings, cost.shape_of(model), 1, 4)["always"]
    assert always == {
        "weights": size(model.parameters()),
        "AdamW": size(moments),
        "reference": size(learner.reference.parameters()),
    }


def test_processes_share_weights_with_fsdp_and_tasks_always():
    shape = cost.shape_of(empty_model(model_config(Qwen2Config, 64, 192, 4, 4, 2, 1000, True)))
    plain = TrainConfig(kl_coef=0.1, tasks_per_iteration=12, group_size=4, eval_tasks=1)
    one, three = (cost.memory(plain, shape, ranks, 2) for ranks in (1, 3))
    assert one["always"] == three["always"]
    assert three["sampling"]["KV cache"] == one["sampling"]["KV cache"] / 3
    assert cost.tasks_of_rank(plain, 5) == 3  # the busiest of five
    sharded = cost.memory(replace(plain, fsdp=True), shape, 3, 2)
    assert sharded["always"]["AdamW"] == one["always"]["AdamW"] / 3
    assert sharded["update"]["gradients"] == one["update"]["gradients"] / 3
    assert sharded["sampling"]["weights to sample with"] == 2 * shape.parameters  # whole, on every rank
    assert cost.memory(replace(plain, kl_coef=0.0), shape, 1, 2)["always"]["reference"] == 0


def test_the_cache_has_the_rows_and_columns_that_the_sampler_reserves_on_a_gpu(house_policy, monkeypatch):
    """Evaluation plays more episodes at once than training. Its memory stays, and both are rounded up."""
    monkeypatch.setattr(sampler, "CAPTURED", ("cpu",))
    monkeypatch.setitem(sampler.ROUNDING, "cpu", sampler.ROUNDING["cuda"])
    policy = Policy(house_policy.model, house_policy.tokenizer)
    config = TrainConfig(tasks_per_iteration=1, group_size=8, eval_tasks=33, max_tokens=300)
    for episodes in (8, 17):  # of training, of evaluation by the busier of two ranks
        Sampler(policy, [[1, 2, 3]] * episodes, 1.0, 4, config.max_tokens)
    buffers = [buffer for layer in policy.memory.cache.layers for buffer in layer.buffers]
    allocated = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
    assert cost.memory(config, cost.shape_of(policy.model), 2, 4)["sampling"]["KV cache"] == allocated


def test_what_sampling_takes_stays_during_the_update_unless_weights_are_sharded():
    """Graphs, cache and cast weights were made anew in each iteration; the formula took the larger of the two."""
    parts = {"always": {"weights": 1.0, "AdamW": 2.0}, "sampling": {"KV cache": 10.0}, "update": {"gradients": 5.0}}
    assert cost.at_most(TrainConfig(), parts) == 18
    assert cost.at_most(TrainConfig(fsdp=True), parts) == 13


def test_arithmetic_of_an_update_is_what_pytorch_counts():
    """FLOP of forward and backward passes by PyTorch's own counter, on a model whose attention is small."""
    config = model_config(Qwen2Config, 128, 384, 3, 4, 2, 512, True)
    model = make_scorable(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager"))
    ids, sampled = torch.randint(512, (2, 48)), torch.arange(48) % 4 > 1  # half of the tokens
    with FlopCounterMode(display=False) as counter:
        logp = model(input_ids=ids, sampled=sampled.expand(2, 48))
        logp.sum().backward()
    work = speed.Work(episodes=2, group=2, prompt=2, turns=12, sampled=2, inserted=2)
    machine = speed.Machine(layer=0, flop=1)
    parts = speed.seconds(cost.shape_of(model), work, machine, TrainConfig())
    assert parts["update"] == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert parts["read"] == pytest.approx(2 * cost.shape_of(model).body * (2 + 2 * 22))  # the prompt once for both
    assert parts["decode"] == 24 * 2 * (cost.shape_of(model).body + 128 * 512) * 2


def test_the_slower_of_arithmetic_and_memory_sets_the_decode_step_and_links_add_up():
    shape = cost.shape_of(empty_model(model_config(Qwen2Config, 64, 192, 2, 4, 2, 500, True)))
    work = speed.Work(episodes=4, group=4, prompt=20, turns=3, sampled=10, inserted=20)
    slow = speed.Machine(layer=0, flop=1e30, bandwidth=10)
    cache = 2 * 2 * 32 * 4 * 4 * 45  # keys and values, layers, width, bytes, episodes, half of the length
    weights = 4 * shape.parameters - 4 * (shape.parameters - shape.body - 64 * 500)
    assert speed.seconds(shape, work, slow, TrainConfig())["decode"] == pytest.approx(30 * (weights + cache) / 10)
    linked = replace(slow, link=100)
    alone, two = (speed.seconds(shape, work, linked, TrainConfig(), ranks) for ranks in (1, 2))
    assert alone["communicate"] == 0
    assert two["communicate"] == pytest.approx(2 * 2 * 4 * shape.parameters / 2 / 100)  # two optimizer steps


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def large(tmp_path) -> Path:
    """A folder with the configuration of a model of 7 billion parameters, and nothing else."""
    model_config(Qwen2Config, *PUBLISHED["Qwen/Qwen2.5-7B-Instruct"][2]).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


@pytest.fixture
def run_cost(monkeypatch, capsys):
    """python -m tools.cost in this process: what it prints."""

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cost.py", *flags])
        cost.main()
        return capsys.readouterr().out

    return call


def test_a_dry_run_reads_no_weights_and_names_what_it_would_load(large, run_cost):
    own = ["--processes", "8", "--mixed_precision", "bf16"]
    text = run_cost("--policy", str(large), *own, "--fsdp", "--gradient_checkpointing", "--kl_coef", "0.01")
    for line in ("7,615,616,512 parameters", "8, FSDP2, mixed precision bf16", "64 episodes of at most 2,048 tokens"):
        assert line in text
    assert "fits 80 GB" in text


def test_a_model_that_does_not_fit_ends_the_dry_run_with_what_to_change(large, run_cost):
    with pytest.raises(SystemExit, match=r"does not fit 80 GB.*try --gradient_checkpointing, --fsdp"):
        run_cost("--policy", str(large))
    assert "fits 2000 GB" in run_cost("--policy", str(large), "--gpu_memory", "2000")


def test_a_dry_run_without_a_model_says_so(tmp_path, run_cost):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match=r"no policy at .*empty"):
        run_cost("--policy", str(tmp_path / "empty"))


LOGITS = r"^the update cannot use this model: its logits are not lm_head of the last hidden state$"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gemma2", {}, LOGITS),
        ("mistral", {"sliding_window": 499}, r"^only full attention .* window has 499 tokens; --max_tokens 500 must"),
        ("llama", {"max_position_embeddings": 499}, r"^the model has 499 positions; --max_tokens 500 must not be"),
        ("jamba", {}, r"^only full attention .* cache has layers of the type LinearAttentionLayer$"),
        ("qwen2_vl", {}, r"^the dry run cannot describe '[^\n]*': Unrecognized configuration class [^\n]*$"),
        ("blt", {}, r"^the dry run cannot describe '[^\n]*': 'BltConfig' object has no attribute [^\n]*$"),
    ],
)
def test_the_dry_run_refuses_what_training_refuses_in_one_line(name, settings, message, tmp_path, run_cost):
    """Eight architectures fitted that training refused, and vision-language models ended in a traceback."""
    described = sweep.tiny_config(CONFIG_MAPPING[name], **settings)
    described.save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=message):
        run_cost("--policy", str(tmp_path), "--max_tokens", "500")


@pytest.mark.parametrize(("name", "inner", "keys"), [("gpt2", 256, 64), ("gemma3", 64, 32)])
def test_the_sizes_of_a_model_are_found_under_other_names(name, inner, keys):
    """GPT-2 does not name the width of its MLP, and a vision-language model has a configuration for its text."""
    shape = cost.shape_of(make_scorable(empty_model(sweep.tiny_config(CONFIG_MAPPING[name]))))
    assert (shape.layers, shape.width, shape.inner, shape.keys) == (2, 64, inner, keys)
    assert shape.vocabulary == len(sweep.tokenizer())


def test_a_dry_run_takes_the_flags_of_training_its_own_and_no_others(run_cost, capsys):
    assert "2 layers of width 64, vocabulary 1,024" in run_cost()
    assert "world       house max_steps=5 objects=4\n" in run_cost("--env_args", "max_steps=5", "objects=4")
    for flags, line in ((["--proces", "2"], "unknown arguments: --proces 2"), (["--processes", "0"], "at least 1")):
        with pytest.raises(SystemExit, match="2"):
            run_cost(*flags)
        assert line in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the presets

PRESETS = [
    ("house", "qwen1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 8),
    ("alfworld", "qwen1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 8),
    ("alfworld", "qwen7b", "Qwen/Qwen2.5-7B-Instruct", 8),
    ("alfworld", "llama8b", "meta-llama/Llama-3.1-8B-Instruct", 8),
    ("webshop", "qwen1.5b", "Qwen/Qwen2.5-1.5B-Instruct", 8),
    ("webshop", "qwen7b", "Qwen/Qwen2.5-7B-Instruct", 8),
    ("webshop", "llama8b", "meta-llama/Llama-3.1-8B-Instruct", 8),
    ("search", "qwen7b", "Qwen/Qwen2.5-7B-Instruct", 8),
    ("search", "qwen32b", "Qwen/Qwen2.5-32B-Instruct", 32),
    ("search", "llama8b", "meta-llama/Llama-3.1-8B-Instruct", 8),
]
STEPS = {"house": 40, "alfworld": 50, "webshop": 15, "search": 4}
METHODS = {
    "GRPO": ["--no_empg"],
    "GRPO + EMPG": [],
    "DAPO": ["--algorithm", "dapo", "--no_empg"],
    "DAPO + EMPG": ["--algorithm", "dapo"],
}


def preset(world: str, model: str, *more: str, **variables: str) -> subprocess.CompletedProcess:
    """runs/llm.sh: the flags that it gives train.py are printed."""
    places = {"ALFWORLD_DATA": "games", "WEBSHOP_DATA": "shop", "QUESTIONS": "q.json", "RETRIEVER": "http://host:8000"}
    command = ["bash", str(ROOT / "runs" / "llm.sh"), world, model, *more]
    environ = os.environ | places | {"TRAIN": "echo"} | variables
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("world", "model", "policy", "ranks"), PRESETS)
def test_a_preset_fits_its_gpus_and_has_the_published_settings(world, model, policy, ranks, tmp_path, monkeypatch):
    _, kind, sizes = PUBLISHED[policy]
    described = model_config(kind, *sizes)
    described.save_pretrained(tmp_path)
    empty = empty_model(described)  # once for all methods
    monkeypatch.setattr(cost, "empty_model", lambda _: empty)
    published = parse_config(TrainConfig, preset(world, model).stdout.split())
    assert published.policy == policy
    parts = cost.memory(published, cost.shape_of(empty), ranks, 2)
    sums = [sum(terms.values()) for terms in parts.values()] + [cost.at_most(published, parts)]
    row = " | ".join([f"{world} {model}", str(ranks), *(f"{size / 1e9:.1f}" for size in sums)])
    assert f"\n| {row} |\n" in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    for method, flags in METHODS.items():
        config = parse_config(TrainConfig, preset(world, model, *flags, POLICY=str(tmp_path)).stdout.split())
        assert "fits" in cost.dry_run(config, ranks, 141 if model == "qwen32b" else 80, "bf16")
        assert (config.algorithm, config.empg) == (method.split()[0].lower(), "EMPG" in method)
        assert (config.learning_rate, config.iterations, config.group_size) == (1e-6, 150, 8)
        assert (config.env, f"max_steps={STEPS[world]}" in config.env_args) == (world, True)
        assert config.example == (world != "house")
        assert config.tasks_per_iteration == (256 if world == "search" else 16)


def test_a_preset_can_be_dry_run(large, run_cost):
    """TRAIN is the command that gets the preset's flags, and its status is that of the script."""
    printed = preset("alfworld", "qwen7b", POLICY=str(large), TRAIN="echo --gpu_memory 10").stdout
    with pytest.raises(SystemExit, match="does not fit 10 GB") as end:
        run_cost(*printed.split())
    assert "world       alfworld restate_task=0 max_steps=50 data=games" in str(end.value)
    assert preset("alfworld", "qwen7b", TRAIN="false").returncode == 1


@pytest.mark.parametrize("world", ["alfworld", "webshop", "search", "house", "mars"])
def test_a_preset_of_no_such_model_ends_with_one_line(world):
    done = preset(world, "gpt2")
    assert (done.returncode, done.stderr) == (2, f"no preset for gpt2 in {world}\n")
