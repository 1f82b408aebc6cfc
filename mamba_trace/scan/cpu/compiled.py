"""What the compiled loops share: how they are compiled, find their arguments, and vectorise.

A kernel is a C function of one argument: the address of a block of int64 numbers, which `BlockLayout.pack` fills
with sizes, flags, and the addresses and strides of float32 arrays. `arguments_at` is compiled from the same
`BlockLayout`: it gives everything in the block as attributes, so that a kernel writes ``p.width`` and
``p.x[b, t, e]`` and no place is counted by hand. A name that the layout lacks, or too many or too few
indices, do not compile.

A C function can be run by any pool of threads, PyTorch's own among them (see `team`), and needs no
interpreter. The work is cut into pieces. Every thread takes the next piece until none is left, so the others
make up for a thread that starts late or never.

Numba compiles a kernel when it first runs and keeps the result on disk. It turns the inner loops into vector
instructions, exponentials included: those are polynomials (`vectors`), because a call into libm keeps a loop scalar.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

from numba import cfunc, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model
from numba.np.arrayobj import populate_array

from ..buffers import BlockLayout
from .vectors import FAST, FLOAT, INDEX

OPTIONS: dict[str, Any] = {"fastmath": {*FAST}, "error_model": "numpy"}  # a division raises nothing

#: A size that Numba may be told of the axes of an array. It adds the size to an index below 0. With a size of
#: 0 or this one, which times 4 bytes is 0 modulo 2^64, the compiler drops the addition, and with it a
#: comparison in every loop.
BOUNDLESS = 1 << 62


class Kernel:
    """A function of one address, compiled when it first runs, and the layout of what stands at that address.

    Args:
        function: the function. It calls `arguments_at` for what stands at the address.
        layout: the layout.
        **constants: values for globals of the function's module, for this kernel alone. What a branch on them leaves
            out is not compiled.

    Example::

        @kernel(FORWARD)
        def forward(data):
            p = arguments_at(data)

        forward_runs = Kernel(forward.function, RUNS, IN_RUNS=True)
    """

    def __init__(self, function: Callable[[Any], None], layout: BlockLayout, **constants: Any) -> None:
        self.function = function
        self.layout = layout
        self.constants = constants

    @functools.cached_property
    def compiled(self) -> Any:
        """Numba's compiled function, which is kept on disk where there is a folder to write to."""
        # Numba's cache asks whether the file and the closure of a function have changed. The layout's places, the
        # constants and what other files define are compiled in as well, so they are put into the closure: no other
        # code is ever run.
        own = CellType(f"{_described(self.layout)}\n{self.constants}\n{SOURCES}")
        code = self.function.__code__.replace(co_freevars=("own",))
        globals_ = self.function.__globals__ | self.constants | {"arguments_at": _arguments_of(self.layout)}
        function = FunctionType(code, globals_, self.function.__name__, closure=(own,))
        signature = types.void(types.voidptr)
        with _nothing_collected():
            try:
                return cfunc(signature, cache=True, **OPTIONS)(function)
            except RuntimeError:  # Numba found no such folder
                return cfunc(signature, **OPTIONS)(function)


def _sources() -> str:
    here = Path(__file__).parent
    files = sorted(file for folder in (here, here.parent / "dual") for file in folder.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


#: What tells the files that kernels are written in from those of another release, read as they are imported.
SOURCES = _sources()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    # To compile makes objects by the hundred thousand, all of which are kept until the end. Python would look through
    # them, and through all others in memory, again and again.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def kernel(layout: BlockLayout) -> Callable[[Callable[[Any], None]], Kernel]:
    """Make a `Kernel` of a function whose arguments stand at the places of ``layout``."""
    return lambda function: Kernel(function, layout)


def arguments_at(data: Any) -> Any:
    """What stands at the address ``data`` that a kernel was given: its numbers and arrays, as attributes."""
    raise NotImplementedError("only a compiled kernel has arguments")  # each kernel is compiled with its own


class Arguments(types.Opaque):
    """Numba's type of a block. Its attributes are the numbers and the arrays of the layout."""

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__(_described(layout))  # types of one name are the same
        self.layout = layout


register_model(Arguments)(models.OpaqueModel)


def _described(layout: BlockLayout) -> str:
    # All that is compiled into a kernel of its layout.
    return f"Arguments({layout.places}, {layout.buffers})"


def _arguments_of(layout: BlockLayout) -> Any:
    @intrinsic
    def arguments_at(typingctx: Any, data: Any) -> Any:
        return Arguments(layout)(types.voidptr), lambda context, builder, signature, args: args[0]

    return arguments_at


def _floats(rank: int) -> Any:
    return types.Array(types.float32, rank, "A")


@infer_getattr
class _Attributes(AttributeTemplate):
    key = Arguments

    def generic_resolve(self, block: Arguments, name: str) -> Any:  # type: ignore[override]
        if name not in block.layout.places:
            return None
        buffer = block.layout.buffers.get(name)
        return types.int64 if buffer is None else _floats(buffer.rank)


@lower_getattr_generic(Arguments)
def _attribute(context: Any, builder: Any, block: Arguments, value: Any, name: str) -> Any:
    # It is read where the kernel begins, so that no loop reads it again.
    with builder.goto_entry_block():
        (data,) = context.call_conv.get_arguments(builder.function)
        numbers = builder.bitcast(data, INDEX.as_pointer())

        def number(place: int) -> Any:
            return builder.load(builder.gep(numbers, [INDEX(place)]))

        places = block.layout.places
        if (buffer := block.layout.buffers.get(name)) is None:
            return number(places[name])
        address, *strides = (number(places[name] + k) for k in range(1 + buffer.loose))
        for axis in range(buffer.loose, buffer.rank):
            sizes = (number(places[inner]) for inner in buffer.names[axis + 1 :])
            strides.append(functools.reduce(builder.mul, sizes, INDEX(1)))
        size = BOUNDLESS if buffer.loose else 0  # measured: the fastest of the ways that drop the comparison
        array = context.make_array(_floats(buffer.rank))(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(address, FLOAT.as_pointer()),
            shape=[INDEX(size)] * buffer.rank,
            strides=[builder.mul(stride, INDEX(4)) for stride in strides],
            itemsize=INDEX(4),
            meminfo=None,
        )
        return array._getvalue()


@intrinsic
def as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.int32), codegen


@intrinsic
def next_piece(typingctx: Any, data: Any) -> Any:
    """The number of a piece that no thread has taken yet: the first number at ``data``, counted up by one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.bitcast(args[0], INDEX.as_pointer())
        return builder.atomic_rmw("add", place, INDEX(1), "monotonic")

    return types.int64(types.voidptr), codegen
