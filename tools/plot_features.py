#!/usr/bin/env python
"""Plot what raw-feature distillation looks at over training: m n / N, magnitudes and angle of each pyramid level.

    tools/train_net.py --config-file configs/nuclei/losses/naive.yaml DISTILL.ANALYSIS_PERIOD 20 OUTPUT_DIR output/w3
    tools/plot_features.py output/w3 output/w100 --output features.png            a line a run
    tools/plot_features.py "w = 3=output/w3" "w = 100=output/w100"                with names

The mean squared difference of two maps is ((m - n)^2 + 2 m n (1 - cos angle)) / N with m = |teacher|, n = |student| and
N numbers a map (WACV 2024, eq. 10): 2 m n / N is the weight that naive L2 gives to the angle. Where it differs between
levels or models, so does the weight that naive L2 needs. Runs record it with DISTILL.ANALYSIS_PERIOD.
"""

import argparse
import sys
from pathlib import Path

from msad import cli
from msad.visualization.feature_plots import features_figure, read_features
from msad.visualization.plots import save_figure


def named(text: str) -> tuple[str, Path]:
    """NAME=FOLDER or FOLDER, by the last "="."""
    name, _, folder = text.rpartition("=")
    return (name or Path(folder).name), Path(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER", help="folder with the features.jsonl of a run")
    parser.add_argument("--output", type=Path, default=Path("features.png"), help="default: %(default)s")
    parser.add_argument("--levels", nargs="+", metavar="LEVEL", help="e.g. p3 p4; default: all")
    args = parser.parse_args(argv)

    def work() -> None:
        files = {name: folder / "features.jsonl" for name, folder in map(named, args.runs)}
        cli.refuse_overwriting([args.output], files.values())
        runs = {name: read_features(file) for name, file in files.items()}
        print(f"Plot: {save_figure(features_figure(runs, args.levels), args.output)}")

    return cli.run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
