#!/usr/bin/env python
"""Write docs/CONFIG.md: every key of msad.config with its default and the comment above it, and the options of
losses and assistants.

    tools/config_docs.py            write the file
    tools/config_docs.py --check    exit 1 if the file is not up to date
"""

import argparse
import re
import sys
from collections.abc import Collection
from pathlib import Path

from fvcore.common.registry import Registry

from msad.distill.assistants import DISTILL_ASSISTANT_REGISTRY, INJECTED_ARGUMENTS
from msad.distill.losses import registry as loss_registry
from msad.distill.losses.registry import DISTILL_LOSS_REGISTRY
from msad.distill.options import own_options

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = [REPOSITORY / "projects/MSAD/msad" / name for name in ("config.py", "config_model.py")]
TARGET = REPOSITORY / "docs/CONFIG.md"
HEAD = """# Configuration

Keys that the project adds to detectron2's. Everything else is detectron2's and means what it means there.
Generated from `projects/MSAD/msad/config.py`, `config_model.py` and the losses by `tools/config_docs.py`.
"""


LOSSES = """
## Entries of DISTILL.LOSSES

A name, option, value or level that does not exist is an error that says which are valid. Every entry has

| key | default | meaning |
| --- | --- | --- |
| `NAME` | | a registered loss |
| `WEIGHT` | the loss's | factor on all of its terms |
| `SOURCE` | every teacher that is in no mean | name or names of teachers, means or assistants |
| `TAP` | `neck` | where features are read; `bottom_up`: the backbone's stages; of segmentors also `decoder`, `scores` |
| `LEVELS` | all that have a partner | names of the teacher's levels (neck: H frame) |
| `MATCH` | `by_stride` | levels of equal grid; `by_index`: the i-th (of stages: from the last), the student's resized |
| `ADAPTATION` | `auto` | 1x1 convolution on the student's features: `auto` (where channels differ), `always`, `none` |
| `ADAPTATION_NORM` | `""` | normalisation after it (`BN`, ...) |

and the options of its loss. Losses that compare predictions (of heads) take no `TAP`, `LEVELS`, `MATCH`, `ADAPTATION`
or `ADAPTATION_NORM`. [LOSSES.md](LOSSES.md) has formulas, sources and open questions of each.

| loss | option | default | meaning |
| --- | --- | --- | --- |
"""
ASSISTANTS = """
## Entries of DISTILL.ASSISTANTS

Every entry has

| key | default | meaning |
| --- | --- | --- |
| `NAME` | | a registered assistant; losses read it as a SOURCE of this name |
| `OPTIMIZER` | `Adam` | `Adam`, `AdamW` or `SGD` |
| `BASE_LR` | the student's | its learning rate; a number is taken as it is, SOLVER.REFERENCE_* do not scale it |
| `WEIGHT_DECAY` | `0.0` | of all of its parameters |
| `SCHEDULE` | `solver` | the student's schedule, or `constant` |
| `HEAD_LEARNS` | `False` | whether its detection losses train the student's head too |
| `WAITS` | `False` | it learns from `DISTILL.START_ITER` on and not from the beginning; needs `SCHEDULE: constant` |

and the options of its assistant:

| assistant | option | default | meaning |
| --- | --- | --- | --- |
"""
TAIL = """
`DISTILL.WEIGHTING` overwrites `MSAD.W_FUSE`, `DISTILL.W_DET` and every `WEIGHT` by what it implies for
`LAMBDA` and `GAMMA`; projects/MSAD/README.md has the table.
"""


def described_arguments(docstring: str) -> dict[str, str]:
    """Names and descriptions of the ``Args:`` of a docstring; "a, b: text" describes both."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.partition("Args:")[2].splitlines()[1:]:
        entry = re.match(r"^ {8}([a-z_, ]+): (.+)$", line)
        if entry:
            names = [name.strip() for name in entry.group(1).split(",")]
            found.update(dict.fromkeys(names, entry.group(2)))
        elif re.match(r"^ {12}\S", line):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
        else:
            break
    return found


def options_of(registry: Registry, injected: Collection[str]) -> list[str]:
    """A line for each option of each registered class, from its signature and docstring."""
    lines = []
    for name, cls in sorted(registry):
        described = described_arguments(cls.__doc__ or "")
        options = own_options(cls, injected)
        if weight := getattr(cls, "default_weight", None):
            source = "factor on all terms; [LOSSES.md](LOSSES.md) says where it comes from"
            lines.append(f"| `{name}` | `WEIGHT` | `{weight}` | {source} |")
        two_stage = getattr(cls, "two_stage", {})
        for key, default in options.items():
            text = described.get(key, "")
            if key in two_stage and "wo-stage" not in text:
                text += f" Two-stage: {two_stage[key]}."
            value = default if default != "" else '""'
            lines.append(f"| `{name}` | `{key.upper()}` | `{value}` | {text.strip().replace('|', chr(92) + '|')} |")
        if not weight and not options:
            lines.append(f"| `{name}` | | | |")
    return lines


def render(source: str) -> str:
    """The Markdown page for the text of the files of keys."""
    lines, comment = [HEAD], []
    for line in source.splitlines():
        line = line.strip()
        section = re.match(r"# --- (.+?) -+$", line)
        assignment = re.match(r"cfg\.([A-Z0-9_.]+) = (.+)$", line)
        if section:
            title = section.group(1)[0].upper() + section.group(1)[1:]
            lines += ["", f"## {title}", "", "| key | default | meaning |", "| --- | --- | --- |"]
            comment = []
        elif line.startswith("# "):
            comment.append(line[2:])
        elif assignment and assignment.group(2) != "CN()":
            cells = [f"`{assignment.group(1)}`", f"`{assignment.group(2)}`", " ".join(comment)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            comment = []
        elif not assignment:
            comment = []
    losses = options_of(DISTILL_LOSS_REGISTRY, loss_registry.INJECTED_ARGUMENTS)
    assistants = options_of(DISTILL_ASSISTANT_REGISTRY, INJECTED_ARGUMENTS)
    return "\n".join([*lines, LOSSES.rstrip("\n"), *losses, ASSISTANTS.rstrip("\n"), *assistants, TAIL])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    page = render("\n".join(path.read_text() for path in SOURCES))
    if args.check:
        if not TARGET.is_file() or TARGET.read_text() != page:
            print(f"{TARGET.name} is not up to date; run {Path(__file__).name}", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
