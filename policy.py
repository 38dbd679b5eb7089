"""The language model: load any causal LM, and write the turns of a chat as token ids.

A conversation is one growing list of ids. Nothing is ever decoded and encoded again, because a tokenizer does not
promise to give the same ids back. What the chat template puts between the texts is read off the template once. What the
environment says is encoded without any added token, special or not, so no observation can open or close a turn.

Decisions about templates:
- A template that rewrites earlier turns is refused, because ids could not be append-only.
- Some templates (Llama-3.1) trim every text. So texts are stripped here before they are encoded.
- Qwen3's template writes an empty <think> block into the last response and drops the blocks of earlier ones. Here
  nothing is inserted: a block that the policy samples stays in the conversation, and one that it does not is not there.

Not covered: ZeRO-3. A mixture of experts trains with no router loss. engine/sampler.py refuses models whose attention
or positions it does not support, such as linear attention, and sliding windows that are shorter than an episode.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicSlidingWindowLayer

# A dialogue is a list of texts: instructions, first observation, then response and observation in turns.
Dialogue = list[str]


class PolicyError(SystemExit):
    """The policy cannot be used. Ends the program with its message, one line, unless it is caught."""


class Policy:
    """A causal LM and its tokenizer, with the turns of the chat template as token ids.

    model: any AutoModelForCausalLM.  tokenizer: its fast tokenizer, with a chat template; it needs no padding token.
    Raises ValueError if there is no template, or if it does not leave earlier turns as they are, or if what it writes
    after a response does not begin with an added token.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._plain = _without_added_tokens(tokenizer)
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model")
        before_system, before_user, before_response, after_response = self._template_pieces()
        self._before_system, self._before_user = (
            self._encode_template(before_system),
            self._encode_template(before_user),
        )
        self._before_response = self._encode_template(before_response)
        # The template closes the response with the stop token: the policy samples that one, the rest is inserted.
        self.stop_id, *self._after_response = self._encode_template(after_response) or [None]
        if self.stop_id not in tokenizer.added_tokens_decoder:
            raise ValueError("the chat template ends a response without a stop token, so the policy could not end it")

    @property
    def device(self) -> torch.device:
        return self.model.device

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write model and tokenizer so that `load_policy` reads them back. weights: all of a sharded model."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    # ----------------------------------------------------------------------------------------- texts to token ids

    def _template_pieces(self) -> list[str]:
        """What the template writes before the system text, the first user text and the response, and after it."""
        contents = ["(system)", "(observation)", "(response)", "(next observation)"]
        roles = ["system", "user", "assistant", "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        rest, pieces = self._render(messages), []
        for text in contents:
            piece, found, rest = rest.partition(text)
            pieces.append(piece)
            if not found:
                raise ValueError(f"the chat template drops the turn {text}")
        prompt = pieces[0] + contents[0] + pieces[1] + contents[1] + pieces[2]
        if prompt != self._render(messages[:2]) or rest != pieces[2]:
            raise ValueError("the chat template rewrites earlier turns; ids could not be append-only")
        return pieces

    def _render(self, messages: list[dict]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode_template(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, stripped. The name of an added token in them is spelled out and never obeyed."""
        stripped = [text.strip() for text in texts]
        return [encoding.ids for encoding in self._plain.encode_batch(stripped, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, instructions: str, observations: list[str]) -> list[list[int]]:
        """Ids up to the first sampled token: system turn, first observation, start of the response."""
        head = self._before_system + self.encode([instructions])[0] + self._before_user
        return [head + ids + self._before_response for ids in self.encode(observations)]

    def between(self, observations: list[str]) -> list[list[int]]:
        """Ids between a response's stop token and the next sampled token: observation, start of the response."""
        return [self._after_response + ids + self._before_response for ids in self.encode(observations)]

    def dialogue(self, texts: Dialogue) -> tuple[list[int], list[bool]]:
        """Ids of a whole dialogue, and which of them a policy would have sampled (stop tokens included)."""
        instructions, first, *rest = self.encode(texts)
        ids = self._before_system + instructions + self._before_user + first + self._before_response
        sampled = [False] * len(ids)
        for position, part in enumerate(rest):
            answer = position % 2 == 0
            new = [*part, self.stop_id] if answer else self._after_response + part + self._before_response
            ids, sampled = ids + new, sampled + [answer] * len(new)
        return ids, sampled


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same tokenizer without the tokens that were added to it. `split_special_tokens` leaves out those that are not
    marked as special, such as Qwen2.5's <tool_call>."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(definition | {"added_tokens": [], "padding": None, "truncation": None}))


# ---------------------------------------------------------------------------------------------------------- loading

# Implementations of attention and experts that are part of transformers and torch. Others may be fetched from the hub.
PLAIN = (None, "eager", "sdpa", "batched_mm", "grouped_mm")


def load_policy(path: str, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy from a folder or a hub id. Raises PolicyError, in one line, if there is none or it cannot be used."""
    try:
        config = load_config(path)
        # Not AutoTokenizer: for some model types, Qwen2 among them, it replaces the saved pre-tokenizer by that of the
        # family. A tiny Qwen2 with a tokenizer of its own then reads ids that it was never trained on.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, trust_remote_code=False)
        require_vocabulary(model.config, tokenizer)
        return Policy(model, tokenizer)
    except Exception as error:  # a cut file, a broken template, no such model: each library has its own class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PolicyError(f"no policy at {path!r}: {reason}") from error


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model in a folder or on the hub. A model is data: nothing that it brings is run.

    Raises OSError or ValueError if there is no such model, or if it needs code of its own or of a third place.
    """
    require_model(path)
    if (Path(path) / "adapter_config.json").exists():  # it would fetch the model that the file names
        raise ValueError("it holds an adapter, which names another model; merge the two first")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # None would ask on the terminal
    parts = [config]
    for part in parts:
        parts += [own for name in part.sub_configs if isinstance(own := getattr(part, name, None), PretrainedConfig)]
        for kind in ("attn", "experts"):
            implementation = getattr(part, f"_{kind}_implementation", None)
            if implementation not in PLAIN:
                raise ValueError(f"its configuration asks for {implementation!r}, which may be code from the hub")
    return config


def require_vocabulary(config, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError if the tokenizer has ids that the model does not know.

    A model may have more ids than the tokenizer: Qwen2.5's vocabulary is padded to 151,936. The policy can sample such
    an id, and then it is trained like any other; as text it is empty.
    """
    largest, vocabulary = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise ValueError(f"the tokenizer's ids go up to {largest}, but the model's vocabulary has {vocabulary} only")


def require_context(policy: Policy, max_tokens: int) -> None:
    """Raises PolicyError if an episode of max_tokens is longer than the model's positions or its attention window.

    The sampler lets a token see all earlier ones. A sliding window that is longer than the episode hides none of them.
    """
    config = policy.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise PolicyError(f"the model has {positions} positions; --max_tokens {max_tokens} must not be more")
    layers = DynamicCache(config=config).layers
    windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    windows += [config.window_size] if config.model_type == "gpt_neo" else []  # unknown to the cache
    if windows and max_tokens > min(windows):
        raise PolicyError(
            f"only full attention is supported, and the model's sliding window has {min(windows)} tokens; "
            f"--max_tokens {max_tokens} must not be more"
        )


def require_model(path: str) -> None:
    """Raises OSError if there is neither a folder nor a cached or reachable model of that name."""
    if Path(path).is_dir():
        return
    try:
        # from_pretrained asks a hub that it cannot reach again and again, for minutes; this asks once.
        if try_to_load_from_cache(path, "config.json") is None:
            HfApi().model_info(path, timeout=10)
    except Exception as error:  # a name that is no hub id, a missing model, no network: each has its own class
        raise OSError(f"neither a folder nor a model on the hub: {error}") from error
