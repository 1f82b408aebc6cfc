"""Mamba-2's scan and its gradients as compiled loops over blocks of a head's channels, for float32 on a CPU.

Both kernels run h_p = decay_p h_{p-1} + (scale_p x_p) B_p with y_p = C_p h_p, which has one decay and one scale
for each head. A block is 64 channels of one head: its state [64,N] stays in the first levels of cache. What happens
to it at a position is written in vector instructions (`steps`), eight channels at a time.
"""

from __future__ import annotations

import numpy as np

from ..buffers import BlockLayout, Buffer
from ..cpu.compiled import arguments_at, kernel, next_piece
from ..cpu.vectors import LANES, fetch, silu
from .steps import backward_step, forward_step

WIDTH = 64  # channels in a block
GROUP = 8  # channels in a step
AHEAD = 4  # positions from the one at which its memory is asked for
CHUNK = 16  # positions between the states that the backward pass keeps
forward_8, forward_1 = forward_step(GROUP), forward_step(1)
backward_8, backward_1 = backward_step(GROUP), backward_step(1)

INPUTS = {
    "x": Buffer("batch length heads width", dense=2),
    "decay": Buffer("batch length heads", dense=1), "scale": Buffer("batch length heads", dense=1),
    "B": Buffer("batch length groups_B n_state", dense=2), "C": Buffer("batch length groups_C n_state", dense=2),
    "h_start": Buffer("batch heads width n_state"),
}  # fmt: skip
FORWARD = BlockLayout(
    "started gated keep",
    **INPUTS | {"h_start": Buffer("batch heads width n_state", when="started")},
    D=Buffer("heads", when="gated"), skip=Buffer("batch length heads width", dense=2, when="gated"),
    y=Buffer("batch length heads width"), h_last=Buffer("batch heads width n_state"),
    states=Buffer("batch length heads width n_state", when="keep"),
)  # fmt: skip
BACKWARD = BlockLayout(
    "keep",
    **INPUTS,
    gy=Buffer("batch length heads width"), gh_last=Buffer("batch heads width n_state"),
    gstates=Buffer("batch length heads width n_state", when="keep"),
    gx=Buffer("batch length heads width"), gh_start=Buffer("batch heads width n_state"),
    gdecay=Buffer("batch length heads"), gscale=Buffer("batch length heads"),
    gB=Buffer("each_B batch length groups_B n_state"), gC=Buffer("each_C batch length groups_C n_state"),
)  # fmt: skip


