"""What each token's y receives from each earlier token, for every pair of tokens: the scan as a matrix.

The recurrence is linear in x, so in channel e it is y_i = sum over j <= i of alpha[i,j] x_j with

    alpha[i,j] = C_i (A_bar_i ... A_bar_{j+1}) B_bar_j

Take any position m with j < m <= i. The product splits there into how row i reads the state as it is when m
begins, and what is left by then of the write of column j:

    alpha[i,j] = (C_i A_bar_i ... A_bar_m) . (A_bar_{m-1} ... A_bar_{j+1} B_bar_j)

So a block of rows from m on and columns before m is one matrix product, over the N states, and over channels
too where they are added up. Blocks are found by halving: the rows of the right half with the columns of the
left half, then each half by itself. That takes L log L E N exponentials, whereas one for each pair would take
L^2 E N. Products of A_bar are exponentials of sums of delta that begin at m and have one sign, so none of
them overflows and each is as exact as its own sum.

Memory: channels are taken some at a time, so that no intermediate tensor has more than `ELEMENTS` numbers,
unless a single channel of [L,N] already has more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange
from torch import Tensor

#: The most numbers that a tensor may have: 32 MiB in float32.
ELEMENTS = 2**23


@dataclass(frozen=True)
class PairBlock:
    """A block of the matrix: rows from a position on, and columns before it.

    Attributes:
        middle: the position.
        rows, columns: which of the wanted rows and columns.
    """

    middle: int
    rows: slice
    columns: slice


@dataclass(frozen=True)
class ScanPairs:
    """The scan of one prompt in some channels, and which pairs of its tokens are wanted.

    Attributes:
        delta: step sizes [L,E].
        x: what each column is multiplied by [L,E].
        A: [E,N].
        B, C: [L,N].
        rows, columns: positions, ascending.
    """

    delta: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    rows: list[int]
    columns: list[int]

    @torch.no_grad()
    def along(self, weight: Tensor) -> Tensor:
        """The sum over channels of weight[i] alpha[i,j] x_j: weight [L,E] -> [rows, columns]."""
        values = self.delta.new_zeros(len(self.rows), len(self.columns))
        for channels, part in self.by_channels():
            some = weight[:, channels]  # [L,e]
            own = (part.own() * some[self.both]).sum(-1)
            values[self.diagonal] += own
            for block in self.blocks():
                read = part.read(block).mul_(some[self.rows[block.rows], :, None])  # [i,e,N]
                written = rearrange(part.written(block), "j e n -> (e n) j")
                values[block.rows, block.columns] += rearrange(read, "i e n -> i (e n)") @ written
        return values

    @torch.no_grad()
    def summed(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over channels of a function of each alpha[i,j] x_j, with f(0) = 0: [rows, columns]."""
        values = self.delta.new_zeros(len(self.rows), len(self.columns))
        for _, part in self.by_channels():
            values[self.diagonal] += function(part.own()).sum(-1)
            for rows, columns, pairs in part.products():
                values[rows, columns] += function(pairs).sum(-1)
        return values

    @torch.no_grad()
    def each(self) -> Tensor:
        """alpha[i,j] x_j of every channel: [rows, columns, E], on the CPU."""
        shape = len(self.rows), len(self.columns), len(self.A)
        values = torch.zeros(shape, dtype=self.delta.dtype, device="cpu")
        for channels, part in self.by_channels():
            values[(*self.diagonal, channels)] = part.own().cpu()
            for rows, columns, pairs in part.products():
                values[rows, columns, channels] = pairs.cpu()
        return values

    # -- some channels ---------------------------------------------------------------------------------

    def by_channels(self) -> Iterator[tuple[slice, ScanPairs]]:
        """Split the channels: yields which channels, and the scan in them."""
        size = max(ELEMENTS // (len(self.delta) * self.A.shape[1]), 1)
        for start in range(0, len(self.A), size):
            some = slice(start, start + size)
            yield some, replace(self, delta=self.delta[:, some], x=self.x[:, some], A=self.A[some])

    def own(self) -> Tensor:
        """alpha[i,i] x_i, what a token reads of its own write, where it is a row and a column [both,E]."""
        return (self.delta * self.x)[self.both] * (self.B * self.C)[self.both].sum(-1, keepdim=True)

    def read(self, block: PairBlock) -> Tensor:
        """How each row reads the state as it is when the middle begins [rows,E,N]."""
        rows = self.rows[block.rows]
        time = self.delta[block.middle : rows[-1] + 1].cumsum(0)  # [l,E]: from the middle up to each position
        time = time[[row - block.middle for row in rows]]
        return (time[..., None] * self.A).exp_().mul_(self.C[rows, None])

    def written(self, block: PairBlock) -> Tensor:
        """What is left of each column's write when the middle begins [columns,E,N]."""
        columns = self.columns[block.columns]
        time = self.delta[columns[0] + 1 : block.middle].flip(0).cumsum(0).flip(0)
        time = torch.cat((time, torch.zeros_like(self.delta[:1])))  # [l,E]: from each position to the middle
        time = time[[column - columns[0] for column in columns]]
        write = (self.delta[columns] * self.x[columns])[..., None]
        return (time[..., None] * self.A).exp_().mul_(write).mul_(self.B[columns, None])

    def products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """alpha[i,j] x_j in every channel, for j < i: yields (which rows, columns, [rows,columns,E])."""
        for block in self.blocks():
            read, written = self.read(block), self.written(block)
            size = max(ELEMENTS // (written.shape[0] * written.shape[1]), 1)
            for start in range(0, len(read), size):
                some = read[start : start + size]
                first = block.rows.start + start
                pairs = einsum(some, written, "i e n, j e n -> i j e")
                yield slice(first, first + len(some)), block.columns, pairs

    # -- which pairs -----------------------------------------------------------------------------------

    @property
    def both(self) -> list[int]:
        """The positions that are both a row and a column."""
        return sorted(set(self.rows) & set(self.columns))

    @property
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Where the positions that are both a row and a column stand in the result."""
        rows = [bisect_left(self.rows, position) for position in self.both]
        columns = [bisect_left(self.columns, position) for position in self.both]
        rows, columns = torch.tensor([rows, columns], dtype=torch.long, device="cpu")
        return rows, columns

    def blocks(self) -> Iterator[PairBlock]:
        """Blocks that together hold every pair of a row and an earlier column exactly once."""

        def within(start: int, stop: int) -> Iterator[PairBlock]:
            rows = slice(bisect_left(self.rows, start), bisect_left(self.rows, stop))
            columns = slice(bisect_left(self.columns, start), bisect_left(self.columns, stop))
            if stop - start < 2 or rows.start == rows.stop or columns.start == columns.stop:
                return
            middle = (start + stop) // 2
            later = slice(bisect_left(self.rows, middle), rows.stop)
            earlier = slice(columns.start, bisect_left(self.columns, middle))
            if later.start < later.stop and earlier.start < earlier.stop:
                yield PairBlock(middle, later, earlier)
            yield from within(start, middle)
            yield from within(middle, stop)

        return within(0, len(self.delta))
