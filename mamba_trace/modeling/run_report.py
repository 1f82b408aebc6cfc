"""What each layer ran in the last forward call: which kernels, over which stretches, and why.

A trace that looks at nothing runs the fastest kernels there are, and every site that it looks at costs what
that site needs, in that layer alone. The report shows that it was so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from ..errors import LayerError
from ..scan.record import Call
from ..tables import html_table

#: What a report calls the functions of a backend.
LABELS = {
    "gated_scan": "scan with softplus, D and gate",
    "selective_scan": "scan",
    "selective_states": "scan with trajectory",
    "explicit_scan": "explicit scan",
    "explicit_states": "explicit scan with trajectory",
    "conv_silu": "conv with SiLU",
    "causal_conv": "conv",
}


@dataclass(repr=False)
class LayerRun:
    """What one layer's mixer ran in its last forward call.

    Attributes:
        layer, positions: its index, and the length L of the call.
        calls: every kernel call, in order; stretches of positions are separate calls.
        reasons: one entry for each fused kernel that was given up and for each faster backend that was passed over,
            saying why.
    """

    layer: int
    positions: int
    calls: list[Call] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def kernels(self) -> str:
        """The calls in words, e.g. ``"cpu conv with SiLU; cpu scan 6 + 3 positions"``."""
        parts = []
        for (function, backend), calls in groupby(self.calls, lambda call: (call.function, call.backend)):
            stretches = [str(call.positions) for call in calls]
            cut = f" {' + '.join(stretches)} positions" if stretches != [str(self.positions)] else ""
            parts.append(f"{backend} {LABELS.get(function, function)}{cut}")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return self.kernels() + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


@dataclass(repr=False)
class RunReport:
    """What every layer ran in the last forward call; in ``generate``, in the last step.

    Attributes:
        layers: one `LayerRun` for each layer that ran in it.
        trace: which trace it was in, ``None`` for none.
    """

    layers: list[LayerRun] = field(default_factory=list)
    trace: int | None = field(default=None, repr=False)

    def begin(self, layer: int, positions: int, trace: int | None) -> LayerRun:
        """Take note that a layer runs. A layer that comes no later than the last one begins another call."""
        if trace != self.trace or (self.layers and layer <= self.layers[-1].layer):
            self.layers = []
        self.trace = trace
        self.layers.append(LayerRun(layer, positions))
        return self.layers[-1]

    def __getitem__(self, layer: int) -> LayerRun:
        """The run of a layer. Raises `LayerError` if it did not run."""
        ran = {run.layer: run for run in self.layers}
        if layer not in ran:
            raise LayerError(
                f"layer {layer} did not run in the last forward call; these did: {', '.join(map(str, ran)) or 'none'}"
            )
        return ran[layer]

    def __iter__(self) -> Iterator[LayerRun]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        lines = (f"layer{'s' * ('-' in layers)} {layers}: {runs[0]}" for layers, runs in self._alike())
        return "\n".join([self._length(), *lines])

    def _repr_html_(self) -> str:
        rows = ([layers, runs[0].kernels(), "; ".join(runs[0].reasons)] for layers, runs in self._alike())
        caption = f"The last forward call: {self._length()}"
        return html_table(caption, ["layers", "what ran", "why no faster kernel"], rows)

    def _length(self) -> str:
        if not self.layers:
            return "nothing has run yet"
        positions = self.layers[0].positions
        return "1 position" if positions == 1 else f"{positions} positions"

    def _alike(self) -> Iterator[tuple[str, list[LayerRun]]]:
        # Layers in a row that ran the same, with their numbers: "0-3".
        for _, together in groupby(self.layers, repr):
            runs = list(together)
            first, last = runs[0].layer, runs[-1].layer
            yield f"{first}" if first == last else f"{first}-{last}", runs
