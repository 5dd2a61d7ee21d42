"""What a benchmark returns, and how it is printed and saved with everything needed to judge it later."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any, NamedTuple

import jax

PACKAGES = ("jax", "jaxlib", "optax", "jaxopt", "optimistix", "scipy", "numpy", "scikit-learn", "sif2jax")


class Table(NamedTuple):
    """One table of results."""

    title: str  # the question that the numbers answer
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


class Report(NamedTuple):
    """One table and what it was made from; a benchmark yields several."""

    name: str
    table: Table
    raw: Any  # samples, for JSON


def show(table: Table) -> None:
    """Print one table."""
    cells = [table.columns, *([_text(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    print(f"\n{table.title}")
    for number, row in enumerate(cells):
        # The first column is a name, the others are figures.
        line = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(line).rstrip())
        if number == 0:
            print("  ".join("-" * w for w in widths))
    if table.note:
        print(table.note)


def environment() -> dict[str, Any]:
    """Return versions, device, commit and date."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "machine": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def save(path: pathlib.Path, reports: list[Report]) -> None:
    """Write environment, tables and raw samples as JSON."""
    content: dict[str, Any] = {"environment": environment()}
    for report in reports:
        content[report.name] = {"table": report.table._asdict(), "raw": report.raw}
    path.write_text(json.dumps(content, indent=1, default=float) + "\n")


def _commit() -> str | None:
    root = pathlib.Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")  # of a copy without its history


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1e3 else f"{cell:.0f}"
    return str(cell)
