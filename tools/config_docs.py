#!/usr/bin/env python
"""Write docs/CONFIG.md: every key of msad.config with its default and the comment above it.

    tools/config_docs.py            write the file
    tools/config_docs.py --check    exit 1 if the file is not up to date
"""

import argparse
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "projects/MSAD/msad/config.py"
TARGET = REPOSITORY / "docs/CONFIG.md"
HEAD = """# Configuration

Keys that the project adds to detectron2's. Everything else is detectron2's and means what it means there.
Generated from `projects/MSAD/msad/config.py` by `tools/config_docs.py`.
"""


TAIL = """
## Entries of DISTILL.LOSSES

A name, option, value or level that does not exist is an error that says which are valid. Every entry has

| key | default | meaning |
| --- | --- | --- |
| `NAME` | | a registered loss |
| `WEIGHT` | the loss's | factor on all of its terms |
| `LEVELS` | all that have a partner | H-frame names of the teacher's levels |
| `MATCH` | `by_stride` | levels of equal grid; `by_index`: the i-th of both sides, the student's resized |
| `ADAPTATION` | `auto` | 1x1 convolution on the student's maps: `auto` (where channels differ), `always`, `none` |
| `ADAPTATION_NORM` | `""` | normalisation after it (`BN`, ...) |

and the options of its loss, which sums over levels:

| loss | options | formula |
| --- | --- | --- |
| `AlignedL1` | `NORMALIZE`: standardise maps per channel; `MASK_PADDING`: leave it out | mean abs(S - T); MSAD |
| `FitNet` | `GT_ONLY`, `REDUCTION` | mean (S - T)^2 |
| `CWD` | `TAU` | divergence of softmax over the cells of a channel |
| `FKD` | `ALPHA`, `BETA`, `TEMPERATURE`, `PER_IMAGE` | norms: attended features, pools, non-local relations |
| `FGD` | `ALPHA`, `BETA`, `GAMMA`, `LAM`, `TEMPERATURE` | attended L2 in and outside of objects, attention, context |
| `MGD` | `MASK_RATIO` | L2 to maps generated from masked ones |
| `PKD` | | 1 - Pearson's correlation per channel |
| `NaiveL2`, `MagnitudeMD` | | raw features: mean (S - T)^2; its magnitude term |
| `LAD`, `PAD`, `CAD`, `Angular` | `Angular`: `UNIT` | 2 (1 - cos) of layers, pixels, channels |
| `LD` | `W_MAIN`, `W_VLR`, `W_CLS`, `TEMPERATURE`, `CLS_TEMPERATURE`, `VLR_LOWER`, `PER_IMAGE` | KL of box sides |
| `Chen` | `MU`, `NU`, `MARGIN`, `W_BG`, `FOCUS` | soft class labels, boxes bounded by the teacher's error |

`LD` and `Chen` compare head predictions and take no `LEVELS`, `MATCH`, `ADAPTATION` or `ADAPTATION_NORM`.

[LOSSES.md](LOSSES.md) has sources, defaults and open questions of each.

`DISTILL.WEIGHTING` overwrites `MSAD.W_FUSE`, `DISTILL.W_DET` and every `WEIGHT` by what it implies for
`LAMBDA` and `GAMMA`; projects/MSAD/README.md has the table.
"""


def render(source: str) -> str:
    """The Markdown page for the text of config.py."""
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
    return "\n".join(lines) + "\n" + TAIL


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    page = render(SOURCE.read_text())
    if args.check:
        if not TARGET.is_file() or TARGET.read_text() != page:
            print(f"{TARGET.name} is not up to date; run {Path(__file__).name}", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
