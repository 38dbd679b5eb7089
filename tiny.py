"""The tiny default: a byte-level BPE tokenizer, a two-layer Qwen2, and imitation of a scripted player.

A model of this size knows no language. Imitation of an imperfect player gives it the format of a response and some
success to start from. Pretrained models need none of this.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from policy import Dialogue, Policy

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@dataclass(frozen=True)
class TinyConfig:
    """What defines the tiny model and its imitation, with the demonstrations and the seed."""

    vocab_size: int = 1024  # at most; a small world has fewer words
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    initializer_range: float = 0.1  # the usual 0.02 is for wide models; with it this one hardly learns to copy names
    batch_size: int = 4  # dialogues
    learning_rate: float = 4e-3  # peak: 10 % linear warm-up, constant, linear decay over the last 20 %


def tiny_tokenizer(dialogues: list[Dialogue], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that was trained on the dialogues, with a chat template of three role tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for dialogue in dialogues for text in dialogue), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def tiny_model_config(config: TinyConfig, vocab_size: int, **ids: int | None) -> Qwen2Config:
    """The architecture of the tiny model. ids: of special tokens."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        **ids,
    )


def tiny_policy(dialogues: list[Dialogue], config: TinyConfig, seed: int) -> Policy:
    """An untrained tiny Qwen2; the same weights bit for bit for the same dialogues, configuration and seed."""
    tokenizer = tiny_tokenizer(dialogues, config.vocab_size)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model_config = tiny_model_config(config, len(tokenizer), **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(AutoModelForCausalLM.from_config(model_config, dtype=torch.float32), tokenizer)


# -------------------------------------------------------------------------------------------------------- imitation


def imitate(policy: Policy, dialogues: list[Dialogue], config: TinyConfig) -> None:
    """Train the policy, in place, to write the dialogues' responses: cross-entropy over the tokens it would sample.

    One pass in the order given, since a player's dialogues are drawn at random already.
    """
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    steps = len(dialogues) // config.batch_size
    rate = lambda step: min(1.0, 10 * (step + 1) / steps, 5 * (steps - step) / steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in tqdm(range(steps), desc="imitation", unit="step", leave=False, delay=2):
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
