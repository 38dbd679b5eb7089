"""The cold start of the tiny model: demonstrations of a scripted player, imitation of them (SFT), and its cache.

The demonstrations come from a player that is careless, so that the model sees every situation and the way back from a
mistake. Imitation gives the model the format of a response and some success to start from. Pretrained models need none
of this.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

import envs
from config import TrainConfig
from engine.world_errors import require_none_aborted
from envs import Env, careless_player, format_response
from episode import Episode
from policy import Dialogue, Policy, PolicyError, load_config
from rollout import play_scripted, train_task
from tiny import TinyConfig, tiny_model_config, tiny_policy


def first_policy(config: TrainConfig, accelerator: Accelerator, env: Env) -> str:
    """Folder or hub id of the policy that training starts from. The main process builds the tiny one, if it is not in
    the cache; the others wait for it."""
    if config.policy != "tiny":
        return config.policy
    folder = [""]
    if accelerator.is_main_process:
        definition = {"env": config.env, "slip": config.slip, "demonstrations": config.demonstrations}
        definition["world"] = fingerprint(env, config.env_args)

        def demonstrate() -> list[Dialogue]:
            return demonstrations(config, env)

        folder = [str(warm_start(definition, demonstrate, TinyConfig(), config.seed, Path(config.cache)))]
    return broadcast_object_list(folder)[0]


def read_config(policy: str) -> PretrainedConfig:
    """The configuration of a folder, of a hub id, or of the tiny model. Raises PolicyError if there is none."""
    if policy == "tiny":
        return tiny_model_config(TinyConfig(), TinyConfig.vocab_size)
    try:
        return load_config(policy)
    except (OSError, ValueError) as error:
        raise PolicyError(f"no policy at {policy!r}: {str(error).splitlines()[0]}") from error


def count_parameters(policy: str) -> int:
    """Parameters of a model, the tiny one at most, counted without loading it. Raises PolicyError as `read_config`."""
    config = read_config(policy)
    try:
        with torch.device("meta"):  # tensors without storage
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    except ValueError as error:
        raise PolicyError(f"no policy at {policy!r}: {str(error).splitlines()[0]}") from error


# --------------------------------------------------------------------------------------------------- demonstrations


def demonstrations(config: TrainConfig, env: Env) -> list[Dialogue]:
    """Dialogues of the careless player, on the first tasks of the run. Ends the program if any is aborted."""
    size = env.size("train")
    tasks = [train_task(config.env, size, config.seed, number) for number in range(config.demonstrations)]
    played = play_scripted(env, tasks, careless_player(config.slip), config.seed, desc="demonstrations")
    return [dialogue(env.instructions, episode) for episode in require_none_aborted(played, "demonstrations")]


def dialogue(instructions: str, episode: Episode) -> Dialogue:
    """The episode as texts for imitation: instructions, first observation, then response and observation in turns."""
    texts = [instructions, episode.prompt]
    for step in episode.steps:
        texts += [format_response(step.thought, step.action), step.observation]
    return texts[:-1]  # nothing answers the last observation


# -------------------------------------------------------------------------------------------------------- imitation


def imitate(policy: Policy, dialogues: list[Dialogue], config: TinyConfig) -> None:
    """Train the policy, in place, to write the player's responses: cross-entropy over the response tokens only.

    One pass in the order given, since a player's dialogues are drawn at random already.
    """
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    steps = len(dialogues) // config.batch_size

    def rate(step: int) -> float:
        return min(1.0, 10 * (step + 1) / steps, 5 * (steps - step) / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in tqdm(range(steps), desc="imitation", unit="batch", leave=False, delay=2):
        batch = dialogues[step * config.batch_size : (step + 1) * config.batch_size]
        loss = F.cross_entropy(*_sampled_logits_and_ids(policy, [policy.dialogue(texts) for texts in batch]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _sampled_logits_and_ids(policy: Policy, rows: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and ids (N,) of the N tokens in the rows that a policy would sample."""
    ids, sampled = (
        pad_sequence([torch.tensor(row) for row in part], batch_first=True) for part in zip(*rows, strict=True)
    )
    # No attention mask: the padding is on the right, where a causal model does not look.
    hidden = policy.model.model(ids[:, :-1]).last_hidden_state[sampled[:, 1:]]  # (N, hidden)
    return policy.model.lm_head(hidden), ids[:, 1:][sampled[:, 1:]]


# ------------------------------------------------------------------------------------------------------------ cache


def warm_start(
    definition: dict, demonstrate: Callable[[], list[Dialogue]], config: TinyConfig, seed: int, cache: Path
) -> Path:
    """Folder of a tiny policy that imitates the demonstrations. It is built once and then found again in the cache.

    definition: JSON that defines the demonstrations; with the configuration, the seed and the versions of the libraries
    it names the folder.  demonstrate: plays them, and is called only if the folder is not there.
    """
    versions = [module.__version__ for module in (torch, transformers, tokenizers)]
    name = json.dumps([definition, asdict(config), seed, versions], sort_keys=True)
    folder = cache / hashlib.sha256(name.encode()).hexdigest()[:16]
    if not folder.exists():
        dialogues = demonstrate()
        policy = tiny_policy(dialogues, config, seed)
        imitate(policy, dialogues, config)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")  # a run that is killed leaves no half of a folder
        policy.save(aside)
        try:
            os.replace(aside, folder)
        except OSError:  # another run built the same policy meanwhile: a folder that is not empty cannot be replaced
            shutil.rmtree(aside)
            if not folder.exists():
                raise
    return folder


def fingerprint(env: Env, args: list[str]) -> list:
    """Cache key of the demonstrations, as JSON: settings, data files, first tasks and source code of the worlds."""
    size = env.size("train")
    first = [env.reset("train", seed)[0] for seed in range(3 if size is None else min(3, size))]
    named = [Path(value) for _, found, value in (arg.partition("=") for arg in args) if found and value]
    files = [
        file for path in named if path.exists() for file in ([path] if path.is_file() else sorted(path.rglob("*")))
    ]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    source = Path(envs.__file__)
    code = [file.read_text() for file in sorted(source.parent.glob("worlds/*.py"))]
    return [sorted(args), size, first, stats, code, source.read_text()]
