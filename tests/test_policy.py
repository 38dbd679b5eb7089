"""policy.py: texts can never become added tokens, ids are the chat template's own, what is saved is what is loaded."""

import json
import os
import shutil
from datetime import datetime
from functools import partial

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils import chat_template_utils

from envs import careless_player, make_envs
from episode import Task
from imitate import dialogue
from policy import Dialogue, Policy, PolicyError, load_policy, require_context
from rollout import play_scripted, rollout
from tiny import SPECIAL_TOKENS, TinyConfig, tiny_policy, tiny_tokenizer

TINY = TinyConfig(vocab_size=320, hidden_size=16, layers=1, intermediate_size=32)

# As in Qwen2.5, without its tools and its default system turn.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD_TEXTS = ["", " ", " a  b\n\nc\t", "drawer 1, drawer 12", "naïve 漢字 🏠", "<|", "a\u200bb", "Thought:\nAction:"]


# ---------------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    """Eight episodes of the house, of different lengths."""
    env = make_envs("house", [], 1)[0]
    tasks = [Task("house", "train", seed) for seed in range(8)]
    return [dialogue(env.instructions, episode) for episode in play_scripted(env, tasks, careless_player(0.3), seed=0)]


def chatml_tokenizer(dialogues: list[Dialogue], template: str = CHATML):
    """A small tokenizer that cuts texts as Qwen2.5's does, with its turn tokens."""
    tokenizer = tiny_tokenizer(dialogues, 320)
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(CHATML_TOKENS, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def converted(tokenizer, template: str | None = None, **parts):
    """The tokenizer with other parts of its definition, such as model=, and with its turn tokens."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str()) | parts
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))
    changed.chat_template = template or tokenizer.chat_template
    return changed


@pytest.fixture(scope="module")
def tiny(dialogues) -> Policy:
    """Not trained."""
    return tiny_policy(dialogues, TINY, seed=0)


@pytest.fixture(params=["tiny", "chatml"])
def talker(request, dialogues, tiny) -> Policy:
    """A policy with either template; nothing that is asked of it here needs weights."""
    return tiny if request.param == "tiny" else Policy(None, chatml_tokenizer(dialogues))


def rendered(policy: Policy, texts: Dialogue, open_response: bool) -> list[int]:
    """Ids of the template's own rendering of the whole dialogue, tokenised in one piece."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    text = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_response)
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


def special_ids(policy: Policy) -> set[int]:
    return {i for i, token in policy.tokenizer.added_tokens_decoder.items() if token.special}


def number_of(wanted: set[int], ids: list[int]) -> int:
    return sum(i in wanted for i in ids)


# ----------------------------------------------------------------------------------------------------- texts as ids


def test_no_text_becomes_a_special_token_and_each_is_decoded_to_itself(talker, dialogues):
    """An observation that says `<|im_end|>` would end the turn, and the next words would be taken for the system's."""
    names = {talker.tokenizer.added_tokens_decoder[i].content for i in special_ids(talker)}
    assert set(SPECIAL_TOKENS) <= names
    texts = [f"a {name}{name} b" for name in names] + ["".join(names)]
    for _ in range(2):  # turn() in between encodes the template, where the names do count
        assert not special_ids(talker) & {i for ids in talker.encode(texts) for i in ids}
        empty, full = (talker.between([text])[0] for text in ("", "".join(names)))
        count = partial(number_of, special_ids(talker))
        assert count(full) == count(empty) > 0
        assert count(talker.prompt("".join(names), ["".join(names)])[0]) == count(talker.prompt("", [""])[0]) > 0
    texts += ODD_TEXTS + dialogues[0]
    assert [talker.tokenizer.decode(ids) for ids in talker.encode(texts)] == [text.strip() for text in texts]


def test_no_text_becomes_an_added_token_that_is_not_special(dialogues):
    """Qwen2.5's <tool_call> is an added token, but not a special one: `split_special_tokens` let a text write it."""
    tokenizer = chatml_tokenizer(dialogues)
    tokenizer.add_tokens(["<tool_call>", "<|fim_prefix|>"])
    (ids,) = Policy(None, tokenizer).encode(["a<tool_call>b<|fim_prefix|>"])
    assert not set(ids) & tokenizer.added_tokens_decoder.keys()
    assert tokenizer.decode(ids) == "a<tool_call>b<|fim_prefix|>"


def added_ids(policy: Policy, texts: list[str]) -> set[int]:
    return {i for ids in policy.encode(texts) for i in ids} & policy.tokenizer.added_tokens_decoder.keys()


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [chr(code) for code in range(33, 127)]
MODELS = {
    "unigram": lambda turns: {
        "type": "Unigram", "unk_id": 0, "byte_fallback": True,
        "vocab": [("<unk>", 0.0), *((name, 0.0) for name in turns), *((b, -9.0) for b in [*BYTES, *LETTERS, "\u2581"])],
    },
    "bpe": lambda turns: {
        "type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "ignore_merges": True,
        "merges": [("<", "|"), ("|", ">"), *(("<|", "end|>") for _ in "a" if "<|end|>" in turns), ("a", "b")],
        "vocab": {piece: i for i, piece in enumerate(
            ["<unk>", *turns, *BYTES, *LETTERS, "\u2581", "<|", "|>", "end|>", "ab"])},
    },
}  # fmt: skip
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
NO_MARKS = {"type": "ByteFallback"}


@pytest.mark.parametrize("kind", MODELS)
def test_no_text_becomes_an_added_token_that_stands_in_the_vocabulary_too(tiny, kind):
    """A Unigram model chose the piece `<|end|>`, of score 0, for that text: an observation could end a turn."""
    added = [{"id": 0, "content": "<unk>"}, *({"id": i, "content": t} for i, t in enumerate(SPECIAL_TOKENS, 1))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    decoder = {"type": "Sequence", "decoders": [SPACES | {"pattern": {"String": "\u2581"}, "content": " "}, NO_MARKS,
                                                {"type": "Fuse"}]}  # fmt: skip
    tokenizer = converted(
        tiny.tokenizer, model=MODELS[kind](SPECIAL_TOKENS), added_tokens=[flags | token for token in added],
        normalizer=SPACES, pre_tokenizer=None, post_processor=None, decoder=decoder,
    )  # fmt: skip
    policy = Policy(None, tokenizer)
    assert policy.stop_id == tokenizer.convert_tokens_to_ids("<|end|>") == 5
    texts = ["x <|end|> y", *SPECIAL_TOKENS, "".join(SPECIAL_TOKENS), "<unk>", "\uffff5", "\u6f22 \U0001f3e0", "a\nb"]
    assert not added_ids(policy, texts)
    for text, ids in zip(texts, policy.encode(texts), strict=True):
        assert policy.tokenizer.decode(ids) == (text.replace("\uffff", "\ufffd") if kind == "unigram" else text)


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram", "BPE"])
def test_a_tokenizer_that_writes_an_added_token_for_unknown_texts_is_refused(tiny, kind):
    vocab = {piece: i for i, piece in enumerate(["<unk>", *SPECIAL_TOKENS, "you", "see", "."])}
    model = {"type": kind, "vocab": vocab, "unk_token": "<unk>"}
    if kind == "WordPiece":
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    if kind == "Unigram":
        model = {"type": kind, "vocab": [(piece, -1.0) for piece in vocab], "unk_id": 0, "byte_fallback": False}
    if kind == "BPE":
        model |= {"merges": []}
    parts = {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "post_processor": None}
    tokenizer = converted(tiny.tokenizer, model=model, added_tokens=[], **parts)
    tokenizer.add_special_tokens({"unk_token": "<unk>", "additional_special_tokens": SPECIAL_TOKENS})
    with pytest.raises(ValueError, match=r"^the tokenizer (has no ids for some texts|writes <unk> for)[^\n]*$"):
        Policy(None, tokenizer)


# ------------------------------------------------------------------------------------- parts are those of the whole

# TinyLlama's and Zephyr's, without blank lines: the generation prompt ends before the line break.
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '</s>' + '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
PREFIXES = {
    "prepend": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, SPACES]},
                "pre_tokenizer": None},
    "first": {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}},
    "always": {"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}},
}  # fmt: skip