def summed(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes of the axes that gradients are to be summed over: the heads of a group."""
    return {f"each_{matrix}": sizes["heads"] // sizes[f"groups_{matrix}"] for matrix in "BC"}


@kernel(FORWARD)
def forward(data):  # type: ignore[no-untyped-def]
    """Run pieces of the blocks (batch x heads x channel blocks) over all positions. Results: y, h_last and states.

    ``started``: whether there is a state to start from, otherwise it is zero; ``gated``: whether to add D x to y and
    gate it after; ``keep``: whether to keep the states.
    """
    p = arguments_at(data)
    of_head = (p.width + WIDTH - 1) // WIDTH
    blocks = p.batch * p.heads * of_head
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for block in range(blocks * piece // p.pieces, blocks * (piece + 1) // p.pieces):
            row, c0 = block // of_head, (block % of_head) * WIDTH
            b, head = row // p.heads, row % p.heads
            end = min(c0 + WIDTH, p.width)
            group_B, group_C = head * p.groups_B // p.heads, head * p.groups_C // p.heads
            before, after = p.h_start[b, head], p.h_last[b, head]
            if not p.started:
                before = after
                for c in range(c0, end):
                    for n in range(p.n_state):
                        before[c, n] = 0.0
            for t in range(p.length):
                a, s = p.decay[b, t, head], p.scale[b, t, head]
                x, y = p.x[b, t, head], p.y[b, t, head]
                B, C = p.B[b, t, group_B], p.C[b, t, group_C]
                if p.keep:
                    after = p.states[b, t, head]
                if t + AHEAD < p.length:
                    for c in range(c0, end, LANES):
                        fetch(p.x[b, t + AHEAD, head], c)
                        fetch(p.y[b, t + AHEAD, head], c)
                        if p.gated:
                            fetch(p.skip[b, t + AHEAD, head], c)
                c = c0
                while c + GROUP <= end:
                    forward_8(before, after, x, y, B, C, c, c, c, a, s, p.n_state)
                    c += GROUP
                while c < end:
                    forward_1(before, after, x, y, B, C, c, c, c, a, s, p.n_state)
                    c += 1
                before = after
                if p.gated:
                    d = p.D[head]
                    for c in range(c0, end):
                        out = p.y[b, t, head, c] + d * p.x[b, t, head, c]
                        p.y[b, t, head, c] = out * silu(p.skip[b, t, head, c])
            if p.keep or p.length == 0:
                for c in range(c0, end):
                    for n in range(p.n_state):
                        p.h_last[b, head, c, n] = before[c, n]


@kernel(BACKWARD)
def backward(data):  # type: ignore[no-untyped-def]
    """Compute the gradients for pieces of the heads (batch x heads), each from its last position to its first.

    ``keep``: whether there are gradients of the states. Results: gx, gdecay, gscale and gh_start; gB and gC, which
    must be zeros before, are added to, and are to be summed over the heads of each group.

    A first pass keeps the state before each chunk. Then the states of one chunk after the other, the last chunk
    first, are computed again from there.
    """
    p = arguments_at(data)
    chunks = (p.length + CHUNK - 1) // CHUNK
    starts = np.zeros((chunks + 1, WIDTH, p.n_state), np.float32)
    states = np.zeros((CHUNK + 1, WIDTH, p.n_state), np.float32)
    g = np.zeros((WIDTH, p.n_state), np.float32)
    write = np.zeros(WIDTH, np.float32)
    gy = np.zeros(WIDTH, np.float32)
    through_write = np.zeros(WIDTH, np.float32)
    through_decay = np.zeros(1, np.float32)
    y = np.zeros(p.width, np.float32)  # nobody reads it
    while True:
        piece = next_piece(data)
        if piece >= p.pieces:
            break
        for unit in range(p.batch * p.heads * piece // p.pieces, p.batch * p.heads * (piece + 1) // p.pieces):
            b, head = unit // p.heads, unit % p.heads
            group_B, group_C = head * p.groups_B // p.heads, head * p.groups_C // p.heads
            member_B, member_C = head % p.each_B, head % p.each_C
            for c0 in range(0, p.width, WIDTH):
                w = min(WIDTH, p.width - c0)
                for c in range(w):
                    for n in range(p.n_state):
                        starts[0, c, n] = p.h_start[b, head, c0 + c, n]
                        g[c, n] = p.gh_last[b, head, c0 + c, n]
                for turn in range(2 * chunks - 1):
                    chunk = turn if turn < chunks else 2 * chunks - 2 - turn
                    begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, p.length)
                    for c in range(w):
                        for n in range(p.n_state):
                            states[0, c, n] = starts[chunk, c, n]
                    for t in range(begin, end):
                        a, s, i = p.decay[b, t, head], p.scale[b, t, head], (t - begin) * WIDTH
                        x, B, C = p.x[b, t, head], p.B[b, t, group_B], p.C[b, t, group_C]
                        c = 0
                        while c + GROUP <= w:
                            forward_8(states, states, x, y, B, C, i + c, i + WIDTH + c, c0 + c, a, s, p.n_state)
                            c += GROUP
                        while c < w:
                            forward_1(states, states, x, y, B, C, i + c, i + WIDTH + c, c0 + c, a, s, p.n_state)
                            c += 1
                    if turn < chunks - 1:
                        for c in range(w):
                            for n in range(p.n_state):
                                starts[chunk + 1, c, n] = states[CHUNK, c, n]
                        continue
                    for t in range(end - 1, begin - 1, -1):
                        a, s, i = p.decay[b, t, head], p.scale[b, t, head], (t - begin) * WIDTH
                        if c0 == 0:
                            p.gdecay[b, t, head], p.gscale[b, t, head] = np.float32(0.0), np.float32(0.0)
                        B, C = p.B[b, t, group_B], p.C[b, t, group_C]
                        gB, gC = p.gB[member_B, b, t, group_B], p.gC[member_C, b, t, group_C]
                        for c in range(w):
                            write[c] = s * p.x[b, t, head, c0 + c]
                            gy[c] = p.gy[b, t, head, c0 + c]
                        if p.keep:
                            for c in range(w):
                                for n in range(p.n_state):
                                    g[c, n] += p.gstates[b, t, head, c0 + c, n]
                        c = 0
                        while c + GROUP <= w:
                            backward_8(
                                g, states, gB, gC, B, C, write, gy, through_write, through_decay,
                                i, i + WIDTH, c, a, p.n_state,
                            )  # fmt: skip
                            p.gdecay[b, t, head] += through_decay[0]
                            c += GROUP
                        while c < w:
                            backward_1(
                                g, states, gB, gC, B, C, write, gy, through_write, through_decay,
                                i, i + WIDTH, c, a, p.n_state,
                            )  # fmt: skip
                            p.gdecay[b, t, head] += through_decay[0]
                            c += 1
                        for c in range(w):
                            p.gx[b, t, head, c0 + c] = s * through_write[c]
                            p.gscale[b, t, head] += p.x[b, t, head, c0 + c] * through_write[c]
                for c in range(w):
                    for n in range(p.n_state):
                        p.gh_start[b, head, c0 + c, n] = g[c, n]
