"""The language model: load any causal LM, and write the turns of a chat as token ids.

A conversation is one growing list of ids. Nothing is ever decoded and encoded again, because a tokenizer does not
promise to give the same ids back. What the chat template puts between the texts is read off the template once. What the
environment says is encoded without any added token, special or not, so no observation can open or close a turn.

Decisions about templates:
- A template that rewrites earlier turns is refused, because ids could not be append-only.
- The ids of the parts must be the ids of the template's whole rendering. This is checked on a dialogue of many turns.
- Some templates (Llama-3.1) trim every text. So texts are stripped here before they are encoded.
- Some generation prompts (Zephyr, TinyLlama) end before the line break that stands before a response. The policy
  samples that line break.
- Some templates (Llama-3.2) write today's date. Here it is always `DATE`, so that a run is the same on every day.
- Qwen3's template writes an empty <think> block into the last response and drops the blocks of earlier ones. Here
  nothing is inserted: a block that the policy samples stays in the conversation, and one that it does not is not there.

Not covered: ZeRO-3. A mixture of experts trains with no router loss. engine/sampler_check.py refuses models whose
attention or positions the sampler does not support, such as linear attention, and sliding windows that are shorter than
an episode.
"""

import json
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedTokenizerFast
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

# A dialogue is a list of texts: instructions, first observation, then response and observation in turns.
Dialogue = list[str]

DATE = datetime(2026, 1, 1)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # as a template calls it
CLOCK_LEFT = re.compile(r"strftime_now(?!\s+is\s)")  # "strftime_now is defined" asks, and reads no clock
NEVER = "\uffff"  # no character; a text that holds it all the same loses it
PROBE_TURNS = 60  # responses of the dialogue that a template is checked on; longer than most episodes
PROBE_ENDS = ("look", "Open drawer 1.", "search[a: b]", '"No?"')  # a last letter may merge with what follows it


