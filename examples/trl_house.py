"""A demonstration of empg_trainer.py: the tiny model plays in the House, in TRL's own agent loop.

    pip install -r requirements-trl.txt
    python -m examples.trl_house                        with the settings of train.py
    python -m examples.trl_house --k 0 --zeta 0         GRPO: the advantages are TRL's, minus their mean over steps
    torchrun --nproc_per_node 2 -m examples.trl_house   two processes, with or without GPUs
    python eval.py --policy out/trl --max_step_tokens 32 --max_tokens 1024   the trained policy on held-out tasks

TRL's loop needs two things that a pretrained model and its tools have already: a tokenizer that reads a response as a
tool call, and an environment whose methods are tools. Both are below.

The loss is the one of train.py with --algorithm grpo: mean over the tokens of an episode, then over episodes
(loss_type "grpo"), the same clip range, no KL. TRL leaves a response that max_step_tokens cut off without a stop token;
rollout.py inserts one.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg
from trl import GRPOConfig, GRPOTrainer

from config import TrainConfig, parse_config
from engine.files import require_writable
from engine.ranks import start_ranks
from engine.terminal import start_script
from envs import Env, make_envs, parse_response
from examples.empg_trainer import EMPGTrainer
from imitate import first_policy
from policy import load_policy
from rollout import train_task

# tiny.py's template with two additions. TRL hands over an observation as a tool's message; the tiny model knows it as
# the user's. TRL also requires that a template writes tool calls. It never uses that for a response that was sampled.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + {'tool': 'user'}.get(message.role, message.role) + '|>' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class ReActTokenizer(PreTrainedTokenizerFast):
    """The tiny model's tokenizer. It reads every response as a call of the tool `act` with the text after `Action:`."""

    def parse_response(self, ids: list[int], **_) -> dict:
        text = self.decode(ids, skip_special_tokens=True)
        action = parse_response(text, ended=ids[-1] == self.eos_token_id)[1]
        call = {"name": "act", "arguments": {"action": action}}
        return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": call}]}


class AgentEnv:
    """An environment of this project as TRL's agent loop takes it: each public method but reset and get_reward is a
    tool. max_completion_length: as in GRPOConfig."""

    def __init__(self, env: Env, max_completion_length: int):
        self._env, self._reward = env, 0.0
        # TRL's loop has no signal for the end of an episode (TRL issue 5389). It does leave an episode, and drops the
        # observation, when the observation does not fit into max_completion_length. This one never fits.
        self._end = "end " * max_completion_length

    def reset(self, seed: int, **_) -> str:
        self._reward = 0.0
        return self._env.reset("train", seed)[0]

    def act(self, action: str) -> str:
        """Do one action.

        Args:
            action: What to do, such as "go to drawer 1".
        """  # in the style from which TRL reads a tool's schema
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self._reward += reward
        return self._end if terminated or truncated else observation

    def get_reward(self) -> float:
        return self._reward


def make_trainer(
    config: TrainConfig, policy: str, trainer: type[GRPOTrainer] = EMPGTrainer, micro_batch_size: int = 16, **kwargs
) -> GRPOTrainer:
    """TRL's trainer, or a subclass, with the world, batch, limits and loss of `config`. policy: folder of a tiny one.

    micro_batch_size: episodes of one forward and backward pass of a process; TRL has no budget of tokens.
    """

    def make_env() -> Env:
        return make_envs(config.env, config.env_args, 1)[0]

    prompt = [{"role": "system", "content": make_env().instructions}, {"role": "user", "content": ""}]
    numbers = range(config.iterations * config.tasks_per_iteration)
    seeds = [train_task(config.env, None, config.seed, number).seed for number in numbers]
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, trust_remote_code=False),
        # TRL calls parse_response only if there is a response_template.
        processing_class=ReActTokenizer.from_pretrained(
            policy, chat_template=CHAT_TEMPLATE, response_template="ReAct", trust_remote_code=False
        ),
        args=trainer_arguments(config, micro_batch_size),
        train_dataset=Dataset.from_list([{"prompt": prompt, "seed": seed} for seed in seeds]),
        environment_factory=lambda: AgentEnv(make_env(), config.max_tokens),
        **kwargs,
    )


def trainer_arguments(config: TrainConfig, micro_batch_size: int = 16) -> GRPOConfig:
    """The settings of train.py by TRL's names."""
    cpu = not torch.cuda.is_available()
    rows = micro_batch_size * PartialState(cpu=cpu).num_processes  # episodes of all processes at once
    micro_batches, left = divmod(config.tasks_per_iteration * config.group_size, rows)
    if left or micro_batches % config.mini_batches:
        raise SystemExit(f"{rows} episodes at once do not divide an optimizer step; launch fewer processes")
    return GRPOConfig(
        output_dir=config.out,
        max_steps=config.iterations * config.mini_batches,
        per_device_train_batch_size=micro_batch_size,
        steps_per_generation=micro_batches,
        gradient_accumulation_steps=micro_batches // config.mini_batches,
        num_generations=config.group_size,
        temperature=config.temperature,
        max_completion_length=config.max_tokens,  # of an episode; TRL does not count the prompt
        generation_kwargs={"max_new_tokens": config.max_step_tokens},  # of one response
        loss_type="grpo",
        epsilon=config.clip_low,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        seed=config.seed,
        use_cpu=cpu,
        shuffle_dataset=False,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=config.mini_batches,  # one line an iteration
        save_strategy="no",
    )


@dataclass(frozen=True)
class ExampleConfig:
    """Train the tiny model with TRL's GRPOTrainer, modulated by EMPG."""

    policy: str = HfArg(default="tiny", help="folder of a tiny policy; tiny: built here, with a cold start")
    iterations: int = HfArg(default=60, help="training iterations")
    k: float = HfArg(default=1.0, help="sharpness of g(H), dimensionless; 0 turns g off")
    k_future: float = HfArg(default=1.0, help="sharpness of f(H), dimensionless")
    zeta: float = HfArg(default=0.1, help="weight of f(H), in units of advantage; 0 turns f off")
    seed: int = HfArg(default=0, help="seed of weights, tasks and sampling")
    out: str = HfArg(default="out/trl", help="folder for the trained policy")

    def __post_init__(self):
        TrainConfig(**asdict(self))  # raises ValueError for a value out of range
        if self.seed >= 2**32:  # numpy's
            raise ValueError(f"seed must be below 2**32, got {self.seed}")


def main() -> None:
    config = TrainConfig(**asdict(parse_config(ExampleConfig)))
    accelerator = start_ranks(config.threads)
    require_writable(Path(config.out))  # refused before the imitation, not after it
    trainer_arguments(config)
    policy = first_policy(config, accelerator, make_envs(config.env, config.env_args, 1)[0])
    if load_policy(policy).tokenizer.eos_token != "<|end|>":
        raise SystemExit(f"{policy} holds no tiny policy; this example has the tiny model's chat template")
    trainer = make_trainer(config, policy, k=config.k, k_future=config.k_future, zeta=config.zeta)
    trainer.train()
    trainer.save_model(config.out)


if __name__ == "__main__":
    start_script()
    main()
