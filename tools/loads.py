"""Models with random weights, the work that benchmarks give them, and clocks."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Qwen2Config

from config import TrainConfig
from empg import step_entropy
from envs import PLAYERS, Env, make_envs
from episode import Batch, Episode, Task
from imitate import dialogue
from policy import Policy
from rollout import play_scripted, rollout
from tiny import tiny_tokenizer
from train import assign_credit, score
from update import Learner, make_learner


@dataclass(frozen=True)
class Load:
    """A Qwen2 with random weights, and the work that it is given."""

    sizes: tuple[int, ...]  # width, width of the MLP, layers, heads, heads of keys, vocabulary
    episodes: int  # sampled in parallel, to measure decode step and sampler
    trained: int  # episodes of an iteration
    step_tokens: int  # of one response; random weights rarely end it earlier
    context: int  # tokens of an episode, at most
    rows: int  # episodes of the measured update, each of `context` tokens
    together: int = 2  # longest episodes in a micro-batch
    turns: int = 15
    checkpointing: bool = False

    @property
    def model(self) -> Qwen2Config:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        sizes = dict(zip((*names, "vocab_size"), self.sizes, strict=True))
        return Qwen2Config(**sizes, max_position_embeddings=8192, tie_word_embeddings=True)

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(
            tasks_per_iteration=max(1, self.trained // 8),
            group_size=min(8, self.trained),
            mini_batches=1,
            learning_rate=1e-9,
            gradient_checkpointing=self.checkpointing,
            micro_batch_tokens=self.together * self.context,
            max_step_tokens=self.step_tokens,
            max_tokens=self.context,
        )


# By type of device. The sampler is measured with the last one alone.
LOADS = {
    "cpu": {
        "3M": Load((192, 704, 5, 6, 2, 4096), episodes=32, trained=32, step_tokens=16, context=1024, rows=4),
        "34M": Load((512, 2048, 9, 8, 2, 1024), episodes=32, trained=8, step_tokens=32, context=2048, rows=2),
    },
    "cuda": {
        # Micro-batches and limits are those of paper.study --world house_llm.
        "135M": Load((576, 1536, 30, 9, 3, 49_152), 64, trained=64, step_tokens=40, context=2048, rows=8, together=8),
        "1.5B": Load(
            (1536, 8960, 28, 12, 2, 151_936),
            episodes=128,
            trained=32,
            step_tokens=64,
            context=4096,
            rows=8,
            checkpointing=True,
        ),
    },
}


def random_policy(load: Load, device: torch.device, dtype: torch.dtype = torch.float32) -> Policy:
    """A model with random weights, made on the device, and a tokenizer of the House's texts."""
    env = make_envs("house", [], 1)[0]
    played = play_scripted(env, [Task("house", "train", seed) for seed in range(200)], PLAYERS["oracle"], 0)
    tokenizer = tiny_tokenizer([dialogue(env.instructions, episode) for episode in played], 1024)
    torch.manual_seed(0)
    with torch.device(device):
        return Policy(AutoModelForCausalLM.from_config(load.model, dtype=dtype, trust_remote_code=False), tokenizer)


def random_learner(accelerator: Accelerator, load: Load) -> Learner:
    """The same, ready to be trained."""
    with tempfile.TemporaryDirectory() as folder:
        random_policy(load, accelerator.device).save(Path(folder))
        return make_learner(load.config, accelerator, folder, folder)


def play(load: Load, policy: Policy, envs: list[Env]) -> list[Episode]:
    """An episode in each of the environments, in groups of one task."""
    config = load.config
    tasks = [Task("house", "train", i // config.group_size) for i in range(len(envs))]
    return rollout(policy, envs, tasks, [("bench", i) for i in range(len(tasks))], **config.limits)


def step_advantage(config: TrainConfig, batch: Batch) -> torch.Tensor:
    """The advantage (B, S) that every step is trained with."""
    entropy, valid = step_entropy(batch.token_entropy, batch.step_ids)
    return assign_credit(config, batch, score(config, batch), entropy, valid).advantage


def clock(work: Callable, *args, **kwargs) -> tuple[float, object]:
    """Seconds that work(*args, **kwargs) took, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@contextmanager
def timed(owner: object, name: str) -> Iterator[list[float]]:
    """Within, the seconds of each call of owner.name are added to the list."""
    work, times = getattr(owner, name), []

    def watched(*args, **kwargs):
        took, result = clock(work, *args, **kwargs)
        times.append(took)
        return result

    with mock.patch.object(owner, name, watched):
        yield times