class PolicyError(SystemExit):
    """The policy cannot be used. Ends the program with its message, one line, unless it is caught."""


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raises PolicyError, in one line, for any error within.

    A cut file, a broken template, an architecture that is like no other: each library has its own class.
    """
    try:
        yield
    except Exception as error:
        raise PolicyError(f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


class Policy:
    """A causal LM and its tokenizer, with the turns of the chat template as token ids.

    model: any AutoModelForCausalLM.  tokenizer: its fast tokenizer, with a chat template; it needs no padding token.
    Raises ValueError if there is no template, if it does not leave earlier turns as they are, if what it writes after a
    response does not begin with an added token, or if the tokenizer cannot write the template's ids part by part.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.memory, self.capture_seconds = None, 0.0  # engine/sampler.py keeps them between rollouts on a GPU
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model")
        tokenizer.clean_up_tokenization_spaces = False  # decoding would take blanks out of actions
        tokenizer.chat_template = _with_fixed_date(tokenizer.chat_template)
        texts = _probe()
        *pieces, self._lead = self._template_pieces(texts)
        self._before_system, self._before_user, self._before_response, after_response = map(
            self._encode_template, pieces
        )
        # The template closes the response with its stop token: the policy samples that one, the rest is inserted.
        self.stop_id, *self._after_response = after_response or [None]
        if self.stop_id not in tokenizer.added_tokens_decoder:
            raise ValueError("the chat template ends a response without a stop token, so the policy could not end it")
        # A response may also end with another token, as in `generate`. The template's own one is inserted after that.
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.stop_ids = tuple(dict.fromkeys([self.stop_id, *ends]))  # all tokens that end a response
        self._choose_plain_tokenizer(texts)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write model and tokenizer so that `load_policy` reads them back. weights: all of a sharded model."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    # ----------------------------------------------------------------------------------------- texts to token ids

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of plain texts, stripped. The name of an added token in them is spelled out and never obeyed."""
        return [each.ids for each in self._plain.encode_batch([*map(str.strip, texts)], add_special_tokens=False)]

    def read(self, response: list[int]) -> tuple[str, bool]:
        """Text of a sampled response, and whether it came to a stop token. That one is left out of the text by its id;
        any other special token is spelled out."""
        ended = response[-1] in self.stop_ids
        return self.tokenizer.decode(response[:-1] if ended else response), ended

    def prompt(self, instructions: str, observations: list[str]) -> list[list[int]]:
        """Ids up to the first sampled token: system turn, first observation, start of the response."""
        head = self._before_system + self.encode([instructions])[0] + self._before_user
        return [head + ids + self._before_response for ids in self.encode(observations)]

    def between(self, observations: list[str]) -> list[list[int]]:
        """Ids between a response's stop token and the next sampled token: observation, start of the response."""
        return [self._after_response + ids + self._before_response for ids in self.encode(observations)]

    def dialogue(self, texts: Dialogue) -> tuple[list[int], list[bool]]:
        """Ids of a whole dialogue, and which of them a policy would have sampled (stop tokens included)."""
        parts = [text.strip() for text in texts]
        parts[2::2] = [self._lead + text for text in parts[2::2]]
        instructions, first, *rest = [e.ids for e in self._plain.encode_batch(parts, add_special_tokens=False)]
        ids = self._before_system + instructions + self._before_user + first + self._before_response
        sampled = [False] * len(ids)
        for position, part in enumerate(rest):
            answer = position % 2 == 0
            new = [*part, self.stop_id] if answer else self._after_response + part + self._before_response
            ids, sampled = ids + new, sampled + [answer] * len(new)
        return ids, sampled

    # ------------------------------------------------------------------------------- template and tokenizer, checked

    def _template_pieces(self, texts: Dialogue) -> list[str]:
        """What the template writes before the system text, the first user text and a response, and after a response;
        last, what the policy has to write before its response's text."""
        rest, pieces = self._render(texts), []
        for text in texts:
            piece, found, rest = rest.partition(text)
            pieces.append(piece)
            if not found:
                raise ValueError(f"the chat template drops the turn {text!r}")
        before_system, before_user, before_response, after_response = pieces[:4]
        so_far = [piece + text for piece, text in zip(pieces, texts, strict=True)]
        prompts_differ = any(
            self._render(texts[:number]) != "".join(so_far[:number]) + rest for number in range(2, len(texts), 2)
        )
        if prompts_differ or len({*pieces[2::2]}) > 1 or len({*pieces[3::2]}) > 1:
            raise ValueError("the chat template rewrites earlier turns; ids could not be append-only")
        lead = before_response.removeprefix(rest)
        if before_response != rest + lead or lead.strip():
            raise ValueError(
                f"the chat template asks for a response with {rest!r}, but writes {before_response!r} later"
            )
        return [before_system, before_user, rest, after_response, lead]

    def _render(self, texts: Dialogue) -> str:
        """The template's own rendering of a dialogue that ends with an observation, and of the start of a response."""
        roles = ["system", *["user", "assistant"] * len(texts)]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encode_template(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _choose_plain_tokenizer(self, texts: Dialogue) -> None:
        """Set the tokenizer for plain texts, so that the parts have the ids of the template's whole rendering."""
        whole = self._encode_template(self._render(texts))
        for plain in _plain_tokenizers(self.tokenizer):
            _require_plain(plain, self.tokenizer)
            self._plain = plain
            if self.dialogue(texts)[0] == whole:
                return
        raise ValueError("the tokenizer gives a text other ids by itself than within the chat template")


def _probe() -> Dialogue:
    """A dialogue in which no two texts are equal, with many turns."""
    texts = ["(system)\nYou act."]
    for turn in range(PROBE_TURNS):
        end = PROBE_ENDS[turn % len(PROBE_ENDS)]
        texts += [f"You see ({turn}).\n{end}", f"Thought: ({turn}) is it.\nAction: {end}"]
    return [*texts, "(last)"]


def _with_fixed_date(template: str | dict[str, str]) -> str | dict[str, str]:
    """The template with DATE in the place of today's date. A tokenizer may have several templates by name."""
    if isinstance(template, dict):
        return {name: _with_fixed_date(text) for name, text in template.items()}
    template = CLOCK.sub(lambda call: json.dumps(DATE.strftime(call[2])), template)
    if CLOCK_LEFT.search(template):
        raise ValueError("the chat template reads the clock in a way that cannot be replaced by a date")
    return template


def _plain_tokenizers(tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokenizer]:
    """The tokenizer without its added tokens; then the same without the space that it may put before a text.

    Removing them from the list of added tokens is not enough, because a model's vocabulary may hold them, too. Byte
    fallback, or a vocabulary with all bytes, then spells them out. (`split_special_tokens` would leave out those that
    are not marked as special, such as Qwen2.5's <tool_call>.)
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition |= {"added_tokens": [], "padding": None, "truncation": None}
    definition["model"] = _without_added_pieces(definition["model"], tokenizer.added_tokens_decoder.keys())
    if isinstance(definition["model"]["vocab"], list):
        never = {"type": "Replace", "pattern": {"String": NEVER}, "content": "\ufffd"}
        own = [definition["normalizer"]] if definition["normalizer"] else []
        definition["normalizer"] = {"type": "Sequence", "normalizers": [never, *own]}
    yield Tokenizer.from_str(json.dumps(definition))
    definition |= {key: _without_space(definition[key]) for key in ("normalizer", "pre_tokenizer")}
    yield Tokenizer.from_str(json.dumps(definition))


def _without_added_pieces(model: dict, added: Set[int]) -> dict:
    """A tokenizer's model, as JSON, that can no longer write the ids `added`.

    In a Unigram model an id is a position. There such a piece gets a name that no text has.
    """
    if isinstance(model["vocab"], list):
        pieces = [f"{NEVER}{i}" if i in added else piece for i, (piece, _) in enumerate(model["vocab"])]
        return model | {"vocab": [(piece, score) for piece, (_, score) in zip(pieces, model["vocab"], strict=True)]}
    vocab = {piece: i for piece, i in model["vocab"].items() if i not in added}
    if "merges" not in model or len(vocab) == len(model["vocab"]):
        return model | {"vocab": vocab}
    prefix = len(model["continuing_subword_prefix"] or "")
    merges = [(a, b) for a, b in model["merges"] if a in vocab and b in vocab and a + b[prefix:] in vocab]
    return model | {"vocab": vocab, "merges": merges}


def _without_space(part: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer, as JSON, that puts no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    changed = {key: never[key] for key in part.keys() & never.keys()}
    for key in part.keys() & {"normalizers", "pretokenizers"}:
        changed[key] = [kept for kept in map(_without_space, part[key]) if kept]
    return part | changed


def _require_plain(plain: Tokenizer, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError if some character has the id of an added token, such as <unk>, or none at all."""
    codes = [*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x110000, 4001)]  # every first byte of UTF-8
    texts = ["".join(map(chr, codes[start : start + 64])) for start in range(0, len(codes), 64)]
    try:
        ids = {i for encoding in plain.encode_batch(texts, add_special_tokens=False) for i in encoding.ids}
    except Exception as error:  # tokenizers knows no other class
        raise ValueError(f"the tokenizer has no ids for some texts: {error}") from error
    if found := ids & tokenizer.added_tokens_decoder.keys():
        raise ValueError(f"the tokenizer writes {tokenizer.decode(min(found))} for texts that it does not know")


