"""The tables of measurements in the README and the documentation, made from the recorded runs.

`tests/tables.py` writes them where they stand; run here, this prints them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: Column of the table -> contender of `forward`.
COLUMNS = {
    "lower floor": "lower floor",
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
    """A row for each length of a record of `forward`: ms of the matmuls, then each contender's ratio."""
    first = next(iter(results["lengths"].values()))["contenders"]
    columns = {column: name for column, name in COLUMNS.items() if name in first}
    lines = ["| L | PyTorch's matmuls | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for length, found in results["lengths"].items():
        contenders = found["contenders"]
        ratios = [f"{contenders[name]['ratio']:.2f}" for name in columns.values()]
        lines.append(f"| {length} | {contenders['floor']['ms']:.0f} ms | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def linear_table(results: dict[str, Any]) -> str:
    """oneDNN and our loop beside PyTorch: a row for each size of ``linear.json``, a column for each number of rows."""
    sizes = results["sizes"]
    lines = [
        "| inputs -> outputs | | "
        + " | ".join(f"{rows} row" + "s" * (rows != "1") for rows in next(iter(sizes.values())))
        + " |"
    ]
    lines.append("|---" * (len(next(iter(sizes.values()))) + 2) + "|")
    for size, found in sizes.items():
        for way, name in (("onednn", "oneDNN"), ("kernel", "our loop")):
            if all(way in ways for ways in found.values()):
                cells = [f"{ways[way]['ratio']:.2f}" for ways in found.values()]
                lines.append(f"| {size} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scaling_table(results: dict[str, Any]) -> str:
    """Best time per token at each length of ``scaling.json``, beside the matmuls' own."""
    of_models = {name: found["time"]["contenders"] for name, found in results["architectures"].items()}
    lengths = [row["length"] for row in of_models["mamba"]["floor"]]
    lines = ["| us/token at L = | | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for model, times in of_models.items():
        for name, rows in times.items():
            cells = [PURE_NAMES[model], "matmuls" if name == "floor" else name, *(f"{row['best']:.0f}" for row in rows)]
            lines.append("| " + " | ".join(cells) + " |")
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


#: What the pages call the architectures of `decode.json` and `analyses.json`.
PURE_NAMES = {"mamba": "Mamba-1", "mamba2": "Mamba-2"}


def grids_table(recorded: Callable[[str], dict[str, Any]]) -> str:
    """`patch_grid` beside the matmuls of its cells, a row for each architecture and a column for each site."""
    found = {name: recorded(file) for name, file in (("Mamba-1", "patching"), ("Mamba-2", "patching_mamba2"))}
    sites = [found["Mamba-1"]["site"], *found["Mamba-1"]["other sites"]]
    lines = ["| patch_grid / matmuls | " + " | ".join(sites) + " |", "|---" * (len(sites) + 1) + "|"]
    for name, results in found.items():
        of_sites = [results["first difference"]["0"], *results["other sites"].values()]
        cells = [f"{each['contenders']['patch_grid']['ratio']:.2f}" for each in of_sites]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decode_table(results: dict[str, Any]) -> str:
    """A row for each architecture and number of threads of ``decode.json``: the contenders beside the matmuls."""
    first = next(iter(results["architectures"]["mamba"].values()))
    columns = [name for name in first if name != "floor"]
    lines = ["| | threads | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for model_type, found in results["architectures"].items():
        for threads, rows in found.items():
            cells = [f"{rows[name]['ratio']:.2f}" for name in columns]
            lines.append(f"| {PURE_NAMES[model_type]} | {threads} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: What the page says of a first use -> in which interpreter, and what of it.
FIRST_USE = {
    "import of PyTorch, transformers and nnsight": ("compiled before", "import"),
    "first forward of an installation": ("nothing compiled yet", "forward, first"),
    "first forward and backward after it": ("nothing compiled yet", "forward and backward, first"),
    "first forward of a later process": ("compiled before", "forward, first"),
}


def first_use_table(results: dict[str, Any]) -> str:
    """Seconds by architecture, of ``first_use.json``."""
    lines = ["| | Mamba-1 | Mamba-2 |", "|---|---|---|"]
    for words, (where, what) in FIRST_USE.items():
        cells = [f"{results[family][where][what]:.1f} s" for family in PURE_NAMES]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def analyses_table(results: dict[str, Any]) -> str:
    """A row for each contender of ``analyses.json`` that is put beside another, a column for each model and length."""
    found = {
        f"{PURE_NAMES[name]}, L = {length}": rows
        for name, lengths in results["architectures"].items()
        for length, rows in lengths.items()
    }
    lines = ["| | beside | " + " | ".join(found) + " |", "|---" * (len(found) + 2) + "|"]
    for name, row in next(iter(found.values())).items():
        if name != row["beside"]:
            cells = [f"{rows[name]['ratio']:.2f}" if name in rows else "" for rows in found.values()]
            lines.append(f"| {name} | {row['beside']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: The names of model types of `hybrids.json`.
HYBRID_NAMES = {
    "nemotron_h": "Nemotron-H",
    "falcon_h1": "Falcon-H1",
    "granitemoehybrid": "Granite 4",
    "jamba": "Jamba",
    "bamba": "Bamba",
    "zamba": "Zamba",
    "zamba2": "Zamba2",
}
Speeds = dict[str, tuple[float, float, float | None]]


def architecture_speed(recorded: Callable[[str], dict[str, Any]]) -> Speeds:
    """By architecture: a forward beside Hugging Face's, an edit of a state beside the forward, a decode step beside
    Hugging Face's, which the records of Mamba-1 and Mamba-2 do not have."""
    found: Speeds = {}
    for name, file in (("Mamba-1", "forward"), ("Mamba-2", "forward_mamba2")):
        rows = recorded(file)["lengths"]["128"]["contenders"]
        found[name] = (rows["untraced"]["ms"] / rows["hugging face"]["ms"], rows["trace, edit h[5]"]["ratio"], None)
    for model_type, name in HYBRID_NAMES.items():
        rows = recorded("hybrids")["shapes"]["large"][model_type]
        found[name] = tuple(rows[row]["ratio"] for row in ("untraced", "trace, edit h[5]", "decode step"))
    return found


def hugging_face_ratios(speeds: Speeds) -> str:
    """A row for each architecture."""
    head = ("architecture", "forward / Hugging Face's", "edit h[5] / forward", "decode step / Hugging Face's")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (forward, edit, step) in speeds.items():
        lines.append(f"| {name} | {forward:.2f} | {edit:.2f} | " + ("|" if step is None else f"{step:.2f} |"))
    return "\n".join(lines)


def speed_in_short(recorded: Callable[[str], dict[str, Any]]) -> str:
    """The README's table: what people do, and how long it takes here and elsewhere."""
    rows = recorded("forward")["lengths"]["128"]["contenders"]
    second = recorded("forward_mamba2")["lengths"]["128"]["contenders"]
    sweep = recorded("patching")["first difference"]["0"]
    ms = {name: row["ms"] for name, row in sweep["contenders"].items()}
    lines = ["| | mamba_trace | MambaLens | Hugging Face | PyTorch's matmuls alone |", "|---|---|---|---|---|"]
    lines.append(
        "| a forward, L = 128 | "
        + " | ".join(f"{rows[name]['ms']:.0f} ms" for name in ("untraced", "mamba lens", "hugging face", "floor"))
        + " |"
    )
    edits = [rows["trace, edit h[5]"]["ms"], rows["mamba lens, edit h[5]"]["ms"]]
    lines.append("| the same with an edit of `h[5]` | " + " | ".join(f"{edit:.0f} ms" for edit in edits) + " | no | |")
    times = [ms["patch_grid"], sweep["mamba lens"]["ms"], None, ms["floor"]]
    cells = ["no" if time is None else f"{time / 1000:.1f} s" for time in times]
    lines.append("| the heatmap of the state, 24 x 17 cells | " + " | ".join(cells) + " |")
    times = [second[name]["ms"] for name in ("untraced", "hugging face", "floor")]
    cells = [f"{times[0]:.0f} ms", "no", f"{times[1]:.0f} ms", f"{times[2]:.0f} ms"]
    lines.append("| a forward of a Mamba-2, L = 128 | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def recorded(name: str) -> dict[str, Any]:
    """One of the recorded runs beside this file."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(forward_table(recorded("forward")), scaling_table(recorded("scaling")), sep="\n\n", end="\n\n")
    print(patching_table(recorded("patching")), hugging_face_ratios(architecture_speed(recorded)), sep="\n\n")
