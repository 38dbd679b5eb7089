"""The cold start: demonstrations of a scripted player, imitation of them (SFT), and its cache.

    python imitate.py --policy out/smollm2 --env coin --demonstrations 64    the folder that train.py would start from

The demonstrations come from a player that is careless, so that the model sees every situation and the way back from a
mistake. Imitation gives the model the format of a response and some success to start from. The tiny model always begins
so. A pretrained model does if --demonstrations is above 0.

The main process imitates alone, and the result does not depend on the number of processes. So weights, gradients and
AdamW's moments must fit its device: 16 bytes a parameter, with --fsdp too.
"""

if __name__ == "__main__":
    from engine.terminal import start_script

    start_script()

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tokenizers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import envs
from config import TrainConfig, fail, parse_config
from engine.checkpoint import CheckpointError, verify_checkpoint, write_folder
from engine.files import CHECKSUMS, require_writable
from engine.ranks import COMPUTE, explain_out_of_memory, split_by_tokens, start_ranks
from engine.scorer import make_scorable
from envs import Env, careless_player, format_response
from episode import Episode
from eval import open_envs
from policy import Dialogue, Policy, load_config, load_policy, refused, require_context
from rollout import play_scripted, train_task
from tiny import TinyConfig, tiny_model_config, tiny_policy


def first_policy(config: TrainConfig, accelerator: Accelerator, env: Env, link: Path | None = None) -> str:
    """Folder or hub id of the policy that training starts from. If it is to imitate first and the result is not in the
    cache, the main process makes it; the others wait.  link: to that of a run which is resumed."""
    if not config.demonstrations:
        return str(link) if link and link.exists() else config.policy
    if link and not config.kl_coef:  # a resumed run needs it as its reference alone
        if not link.exists():
            tqdm.write(f"{link} is lost; the run goes on without it")
        return str(link)
    folder = [""]
    if accelerator.is_main_process:
        # The warm starts of older runs have no checksums.
        sound = link and link.exists() and (is_whole(link) or not (link / CHECKSUMS).exists())
        first = link if sound else cold_start(config, accelerator, env)
        if link and first.resolve() != link.resolve():
            raise CheckpointError(f"the policy that {link} names is lost, and this code would imitate another one")
        folder = [str(first)]
    return broadcast_object_list(folder)[0]


def cold_start(config: TrainConfig, accelerator: Accelerator, env: Env) -> Path:
    """Folder of the policy after its imitation.

    A pretrained model imitates on the accelerator's device, in its precision. The tiny one is built on the CPU in
    float32, so it is the same wherever it is trained.
    """
    tiny, how = config.policy == "tiny", Imitation(config.imitation_rate, config.imitation_passes)
    definition = {"env": config.env, "slip": config.slip, "demonstrations": config.demonstrations}
    definition |= {"seed": config.seed, "world": fingerprint(env, config.env_args)}
    if tiny:
        definition["tiny"] = asdict(TinyConfig())
    else:
        how = replace(how, max_tokens=config.max_tokens, micro_batch_tokens=config.micro_batch_tokens)
        how = replace(how, mixed_precision=accelerator.mixed_precision)
        definition |= {"policy": files_of_policy(config.policy), "device": accelerator.device.type}

    def make() -> Policy:
        if tiny:
            dialogues = demonstrations(config, env)
            policy = tiny_policy(dialogues, TinyConfig(), config.seed)
        else:
            with explain_out_of_memory("loading the policy", "take a smaller model"):
                policy = load_policy(config.policy)
                require_context(policy.model.config, config.max_tokens)  # refused before the imitation, not after it
                make_scorable(policy.model.to(accelerator.device))
            dialogues = demonstrations(config, env)
        imitate(policy, dialogues, how)
        return policy

    return warm_start(definition | {"imitation": asdict(how)}, make, Path(config.cache))


def read_config(policy: str) -> PretrainedConfig:
    """The configuration of a folder, of a hub id, or of the tiny model. Raises PolicyError if there is none."""
    if policy == "tiny":
        return tiny_model_config(TinyConfig(), TinyConfig.vocab_size)
    with refused(f"no policy at {policy!r}"):
        return load_config(policy)


def count_parameters(policy: str) -> int:
    """Parameters of a model (of the tiny one, the most that it can have), counted without loading it.

    Raises PolicyError as `read_config` does."""
    with refused(f"no policy at {policy!r}"):
        return empty_model(read_config(policy)).num_parameters()


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, whose weights have no storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


# --------------------------------------------------------------------------------------------------- demonstrations


def demonstrations(config: TrainConfig, env: Env) -> list[Dialogue]:
    """Dialogues of the careless player, on the first tasks of the run. Ends the program if any is aborted."""
    size = env.size("train")
    tasks = [train_task(config.env, size, config.seed, number) for number in range(config.demonstrations)]
    played = play_scripted(env, tasks, careless_player(config.slip), config.seed, desc="demonstrations", strict=True)
    return [dialogue(env.instructions, episode) for episode in played]


def dialogue(instructions: str, episode: Episode) -> Dialogue:
    """The episode as texts for imitation: instructions, first observation, then response and observation in turns."""
    texts = [instructions, episode.prompt]
    for step in episode.steps:
        texts += [format_response(step.thought, step.action), step.observation]
    return texts[:-1]  # nothing answers the last observation


# -------------------------------------------------------------------------------------------------------- imitation


