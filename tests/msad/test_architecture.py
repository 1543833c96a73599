"""Imports point down in the list of modules in docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "projects" / "MSAD" / "msad"
ALLOWED = {("distill", "product")}  # the call msad.distill(...)


def imported(file: Path) -> set[str]:
    """Folders and modules at the top of msad that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module.split(".") if node.module else []
        if node.level:
            parts = [*file.relative_to(PACKAGE).parts[: -node.level], *module]
        elif module[:1] == ["msad"]:
            parts = module[1:]
        else:
            continue
        found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


def test_imports_point_down():
    listed = re.findall(r"^msad/(\S+)(?:, (\S+))?", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    order = [name.removesuffix("/").removesuffix(".py") for names in listed for name in names if name]
    folders = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert set(folders) <= set(order)
    seen, upwards = set(), []
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported(file) if own in order else ():
            if other in order and other != own:
                seen.add((own, other))
                if order.index(other) < order.index(own) and (own, other) not in ALLOWED:
                    upwards.append(f"{file.relative_to(PACKAGE)} imports {other}")
    assert not upwards, upwards
    assert {("engine", "distill"), ("export", "engine"), ("product", "experiments"), *ALLOWED} <= seen