# ---------------------------------------------------------------------------------------------------------- loading

# Implementations of attention and experts that are part of transformers and torch. Others may be fetched from the hub.
PLAIN = (None, "eager", "sdpa", "batched_mm", "grouped_mm")


def load_policy(path: str) -> Policy:
    """A policy from a folder or a hub id. Raises PolicyError, in one line, if there is none or it cannot be used."""
    with refused(f"no policy at {path!r}"):
        config = load_config(path)
        # Not AutoTokenizer: for some model types, Qwen2 among them, it replaces the saved pre-tokenizer by that of the
        # family. A tiny Qwen2 with a tokenizer of its own then reads ids that it was never trained on.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, trust_remote_code=False)
        # A model may have more ids than the tokenizer: Qwen2.5's are padded to 151,936. The policy can sample such an
        # id, and then it is trained like any other; as text it is empty.
        largest, vocabulary = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
        if largest >= vocabulary:
            raise ValueError(
                f"the tokenizer's ids go up to {largest}, but the model's vocabulary has {vocabulary} only"
            )
        return Policy(model, tokenizer)


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a model in a folder or on the hub. A model is data: nothing that it brings is run.

    Raises OSError or ValueError if there is no such model, or if it needs code of its own or of a third place.
    """
    require_model(path)
    if (Path(path) / "adapter_config.json").exists():  # it would fetch the model that the file names
        raise ValueError("it holds an adapter, which names another model; merge the two first")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # None would ask on the terminal
    parts = [config]
    for part in parts:  # and of each part its own parts
        parts += [own for name in part.sub_configs if isinstance(own := getattr(part, name, None), PretrainedConfig)]
        for kind in ("attn", "experts"):
            implementation = getattr(part, f"_{kind}_implementation", None)
            if implementation not in PLAIN:
                raise ValueError(f"its configuration asks for {implementation!r}, which may be code from the hub")
    return config


def require_context(config: PretrainedConfig, max_tokens: int) -> None:
    """Raises PolicyError if the model has other layers than attention, or an episode of max_tokens is longer than its
    positions or its attention window.

    The sampler lets a token see all earlier ones. A sliding window that is longer than the episode hides none of them.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise PolicyError(f"the model has {positions} positions; --max_tokens {max_tokens} must not be more")
    layers = DynamicCache(config=config).layers
    if others := {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}:
        names = ", ".join(sorted(other.__name__ for other in others))
        raise PolicyError(f"only full attention is supported, and the model's cache has layers of the type {names}")
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