@dataclass(frozen=True)
class Imitation:
    """Hyperparameters of the imitation."""

    learning_rate: float  # peak: 10 % linear warm-up, constant, linear decay over the last 20 %
    passes: int = 1  # over the dialogues
    batch_size: int = 4  # dialogues of an optimizer step
    max_tokens: int | None = None  # of a dialogue; what comes after them is not imitated
    micro_batch_tokens: int | None = None  # most tokens of a forward pass, with padding; None: the batch in one pass
    mixed_precision: str = "no"  # as Accelerate names it


@explain_out_of_memory("imitating", "lower --micro_batch_tokens")
def imitate(policy: Policy, dialogues: list[Dialogue], how: Imitation) -> None:
    """Train the policy, in place, to write the player's responses: cross-entropy over the response tokens only.

    Every pass takes the dialogues in the order given, since a player's dialogues are drawn at random already.
    """
    parameters, device, dtype = list(policy.model.parameters()), policy.device.type, COMPUTE.get(how.mixed_precision)
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)  # does nothing in another precision
    order = dialogues * how.passes
    steps = len(order) // how.batch_size

    def rate(step: int) -> float:
        return min(1.0, 10 * (step + 1) / steps, 5 * (steps - step) / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in tqdm(range(steps), desc="imitation", unit="batch", leave=False, delay=2):
        batch = order[step * how.batch_size : (step + 1) * how.batch_size]
        rows = [(ids[: how.max_tokens], sampled[: how.max_tokens]) for ids, sampled in map(policy.dialogue, batch)]
        number = max(1, sum(sum(sampled) for _, sampled in rows))
        for part in _micro_batches(rows, how.micro_batch_tokens):
            with torch.autocast(device, dtype, enabled=dtype is not None):
                logits, ids = _sampled_logits_and_ids(policy, part)
                loss = F.cross_entropy(logits, ids, reduction="sum") / number
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
    if not all(weight.isfinite().all() for weight in parameters):
        raise SystemExit("the imitation ended in weights that are not finite: lower --imitation_rate")


def _micro_batches(rows: list[tuple], budget: int | None) -> list[list[tuple]]:
    """The rows in parts of at most `budget` tokens, padding included. A longer row is alone."""
    if budget is None:
        return [rows]
    lengths = [len(ids) for ids, _ in rows]
    return [
        [rows[i] for i in part]
        for part in split_by_tokens(sorted(range(len(rows)), key=lengths.__getitem__), lengths, budget)
    ]


def _sampled_logits_and_ids(policy: Policy, rows: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and ids (N,) of the N tokens in the rows that a policy would sample."""
    ids, sampled = (
        pad_sequence([torch.tensor(row) for row in part], batch_first=True).to(policy.device)
        for part in zip(*rows, strict=True)
    )
    # No attention mask: the padding is on the right, where a causal model does not look.
    hidden = policy.model.base_model(ids[:, :-1]).last_hidden_state[sampled[:, 1:]]  # (N, hidden)
    return policy.model.get_output_embeddings()(hidden), ids[:, 1:][sampled[:, 1:]]


# ------------------------------------------------------------------------------------------------------------ cache


def warm_start(definition: dict, make: Callable[[], Policy], cache: Path) -> Path:
    """Folder of the policy that `make` returns. It is made once and then found again in the cache, if it is whole.

    definition: JSON that says what `make` makes; with the versions of the libraries it names the folder.
    """
    versions = [module.__version__ for module in (torch, transformers, tokenizers)]
    name = json.dumps([definition, versions], sort_keys=True)
    folder = cache / hashlib.sha256(name.encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):  # another run that needs the same one waits for it
        if not is_whole(folder):
            if folder.exists():
                tqdm.write(f"{folder} is damaged; making this warm start anew")
            write_folder(folder, make().save, {})
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder of the cache holds what was written there."""
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def fingerprint(env: Env, args: list[str]) -> list:
    """Cache key of the demonstrations, as JSON: settings, data files, instructions, first tasks and source code of the
    worlds."""
    size = env.size("train")
    first = [env.reset("train", seed)[0] for seed in range(3 if size is None else min(3, size))]
    named = [Path(value) for _, found, value in (arg.partition("=") for arg in args) if found and value]
    stats = [stat for path in named if path.exists() for stat in file_stats(path)]
    source = Path(envs.__file__)
    code = [file.read_text(encoding="utf-8") for file in sorted(source.parent.glob("worlds/*.py"))]
    return [sorted(args), size, env.instructions, first, stats, code, source.read_text(encoding="utf-8")]


def files_of_policy(policy: str) -> list:
    """Cache key of a pretrained policy, as JSON: its name, and its files or the commit on the hub."""
    if Path(policy).is_dir():
        return [policy, file_stats(Path(policy))]
    read_config(policy)  # downloads the newest
    return [policy, str(try_to_load_from_cache(policy, "config.json"))]  # the commit is a folder of that path


def file_stats(path: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of change of a file, or of all files in a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def main() -> None:
    config = parse_config(TrainConfig)
    if not config.demonstrations:
        fail("there is nothing to imitate: set --demonstrations")
    transformers.utils.logging.disable_progress_bar()
    accelerator = start_ranks(config.threads, config.fsdp)
    require_writable(Path(config.cache))
    (env,) = open_envs(config, 1, ["train"])
    folder = first_policy(config, accelerator, env)
    if accelerator.is_main_process:
        print(folder)
    accelerator.end_training()


if __name__ == "__main__":
    main()
