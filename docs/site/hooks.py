"""Hooks of the documentation site: pages made from files that live elsewhere, and links that leave the site.

The gallery is made of the examples, the page of benchmarks of the README's marked tables, the changes of CHANGELOG.md:
each text stands in one place. No network, no code is run.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PICTURES = {  # pictures that an example writes and docs/images keeps
    "01_quickstart": "quickstart.png",
    "02_saddle": "saddle.png",
    "04_curve_fit": "curve_fit.png",
    "05_why_is_training_stuck": "critical_points.png",
    "06_curvature_tour": "slices.png",
    "07_pinn": "pinn.png",
}


def on_config(config: Any) -> Any:
    """Append guides that the navigation does not name, so that a new page is never lost."""
    known = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
    guides += sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in known)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from other files."""
    pages = {"gallery.md": _gallery(), "benchmarks.md": _benchmarks(), "changelog.md": _read("CHANGELOG.md")}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to files outside of the site into their paths, and links of the README into links of the site."""
    markdown = re.sub(r"\]\(docs/([\w./#-]+)\)", r"](\1)", markdown)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./|examples/|benchmarks/)([^)]*)\)", _path, markdown)


def _path(match: re.Match[str]) -> str:
    text, target = match.group(1), match.group(0).split("](")[1].rstrip(")").removeprefix("../")
    return f"`{target}`" if text.strip("`") in target else f"{text} (`{target}`)"


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _benchmarks() -> str:
    """Return the README's measured tables."""
    readme = _read("README.md")
    measured = readme[readme.index("## Measured") : readme.index("## Development")]
    return "# Benchmarks\n" + measured.removeprefix("## Measured")


def _gallery() -> str:
    """Return all examples: what each teaches, its picture, its code."""
    parts = [
        "# Gallery\n\nPrograms from the repository, as CI runs them; each checks its own numbers. The pictures are "
        "those that they draw."
    ]
    for folder, pattern, prefix in (("examples", "[0-9]*.py", ""), ("examples/frameworks", "*_*.py", "Frameworks: ")):
        for path in sorted((ROOT / folder).glob(pattern)):
            head, rest = _teaching(path)
            picture = PICTURES.get(path.stem)
            shown = f"\n![{head}](images/{picture})\n" if picture else ""
            parts.append(f"\n## {prefix}{head.rstrip('.:')}\n\n{rest}\n{shown}\n{_folded(path)}")
    for after in sorted((ROOT / "examples/migration").glob("*_after.py")):
        library = after.stem.removesuffix("_after")
        before = after.with_name(f"{library}_before.py")
        told = [" ".join(_teaching(path)) for path in (before, after)]
        parts.append(f"\n## Migration from {library}\n\n{told[0]} {told[1]}\n\n{_folded(before)}\n{_folded(after)}")
    return "\n".join(parts)


def _teaching(path: Path) -> tuple[str, str]:
    """Return the first line of a program's docstring, and the rest."""
    head, _, rest = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem).partition("\n")
    return head, rest.strip()


def _folded(path: Path) -> str:
    """Return the code of a program behind its name."""
    source = path.read_text(encoding="utf-8")
    code = source[source.index('"""', 3) + 3 :].strip()
    return f'??? example "{path.relative_to(ROOT)}"\n\n{_indented(code)}\n'


def _indented(code: str) -> str:
    lines = ["```python", *code.splitlines(), "```"]
    return "\n".join("    " + line if line else "" for line in lines)
