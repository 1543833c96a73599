"""docs/CONFIG.md is what the files of keys and the losses say."""

import subprocess
import sys
from pathlib import Path

from detectron2.config import get_cfg
from load_tool import load_tool

from msad.config import add_msad_config, valid_keys

SCRIPT = Path(__file__).parents[2] / "tools" / "config_docs.py"


def test_page_is_up_to_date():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_key_has_a_row_and_a_meaning():
    module = load_tool("config_docs")
    page = module.render("\n".join(path.read_text() for path in module.SOURCES))
    rows = {
        cells[1].strip(" `"): cells[3].strip()
        for cells in (line.split(" | ") for line in page.splitlines())
        if len(cells) == 3
        for cells in [["", cells[0].lstrip("| "), cells[1], cells[2].rstrip("| ")]]
    }
    plain = get_cfg()
    ours = {k for k in valid_keys(add_msad_config(get_cfg())) if k not in valid_keys(plain)}
    leaves = {k for k in ours if not any(other.startswith(k + ".") for other in ours)}
    assert leaves <= set(rows), leaves - set(rows)
    assert all(rows[key] for key in leaves)


def test_every_option_of_a_loss_or_an_assistant_has_a_meaning():
    module = load_tool("config_docs")
    page = module.TARGET.read_text()  # the registries have those of other tests too
    tables = [page.partition(f"| {kind} | option |")[2].partition("\n\n")[0] for kind in ("loss", "assistant")]
    lines = [line for table in tables for line in table.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert ["`CrossScaleAssistant`", "`HEADS`", "`8`", "of each level's attention."] in rows
    assert ["`CWD`", "`TAU`", "`1.0`", "temperature of the softmax."] in rows
    assert {"`LD`", "`SDF`", "`MGD`"} <= {row[0] for row in rows}
    assert all(len(row) == 4 and row[3] for row in rows if len(row) > 1)
