"""What the porter found in a script, by line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

#: What a comment of the porter begins with, before each statement that cannot be ported.
REMARK = "# mamba-trace port:"


@dataclass(frozen=True)
class Finding:
    """A name, a call or an import of a script, what it is here (nothing where it is left out), and why."""

    line: int
    found: str
    becomes: str = ""
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """Something that the author of a script should look at: why, and what to do."""

    line: int
    found: str
    reason: str


@dataclass(frozen=True)
class PortedBlock:
    """A trace, ``code``, which can stand where the ported script has ``statement``."""

    line: int
    statement: str
    code: str


@dataclass
class PortReport:
    """What was found in a script: names, hooks and calls, traces, what cannot be ported, what else to know.

    The ported ``script`` runs the model by the same calls: only imports, loading, and calls that keep hooks
    on a model are rewritten, and every comment stays.
    """

    filename: str
    findings: list[Finding] = field(default_factory=list)
    blocks: list[PortedBlock] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    script: str = ""

    @property
    def incomplete(self) -> str:
        """That the ported script does not do all that the script did; empty if it does."""
        if not self.problems:
            return ""
        lines = len({one.line for one in self.problems})
        return (
            f"the ported script is not complete: {lines} line{'s' * (lines > 1)} of {self.filename} cannot be ported. "
            f"Each place has a comment, {REMARK} ..."
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists and dicts, for JSON."""
        return asdict(self)

    def add(self, entries: list, entry: Any) -> None:
        """Put an entry in its place in one of the lists, unless it is there."""
        if entry not in entries:
            entries.append(entry)
            entries.sort(key=lambda one: one.line)

    def __str__(self) -> str:
        lines = [self.filename]
        for finding in self.findings:
            becomes = (finding.becomes or "left out").replace("\n", "\n          ")
            note = f" ({finding.note})" if finding.note else ""
            lines += [f"{finding.line:>5}  {' '.join(finding.found.split())}", f"       -> {becomes}{note}"]
        if not self.findings:
            lines.append("       no hook name and no call of MambaLens or TransformerLens is in it")
        for block in self.blocks:
            lines += ["", f"# line {block.line}", block.code]
        for title, entries in (("Also:", self.notes), ("Cannot be ported:", self.problems)):
            lines += ["", title] if entries else []
            lines += [f"{one.line:>5}  {' '.join(one.found.split())}\n       {one.reason}" for one in entries]
        lines += ["", self.incomplete[:1].upper() + self.incomplete[1:]] if self.problems else []
        return "\n".join(lines)
