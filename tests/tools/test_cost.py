"""The dry run: its formula is held to what PyTorch keeps and allocates, its presets to the settings that they name."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from config import TrainConfig, parse_config
from engine.scorer import make_scorable
from policy import PolicyError
from tools import cost
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
    shape = cost.shape_of(model_config(kind, *sizes))
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def kept(layers: int, compute: int, checkpointing: bool, tokens: int = 192) -> int:
    """Bytes that PyTorch keeps for the backward pass of a small model, without weights and their casts."""
    config = model_config(Qwen2Config, 256, 640, layers, 4, 2, 128, True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
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
    size = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # noqa: E731
    moments = [part[name] for part in learner.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    always = cost.memory(settings, cost.shape_of(model.config), 1, 4)["always"]
    assert always == {
        "weights": size(model.parameters()),
        "AdamW": size(moments),
        "reference": size(learner.reference.parameters()),
    }


def test_processes_share_weights_with_fsdp_and_tasks_always():
    shape = cost.shape_of(model_config(Qwen2Config, 64, 192, 4, 4, 2, 1000, True))
    plain = TrainConfig(kl_coef=0.1, tasks_per_iteration=6, group_size=4)
    one, three = (cost.memory(plain, shape, ranks, 2) for ranks in (1, 3))
    assert one["always"] == three["always"]
    assert three["sampling"]["KV cache"] == one["sampling"]["KV cache"] / 3
    assert cost.tasks_of_rank(plain, 4) == 2  # the busiest of four
    sharded = cost.memory(replace(plain, fsdp=True), shape, 3, 2)
    assert sharded["always"]["AdamW"] == one["always"]["AdamW"] / 3
    assert sharded["update"]["gradients"] == one["update"]["gradients"] / 3
    assert sharded["sampling"]["weights to sample with"] == 2 * shape.parameters  # whole, on every rank
    assert cost.memory(replace(plain, kl_coef=0.0), shape, 1, 2)["always"]["reference"] == 0


def test_arithmetic_of_an_update_is_what_pytorch_counts():
    """FLOP of forward and backward passes by PyTorch's own counter, on a model whose attention is small."""
    config = model_config(Qwen2Config, 128, 384, 3, 4, 2, 512, True)
    model = make_scorable(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager"))
    ids, sampled = torch.randint(512, (2, 48)), torch.arange(48) % 4 > 1  # half of the tokens
    with FlopCounterMode(display=False) as counter:
        logp = model(input_ids=ids, sampled=sampled.expand(2, 48))
        logp.sum().backward()
    work = cost.Work(episodes=2, group=2, opening=2, turns=12, sampled=2, inserted=2)
    machine = cost.Machine(layer=0, decode=1, update=1)
    parts = cost.seconds(cost.shape_of(config), work, machine, TrainConfig())
    assert parts["update"] == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert parts["read"] == pytest.approx(2 * cost.shape_of(config).body * (2 + 2 * 22))  # the opening once for both
    assert parts["decode"] == 24 * 2 * (cost.shape_of(config).body + 128 * 512) * 2


def test_the_slower_of_arithmetic_and_memory_sets_the_decode_step_and_links_add_up():
    shape, work = cost.shape_of(model_config(Qwen2Config, 64, 192, 2, 4, 2, 500, True)), cost.Work(4, 4, 20, 3, 10, 20)
    slow = cost.Machine(layer=0, decode=1e30, update=1, bandwidth=10)
    cache = 2 * 2 * 32 * 4 * 4 * 45  # keys and values, layers, width, bytes, episodes, half of the length
    weights = 4 * shape.parameters - 4 * (shape.parameters - shape.body - 64 * 500)
    assert cost.seconds(shape, work, slow, TrainConfig())["decode"] == pytest.approx(30 * (weights + cache) / 10)
    linked = replace(slow, link=100)
    alone, two = (cost.seconds(shape, work, linked, TrainConfig(), ranks) for ranks in (1, 2))
    assert alone["communicate"] == 0
    assert two["communicate"] == pytest.approx(2 * 2 * 4 * shape.parameters / 2 / 100)  # two optimizer steps


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def large(tmp_path) -> Path:
    """A folder with the configuration of a model of 7 billion parameters, and nothing else."""
    model_config(Qwen2Config, *PUBLISHED["Qwen/Qwen2.5-7B-Instruct"][2]).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


def test_a_dry_run_reads_no_weights_and_names_what_it_would_load(large, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    flags = ["--policy", str(large), "--dry_run", "8", "--fsdp", "--gradient_checkpointing", "--kl_coef", "0.01"]
    text = cost.dry_run(parse_config(TrainConfig, flags))
    for line in ("7,615,616,512 parameters", "8, FSDP2, mixed precision bf16", "64 episodes of at most 1,024 tokens"):
        assert line in text
    assert "fits 80 GB" in text


def test_a_model_that_does_not_fit_ends_the_dry_run_with_what_to_change(large):
    with pytest.raises(SystemExit, match=r"does not fit 80 GB.*try --gradient_checkpointing, --fsdp"):
        cost.dry_run(parse_config(TrainConfig, ["--policy", str(large), "--dry_run", "1"]))


def test_a_dry_run_without_a_model_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match=r"no configuration of a model at .*empty"):
        cost.dry_run(parse_config(TrainConfig, ["--policy", str(tmp_path / "empty"), "--dry_run", "1"]))


def test_a_dry_run_of_the_tiny_model_says_its_sizes():
    assert "2 layers of width 64, vocabulary 1,024" in cost.dry_run(parse_config(TrainConfig, ["--dry_run", "1"]))


# ---------------------------------------------------------------------------------------------------------- the presets

PRESETS = [
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
METHODS = {
    "GRPO": ["--no_empg"],
    "GRPO + EMPG": [],
    "DAPO": ["--algorithm", "dapo", "--no_empg"],
    "DAPO + EMPG": ["--algorithm", "dapo"],
}


def flags_of(world: str, model: str, *more: str, **variables: str) -> list[str]:
    """The flags that a preset gives train.py."""
    places = {"ALFWORLD_DATA": "games", "WEBSHOP_DATA": "shop", "QUESTIONS": "q.json", "RETRIEVER": "http://host:8000"}
    command = ["bash", str(ROOT / "runs" / f"llm_{world}.sh"), model, *more]
    environ = os.environ | places | {"LAUNCH": "echo"} | variables
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1:]


@pytest.mark.parametrize(("world", "model", "policy", "ranks"), PRESETS)
def test_a_preset_fits_its_gpus_and_has_the_published_settings(world, model, policy, ranks, tmp_path, monkeypatch):
    _, kind, sizes = PUBLISHED[policy]
    model_config(kind, *sizes).save_pretrained(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse_config(TrainConfig, flags_of(world, model)).policy == policy
    for method, flags in METHODS.items():
        given = flags_of(world, model, *flags, "--dry_run", str(ranks), POLICY=str(tmp_path))
        config = parse_config(TrainConfig, given)
        assert "fits" in cost.dry_run(config)
        assert (config.algorithm, config.empg) == (method.split()[0].lower(), "EMPG" in method)
        assert (config.learning_rate, config.iterations, config.group_size, config.example) == (1e-6, 150, 8, True)
        steps = {"alfworld": "max_steps=50", "webshop": "max_steps=15", "search": "max_steps=4"}
        assert (config.env, steps[world] in config.env_args) == (world, True)
        assert config.tasks_per_iteration == (256 if world == "search" else 16)


@pytest.mark.parametrize("world", ["alfworld", "webshop", "search"])
def test_a_preset_of_no_such_model_ends_with_one_line(world):
    command = ["bash", str(ROOT / "runs" / f"llm_{world}.sh"), "gpt2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "no preset for gpt2\n")
