"""EMPG in TRL: a GRPOTrainer whose advantages are modulated by step entropy, with the functions of empg.py.

    pip install -r requirements-trl.txt
    python -m examples.trl_empg                        the tiny model in the House world, with the settings of train.py
    python -m examples.trl_empg --k 0 --zeta 0         GRPO: the advantages are TRL's, minus their mean over steps
    torchrun --nproc_per_node 2 -m examples.trl_empg   two processes, with or without GPUs

TRL 1.16 has no hook for advantages of steps. There are two facts to build on: its loss accepts advantages of shape
(B, L), and `_generate_and_score_completions` returns all episodes of an update with one advantage each. `EMPGTrainer`
overrides this one method. It works with any model, tools and environments that TRL's agent loop can run.

The rest of this file lets the tiny model play in that loop: a tokenizer that reads `Action: ...` as a tool call, and an
environment with one tool.

The loss is the one of train.py with --algorithm grpo: mean over the tokens of an episode, then over episodes
(loss_type "grpo"), the same clip range, no KL. TRL adds 1e-4 to the standard deviation of a group, empg.py 1e-6.
"""

from dataclasses import asdict, dataclass, field

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from config import TrainConfig, parse_config
from empg import modulate, spread, step_entropy
from envs import Env, make_envs, parse_response
from eval import start_ranks
from groups import train_task
from train import first_policy

# ------------------------------------------------------------------------------------------------- EMPG, for any model


class EMPGTrainer(GRPOTrainer):
    """GRPOTrainer with modulated advantages. k, k_future, zeta: see `empg.modulate`."""

    def __init__(self, *args, k: float = 1.0, k_future: float = 1.0, zeta: float = 0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.strength = {"k": k, "k_future": k_future, "zeta": zeta}

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        """TRL's batch of this process, with "advantages" (B, L) in place of (B,).

        TRL splits this batch into micro-batches afterwards, so EMPG's min, max and means are taken here. They run over
        the episodes of all processes. Each process keeps its own rows.
        """
        batch = super()._generate_and_score_completions(inputs)
        step_ids = sampled_steps(batch["completion_mask"] * batch.get("tool_mask", 1))  # (B, L)
        entropy, valid = step_entropy(self.token_entropy(batch), step_ids)  # (B, S)
        advantage = self.accelerator.gather(batch["advantages"])  # (B of all processes,), group-relative
        step_advantage = modulate(advantage, self._gather(entropy), self._gather(valid.int()).bool(), **self.strength)
        first = self.accelerator.process_index * len(step_ids)
        return batch | {"advantages": spread(step_advantage[first : first + len(step_ids)], step_ids)}

    @torch.no_grad()
    def token_entropy(self, batch: dict[str, Tensor]) -> Tensor:
        """Entropy (B, L) in nats at every completion token, at the temperature of sampling. TRL does not keep it while
        sampling, so this is one more forward pass."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length, rows = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, length, rows, compute_entropy=True)[1]

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows (B, S) of all processes, padded with 0 to the largest S."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(rows, dim=1))


def sampled_steps(mask: Tensor) -> Tensor:
    """The step that sampled each token, -1 if the policy did not: every run of ones in the mask is one step.

    mask: (B, L), 1 where the policy sampled. Between two steps there is always an observation.
    >>> sampled_steps(torch.tensor([[1, 1, 0, 1, 0, 0]]))
    tensor([[ 0,  0, -1,  1, -1, -1]])
    """
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ((mask > before).cumsum(1) - 1).where(mask > 0, -1)


# ---------------------------------------------------------------------- the tiny model and a world in TRL's agent loop

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
        call = {"name": "act", "arguments": {"action": parse_response(text)[1]}}
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
    config: TrainConfig,
    policy: str,
    trainer: type[GRPOTrainer] = EMPGTrainer,
    micro_batch_size: int = 16,
    **kwargs,
) -> GRPOTrainer:
    """TRL's trainer, or a subclass, with the world, batch, limits and loss of `config`. policy: folder of a tiny one.

    micro_batch_size: episodes of one forward and backward pass of a process; TRL has no budget of tokens.

    TRL leaves a response that max_step_tokens cut off without a stop token; rollout.py inserts one.
    """
    # TRL calls parse_response only if there is a response_template.
    tokenizer = ReActTokenizer.from_pretrained(policy, chat_template=CHAT_TEMPLATE, response_template="ReAct")
    cpu = not torch.cuda.is_available()
    rows = micro_batch_size * PartialState(cpu=cpu).num_processes  # episodes of all processes at once
    micro_batches = config.tasks_per_iteration * config.group_size // rows
    args = GRPOConfig(
        output_dir=config.out,
        max_steps=config.iterations * config.mini_batches,
        per_device_train_batch_size=micro_batch_size,
        steps_per_generation=micro_batches,
        gradient_accumulation_steps=micro_batches // config.mini_batches,
        num_generations=config.group_size,
        temperature=config.temperature,
        max_completion_length=config.max_tokens,  # of an episode; TRL does not count the opening
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
    make_env = lambda: make_envs(config.env, config.settings, 1)[0]  # noqa: E731
    prompt = [{"role": "system", "content": make_env().instructions}, {"role": "user", "content": ""}]
    tasks = [train_task(config, None, number) for number in range(config.iterations * config.tasks_per_iteration)]
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        processing_class=tokenizer,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt, "seed": task.seed} for task in tasks]),
        environment_factory=lambda: AgentEnv(make_env(), config.max_tokens),
        **kwargs,
    )


@dataclass(frozen=True)
class ExampleConfig:
    """Train the tiny model with TRL's GRPOTrainer, modulated by EMPG."""

    policy: str = field(default="tiny", metadata={"help": "folder of a tiny policy; tiny: built and warm-started"})
    iterations: int = field(default=60, metadata={"help": "batches of episodes to learn from"})
    k: float = field(default=1.0, metadata={"help": "sharpness of g(H), dimensionless; 0 turns g off"})
    zeta: float = field(default=0.1, metadata={"help": "weight of f(H), in units of advantage; 0 turns f off"})
    seed: int = field(default=0, metadata={"help": "of weights, tasks and sampling"})
    out: str = field(default="out/trl", metadata={"help": "folder for the trained policy"})


def main() -> None:
    config = TrainConfig(**asdict(parse_config(ExampleConfig)))
    policy = first_policy(config, start_ranks(config.threads), make_envs(config.env, config.settings, 1)[0])
    trainer = make_trainer(config, policy, k=config.k, zeta=config.zeta)
    trainer.train()
    trainer.save_model(config.out)


if __name__ == "__main__":
    main()
