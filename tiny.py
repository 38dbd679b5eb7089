"""The tiny default: a byte-level BPE tokenizer trained on the worlds' texts, and a two-layer Qwen2.

A model of this size knows no language. It learns a world by imitation first (imitate.py).
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
    """Sizes of the tiny model."""

    vocab_size: int = 1024  # at most; a small world has fewer words
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    initializer_range: float = 0.1  # the usual 0.02 is for wide models; with it this one hardly learns to copy names


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
        return Policy(
            AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, trust_remote_code=False), tokenizer
        )
