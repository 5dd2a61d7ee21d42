"""What changed between two saved runs? Each figure of the new file over the same figure of the old one.

Takes what `--json` of the benchmarks wrote: files of tables (JSON), or runs of problems (JSON lines). Rows are matched
by the table and the row's name, runs by problem and solver. Counts are exact; times are worth a look beyond their
scatter, and only on one machine: the command says so if devices or versions differ.
"""

import argparse
import json
import math
import pathlib
from typing import Any, NamedTuple

from benchmarks import report

OF_RUNS = ("value", "grad_norm", "evaluations", "hessian_products", "hessians", "compile_s", "run_s")


class Figure(NamedTuple):
    """One number in two files."""

    where: str  # table or solver
    row: str
    column: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        """New over old; 1 if both are equal, also both zero."""
        if self.old == self.new:
            return 1.0
        return self.new / self.old if self.old else math.inf


def main(arguments: list[str]) -> int:
    """Print the figures that changed; return 1 if one exceeds `--fail-above`."""
    chosen = _parser().parse_args(arguments)
    try:
        (old_about, old), (new_about, new) = (_read(path) for path in (chosen.old, chosen.new))
    except ValueError as error:
        _parser().error(str(error))
    differences = [f"{key}: {old_about.get(key)} -> {new_about.get(key)}" for key in ("commit", "device", "versions")]
    for key, line in zip(("commit", "device", "versions"), differences, strict=True):
        if old_about.get(key) != new_about.get(key):
            print(line if key != "versions" else _versions(old_about, new_about))
    figures = [Figure(*key, old[key], new[key]) for key in old if key in new]
    changed = [f for f in figures if chosen.all or abs(f.ratio - 1) > chosen.tolerance]
    changed.sort(key=lambda f: abs(math.log(f.ratio)) if 0 < f.ratio < math.inf else math.inf, reverse=True)
    rows = [[f.where, f.row, f.column, f.old, f.new, f.ratio] for f in changed]
    title = f"{len(changed)} of {len(figures)} figures differ by more than {100 * chosen.tolerance:g} %"
    title = f"all {len(figures)} figures" if chosen.all else title
    gone, come = len(old.keys() - new.keys()), len(new.keys() - old.keys())
    note = f"{gone} only in {chosen.old.name}, {come} only in {chosen.new.name}" if gone or come else ""
    table = report.Table(title, ["table", "row", "figure", "old", "new", "new / old"], rows, note)
    report.show(table)
    if chosen.json:
        content = {"old": old_about, "new": new_about, "figures": [f._asdict() | {"ratio": f.ratio} for f in figures]}
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(chosen.fail_above is not None and any(f.ratio > chosen.fail_above for f in changed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=pathlib.Path, metavar="OLD.json")
    parser.add_argument("new", type=pathlib.Path, metavar="NEW.json")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, metavar="X", help="relative change to show (default 0.1)"
    )
    parser.add_argument("--all", action="store_true", help="show every figure")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="save all figures with their ratios")
    parser.add_argument("--fail-above", type=float, metavar="R", help="exit with 1 if a shown ratio exceeds R")
    return parser


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[tuple[str, str, str], float]]:
    """Return the environment and the figures of a file, by (table, row, column)."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return _runs(path, text)
    if not isinstance(content, dict) or "environment" not in content:
        raise ValueError(f"{path} is no file of the benchmarks; save one with: python -m benchmarks NAME --json FILE")
    figures = {}
    for name, part in content.items():
        if name == "environment":
            continue
        seen: dict[str, int] = {}
        for row in part["table"]["rows"]:
            label = ", ".join(str(cell) for cell in row if isinstance(cell, str)) or str(row[0])
            seen[label] = seen.get(label, 0) + 1
            label += f" ({seen[label]})" if seen[label] > 1 else ""
            for number, (column, cell) in enumerate(zip(part["table"]["columns"], row, strict=True)):
                if _is_number(cell):
                    repeated = part["table"]["columns"].count(column) > 1
                    figures[name, label, f"{column} [{number}]" if repeated else column] = float(cell)
    return content["environment"], figures


def _runs(path: pathlib.Path, text: str) -> tuple[dict[str, Any], dict[tuple[str, str, str], float]]:
    """Return the same of JSON lines: one run of one solver on one problem each."""
    try:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither JSON nor JSON lines: {error}") from None
    about, figures = {}, {}
    for line in lines:
        if "environment" in line:
            about = about or line["environment"]
        elif "problem" in line:
            for column, cell in line.items():
                if column in OF_RUNS and _is_number(cell):
                    figures[str(line["solver"]), f"{line['problem']} {line.get('n', '')}".strip(), column] = float(cell)
    return about, figures


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool) and math.isfinite(cell)


def _versions(old: dict[str, Any], new: dict[str, Any]) -> str:
    before, after = old.get("versions") or {}, new.get("versions") or {}
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return "versions: " + ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in names)
