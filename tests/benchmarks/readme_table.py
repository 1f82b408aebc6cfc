"""The README's tables of measurements, made from the recorded runs.

python tests/benchmarks/readme_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: Column of the table -> contender of `forward`.
COLUMNS = {
    "Hugging Face": "hugging face",
    "MambaLens": "mamba lens",
    "untraced": "untraced",
    "empty trace": "trace, empty",
    "edit h[5]": "trace, edit h[5]",
    "read h[p] at all L": "trace, read every h[p]",
    "read h whole": "trace, read h",
    "MambaLens, edit h[5]": "mamba lens, edit h[5]",
}


def forward_table(results: dict[str, Any]) -> str:
    """A row for each length of ``forward.json``: ms of the matmuls, then each contender's ratio."""
    lines = ["| L | matmuls | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for length, found in results["lengths"].items():
        contenders = found["contenders"]
        ratios = [f"{contenders[name]['ratio']:.2f}" for name in COLUMNS.values()]
        lines.append(f"| {length} | {contenders['floor']['ms']:.0f} ms | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def scaling_table(results: dict[str, Any]) -> str:
    """Best time per token at each length of ``scaling.json``, beside the matmuls' own."""
    times = results["time"]["contenders"]
    lengths = [row["length"] for row in times["floor"]]
    lines = ["| us/token at L = | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name, rows in times.items():
        lines.append(f"| {name} | " + " | ".join(f"{row['best']:.0f}" for row in rows) + " |")
    return "\n".join(lines)


def patching_table(results: dict[str, Any]) -> str:
    """A row for each pair of prompts of ``patching.json``: seconds, and MambaLens beside `patch_grid`."""
    columns = ("matmuls", "attribution_grid", "patch_grid", "MambaLens", "MambaLens / patch_grid")
    lines = ["| prompts differ | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for first, found in results["first difference"].items():
        ms = {name: row["ms"] for name, row in found["contenders"].items()}
        lens = found["mamba lens"]
        seconds = [ms["floor"], ms["attribution_grid"], ms["patch_grid"], lens["ms"]]
        where = "from the first token on" if first == "0" else "in the eleventh token"
        cells = [*(f"{value / 1000:.2f} s" for value in seconds), f"{lens['ratio']:.1f}"]
        lines.append(f"| {where} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recorded(name: str) -> dict[str, Any]:
    """One of the recorded runs beside this file."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(forward_table(recorded("forward")))
    print()
    print(scaling_table(recorded("scaling")))
    print()
    print(patching_table(recorded("patching")))
