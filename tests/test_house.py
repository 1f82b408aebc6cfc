"""How the package is built: imports run one way, nothing has two names, and a newcomer finds the room.

The rooms stand on floors. A module may import what stands on a lower floor, and in its own room whatever does
not import it in turn. Imports for type checking alone, and those inside functions, count as well.
"""

from __future__ import annotations

import ast
import doctest
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import mamba_trace

ROOT = Path(mamba_trace.__file__).parent
PACKAGE = ROOT.name

#: The rooms, lowest floor first; those of one floor do not import each other.
FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(floor.split())
    for floor in (
        "_version errors tables",
        "sites",
        "names",
        "scan",
        "tracing",
        "modeling",
        "conversion",
        "arguments",
        "results",
        "hooked",
        "model",
        "flow hidden_attention interventions lenses mamba_lens means patching porting",
        "cli",
        "__init__ __main__",
    )
)
#: Lines of a file that can still be held in the head.
LONGEST = 380
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def modules() -> dict[str, Path]:
    """Every module by its name below the package: ``scan.cpu`` for ``scan/cpu/__init__.py``."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(module: str) -> Iterator[str]:
    """The modules of this package that a module names in its imports, wherever they stand in it."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [] if module == "__init__" else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            own = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            assert not own, f"{module} imports {own}: write a relative import"
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in MODULES else ".".join(base) or "__init__"


IMPORTS = {module: set(imported(module)) for module in MODULES}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} == set(FLOOR)


def test_imports_run_one_way() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not upward


def test_no_module_imports_itself_by_way_of_others() -> None:
    left = {module: set(others) - {module} for module, others in IMPORTS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle among {sorted(left)}"


def test_few_files_stand_at_the_top() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 16


def test_no_two_classes_have_one_name() -> None:
    names = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


def test_a_file_can_be_held_in_the_head() -> None:
    long = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: lines for module, lines in long.items() if lines > LONGEST}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("mamba_trace", "MambaTrace names __version__"),
        ("mamba_trace.model", "MambaTrace"),  # in the key under which a server knows a model
        ("mamba_trace.names", "to_path to_hook_name to_bridge_name"),
        (
            "mamba_trace.patching",
            "patch_grid attribution_grid logit logit_diff log_prob prob Metric PatchGrid",
        ),
        ("mamba_trace.mamba_lens", "HookedMamba MambaCfg MambaInitCfg"),
        ("mamba_trace.conversion", "convert_config convert_state_dict"),
        ("mamba_trace.flow", "knockout zero_delta decay_groups apply Cut ZeroDelta"),
        ("mamba_trace.hidden_attention", "hidden_attention contributions"),
        ("mamba_trace.interventions", "ablate steer"),
        ("mamba_trace.lenses", "logit_lens state_lens"),
        ("mamba_trace.means", "mean_activation"),
        ("mamba_trace.results", "Report Result"),
        ("mamba_trace.errors", "MambaTraceError"),
        ("mamba_trace.scan", "selective_scan explicit_scan"),
    ],
)
def test_what_users_import_stays_where_it_is(module: str, names: str) -> None:
    found = importlib.import_module(module)
    assert not [name for name in names.split() if not hasattr(found, name)]


def test_only_tracing_imports_submodules_of_nnsight() -> None:
    """`tracing` is the one room that knows nnsight's internals; the others may ``import nnsight`` and no more."""
    elsewhere = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if room(module) != "tracing"
        for node in ast.walk(ast.parse(path.read_text()))
        for name in foreign(node)
        if name.startswith("nnsight.")
    ]
    assert not elsewhere


def foreign(node: ast.AST) -> list[str]:
    """The modules that an import names absolutely."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []


#: Fields of a configuration that mean something else, or are missing, in another architecture.
SIZES_OF_A_MIXER = "intermediate_size state_size conv_kernel time_step_rank num_heads head_dim n_groups expand".split()


def test_only_the_adapters_and_the_conversion_read_sizes_from_a_configuration() -> None:
    """Everything else asks the mixer: in a hybrid ``config.intermediate_size`` is the width of an MLP."""
    elsewhere = [
        f"{module}, line {node.lineno}: config.{node.attr}"
        for module, path in MODULES.items()
        if not module.startswith(("conversion", "modeling.architectures"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in SIZES_OF_A_MIXER
        if ast.unparse(node.value).endswith(("config", "cfg"))
    ]
    assert not elsewhere


@pytest.mark.parametrize("module", sorted(name for name, path in MODULES.items() if "    >>> " in path.read_text()))
def test_the_examples_of_the_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"{PACKAGE}.{module}" if module else PACKAGE))
    assert result.failed == 0
