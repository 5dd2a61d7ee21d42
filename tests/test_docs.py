"""Every Python block of the documentation runs, and the site builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if "```python" in page.read_text(encoding="utf-8"))
ELSEWHERE = ("curvature.md",)  # in test_readme, with checks of what it computes


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.name)
def test_code_of_a_page_runs(page, monkeypatch, tmp_path):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


def test_the_pages_for_everybody_have_code():
    assert {"index.md", "differentiation.md", "frameworks.md", "migration.md"} <= {page.name for page in PAGES}


def test_every_public_name_has_an_api_page():
    import secondorder as so

    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    for module, prefix in ((so, "secondorder"), (so.curvature, "secondorder.curvature")):
        for name in module.__all__:
            if name not in ("compat", "curvature", "problems"):
                own = (f"::: {prefix}.{name}\n", f"::: {prefix}.{name}.{name}\n")  # a function named like its file
                assert any(line in text for line in own), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent, check=False)
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "gallery/index.html", "benchmarks/index.html", "api/optimizers/index.html"):
        assert (tmp_path / page).stat().st_size > 10_000
