"""Every piece of yaml in README and docs/ is a config that loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from msad import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "projects/MSAD/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


def test_there_are_some():
    assert len(BLOCKS) > 15


@pytest.mark.parametrize("text", BLOCKS)
def test_loads(text, tmp_path, monkeypatch):
    """Without the file that it is based on, whose place is the reader's; with the module that the page writes."""
    pages = "".join(page.read_text() for page in PAGES)
    for name, module in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", pages, flags=re.DOTALL):
        (tmp_path / name).write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "a.yaml"
    path.write_text("VERSION: 2\n" + re.sub(r"^_BASE_:.*\n", "", text, flags=re.MULTILINE))
    load_config(path)
