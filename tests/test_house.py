"""The rules of docs/design.md that no linter knows: where things live, which way imports run."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = ["compute_cache", "trainer", "sampler", "scorer", "stories", "app"]
MODULES = sorted(path.stem for path in (ROOT / "antarctic").glob("*.py") if path.stem != "__init__")
README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()


def tree(path):
    return ast.parse(path.read_text())


def imported(path):
    """The names of the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", [
    *(ROOT / f"{name}.py" for name in [*SCRIPTS, "model", "utils"]),
    *(ROOT / "antarctic" / f"{name}.py" for name in MODULES)], ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    above = {*SCRIPTS, "snowglobe", "benchmarks"}
    if path.parent.name == "antarctic":
        above |= {"model", "utils"}
    assert not {name.partition(".")[0] for name in imported(path)} & above


def test_no_modules_import_one_another_in_a_circle():
    needs = {name: {other for other in MODULES
                    if f"antarctic.{other}" in imported(ROOT / "antarctic" / f"{name}.py")}
             for name in MODULES}
    while needs:
        leaves = {name for name, others in needs.items() if not others}
        assert leaves, f"a circle among {sorted(needs)}"
        needs = {name: others - leaves for name, others in needs.items() if name not in leaves}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_read_to_its_end(name):
    path = ROOT / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 300
    [main] = [node for node in tree(path).body if getattr(node, "name", "") == "main"]
    assert main.end_lineno - main.lineno < 60


def test_the_pages_name_what_there_is():
    for name in MODULES:
        assert re.search(rf"^\|.*`{name}`.*\|", DESIGN, re.M), f"docs/design.md lacks {name}"
    files = README.partition("## Files")[2].partition("```\n")[2].partition("```")[0]
    for line in files.splitlines():
        for name in line.partition("  ")[0].split(", "):
            assert (ROOT / name).exists(), f"README.md names {name}"
    for script in SCRIPTS:
        assert f"{script}.py" in files
    assert len(README.encode()) <= 12_000


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "MODEL_CARD.md", *(
    f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        if "://" not in link:
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
