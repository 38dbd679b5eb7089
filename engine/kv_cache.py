"""A KV cache for sampling: keys and values are written in place, and every row grows by its own number of tokens.

transformers' own cache copies the whole past of a row for every token, and its layer of fixed size has one length for
all rows.
"""

from torch import Tensor, arange
from transformers.cache_utils import DynamicLayer


class SlotLayer(DynamicLayer):
    """Keys and values of one attention layer. The token at position p of a row stands in column p.

    They are views of two buffers, (rows, heads, columns, size). The buffers stay where they are in memory until
    `capacity` changes. Their last column takes what belongs to no token.
    """

    capacity: tuple[int, int]  # rows and columns of the buffers
    rows: slice  # to which the next tokens belong
    slots: Tensor  # (B, n), the column of each of these tokens, -1 for padding
    columns: int  # that attention sees

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the states of n tokens, (B, heads, n, size), into their slots; returns these rows' columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # Keys take the type of the values. Under autocast, rotary embedding leaves them in float32, and attention
            # would cast the whole cache for every token.
            self.buffers = [states[:0, :, :0].to(value_states.dtype) for states in (key_states, value_states)]
        if self.buffers[0].shape[::2] != self.capacity:
            self.buffers = [self._larger(buffer) for buffer in self.buffers]
        row = arange(len(self.slots), device=self.slots.device)[:, None]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows][row, :, self.slots] = states.transpose(1, 2).to(buffer.dtype)
        self.keys, self.values = (buffer[self.rows, :, : self.columns] for buffer in self.buffers)
        return self.keys, self.values

    def _larger(self, old: Tensor) -> Tensor:
        """A buffer of the present capacity. Zeros follow, because attention multiplies masked values by 0."""
        new = old.new_zeros(self.capacity[0], old.shape[1], self.capacity[1], old.shape[3])
        used = old[:, :, :-1]
        new[: used.shape[0], :, : used.shape[2]] = used
        return new

    def keep(self, rows: Tensor, columns: int) -> None:
        """Make the first rows copies of these (n,), as far as these columns."""
        for buffer in self.buffers:
            buffer[: len(rows), :, :columns] = buffer[rows, :, :columns]
