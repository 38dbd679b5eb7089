"""Responses for all rows of a batch, sampled turn after turn on one KV cache, on a CPU or on a GPU.

The plain version: `model.generate(ids)` for every turn, with the log-prob and entropy of every token kept.

The file's order: the cache, the memory of a decode step, the sampler. A turn of the sampler has
three parts. `_read` feeds the tokens that the model has not read yet, many at a time. `_draw` samples a token for each
row from the logits. `_decode`, the decode step, feeds that token and draws the next one.

On a GPU, Python takes longer to launch the kernels of a decode step than the GPU takes to run them. So the decode step
is captured as a CUDA graph and replayed. A graph repeats the same kernels on the same shapes at the same addresses.
Therefore `Memory` keeps its place, and a policy keeps its memory from rollout to rollout: a shape is captured once in a
run. Numbers of rows and columns are rounded up, so that few graphs are needed. A CPU runs the same functions on exact
shapes, and each rollout has a memory of its own.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from empg import token_logp_and_entropy
from policy import Policy, PolicyError

# For each type of device. First and second: the rows and columns of a decode step are rounded up to multiples of these.
# Third: decode steps between two checks for the end. A check synchronises with the GPU.
ROUNDING = {"cpu": (1, 1, 1), "cuda": (16, 256, 4)}
CAPTURED = ("cuda",)  # types of device whose decode steps are captured, see `is_captured`
READ_AT_ONCE = 2**15  # tokens of one forward pass, padding included; it bounds the memory


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens (B,) from softmax(logits / temperature), by inversion of the cumulative distribution.

    logits: (B, V).  uniform: (B,) float64 in [0, 1).  temperature: 0 means the most likely token.
    In float64 the cumulative probability of 150,000 tokens still ends at 1. A token of probability 0 is never drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    distribution = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    target = uniform[:, None] * distribution[:, -1:]
    return torch.searchsorted(distribution, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


# -------------------------------------------------------------------------------------------------------- the KV cache


class SlotLayer(DynamicLayer):
    """Keys and values of one attention layer. The token at position p of a row stands in column p.

    Keys and values are written in place, and each row has its own length. transformers' DynamicLayer copies the whole
    past for every token, and its StaticLayer has one length for all rows.

    `keys` and `values` are views of two buffers, (rows, heads, columns, size). The buffers keep their place in memory
    until `capacity` changes. The last column is a bin for padding.
    """

    capacity: tuple[int, int]  # rows and columns of the buffers
    rows: slice  # the rows of the next tokens
    slots: Tensor  # (B, n), the column of each of these tokens, -1 for padding
    columns: int  # attention sees the first `columns` columns

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the states of n tokens, (B, heads, n, size), into their slots.

        Returns keys and values of these rows, (B, heads, columns, size) each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Keys take the type of the values. Under autocast, rotary embedding returns float32 keys, and attention
            # would cast the whole cache for every token.
            self.buffers = [states[:0, :, :0].to(value_states.dtype) for states in (key_states, value_states)]
        if self.buffers[0].shape[::2] != self.capacity:
            self.buffers = [self._grow(buffer) for buffer in self.buffers]
        row = torch.arange(len(self.slots), device=self.slots.device)[:, None]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows][row, :, self.slots] = states.transpose(1, 2).to(buffer.dtype)
        self.keys, self.values = (buffer[self.rows, :, : self.columns] for buffer in self.buffers)
        return self.keys, self.values

    def _grow(self, old: Tensor) -> Tensor:
        """A copy of the buffer with the present capacity. Unused columns are 0, because attention multiplies masked
        values by 0, and nan * 0 is nan."""
        new = old.new_zeros(self.capacity[0], old.shape[1], self.capacity[1], old.shape[3])
        used = old[:, :, :-1]
        new[: used.shape[0], :, : used.shape[2]] = used
        return new

    def keep(self, rows: Tensor, columns: int) -> None:
        """Move `rows` (n,) to the front, copying their first `columns` columns."""
        for buffer in self.buffers:
            buffer[: len(rows), :, :columns] = buffer[rows, :, :columns]


# ---------------------------------------------------------------------------------------- the memory of a decode step


class Memory:
    """The tensors that a decode step reads and writes, besides the weights, and the graphs that know their addresses.

    rows: of the batch, at most.  tokens: the most of a response.  weights: the addresses of the weights.
    """

    def __init__(self, policy: Policy, rows: int, tokens: int, weights: tuple[int, ...] = ()):
        device, self.tokens, self.weights = policy.model.device, tokens, weights
        self.cache = DynamicCache(config=policy.model.config)
        self.cache.layers = [SlotLayer() for _ in self.cache.layers]
        self.columns = 0  # of the cache
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}  # of decode steps, by temperature, rows and columns
        self.stops = torch.tensor(policy.stop_ids, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # tokens of each response so far
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)  # the last token of each response
        self.length = torch.zeros(rows, 1, dtype=torch.long, device=device)  # tokens that the model has read
        self.open = torch.zeros(rows, 1, dtype=torch.bool, device=device)  # False after a stop token
        self.uniform = torch.zeros(rows, tokens, dtype=torch.float64, device=device)  # random numbers in [0, 1)
        self.ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.logp, self.entropy = (torch.zeros_like(self.uniform) for _ in range(2))  # nats

    def begin_turn(self, lengths: list[int], uniform: Tensor) -> None:
        """Reset for new responses.

        lengths: tokens that the model has read, of each of the B rows; further rows are closed.  uniform: (B, tokens).
        """
        for tensor in (self.count, self.open, self.length):
            tensor.zero_()
        self.open[: len(lengths)] = True
        self.length[: len(lengths), 0] = torch.tensor(lengths, device=self.length.device)
        self.uniform[: len(lengths)] = uniform.to(self.uniform.device)


def is_captured(policy: Policy) -> bool:
    """Whether decode steps are captured. Those of a sharded policy are not: each rollout gathers its weights at new
    addresses, and the kernels of models that need sharding take longer than their launch."""
    return policy.model.device.type in CAPTURED and not isinstance(policy.model, FSDPModule)


def memory_of(policy: Policy, rows: int, tokens: int) -> Memory:
    """The memory that the policy keeps, if it is large enough and the weights are where they were. Otherwise a new one.

    Without captured graphs a policy keeps none.
    """
    if not is_captured(policy):
        return Memory(policy, rows, tokens)
    weights, kept = tuple(weight.data_ptr() for weight in policy.model.parameters()), policy.memory
    if kept is None or (kept.tokens, kept.weights) != (tokens, weights) or len(kept.ids) < rows:
        kept = policy.memory = None  # frees the old one before the new one is made
        policy.memory = Memory(policy, rows, tokens, weights)
    return policy.memory


# --------------------------------------------------------------------------------------------------------- the sampler


class Response(NamedTuple):
    """The tokens that one row sampled in a turn, with the stop token if it came. logp and entropy are in nats."""

    ids: list[int]
    logp: list[float]
    entropy: list[float]


class Sampler:
    """Samples a response for every row of a batch, turn after turn, on one KV cache.

    prompts: the first ids of each row. Equal prompts are read once, except for their last id, which `respond` reads.
    max_step_tokens: of a response.  max_tokens: of a row; the cache has no room for more.
    """

    def __init__(
        self, policy: Policy, prompts: list[list[int]], temperature: float, max_step_tokens: int, max_tokens: int
    ):
        self.policy, self.temperature = policy, temperature
        self.max_step_tokens, self.max_tokens = max_step_tokens, max_tokens
        self.rounding = ROUNDING.get(policy.model.device.type, ROUNDING["cpu"])
        # Eager attention adds the mask to the scores. A boolean one would add 1 for tokens that are seen, 0 for others.
        self.adds_mask = policy.model.config.get_text_config()._attn_implementation == "eager"
        self.memory = memory_of(policy, round_up(len(prompts), self.rounding[0]), max_step_tokens)
        distinct = list(dict.fromkeys(tuple(ids[:-1]) for ids in prompts))
        self.lengths = [0] * len(distinct)  # tokens that the model has read, of each row
        self._reserve(max(map(len, distinct)))
        self._read(distinct)
        self.keep([distinct.index(tuple(ids[:-1])) for ids in prompts])

    def keep(self, rows: list[int]) -> None:
        """Make `rows` the batch, in this order. All other rows are dropped."""
        lengths = [self.lengths[row] for row in rows]
        if rows != list(range(len(rows))):
            index = torch.tensor(rows, dtype=torch.long, device=self.policy.model.device)
            for layer in self.memory.cache.layers:
                layer.keep(index, max(lengths, default=0))
        self.lengths = lengths

    def respond(self, histories: list[list[int]], uniform: Tensor) -> list[Response]:
        """Read the new ids of each row, and sample until a stop token or max_step_tokens.

        histories: all ids of each row, earlier responses and observations included.  uniform: (B, max_step_tokens)
        random numbers in [0, 1).  Raises PolicyError if the logits are not finite.
        """
        rows, columns, steps_between_checks = self.rounding
        pending = [ids[length:] for ids, length in zip(histories, self.lengths, strict=True)]
        longest = max(map(len, histories))
        self._reserve(longest + self.max_step_tokens)
        logits = self._read(pending)
        self.memory.begin_turn(self.lengths, uniform)
        self._draw(logits)
        for number in range(1, self.max_step_tokens):
            unchecked = number % steps_between_checks  # decode steps since the last check
            if unchecked == 0:
                if not self.memory.open.any():
                    break
                longest = int((self.memory.length + self.memory.open).max())
            self._decode_or_replay(round_up(len(pending), rows), round_up(longest + unchecked, columns))
        sampled = (self.memory.ids, self.memory.logp, self.memory.entropy)
        of_rows = zip(*(column[: len(pending)].tolist() for column in sampled), strict=True)
        responses = [self._response(*row) for row in of_rows]
        self.lengths = [length + len(new.ids) - 1 for length, new in zip(self.lengths, responses, strict=True)]
        return responses

    def _reserve(self, columns: int) -> None:
        """Grow the cache: by doubling, or to its end at once if graphs are captured, because growing discards them."""
        memory, columns = self.memory, round_up(columns, self.rounding[1])
        if columns >= memory.columns:
            most = round_up(self.max_tokens, self.rounding[1]) + 1  # plus one column that padding is written to
            memory.columns, memory.graphs = most if is_captured(self.policy) else min(2 * columns, most), {}
            for layer in memory.cache.layers:
                layer.capacity = (len(memory.ids), memory.columns)

    def _response(self, ids: list[int], logp: list[float], entropy: list[float]) -> Response:
        """The response of one row: its tokens up to the first stop token."""
        length = next((number for number, i in enumerate(ids, 1) if i in self.policy.stop_ids), len(ids))
        if not all(map(math.isfinite, logp[:length])):
            raise PolicyError("the policy's logits are not finite: its weights are damaged, or training diverged")
        return Response(ids[:length], logp[:length], entropy[:length])

    def _read(self, pending: list) -> Tensor:
        """Feed each row its pending ids, padded on the left to (B, n). Returns the logits (B, V) after the last id."""
        width, device, logits = max(map(len, pending)), self.policy.model.device, []
        at_once = max(1, READ_AT_ONCE // max(1, width))
        for start in range(0, len(pending), at_once):
            part = pending[start : start + at_once]
            rows = slice(start, start + len(part))
            padding = [width - len(row) for row in part]
            ids = torch.tensor([[0] * n + [*row] for n, row in zip(padding, part, strict=True)], device=device)
            number = torch.arange(width, device=device) - torch.tensor(padding, device=device)[:, None]
            slots = (torch.tensor(self.lengths[rows], device=device)[:, None] + number).where(number >= 0, -1)
            self.lengths[rows] = [length + len(row) for length, row in zip(self.lengths[rows], part, strict=True)]
            logits.append(self._forward(ids, slots, rows, round_up(max(self.lengths[rows]), self.rounding[1])))
        return torch.cat(logits)

    def _decode_or_replay(self, rows: int, columns: int) -> None:
        """A decode step. If they are captured, the first of a shape is run and captured, later ones are replayed."""
        graphs, shape = self.memory.graphs, (self.temperature, rows, columns)
        if shape in graphs:
            graphs[shape].replay()
            return
        start = time.perf_counter()
        self._decode(rows, columns)
        if is_captured(self.policy):
            graphs[shape] = self._capture(rows, columns)
            self.policy.capture_seconds += time.perf_counter() - start

    def _capture(self, rows: int, columns: int) -> torch.cuda.CUDAGraph:
        """The decode step as a graph. Capturing runs nothing. All graphs share one pool of memory.

        Autocast keeps what it casts until the rollout ends. The graph must not use such a copy, because it outlives it.
        And nobody may use a copy that was made while capturing, because its numbers are not there yet.
        """
        pool = next((graph.pool() for graph in self.memory.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._decode(rows, columns)
        torch.clear_autocast_cache()
        return graph

    def _decode(self, rows: int, columns: int) -> None:
        """Feed the last token of every open response, and draw the next one.

        All work is on the device, because a graph cannot repeat what Python decides.
        """
        memory = self.memory
        slots = memory.length[:rows].where(memory.open[:rows], -1)  # (B, 1)
        logits = self._forward(memory.token[:rows], slots, slice(0, rows), columns)
        memory.length[:rows] += memory.open[:rows]
        self._draw(logits)

    def _forward(self, ids: Tensor, slots: Tensor, rows: slice, columns: int) -> Tensor:
        """Feed ids (B, n) of these rows into slots (B, n) of the cache. Returns the logits (B, V) after the last id."""
        for layer in self.memory.cache.layers:
            layer.rows, layer.slots, layer.columns = rows, slots, columns
        positions = slots.clamp(min=0)
        mask = torch.arange(columns, device=slots.device) <= positions[:, None, :, None]  # (B, 1, n, columns)
        if self.adds_mask:
            mask = torch.zeros_like(mask, dtype=self.policy.model.dtype).masked_fill_(~mask, -math.inf)
        output = self.policy.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.memory.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _draw(self, logits: Tensor) -> None:
        """Sample a token of every row from the logits (B, V), and keep it with its log-prob and entropy."""
        memory, rows = self.memory, len(logits)
        uniform = memory.uniform[:rows].index_select(1, memory.count).squeeze(1)
        token = sample(logits, uniform, self.temperature)[:, None]
        # At temperature 0, log-prob and entropy are those of temperature 1.
        logp, entropy = token_logp_and_entropy(logits[:, None], token, self.temperature or 1.0)
        for column, new in ((memory.ids, token), (memory.logp, logp), (memory.entropy, entropy)):
            column[:rows].index_copy_(1, memory.count, new.to(column.dtype))
        memory.token[:rows] = token
        memory.open[:rows] &= (token != memory.stops).all(-1, keepdim=True)  # (B, 1) against (stop tokens,)
        memory.count += 1


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
