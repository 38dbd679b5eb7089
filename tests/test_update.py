"""What an update works on: the same numbers as while sampling, micro-batches by tokens, the loss, memory."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import eval as evaluation
import imitate
import train
import update
from config import TrainConfig
from engine import checkpoint, sampler_check
from engine.checkpoint import CheckpointError
from engine.ranks import weights_for_sampling
from engine.record import update_metrics
from engine.scorer import checkpoint_layers
from engine.stopping import NotFiniteError
from envs import make_envs
from episode import Task, collate
from policy import Policy, PolicyError
from rollout import rollout

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = TrainConfig(tasks_per_iteration=3, group_size=2, temperature=0.7, learning_rate=1e-3, threads=1)


@pytest.fixture
def learner(house_policy, tmp_path):
    house_policy.save(tmp_path / "policy")
    return update.make_learner(CONFIG, Accelerator(cpu=True), *[str(tmp_path / "policy")] * 2)


@pytest.fixture
def batch(house_episodes):
    return collate(house_episodes)


@pytest.fixture
def advantage(batch):
    """(B, S), another number for every step."""
    return torch.linspace(-1, 1, batch.step_ids.max() * 6 + 6).view(6, -1)


def changed(**flags) -> TrainConfig:
    return TrainConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | flags)


# ---------------------------------------------------------------------------------------------------- micro-batches


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    budget=st.integers(1, 200),
    ranks=st.integers(1, 5),
    data=st.data(),
)
@settings(deadline=None, derandomize=True)
def test_every_row_is_in_one_part_of_one_rank_within_the_budget(lengths, budget, ranks, data):
    """Ranks with different numbers of parts would wait for each other for ever."""
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    config, parts = changed(micro_batch_tokens=budget), []
    for rank in range(ranks):
        accelerator = SimpleNamespace(process_index=rank, num_processes=ranks)
        parts.append(update.micro_batches(config, accelerator, torch.tensor(lengths), rows))
    assert len({len(of_rank) for of_rank in parts}) == 1
    counted = [part for of_rank in parts for part, weight in of_rank if weight]
    assert sorted(row for part in counted for row in part) == sorted(rows)
    for part in counted:
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= budget
    for part, weight in (part for of_rank in parts for part in of_rank):
        assert weight in (0, ranks)
        assert set(part) <= set(rows)


def test_a_rank_alone_fills_its_parts():
    config = changed(micro_batch_tokens=40)
    parts = update.micro_batches(config, Accelerator(cpu=True), torch.tensor([50, 10, 20, 19, 9, 21]), range(6))
    assert parts == [([4, 1], 1), ([3, 2], 1), ([5], 1), ([0], 1)]  # 3 x 19 > 40; 50 is too long and goes alone


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_micro_batches_do_not_change_the_update(house_policy, batch, advantage, tmp_path, monkeypatch, aggregation):
    """A normaliser taken per micro-batch makes a mean of means (nanochat, GRPO-Zero before its fix).

    With plain SGD the update is the gradient; Adam divides even the last bit of a gradient of nearly 0 by its size.
    """

    def sgd(parameters, lr, weight_decay):
        return torch.optim.SGD(parameters, lr=1.0)

    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    monkeypatch.setattr(update, "MAX_GRAD_NORM", 0.1)  # the loss has a gradient of about 1
    house_policy.save(tmp_path / "policy")
    weights, sums, paths = [], [], [str(tmp_path / "policy")] * 2
    for tokens in (1, 10**6):
        config = changed(aggregation=aggregation, mini_batches=2, micro_batch_tokens=tokens)
        learner = update.make_learner(config, Accelerator(cpu=True), *paths)
        sums.append(update.update(config, learner, batch, advantage, 1))
        weights.append(learner.policy.model.state_dict())
    assert sums[0] == pytest.approx(sums[1], abs=1e-6, rel=1e-5)
    assert sums[0]["grad_norm"] > 0.5
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=0, atol=2e-6)
        assert not torch.equal(one, house_policy.model.state_dict()[name])


# ---------------------------------------------------------------------------------------------------------- the loss


def test_the_update_computes_the_log_probs_that_were_captured(learner, batch):
    logp = update.sampled_logp(learner.model, batch, CONFIG.temperature)
    torch.testing.assert_close(logp, batch.old_logp, rtol=0, atol=1e-4)
    assert not logp[~batch.mask].any()


def test_kl_rollout_is_rounding_in_float32_and_takes_no_pass_of_its_own(learner, batch, advantage):
    passes = []
    learner.policy.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    config = changed(mini_batches=3, epochs=2, micro_batch_tokens=10**6)
    sums = update.update(config, learner, batch, advantage, 1)
    row = update_metrics(sums)
    assert row["policy/kl_rollout"] < 1e-8 < row["policy/kl_old"]
    assert sums["rollout_tokens"] < batch.mask.sum()  # those of the first mini-batch
    assert len(passes) == 6


@pytest.mark.usefixtures("no_precision_yet")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_kl_rollout_of_bf16_is_rounding_and_not_0(device, house_policy, advantage, tmp_path):
    """It was 0.0 in rows of a GPU that were taken for bf16. The runs were in float32: `python train.py` sets no
    mixed precision. There a token has the same bits in a decode step and in a whole episode, up to one in 40,000."""
    house_policy.save(tmp_path)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    learner = update.make_learner(CONFIG, accelerator, str(tmp_path), str(tmp_path))
    tasks, envs = [Task("house", "eval", seed) for seed in range(6)], make_envs("house", ["max_steps=3"], 6)
    with weights_for_sampling(accelerator, learner.policy.model):
        episodes = rollout(learner.policy, envs, tasks, [(0, task.seed) for task in tasks], **CONFIG.limits)
    batch = collate(episodes, accelerator.device)
    sums = update.update(CONFIG, learner, batch, advantage[:, :3].to(accelerator.device), 1)
    assert batch.ids.device.type == device
    assert 1e-12 < update_metrics(sums)["policy/kl_rollout"] < 1e-2


def test_the_loss_has_the_kl_term_of_a_reference_that_is_scored_the_same_way(house_policy, batch, tmp_path):
    house_policy.save(tmp_path / "policy")
    config, paths = changed(kl_coef=0.5, mini_batches=1), [str(tmp_path / "policy")] * 2
    learner = update.make_learner(config, Accelerator(cpu=True), *paths)
    with torch.no_grad():
        learner.policy.model.lm_head.weight.mul_(1.2)
    advantage = torch.zeros_like(batch.old_logp)
    loss, sums = update.micro_batch_loss(config, learner, batch, advantage, len(batch.ids))
    logp, ref = (update.sampled_logp(model, batch, 0.7) for model in (learner.model, learner.reference))
    kl = torch.stack([(r - p).exp() - (r - p) - 1 for p, r in zip(logp, ref, strict=True)])  # (B, L)
    per_episode = torch.stack([row[mask].mean() for row, mask in zip(kl, batch.mask, strict=True)])
    torch.testing.assert_close(loss, 0.5 * per_episode.mean(), rtol=1e-4, atol=1e-6)
    assert sums["kl_ref"] == pytest.approx(kl.detach().sum().item(), rel=1e-4)
    assert sums["kl_ref"] > 0.1


def test_a_step_that_overflows_in_fp16_is_left_out_and_the_next_one_is_taken(house_policy, batch, advantage, tmp_path):
    """The run ended with "loss or gradient is not finite", where the scaler would have halved its scale."""
    house_policy.save(tmp_path)
    accelerator, config = Accelerator(cpu=True), changed(mini_batches=1)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    learner = update.make_learner(config, accelerator, str(tmp_path), str(tmp_path))
    before = {name: weight.clone() for name, weight in learner.policy.model.state_dict().items()}
    assert update.update(config, learner, batch, 1e6 * advantage, 1)["grad_norm"] == 0
    assert accelerator.scaler.get_scale() == 2.0**126
    assert all(torch.equal(weight, before[name]) for name, weight in learner.policy.model.state_dict().items())
    accelerator.scaler.update(1024.0)
    assert 0 < update.update(config, learner, batch, advantage, 2)["grad_norm"] < math.inf
    assert not torch.equal(learner.policy.model.lm_head.weight, before["lm_head.weight"])
    accelerator.scaler.update(0.5)
    accelerator.clip_grad_norm_ = lambda *_: torch.tensor(math.nan)
    with pytest.raises(NotFiniteError):  # no scale is small enough
        update.update(config, learner, batch, advantage, 3)


def test_gradient_checkpointing_is_on_while_learning(house_policy, batch, advantage, tmp_path):
    """Sampling puts the model into evaluation mode, where transformers keeps every activation."""
    house_policy.save(tmp_path / "policy")
    paths, passes = [str(tmp_path / "policy")] * 2, {}
    for checkpointing in (False, True):
        config = changed(gradient_checkpointing=checkpointing, mini_batches=1)
        learner = update.make_learner(config, Accelerator(cpu=True), *paths)
        layers, passes[checkpointing] = learner.policy.model.model.layers, 0

        def count(*_, checkpointing=checkpointing):
            passes[checkpointing] += 1

        rollout(learner.policy, [None], [], [])  # plays nothing
        layers[0].self_attn.register_forward_hook(count)
        update.update(config, learner, batch, advantage, 1)
    assert passes[True] == 2 * passes[False] > 0


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_what_an_environment_aborted_is_in_no_loss_and_no_normalizer(
    house_policy, house_episodes, advantage, tmp_path, aggregation
):
    """Episodes whose server was gone were trained as failures (prime-rl#1416, rllm#710)."""
    house_policy.save(tmp_path / "policy")
    left, weights = [0, 2, 3, 5], []
    aborted = [
        episode if row in left else replace(episode, info=episode.info | {"error": "ConnectionError: gone"})
        for row, episode in enumerate(house_episodes)
    ]
    for episodes, of_steps in ((aborted, advantage), ([house_episodes[row] for row in left], advantage[left])):
        config = changed(aggregation=aggregation, mini_batches=2, micro_batch_tokens=600)
        learner = update.make_learner(config, Accelerator(cpu=True), *[str(tmp_path / "policy")] * 2)
        sums = update.update(config, learner, collate(episodes), of_steps, 1)
        weights.append((sums, learner.policy.model.state_dict()))
    (sums, with_aborted), (expected, without) = weights
    assert sums == expected
    assert sums["tokens"] == sum(step >= 0 for row in left for step in house_episodes[row].step_ids)
    assert all(torch.equal(with_aborted[name], without[name]) for name in without)
    one = [episode if row == 2 else replace(episode, info={"error": ""}) for row, episode in enumerate(house_episodes)]
    assert update.update(changed(mini_batches=3), learner, collate(one), advantage, 1)["optimizer_steps"] == 1


NO_DROPOUT_YET = {
    "GPT2": {"n_positions": 1024, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.3, "attn_pdrop": 0.3},
    "OPT": {
        "max_position_embeddings": 1024,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.3,
        "layerdrop": 0.3,
    },
    "Qwen2": {"intermediate_size": 64, "num_key_value_heads": 2, "attention_dropout": 0.3},
    "Mixtral": {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.3}
    | {"sliding_window": None, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("kind", NO_DROPOUT_YET)
def test_gradient_checkpointing_switches_no_dropout_on(kind, house_policy, tmp_path):
    """In training mode kl_rollout rose from 5e-14 to 0.06: dropout, router jitter and layer drop (trl#3234)."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**size | NO_DROPOUT_YET[kind])
    Policy(AutoModelForCausalLM.from_config(settings), house_policy.tokenizer).save(tmp_path / "policy")
    sums, gradients, paths = [], [], [str(tmp_path / "policy")] * 2
    tasks, envs = [Task("house", "eval", seed) for seed in range(4)], make_envs("house", ["max_steps=2"], 4)
    for checkpointing in (False, True):
        config = changed(gradient_checkpointing=checkpointing, mini_batches=1)
        learner = update.make_learner(config, Accelerator(cpu=True), *paths)
        episodes = rollout(learner.policy, envs, tasks, [(0, task.seed) for task in tasks], **config.limits)
        batch = collate(episodes)
        sums.append(update.update(config, learner, batch, torch.ones(4, 2).cumsum(1) - 1.5, 1))
        assert update_metrics(sums[-1])["policy/kl_rollout"] < 1e-8
        gradients.append(learner.policy.model.state_dict())
    assert sums[0] == pytest.approx(sums[1], rel=1e-4, abs=1e-6)
    for name, weight in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], weight, rtol=0, atol=1e-5)


def test_a_model_whose_layers_cannot_be_checkpointed_is_refused():
    with pytest.raises(PolicyError, match="--gradient_checkpointing cannot be used with this model"):
        checkpoint_layers(torch.nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------------ memory


def hidden_by(outer: Exception, inner: Exception) -> Exception:
    """The error that is left if ending a capture, or closing a file, fails because of an earlier one."""
    outer.__context__ = inner
    return outer


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
OUT_OF_MEMORY = [
    FULL,
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the documentation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    hidden_by(RuntimeError("CUDA error: operation failed due to a previous error during capture"), FULL),
]


@pytest.mark.parametrize(
    ("module", "function", "call", "message"),
    [
        (
            update,
            "micro_batch_loss",
            lambda a: update.update(CONFIG, a.learner, a.batch, a.advantage, 1),
            "lower --micro_batch_tokens",
        ),
        (train, "rollout", lambda a: train.sample_round(CONFIG, a.learner, [a.env], 0), "lower --batch_size"),
        (
            evaluation,
            "rollout",
            lambda a: evaluation.evaluate(a.learner.policy, [a.env], [], CONFIG, a.learner.accelerator),
            "lower --batch_size",
        ),
        (
            sampler_check,
            "_play_probe",
            lambda a: update.make_learner(CONFIG, *a.where),
            "a smaller model, or .* --fsdp",
        ),
        (sampler_check, "_play_probe", lambda a: evaluation.load_player(a.where[1], CONFIG, a.where[0]), "a smaller"),
        (
            imitate,
            "load_policy",
            lambda a: imitate.cold_start(
                changed(policy=a.where[1], demonstrations=4, cache=f"{a.where[1]}_cache"), a.where[0], a.env
            ),
            "a smaller",
        ),
        (
            checkpoint,
            "load_shards",
            lambda a: checkpoint.restore(Path(a.where[1]), a.learner.policy, a.learner.optimizer),
            "a smaller model, or .* --fsdp",
        ),
    ],
    ids=["learn", "sample", "evaluate", "load", "load a player", "load to imitate", "load an optimizer"],
)
def test_out_of_memory_ends_with_the_setting_to_lower(
    module, function, call, message, learner, batch, advantage, tmp_path, monkeypatch
):
    def run_into(error: Exception) -> None:
        monkeypatch.setattr(module, function, lambda *_, **__: (_ for _ in ()).throw(error))
        call(SimpleNamespace(learner=learner, batch=batch, advantage=advantage, env=env, where=where))

    where = (learner.accelerator, *[str(tmp_path / "policy")] * 2)
    env = make_envs("coin", [], 1)[0]
    for error in OUT_OF_MEMORY:
        with pytest.raises(SystemExit, match=f"^out of memory while .*{message}") as end:
            run_into(error)
        assert "\n" not in str(end.value)
    with pytest.raises((RuntimeError, PolicyError, CheckpointError), match="shapes do not match"):
        run_into(RuntimeError("shapes do not match"))
