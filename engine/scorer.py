"""Log-probability and entropy of the sampled tokens alone, from hidden states, a part of the logits at a time.

The logits are the largest tensor of an update: 8,192 tokens of a vocabulary of 151,936 take 4.6 GiB in float32, and
plain code keeps two or three tensors of that size. Here no such tensor exists. `lm_head` sees the hidden states of the
sampled tokens and no others. The forward pass works on some tokens at a time, the backward pass on a part of the
vocabulary at a time, and computes the logits again.

The numbers are those of `empg.token_logp_and_entropy`, and tests hold them to it.

Not covered: models whose logits are not `lm_head` of the last hidden state, such as those with a logit cap (Gemma 2) or
a logit scale (Cohere, Granite), and heads with a bias. `scoring` refuses them.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from policy import PolicyError

CHUNK_ELEMENTS = 2**26  # logits that exist at a time: 256 MiB in float32


def scoring(model: nn.Module) -> nn.Module:
    """Give a causal LM a second way to be called: model(input_ids=ids, sampled=mask) scores the sampled tokens.

    Then ids is (B, L), and mask, (B, L) bool, says which of them to score; the first of a row cannot be scored. Further
    arguments are `temperature`, and `entropy=True` to compute entropy, too. Returns logp and entropy, (N,) each, in
    nats, row by row; entropy is None if it was not asked for. Gradient flows through logp only.

    The model stays the same object with the same weights under the same names. Only its class and that of its head
    change. So whatever wraps or saves a model works as before, and so does a call without `sampled`.
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
    def forward(self, *args, sampled: Tensor | None = None, temperature: float = 1.0, entropy: bool = False, **kwargs):
        if sampled is None:
            return kind.forward(self, *args, **kwargs)
        ids = kwargs["input_ids"]
        hidden = self.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, hidden)
        before, wanted = hidden[:, :-1], sampled[:, 1:]  # a token is predicted one place earlier
        return self.get_output_embeddings()(before[wanted], ids[:, 1:][wanted], temperature, entropy)

    return forward


def _require_plain_head(model: nn.Module, head: nn.Module) -> None:
    if type(head) is not nn.Linear or head.bias is not None:
        raise PolicyError("the update cannot use this model: its lm_head is not a linear layer without bias")
    if head.weight.is_meta:  # sharded loading: the main process has the weights, and looks at them
        return
    with torch.no_grad():
        ids = torch.arange(1, 9, device=head.weight.device)[None]
        logits, hidden = model(input_ids=ids).logits, model.base_model(input_ids=ids).last_hidden_state
        if not torch.equal(logits, head(hidden)):
            raise PolicyError("the update cannot use this model: its logits are not lm_head of the last hidden state")


class ScoringHead(nn.Linear):
    """An lm_head that gives logits, or, if it is told the tokens, their log-probabilities."""

    def forward(self, hidden: Tensor, ids: Tensor | None = None, temperature: float = 1.0, entropy: bool = False):
        """hidden: (N, hidden).  ids: (N,).  Returns logp and entropy, (N,) each, or without ids logits (N, V)."""
        if ids is None:
            return super().forward(hidden)
        kind, dtype = hidden.device.type, self.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        # The temperature divides the hidden states: they are far fewer numbers than the logits.
        return _Score.apply((hidden / temperature).to(dtype), self.weight.to(dtype), ids, entropy)


class _Score(torch.autograd.Function):
    """Keeps one number a token, log_norm, from which the probabilities can be computed again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, ids: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logp, log_norm, entropy = (torch.empty(len(ids), dtype=exact, device=ids.device) for _ in range(3))
        for at in _slices(len(ids), len(weight)):
            z = (hidden[at] @ weight.T).to(exact)  # (n, V)
            log_norm[at] = z.logsumexp(-1)
            logp[at] = z.gather(-1, ids[at, None]).squeeze(-1) - log_norm[at]
            if want_entropy:
                # A banned token has z = -inf and p = 0; the clamp makes its term 0, the limit of p log p.
                log_p = z.sub_(log_norm[at, None]).clamp_(min=torch.finfo(exact).min)
                entropy[at] = -log_p.exp().mul_(log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, ids, log_norm)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy if want_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp: Tensor, _) -> tuple[Tensor, Tensor, None, None]:
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
        return d_hidden.to(hidden.dtype), d_weight, None, None


def _slices(length: int, width: int) -> list[slice]:
    """Slices that cover `length` rows, each of as many as CHUNK_ELEMENTS allows if a row has `width` elements."""
    size = max(1, CHUNK_ELEMENTS // max(1, width))
    return [slice(i, i + size) for i in range(0, length, size)]