def sentencepiece(prefix: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama-2's, which puts a space before a text in one of three ways."""
    tokens = ["<unk>", "<s>", "</s>", *CHATML_TOKENS]
    vocab = {piece: i for i, piece in enumerate([*tokens[:3], *BYTES, *LETTERS, "\u2581", "\u2581Y", "\u2581T", "ou"])}
    merges = [("\u2581", "Y"), ("\u2581", "T"), ("o", "u")]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>", "byte_fallback": True}
    decoders = [SPACES | {"pattern": {"String": "\u2581"}, "content": " "}, NO_MARKS, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    definition = {"version": "1.0", "added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    definition |= PREFIXES[prefix] | {"model": model, "decoder": {"type": "Sequence", "decoders": decoders}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in tokens], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, ZEPHYR], ids=["chatml", "zephyr"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_tokenizer_that_puts_a_space_before_a_text_writes_the_ids_of_the_template(dialogues, prefix, template):
    """Each part by itself got a space that the whole rendering does not have: 72 ids instead of 71."""
    policy = Policy(None, sentencepiece(prefix, template))
    for texts in dialogues[:2]:
        assert policy.dialogue(texts[:6])[0] == rendered(policy, texts[:6], open_response=True)
        assert policy.prompt(texts[0], [texts[1]])[0] == rendered(policy, texts[:2], open_response=True)
    text, end = policy.encode(["Thought: a.\nAction: Yes you"])[0], policy.stop_id
    special = policy.tokenizer.convert_tokens_to_ids("<s>")
    assert policy.read([*text[:-3], special, *text[-3:], end]) == ("Thought: a.\nAction: Yes<s> you", True)
    assert policy.read([policy.tokenizer.convert_tokens_to_ids("\u2581T"), end]) == ("T", True)
    assert policy.read(text) == ("Thought: a.\nAction: Yes you", False)
    assert not added_ids(policy, ["x <|im_end|> y</s>", "<unk>", "\u6f22"])


def test_a_tokenizer_whose_parts_are_not_those_of_the_whole_is_refused(dialogues):
    """A system text directly after its turn token has a space before it, and a user's text after a line break none."""
    mixed = CHATML.replace("+ '\\n' + message.content", "+ ('\\n' if message.role == 'user' else '') + message.content")
    mixed = mixed.replace(
        "'<|im_start|>' + message.role", "'<|im_start|>' + (message.role if message.role == 'user' else '')"
    )
    mixed = mixed.replace("'<|im_start|>assistant\\n'", "'<|im_start|>'")
    with pytest.raises(ValueError, match=r"^the tokenizer gives a text other ids by itself than within the [^\n]*$"):
        Policy(None, sentencepiece("prepend", mixed))


def test_the_line_break_that_a_generation_prompt_lacks_is_sampled_by_the_policy(dialogues):
    """Zephyr's and TinyLlama's templates were refused, as if they rewrote earlier turns."""
    tokenizer = chatml_tokenizer(dialogues, CHATML.replace("assistant\\n", "assistant"))
    policy, texts = Policy(None, tokenizer), dialogues[0]
    ids, sampled = policy.dialogue(texts[:4])
    assert ids == rendered(policy, texts[:4], open_response=True)
    (line_break,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert [i for i, s in zip(ids, sampled, strict=True) if s] == [
        line_break,
        *policy.encode(texts[2:3])[0],
        policy.stop_id,
    ]
    assert policy.prompt(texts[0], texts[1:2])[0] == ids[: sampled.index(True)]
    assert policy.between(texts[3:4])[0] == ids[len(ids) - sampled[::-1].index(True) :]


# ------------------------------------------------------------------------------------------------------------- dates

TODAY = CHATML.replace(
    "message.content", "(strftime_now('%d %b %Y') if message.role == 'system' else '') + message.content"
)


def test_a_template_that_reads_the_clock_always_reads_the_same_date(tiny, dialogues, tmp_path, monkeypatch):
    """Llama-3.2 gave another prompt every day, so resuming and evaluating differed on the next one."""

    def on(day: int, policy: Policy) -> list[int]:
        moment = type("Clock", (), {"now": staticmethod(lambda: datetime(2031, 7, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", moment)
        prompt = policy.prompt("Act.", ["You see."])[0]
        assert prompt == rendered(policy, ["Act.", "You see."], open_response=True)
        return prompt

    def load() -> Policy:
        return Policy(tiny.model, chatml_tokenizer(dialogues, TODAY))

    first = load()
    assert "01 Jan 2026Act." in first.tokenizer.decode(on(1, first))
    first.save(tmp_path)
    assert on(1, first) == on(2, first) == on(2, load()) == on(3, Policy(None, AutoTokenizer.from_pretrained(tmp_path)))
    assert "strftime_now" not in (tmp_path / "chat_template.jinja").read_text()


def test_a_template_that_trims_texts_gets_the_same_ids(dialogues):
    """Llama-3.1's template trims: with a line break at its end an observation had other ids here than there."""
    policy = Policy(None, chatml_tokenizer(dialogues, CHATML.replace("message.content", "message.content | trim")))
    texts = [f" \n{text}\n " for text in dialogues[0][:4]]
    assert policy.dialogue(texts)[0] == rendered(policy, texts, open_response=True)


# As in Qwen3: the last response begins with a <think> block, and earlier ones lose theirs.
THINKING = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% set text = message.content %}\
{% if message.role == 'assistant' %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}\
{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}{{ text + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_no_think_block_is_inserted_and_a_sampled_one_stays(dialogues):
    policy = Policy(None, chatml_tokenizer(dialogues, THINKING))
    texts = dialogues[0][:4]
    assert policy.dialogue(texts)[0] == rendered(policy, texts, open_response=True)
    assert "<think>" in policy.tokenizer.decode(rendered(policy, texts[:3], open_response=False))
    assert "<think>" not in policy.tokenizer.decode(policy.dialogue(texts[:3])[0])
    thought = [*texts[:2], "<think>hm</think>Action: look", texts[3]]
    assert "<think>hm</think>" in policy.tokenizer.decode(policy.dialogue(thought)[0])


def test_ids_are_those_of_the_template(talker, dialogues):
    """Templates that drop or rewrite earlier turns give ids that the policy never saw; here each prefix is checked."""
    for texts in dialogues:
        opening = talker.prompt(texts[0], [texts[1], "another"])[0]
        assert opening == rendered(talker, texts[:2], open_response=True)
        for n in range(4, len(texts) + 1, 2):
            ids, _ = talker.dialogue(texts[:n])
            assert ids == rendered(talker, texts[:n], open_response=True)
            turn = talker.between(["another", texts[n - 1]])[1]
            assert ids[-len(turn) :] == turn
        complete, _ = talker.dialogue(texts)  # ends with a response, so without what follows its stop token
        assert rendered(talker, texts, open_response=False)[: len(complete)] == complete
        assert complete[: len(ids)] == ids


def test_a_dialogue_says_what_was_sampled_the_stop_token_included(talker, dialogues):
    """A project found the padding by the stop token's id, and so never trained a policy to end its turn."""
    stop = talker.tokenizer.convert_ids_to_tokens(talker.stop_id)
    assert stop == ("<|im_end|>" if "im_end" in talker.tokenizer.chat_template else "<|end|>")
    for texts in dialogues:
        ids, sampled = talker.dialogue(texts)
        assert len(ids) == len(sampled)
        responses = [[*talker.encode([text])[0], talker.stop_id] for text in texts[2::2]]
        assert [i for i, s in zip(ids, sampled, strict=True) if s] == [i for response in responses for i in response]
        assert sum(a < b for a, b in zip([False, *sampled], sampled, strict=False)) == len(responses)  # apart


# ----------------------------------------------------------------------------------------------- templates refused

LOOP = "{% for message in messages %}"
TURN = "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


BAD = r"chat template (drops|rewrites)"
# Numbers the user's turns, from turn LIMIT on.
ROUNDS = LOOP + (
    "{% set n = loop.index // 2 %}{% if message.role == 'user' and n > LIMIT %}"
    + TURN.replace("+ message.content", "+ '[Round ' ~ n ~ '] ' + message.content")
    + "{% else %}" + TURN + "{% endif %}"
) + END  # fmt: skip
NO_SYSTEM = LOOP + "{% if message.role != 'system' %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (LOOP + "{% if message.role != 'assistant' or loop.last %}" + TURN + "{% endif %}" + END, BAD),
        (LOOP + "{% if loop.revindex <= 2 %}" + TURN + "{% endif %}" + END, BAD),  # the last two
        (NO_SYSTEM + TURN + "{% endif %}" + END, BAD),
        (LOOP + TURN.replace("content", "content[:8]") + END, BAD),
        ("{{ messages | length }} turns\n" + LOOP + TURN + END, BAD),
        (LOOP + "{{ loop.revindex }}" + TURN + END, BAD),  # numbers from the end
        *((ROUNDS.replace("LIMIT", str(number)), BAD) for number in (0, 1, 2, 9)),
        # What stands before a response is not a line break that the policy could sample.
        (LOOP + TURN.replace("'\\n' + message", "'\\n> ' + message") + END, "asks for a response with"),
        (LOOP + TURN + END.replace("assistant\\n", "assistant\\n<think>"), "asks for a response with"),
        (LOOP + TURN + END + "{% set now = strftime_now %}{{ now('%d') }}", "reads the clock"),
        ("{% set form = '%d' %}{{ strftime_now(form) }}" + LOOP + TURN + END, "reads the clock"),
        (NO_SYSTEM + "{{ message.content }}{% endif %}{% endfor %}{{ messages[0].content }}" + END[12:], BAD),
        (LOOP + TURN + END.replace("if add", "if messages | length < 3 and add"), BAD),
        (None, "no chat template"),
        # Plain text after a response: a policy would stop wherever it writes the first token of that.
        (CHATML.replace("<|im_start|>", "# ").replace("<|im_end|>", ""), "without a stop token"),
        (CHATML.replace("<|im_end|>\\n", "\\nDone."), "without a stop token"),
    ],
)
def test_a_template_that_rewrites_or_drops_turns_or_has_no_stop_token_is_refused(dialogues, template, problem):
    with pytest.raises(ValueError, match=problem):
        Policy(None, chatml_tokenizer(dialogues, template))


def test_no_padding_token_is_needed(tiny, dialogues, tmp_path):
    """Rows are padded by length. A stop token that doubled as padding was never trained on (tiny-grpo, RAGEN)."""
    tokenizer = tiny_tokenizer(dialogues, 320)
    tokenizer.pad_token = None
    policy = Policy(tiny.model, tokenizer)
    assert policy.tokenizer.pad_token_id is None
    policy.save(tmp_path)
    played = [play(one) for one in (tiny, policy, load_policy(str(tmp_path)))]
    assert played[0] == played[1] == played[2]
    assert len({len(episode.ids) for episode in played[0]}) > 1


def play(policy: Policy) -> list:
    """Two episodes with openings of different lengths."""
    envs = make_envs("house", ["max_steps=2"], 2)
    tasks = [Task("house", "train", seed) for seed in (0, 1)]
    return rollout(policy, envs, tasks, [(0, 0), (0, 1)], max_step_tokens=8)


def test_an_id_that_only_the_model_knows_is_sampled_trained_and_reads_as_nothing(tiny):
    """Qwen2.5's model has 151,936 ids and its tokenizer 151,665."""
    unknown = len(tiny.tokenizer) + 9
    config = Qwen2Config(**tiny.model.config.to_dict() | {"vocab_size": len(tiny.tokenizer) + 64})
    policy = Policy(AutoModelForCausalLM.from_config(config), tiny.tokenizer)
    policy.model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(unknown), 99.0)
    )
    for episode in play(policy):
        assert [i for i, step in zip(episode.ids, episode.step_ids, strict=True) if step >= 0] == [unknown] * 16
        assert [(step.thought, step.action, step.valid) for step in episode.steps] == [("", "", False)] * 2
    assert policy.tokenizer.batch_decode([[unknown]]) == [""]  # as a transcript writes it


# ------------------------------------------------------------------------------------------------------- save, load


def test_what_is_saved_is_what_is_loaded(tmp_path, tiny, dialogues):
    """AutoTokenizer put the pre-tokenizer of Qwen2 in the place of the saved one: it cuts digits off the blank before
    them, so "drawer 1" came back as other ids than the policy had been trained on, without an error."""
    tiny.save(tmp_path)
    loaded = load_policy(str(tmp_path))
    texts = [text for texts in dialogues for text in texts] + ODD_TEXTS
    assert loaded.encode(texts) == tiny.encode(texts)
    assert [loaded.dialogue(texts) for texts in dialogues] == [tiny.dialogue(texts) for texts in dialogues]
    assert loaded.stop_id == tiny.stop_id
    weights, expected = loaded.model.state_dict(), tiny.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "neither a folder nor a model on the hub"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "."),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "."),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "."),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for x in %}"), "."),
    ],
    ids=["missing", "empty", "no-weights", "cut-weights", "tokenizer", "template"],
)
def test_a_folder_that_holds_no_policy_is_named_in_one_line(tmp_path, tiny, damage, reason):
    folder = tmp_path / "policy"
    tiny.save(folder)
    damage(folder)
    with pytest.raises(PolicyError, match=rf"^no policy at '{folder}': [^\n]*{reason}[^\n]*$"):
        load_policy(str(folder))


def test_a_tokenizer_with_ids_that_the_model_does_not_know_is_refused(tiny, tmp_path):
    """The first such id ended the run with `index out of range in self`, on a GPU with a device-side assert."""
    config = Qwen2Config(**tiny.model.config.to_dict() | {"vocab_size": len(tiny.tokenizer) - 1})
    Policy(AutoModelForCausalLM.from_config(config), tiny.tokenizer).save(tmp_path)
    largest = len(tiny.tokenizer) - 1
    with pytest.raises(PolicyError, match=rf"ids go up to {largest}, but the model's vocabulary has {largest} only$"):
        load_policy(str(tmp_path))


def test_episodes_longer_than_the_positions_of_the_model_are_refused(tiny):
    require_context(tiny.model.config, 8192)
    with pytest.raises(PolicyError, match="the model has 8192 positions; --max_tokens 8193 must not be more"):
        require_context(tiny.model.config, 8193)
