"""Every causal LM type of transformers, built tiny: is the sampler exact for it, or is it refused in one line?

    python -m tests.sweep_architectures                 all types, some minutes; the table, and the totals
    python -m tests.sweep_architectures llama gptj      these types
    python -m tests.sweep_architectures --attention eager

pytest does not collect this file. tests/engine/test_sampler_check.py runs twelve types of it.

Each type gets one of these words:
    exact       accepted, and the log-probs captured in longer episodes are those of plain forward passes, to 1e-4 nats
    refused     refused in one line, by the update's check or the sampler's
    WRONG       accepted, and a captured log-prob differs by more
    TRACEBACK   an exception that is no PolicyError
    not built   no tiny configuration could be guessed, or the type needs a package that is not here
"""

import argparse
import collections
import functools
import logging
import warnings

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.sampler_check import require_exact_sampling
from engine.scorer import make_scorable
from envs import careless_player, make_envs
from episode import Episode, Task
from imitate import dialogue
from policy import Policy, PolicyError
from rollout import play_scripted, rollout
from tiny import tiny_tokenizer

LAYERS, MOST_PARAMETERS = 2, 5_000_000
MAX_TOKENS = 400  # of an episode
# The sizes that configurations have, under all of their names.
SIZES = (
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
    (64, "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim n_inner intermediate_size ffn_dim d_ff"),
    (64, "decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_inner moe_intermediate_size feed_forward_size dff"),
    (64, "shared_expert_intermediate_size expert_ffn_hidden_size attention_hidden_size lru_width embedding_size"),
    (64, "intermediate_size_mlp shared_intermediate_size dense_intermediate_size decoder_hidden_size"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_local_experts num_experts n_routed_experts moe_num_experts index_n_heads linear_num_value_heads"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    (2, "linear_num_key_heads num_selected_experts"),
    (16, "head_dim d_kv qk_nope_head_dim v_head_dim qk_rope_head_dim kv_lora_rank q_lora_rank rotary_dim dim_head"),
    (16, "index_head_dim global_head_dim linear_key_head_dim linear_value_head_dim state_size mamba_d_state"),
    (16, "o_lora_rank attention_head_size qk_head_dim mamba_d_head mamba_head_dim"),
    (8, "mamba_n_heads mamba_num_heads"),
    (1, "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_nextn_predict_layers"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_target_positions"),
)
OF_NAME = {name: size for size, names in SIZES for name in names.split()}
SPECIAL = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of dialogues of the house."""
    env = make_envs("house", [], 1)[0]
    tasks = [Task("house", "train", seed) for seed in range(40)]
    episodes = play_scripted(env, tasks, careless_player(0.3), seed=0)
    return tiny_tokenizer([dialogue(env.instructions, episode) for episode in episodes], 400)


def tiny_config(kind: type, **settings) -> transformers.PreTrainedConfig:
    """A small configuration of this class: the default one with the usual sizes replaced."""
    default, new = kind(), {}
    values = default.to_dict()
    layers = getattr(default, "num_hidden_layers", None)
    for name, value in values.items():
        if name in OF_NAME and (isinstance(value, int) or name == "head_dim"):
            new[name] = OF_NAME[name]
        elif isinstance(value, list) and len(value) == layers:
            new[name] = value[-LAYERS:]  # hybrid models end with the rarer kind of layer
        elif name.endswith("_token_id") and isinstance(value, int):
            new[name] = min(value, 3)
    others = {"vocab_size": len(tokenizer()), "initializer_range": 0.1}
    new |= {name: value for name, value in others.items() if name in values}
    if "text_config" in values and not isinstance(default.text_config, dict | None):
        new["text_config"] = tiny_config(type(default.text_config)).to_dict()
    if "is_decoder" in values:
        new["is_decoder"] = True
    return kind(**new | settings)


def tiny_model(config: transformers.PreTrainedConfig, **options) -> torch.nn.Module:
    """A model with random weights, large enough that what a token attends to matters."""
    with torch.device("meta"):
        number = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if number > MOST_PARAMETERS:
        raise ValueError(f"{number / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options).eval()


def play(policy: Policy) -> list[Episode]:
    """Nine episodes of different lengths; the openings of a group are equal."""
    envs = [make_envs("house", [f"max_steps={1 + i % 4}"], 1)[0] for i in range(9)]
    tasks = [Task("house", "eval", i // 3) for i in range(9)]
    return rollout(policy, envs, tasks, [(0, i) for i in range(9)], max_step_tokens=12, max_tokens=MAX_TOKENS)


@torch.inference_mode()
def captured_minus_plain(policy: Policy, episode: Episode) -> float:
    """The largest difference of a captured log-prob or entropy from a plain forward pass over the episode, in nats."""
    log_p = policy.model(torch.tensor([episode.ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
    logp = log_p.gather(-1, torch.tensor(episode.ids)[1:, None]).squeeze(-1)
    sampled = torch.tensor(episode.step_ids)[1:] >= 0
    entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
    pairs = ((logp, episode.old_logp), (entropy, episode.token_entropy))
    return max((plain - torch.tensor(kept[1:]))[sampled].abs().max().item() for plain, kept in pairs)


def verdict(model: torch.nn.Module) -> tuple[str, str]:
    """A word of the list above, and why."""
    policy = Policy(model, tokenizer())
    try:
        require_exact_sampling(policy, MAX_TOKENS)
    except PolicyError as error:
        return ("TRACEBACK" if "\n" in str(error) else "refused"), str(error)
    difference = max(captured_minus_plain(policy, episode) for episode in play(policy))
    if not difference <= 1e-4:
        return "WRONG", f"{difference:.1e}"
    try:
        make_scorable(model)
    except PolicyError as error:
        return "exact", f"{difference:.1e}; eval.py only: {error}"
    return "exact", f"{difference:.1e}"


def tiny_model_of(name: str, **options) -> torch.nn.Module:
    """A model of this type whose plain forward pass works."""
    errors = []
    # Some types know no grouped key-value heads, some have no head size of their own.
    for settings in ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": 8}):
        try:
            model = tiny_model(tiny_config(CONFIG_MAPPING[name], **SPECIAL.get(name, {}), **settings), **options)
            with torch.inference_mode():
                model(input_ids=torch.arange(9)[None], use_cache=False)
            return model
        except Exception as error:  # a size that the guess does not know
            errors.append(error)
    raise errors[0]


def try_type(name: str, **options) -> tuple[str, str]:
    """A word of the list above for a type, and why. options: as `from_config` takes them."""
    try:
        model = tiny_model_of(name, **options)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}".replace("\n", " ")
    try:
        return verdict(model)
    except Exception as error:
        return "TRACEBACK", f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--attention", help="attention implementation; default: the model's own choice")
    asked = parser.parse_args()
    options = {"attn_implementation": asked.attention} if asked.attention else {}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    words = collections.Counter()
    for name in asked.types:
        word, reason = try_type(name, **options)
        words[word] += 1
        print(f"{name:32} {word:10} {reason[:190]}", flush=True)
    print(dict(words))
    if words["WRONG"] or words["TRACEBACK"] or (len(asked.types) > 100 and words["exact"] < 40):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
