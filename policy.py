"""The language model: load any causal LM, or build the tiny one; chat turns as token ids; warm start by cloning.

A conversation is one growing list of ids. What the environment says is encoded with special tokens switched off, so
no observation can open or close a turn; what the chat template puts between the texts is read off the template once.
Nothing is ever decoded and encoded again, because a tokenizer does not promise to give the same ids back.

Not covered: models whose weights are sharded over several devices (FSDP, ZeRO-3), and templates that rewrite earlier
turns; the latter are refused.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

# A dialogue is a list of texts: instructions, first observation, then response and observation in turns.
Dialogue = list[str]


class Policy:
    """A causal LM and its tokenizer, with the turns of the chat template as token ids.

    model: any AutoModelForCausalLM.  tokenizer: its fast tokenizer, with a chat template.
    Raises ValueError if there is no template, or one that does not leave earlier turns as they are.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model")
        contents = ["(system)", "(observation)", "(response)", "(next observation)"]
        roles = ["system", "user", "assistant", "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        rest, pieces = self._render(messages), []
        for text in contents:
            piece, found, rest = rest.partition(text)
            pieces.append(piece)
            if not found:
                raise ValueError(f"the chat template drops the turn {text}")
        opening = pieces[0] + contents[0] + pieces[1] + contents[1] + pieces[2]
        if opening != self._render(messages[:2]) or rest != pieces[2]:
            raise ValueError("the chat template rewrites earlier turns; ids could not be append-only")
        self._before_system, self._before_user, self._before_response = map(self._encode_template, pieces[:3])
        # The template closes the response with the stop token: the policy samples that one, the rest is inserted.
        self.stop_id, *self._after_response = self._encode_template(pieces[3])

    @property
    def device(self) -> torch.device:
        return self.model.device

    def save(self, folder: Path) -> None:
        """Write model and tokenizer so that `load_policy` reads them back."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _render(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode_template(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts: a special token's name in them is spelled out letter by letter, never obeyed."""
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def opening(self, instructions: str, observations: list[str]) -> list[list[int]]:
        """Ids up to the first sampled token: system turn, first observation, start of the response."""
        head = self._before_system + self.encode([instructions])[0] + self._before_user
        return [head + ids + self._before_response for ids in self.encode(observations)]

    def turn(self, observations: list[str]) -> list[list[int]]:
        """Ids between a response's stop token and the next sampled token: observation, start of the response."""
        return [self._after_response + ids + self._before_response for ids in self.encode(observations)]

    def dialogue(self, texts: Dialogue) -> tuple[list[int], list[bool]]:
        """Ids of a whole dialogue, and which of them a policy would have sampled (stop tokens included)."""
        ids = self.opening(texts[0], [texts[1]])[0]
        sampled = [False] * len(ids)
        for position, text in enumerate(texts[2:]):
            new = self.turn([text])[0] if position % 2 else [*self.encode([text])[0], self.stop_id]
            ids, sampled = ids + new, sampled + [position % 2 == 0] * len(new)
        return ids, sampled


def load_policy(path: str, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy from a folder or a hub id. Raises OSError or ValueError if there is none, or it has no chat template."""
    _require_model(path)
    # Not AutoTokenizer: for some model types, Qwen2 among them, it puts the pre-tokenizer of the family in the place of
    # the one that was saved. A tiny Qwen2 with a tokenizer of its own then reads ids that it was never trained on.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return Policy(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), tokenizer)


def _require_model(path: str) -> None:
    """Raises OSError if there is neither a folder nor a cached or reachable model of that name."""
    if Path(path).is_dir():
        return
    try:
        # from_pretrained asks a hub that it cannot reach again and again, for minutes; this asks once.
        if try_to_load_from_cache(path, "config.json") is None:
            HfApi().model_info(path, timeout=10)
    except (
        Exception
    ) as error:  # a name that is no hub id, a model that is not there, no network: each has its own class
        raise OSError(f"neither a folder nor a model on the hub: {error}") from error


# ----------------------------------------------------------------------------------- the tiny model and its warm start

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@dataclass(frozen=True)
class TinyConfig:
    """What defines the tiny model and its warm start, with the demonstrations and the seed."""

    vocab_size: int = 1024  # at most; a small world has fewer words
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    initializer_range: float = 0.1  # the usual 0.02 is for wide models; with it this one hardly learns to copy names
    batch_size: int = 4  # dialogues
    learning_rate: float = 4e-3  # peak; over a tenth of the dialogues up, then level, over the last fifth down to 0


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


def tiny_policy(dialogues: list[Dialogue], config: TinyConfig, seed: int) -> Policy:
    """An untrained tiny Qwen2; the same weights bit for bit for the same dialogues, configuration and seed."""
    tokenizer = tiny_tokenizer(dialogues, config.vocab_size)
    model_config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(AutoModelForCausalLM.from_config(model_config, dtype=torch.float32), tokenizer)


def clone(policy: Policy, dialogues: list[Dialogue], config: TinyConfig) -> None:
    """Train the policy, in place, to write the dialogues' responses: cross-entropy over the tokens it would sample.

    One pass in the order given: a player's dialogues are drawn at random already.
    """
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    steps = len(dialogues) // config.batch_size
    rate = lambda step: min(1.0, 10 * (step + 1) / steps, 5 * (steps - step) / steps)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in tqdm(range(steps), desc="warm start", unit="step", leave=False, delay=2):
        rows = [
            policy.dialogue(texts) for texts in dialogues[step * config.batch_size : (step + 1) * config.batch_size]
        ]
        loss = F.cross_entropy(*_sampled_logits_and_ids(policy, rows))
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


def warm_start(dialogues: list[Dialogue], config: TinyConfig, seed: int, cache: Path) -> Path:
    """Folder of a tiny policy that was cloned from the dialogues; built once, then found again by its hash.

    The hash covers all that defines the weights: dialogues, configuration, seed and the versions of the libraries.
    """
    versions = [module.__version__ for module in (torch, transformers, tokenizers)]
    definition = json.dumps([dialogues, asdict(config), seed, versions])
    folder = cache / hashlib.sha256(definition.encode()).hexdigest()[:16]
    if not folder.exists():
        policy = tiny_policy(dialogues, config, seed)
        clone(policy, dialogues, config)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")  # whole or not there: a killed run leaves no half
        policy.save(aside)
        os.replace(aside, folder)
    return folder
