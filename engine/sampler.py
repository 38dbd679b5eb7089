"""Responses for all rows of a batch, sampled turn after turn on one KV cache, on a CPU or on a GPU.

A turn has three parts. `_read` feeds what the rows have not read yet, many tokens at a time. `_draw` samples a token
for each row from the logits. `_decode`, the decode step, feeds that token and draws the next one.

On a GPU, Python takes longer to launch the kernels of a decode step than the GPU to run them. So the step is captured
as a CUDA graph and replayed. A graph repeats the same kernels on the same shapes at the same addresses. Therefore cache
and `Turn` keep their place in memory, and numbers of rows and columns are rounded up, so that few graphs are needed.

A CPU runs the same functions on exact shapes. Tests run them there on rounded shapes, too. Capture and replay alone
(`_step`) were not run: no GPU was at hand.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from empg import token_logp_and_entropy
from engine.kv_cache import SlotLayer
from policy import Policy, PolicyError

# By device: rows and columns of a decode step are rounded up to multiples of the first two numbers. The third is the
# number of tokens between two looks of the host at whether all responses have ended. A look makes a GPU wait.
ROUNDING = {"cpu": (1, 1, 1), "cuda": (16, 256, 4)}
READ_AT_ONCE = 2**15  # tokens of one forward pass, padding included; it bounds the memory


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens (B,) from softmax(logits / temperature) by inversion of its distribution function.

    logits: (B, V).  uniform: (B,) float64 in [0, 1).  temperature 0 means the most likely token. In float64, where the
    function of 150,000 tokens still ends at 1; a token of probability 0 is never drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    distribution = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    target = uniform[:, None] * distribution[:, -1:]
    return torch.searchsorted(distribution, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class Turn:
    """What a decode step reads and writes besides the cache: (rows, tokens of a response, at most) on the device."""

    def __init__(self, rows: int, tokens: int, device: torch.device):
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # tokens of each response so far
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)  # the last of them
        self.length = torch.zeros(rows, 1, dtype=torch.long, device=device)  # tokens that the model has read
        self.open = torch.zeros(rows, 1, dtype=torch.bool, device=device)  # False after the stop token
        self.uniform = torch.zeros(rows, tokens, dtype=torch.float64, device=device)
        self.ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.logp, self.entropy = (torch.zeros_like(self.uniform) for _ in range(2))  # nats

    def begin(self, lengths: list[int], uniform: Tensor) -> None:
        """Begin a turn.  lengths: tokens read, of each row; rows behind these are closed.  uniform: (B, tokens)."""
        for tensor in (self.count, self.open, self.length):
            tensor.zero_()
        self.open[: len(lengths)] = True
        self.length[: len(lengths), 0] = torch.tensor(lengths, device=self.length.device)
        self.uniform[: len(lengths)] = uniform.to(self.uniform.device)


class Response(NamedTuple):
    """What one row sampled in a turn, the stop token included if it came. A number a token, in nats."""

    ids: list[int]
    logp: list[float]
    entropy: list[float]


class Sampler:
    """Samples a response for every row of a batch, turn after turn, on one KV cache.

    openings: the ids that each row begins with. Equal ones are read once, except for their last id, which is left for
    `respond`.  max_tokens: of a row; the cache takes no more.
    """

    def __init__(
        self, policy: Policy, openings: list[list[int]], temperature: float, max_step_tokens: int, max_tokens: int
    ):
        self.policy, self.temperature = policy, temperature
        self.max_step_tokens, self.max_tokens = max_step_tokens, max_tokens
        self.rounding = ROUNDING.get(policy.device.type, ROUNDING["cpu"])
        self.cache = DynamicCache(config=policy.model.config)
        self.cache.layers = [SlotLayer() for _ in self.cache.layers]
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # of the decode steps of so many rows and columns
        self.turn = Turn(_up(len(openings), self.rounding[0]), max_step_tokens, policy.device)
        distinct = list(dict.fromkeys(tuple(ids[:-1]) for ids in openings))
        self.lengths = [0] * len(distinct)  # tokens that the model has read, of each row
        self.columns = 0  # of the cache
        self._reserve(max(map(len, distinct)))
        self._read(distinct)
        self.keep([distinct.index(tuple(ids[:-1])) for ids in openings])

    def keep(self, rows: list[int]) -> None:
        """Make these the rows of the batch; every other row is dropped."""
        lengths = [self.lengths[row] for row in rows]
        if rows != list(range(len(rows))):
            index = torch.tensor(rows, dtype=torch.long, device=self.policy.device)
            for layer in self.cache.layers:
                layer.keep(index, max(lengths, default=0))
        self.lengths = lengths

    def _reserve(self, columns: int) -> None:
        """Make room in the cache, twice the columns if they are full. Graphs that know its old place are dropped."""
        columns = _up(columns, self.rounding[1])
        if columns >= self.columns:
            most = _up(self.max_tokens, self.rounding[1]) + 1  # one more for what belongs to no token
            self.columns, self.graphs = min(2 * columns, most), {}
            for layer in self.cache.layers:
                layer.capacity = (len(self.turn.ids), self.columns)

    def respond(self, histories: list[list[int]], uniform: Tensor) -> list[Response]:
        """Feed each row what it has not read of its history, and sample until the stop token or max_step_tokens.

        histories: all ids of each row; responses and observations belong to them.  uniform: (B, max_step_tokens) random
        numbers in [0, 1).  Raises PolicyError if the logits are not finite.
        """
        rows, columns, look = self.rounding
        pending = [ids[length:] for ids, length in zip(histories, self.lengths, strict=True)]
        longest = max(map(len, histories))
        self._reserve(longest + self.max_step_tokens)
        logits = self._read(pending)
        self.turn.begin(self.lengths, uniform)
        self._draw(logits)
        for number in range(1, self.max_step_tokens):
            if number % look == 0:
                if not self.turn.open.any():
                    break
                longest = int((self.turn.length + self.turn.open).max())
            self._step(_up(len(pending), rows), _up(longest + number % look, columns))
        records = (record[: len(pending)].tolist() for record in (self.turn.ids, self.turn.logp, self.turn.entropy))
        responses = [self._response(*row) for row in zip(*records, strict=True)]
        self.lengths = [length + len(new.ids) - 1 for length, new in zip(self.lengths, responses, strict=True)]
        return responses

    def _response(self, ids: list[int], logp: list[float], entropy: list[float]) -> Response:
        """A row's record up to its stop token."""
        length = ids.index(self.policy.stop_id) + 1 if self.policy.stop_id in ids else len(ids)
        if not all(map(math.isfinite, logp[:length])):
            raise PolicyError("the policy's logits are not finite: its weights are damaged, or training diverged")
        return Response(ids[:length], logp[:length], entropy[:length])

    def _read(self, pending: list) -> Tensor:
        """Feed each row its pending ids, padded to (B, n); returns the logits (B, V) after the last of them."""
        width, device, logits = max(map(len, pending)), self.policy.device, []
        at_once = max(1, READ_AT_ONCE // max(1, width))
        for first in range(0, len(pending), at_once):
            part = pending[first : first + at_once]
            rows = slice(first, first + len(part))
            padding = [width - len(row) for row in part]  # on the left
            ids = torch.tensor([[0] * n + [*row] for n, row in zip(padding, part, strict=True)], device=device)
            number = torch.arange(width, device=device) - torch.tensor(padding, device=device)[:, None]
            slots = (torch.tensor(self.lengths[rows], device=device)[:, None] + number).where(number >= 0, -1)
            self.lengths[rows] = [length + len(row) for length, row in zip(self.lengths[rows], part, strict=True)]
            logits.append(self._forward(ids, slots, rows, _up(max(self.lengths[rows]), self.rounding[1])))
        return torch.cat(logits)

    def _step(self, rows: int, columns: int) -> None:
        """`_decode`. On a GPU, a shape is run and captured when it comes first, and replayed from then on.

        The CUDA lines were not run here.
        """
        if self.policy.device.type != "cuda":
            self._decode(rows, columns)
        elif (rows, columns) in self.graphs:
            self.graphs[rows, columns].replay()
        else:
            self._decode(rows, columns)
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None  # they share their memory
            graph = self.graphs[rows, columns] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._decode(rows, columns)

    def _decode(self, rows: int, columns: int) -> None:
        """Feed the last token of every open response, and draw the next one. All of it happens on the device: a graph
        cannot repeat what Python decides."""
        now = self.turn
        slots = now.length[:rows].where(now.open[:rows], -1)  # (B, 1)
        logits = self._forward(now.token[:rows], slots, slice(0, rows), columns)
        now.length[:rows] += now.open[:rows]
        self._draw(logits)

    def _forward(self, ids: Tensor, slots: Tensor, rows: slice, columns: int) -> Tensor:
        """Logits (B, V) after the last of the ids (B, n) of these rows, which go into these slots (B, n)."""
        for layer in self.cache.layers:
            layer.rows, layer.slots, layer.columns = rows, slots, columns
        positions = slots.clamp(min=0)
        causal = torch.arange(columns, device=slots.device) <= positions[:, None, :, None]  # (B, 1, n, columns)
        output = self.policy.model(
            input_ids=ids,
            attention_mask=causal,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _draw(self, logits: Tensor) -> None:
        """Sample a token of every row from the logits (B, V), and record it with its logp and entropy."""
        now, rows = self.turn, len(logits)
        uniform = now.uniform[:rows].index_select(1, now.count).squeeze(1)
        token = sample(logits, uniform, self.temperature)[:, None]
        # Greedy decoding has no distribution of its own; the record is that of temperature 1.
        logp, entropy = token_logp_and_entropy(logits[:, None], token, self.temperature or 1.0)
        for record, new in ((now.ids, token), (now.logp, logp), (now.entropy, entropy)):
            record[:rows].index_copy_(1, now.count, new.to(record.dtype))
        now.token[:rows] = token
        now.open[:rows] &= token != self.policy.stop_id
        now.count += 1


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# --------------------------------------------------------------------------------------------- weights for sampling


@contextmanager
def sampling_weights(model: nn.Module, mixed_precision: str) -> Iterator[None]:
    """While this lasts, linear layers hold their weights in the type that mixed precision computes in.

    Autocast casts their float32 weights in every forward pass, which costs a decode step more than its own work. Here
    they are cast once, and the numbers are the same. The copy takes 2 bytes a parameter.  mixed_precision: as
    Accelerate names it; nothing is done for "no".
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    if dtype is None:
        yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.dtype != dtype]
    kept = [(layer, name, weight) for layer in layers for name, weight in layer.named_parameters(recurse=False)]
    try:
        for layer, name, weight in kept:
            setattr(layer, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
        with torch.autocast(model.device.type, dtype):
            yield
    finally:
        for layer, name, weight in kept:
            setattr(layer, name, weight)
