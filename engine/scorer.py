"""Log-probabilities of the sampled tokens, without the logits of all tokens in memory.

The plain version: log_softmax(model(ids).logits[:, :-1] / T, -1).gather(-1, ids[:, 1:, None])

The logits are the largest tensor of an update. 8,192 tokens of a vocabulary of 151,936 take 4.6 GiB in float32, and
autograd keeps two or three tensors of that size. The scorer holds no such tensor. `lm_head` gets the hidden states of
the sampled tokens only. The forward pass computes the logits of some tokens at a time. The backward pass computes them
again, for a part of the vocabulary at a time.

The numbers are those of `empg.token_logp_and_entropy`. Tests compare values and gradients.

Not covered: heads with a bias, and models whose logits are not `lm_head` of the last hidden state, such as those with a
logit cap (Gemma 2) or a logit scale (Cohere, Granite). `make_scorable` refuses them.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from policy import PolicyError, refused

CHUNK_ELEMENTS = 2**26  # logits in memory at a time: 256 MiB in float32


def make_scorable(model: nn.Module) -> nn.Module:
    """Change a causal LM in place, so that it can also be called as model(input_ids=ids, sampled=mask, temperature=T).

    ids: (B, L).  mask: (B, L) bool, the tokens to score; the first token of a row cannot be scored.  T: 1 by default.
    That call returns logp (N,) of the N tokens, in nats, row by row.

    Only the classes of the model and of its head change. The object, its weights and their names stay. So code that
    wraps or saves the model still works, and a call without `sampled` returns what it did before.
    Raises PolicyError if the model computes its logits in another way.
    """
    head = model.get_output_embeddings()
    if isinstance(head, ScoringHead):
        return model
    _require_plain_head(model, head)
    head.__class__ = ScoringHead
    kind = type(model)
    members = {"forward": functools.wraps(kind.forward)(_forward(kind)), "__module__": kind.__module__}
    model.__class__ = type(kind.__name__, (kind,), members)
    return model


def _forward(kind: type):
    def forward(self, *args, sampled: Tensor | None = None, temperature: float = 1.0, **kwargs):
        if sampled is None:
            return kind.forward(self, *args, **kwargs)
        ids = kwargs["input_ids"]
        hidden = self.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, hidden)
        before, wanted = hidden[:, :-1], sampled[:, 1:]  # a token is predicted one position earlier
        return self.get_output_embeddings()(before[wanted], ids[:, 1:][wanted], temperature)

    return forward


def _require_plain_head(model: nn.Module, head: nn.Module) -> None:
    """Raises PolicyError unless the logits are a linear layer of the last hidden state. The weights are not needed.

    The body is replaced by a function that returns fixed numbers, and the head by one that returns what it gets.
    """
    if type(head) is not nn.Linear or head.bias is not None:
        raise PolicyError("the update cannot use this model: its lm_head is not a linear layer without bias")
    device = "cpu" if head.weight.is_meta else head.weight.device
    hidden, ids = torch.linspace(1, 2, head.in_features, device=device)[None, None], torch.tensor([[1]], device=device)
    bodies = {model.base_model, model.get_decoder()}
    for body in bodies:
        body.forward = lambda *_, **__: _FixedOutput([hidden])
    head.forward = lambda hidden: hidden
    try:
        with refused("the update cannot use this model"), torch.no_grad():
            # Llama 4's base model is the model itself, and returns no hidden state.
            plain = model.base_model is not model and torch.equal(model(input_ids=ids).logits, hidden)
    finally:
        for part in (head, *bodies):
            del part.forward
    if not plain:
        raise PolicyError("the update cannot use this model: its logits are not lm_head of the last hidden state")


class _FixedOutput(tuple):
    """The output of a body: hidden states, and None under any other name."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class ScoringHead(nn.Linear):
    """An lm_head that returns logits, or, if it is given token ids, their log-probabilities."""

    def forward(self, hidden: Tensor, ids: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """hidden: (N, hidden).  ids: (N,).  Returns logp (N,) in nats; without ids, logits (N, V)."""
        if ids is None:
            return super().forward(hidden)
        device, dtype = hidden.device.type, self.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # The temperature divides the hidden states, which are far fewer numbers than the logits.
        return _Score.apply((hidden / temperature).to(dtype), self.weight.to(dtype), ids)


class _Score(torch.autograd.Function):
    """log_softmax(hidden @ weight.T) at ids. It keeps log_norm, one number a token, to compute probabilities again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logp, log_norm = (torch.empty(len(ids), dtype=exact, device=ids.device) for _ in range(2))
        for at in _slices(len(ids), len(weight)):
            z = (hidden[at] @ weight.T).to(exact)  # (n, V)
            log_norm[at] = z.logsumexp(-1)
            logp[at] = z.gather(-1, ids[at, None]).squeeze(-1) - log_norm[at]
        ctx.save_for_backward(hidden, weight, ids, log_norm)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp: Tensor) -> tuple[Tensor, Tensor, None]:
        """d logp_a / d z = 1_a - p. Each part of the weight's gradient is written once, into its only buffer."""
        hidden, weight, ids, log_norm = ctx.saved_tensors
        d_hidden = torch.zeros(hidden.shape, dtype=log_norm.dtype, device=hidden.device)
        d_weight = torch.empty_like(weight)
        for part in _slices(len(weight), len(ids)):
            rows = weight[part]  # (v, hidden)
            z = (hidden @ rows.T).to(log_norm.dtype)  # (N, v)
            d_z = z.sub_(log_norm[:, None]).exp_().mul_(-d_logp[:, None])
            place = ids - part.start
            here = (place >= 0) & (place < len(rows))
            d_z.scatter_add_(1, place.clamp(0, len(rows) - 1)[:, None], (d_logp * here)[:, None])
            d_z = d_z.to(weight.dtype)
            d_hidden += d_z @ rows
            torch.mm(d_z.T, hidden, out=d_weight[part])
        return d_hidden.to(hidden.dtype), d_weight, None


def _slices(length: int, width: int) -> list[slice]:
    """Slices that cover `length` rows. A slice of rows of `width` elements has at most CHUNK_ELEMENTS, or one row."""
    size = max(1, CHUNK_ELEMENTS // max(1, width))
    return [slice(i, i + size) for i in range(0, length, size)]


# ------------------------------------------------------------------------------------------- gradient checkpointing


def checkpoint_layers(model: nn.Module) -> nn.Module:
    """Change a causal LM in place: its layers keep no activations, and compute them again in the backward pass.

    transformers does the same in training mode only, which also switches on dropout, router jitter and layer drop. Here
    the model stays in evaluation mode. As in `make_scorable`, only classes change.
    Raises PolicyError if the model has no layers of that kind.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise PolicyError("--gradient_checkpointing cannot be used with this model: its layers do not support it")
    kinds = {kind: _checkpointed(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = kinds[type(layer)]
    return model


def _checkpointed(kind: type) -> type:
    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        own = functools.partial(kind.forward, self)
        if not torch.is_grad_enabled():  # while sampling
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
