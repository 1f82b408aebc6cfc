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

In Mamba-2 the decay is one number for a head, so it comes out of the product over states, and with it whatever
else differs from channel to channel: with r_i and w_j the decay from m up to i and from j to m,

    sum over channels p of weight_i[p] alpha[i,j] x_j[p] = (C_i . B_j) (r_i weight_i) . (w_j delta_j x_j)

which is two matrix products for each group of heads (Mamba-2, arXiv 2405.21060, section 6).

Memory: channels are taken some at a time, so that no intermediate tensor has more than `ELEMENTS` numbers,
unless a single channel of [L,N] already has more. In Mamba-2 none is larger than
[L,E] or the result.
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


class WantedPairs:
    """What `ScanPairs` and `HeadPairs` share: which pairs of tokens are wanted, and the time between them.

    Attributes:
        delta: step sizes [L,E], or [L,H].
        rows, columns: positions, ascending.
    """

    delta: Tensor
    rows: list[int]
    columns: list[int]

    def time_to_rows(self, block: PairBlock) -> Tensor:
        """The sum of delta from the middle up to each row [rows,E]."""
        rows = self.rows[block.rows]
        time = self.delta[block.middle : rows[-1] + 1].cumsum(0)  # [l,E]: from the middle up to each position
        return time[[row - block.middle for row in rows]]

    def time_from_columns(self, block: PairBlock) -> Tensor:
        """The sum of delta after each column, up to the middle and without it [columns,E]."""
        columns = self.columns[block.columns]
        time = self.delta[columns[0] + 1 : block.middle].flip(0).cumsum(0).flip(0)
        time = torch.cat((time, torch.zeros_like(self.delta[:1])))  # [l,E]: from each position to the middle
        return time[[column - columns[0] for column in columns]]

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


@dataclass(frozen=True)
class ScanPairs(WantedPairs):
    """The scan of Mamba-1 in some channels.

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
        return (self.time_to_rows(block)[..., None] * self.A).exp_().mul_(self.C[rows, None])

    def written(self, block: PairBlock) -> Tensor:
        """What is left of each column's write when the middle begins [columns,E,N]."""
        columns = self.columns[block.columns]
        write = (self.delta[columns] * self.x[columns])[..., None]
        return (self.time_from_columns(block)[..., None] * self.A).exp_().mul_(write).mul_(self.B[columns, None])

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


@dataclass(frozen=True)
class HeadPairs(WantedPairs):
    """The scan of Mamba-2 in some heads.

    Attributes:
        delta: step sizes [L,H].
        x: what each column is multiplied by [L,H,P].
        A: [H].
        B, C: [L,G,N].
        rows, columns: positions, ascending.
        groups: the group of each head, H numbers.
    """

    delta: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    rows: list[int]
    columns: list[int]
    groups: list[int]

    @torch.no_grad()
    def along(self, weight: Tensor) -> Tensor:
        """The sum over channels of weight[i] alpha[i,j] x_j: weight [L,H,P] -> [rows, columns]."""
        values = self.delta.new_zeros(len(self.rows), len(self.columns))
        values[self.diagonal] += ((weight * self.x).sum(-1) * self.own())[self.both].sum(-1)
        for group, heads in self.by_group():
            for block in self.blocks():
                read = self.read(block)[:, heads, None] * weight[self.rows[block.rows]][:, heads]  # [i,h,P]
                written = self.written(block)[:, heads, None] * self.x[self.columns[block.columns]][:, heads]
                products = read.flatten(1) @ written.flatten(1).T  # [i,j]
                values[block.rows, block.columns] += products.mul_(self.matches(group, block))
        return values

    @torch.no_grad()
    def summed(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum over channels of f(alpha[i,j] x_j), for a function with f(a b) = f(a) f(b): [rows, columns]."""
        values = self.delta.new_zeros(len(self.rows), len(self.columns))
        factor = function(self.x).sum(-1)  # [L,H]
        values[self.diagonal] += (function(self.own()) * factor)[self.both].sum(-1)
        for group, heads in self.by_group():
            for block in self.blocks():
                written = function(self.written(block)[:, heads]) * factor[self.columns[block.columns]][:, heads]
                products = function(self.read(block)[:, heads]) @ written.T  # [i,j]
                values[block.rows, block.columns] += products.mul_(function(self.matches(group, block)))
        return values

    @torch.no_grad()
    def each(self) -> Tensor:
        """alpha[i,j] of every head, without x: [rows, columns, H], on the CPU."""
        shape = len(self.rows), len(self.columns), len(self.A)
        values = torch.zeros(shape, dtype=self.delta.dtype, device="cpu")
        values[self.diagonal] = self.own()[self.both].cpu()
        for group, heads in self.by_group():
            for block in self.blocks():
                read, written = self.read(block)[:, heads], self.written(block)[:, heads]
                matches = self.matches(group, block)
                for place, head in enumerate(heads):
                    alpha = torch.outer(read[:, place], written[:, place]).mul_(matches)
                    values[block.rows, block.columns, head] = alpha.cpu()
        return values

    # -- some heads ------------------------------------------------------------------------------------

    def by_group(self) -> Iterator[tuple[int, list[int]]]:
        """The groups that a head is in, and which heads are in each."""
        for group in sorted(set(self.groups)):
            yield group, [head for head, own in enumerate(self.groups) if own == group]

    def own(self) -> Tensor:
        """alpha[i,i], what a token reads of its own write, of every head [L,H]."""
        return self.delta * (self.B * self.C).sum(-1)[:, self.groups]

    def matches(self, group: int, block: PairBlock) -> Tensor:
        """C_i . B_j of a group [rows,columns]."""
        return self.C[self.rows[block.rows], group] @ self.B[self.columns[block.columns], group].T

    def read(self, block: PairBlock) -> Tensor:
        """What is left, at each row, of the state as it is when the middle begins [rows,H]."""
        return self.time_to_rows(block).mul_(self.A).exp_()

    def written(self, block: PairBlock) -> Tensor:
        """What is left of each column's write when the middle begins, its delta included [columns,H]."""
        return self.time_from_columns(block).mul_(self.A).exp_().mul_(self.delta[self.columns[block.columns]])
