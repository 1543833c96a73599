#!/usr/bin/env python
"""Is this training set up as it should be? Looks at config, data, models and checkpoints before they cost a night.

    tools/preflight.py configs/nuclei/student_L.yaml
    tools/preflight.py STUDENT.yaml DISTILL.TEACHERS "[{'CONFIG': 'T.yaml', 'WEIGHTS': 't.pth'}]" MODEL.DEVICE cuda
    tools/preflight.py STUDENT.yaml --images 0 --json > findings.json          without running the teacher
    tools/preflight.py STUDENT.yaml --no-kd-weights FILE                      is the teacher better than that?
    tools/preflight.py STUDENT.yaml DATASETS.CHECK_IMAGES 0                    look into every image file

A curriculum is looked at stage by stage. Every finding that is not ok has a fix. Exit status: 0, or 1 if there is an
error (with --strict: or a warning), or 2 if there is no such file. Training makes the quick ones of these checks by
itself and stops at errors.
"""

import argparse
import contextlib
import json
import logging
import sys
import textwrap

from msad import cli, load_config
from msad.engine.preflight import examine_stages
from msad.finding import ERROR, OK, WARNING, Finding

_MARKS = {OK: "ok     ", WARNING: "WARNING", ERROR: "ERROR  "}


def show(findings: list[Finding]) -> str:
    """The findings as text, worst last."""
    lines = []
    for finding in sorted(findings, key=lambda f: list(_MARKS).index(f.level)):
        text = f"{_MARKS[finding.level]}  {finding.check}: {finding.text}"
        lines.append(textwrap.fill(text, 118, subsequent_indent=" " * 9, break_on_hyphens=False))
        if finding.fix:
            fix = f"Fix: {finding.fix}"
            lines.append(textwrap.fill(fix, 118, initial_indent=" " * 9, subsequent_indent=" " * 9))
    counts = {level: sum(f.level == level for f in findings) for level in _MARKS}
    return "\n".join([*lines, f"\n{counts[ERROR]} errors, {counts[WARNING]} warnings, {counts[OK]} ok"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="YAML", help="of a student, or of any other training")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="for the teacher's AP; default: 200")
    parser.add_argument(
        "--no-kd-weights", default="", metavar="FILE",
        help="checkpoint of the student trained without distillation: warn if the teacher is no better on its images",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print a list of {level, check, text, fix}, of a curriculum with {stage}"
    )
    parser.add_argument("--strict", action="store_true", help="warnings count as errors for the exit status")
    args = cli.parse(parser, argv)
    logging.getLogger().addHandler(logging.NullHandler())  # what the engine says while loading is not a finding

    def work() -> int:
        cfg = load_config(args.config, args.opts)
        with contextlib.redirect_stdout(sys.stderr):
            of_stages = examine_stages(cfg, args.images, args.no_kd_weights)
        found = [(stage, finding) for stage, findings in of_stages.items() for finding in findings]
        if args.json:
            print(json.dumps([{**f._asdict(), **({"stage": stage} if stage else {})} for stage, f in found], indent=1))
        else:
            parts = of_stages.items()
            print("\n\n".join(f"{stage}:\n{show(findings)}" if stage else show(findings) for stage, findings in parts))
        bad = {ERROR, WARNING} if args.strict else {ERROR}
        return int(any(finding.level in bad for _, finding in found))

    return cli.run("preflight.py", work)


if __name__ == "__main__":
    sys.exit(main())
