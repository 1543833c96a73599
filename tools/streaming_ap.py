#!/usr/bin/env python
"""Streaming AP of detectors on videos: accuracy and latency in one number, over input sizes.

    tools/streaming_ap.py --model student.yaml student.pth --output out DATASETS.TEST "('my_videos',)"
    tools/streaming_ap.py --model teacher.yaml t.pth --model student.yaml s.pth --sizes 1200 900 600 --output out
    tools/streaming_ap.py --model student.yaml student.pth --real-time --output out
    tools/streaming_ap.py --scenes --model student.yaml student.pth --output out

The data set in DATASETS.TEST has TYPE argoverse_hd; --scenes draws one for the detectors of make demo. Every frame is
detected once and timed; the stream is then simulated with runtimes drawn from those measured (or with --runtime-ms), or
played in real time. Writes DIR/streaming.json and DIR/streaming.png, and prints a table. Detections are kept in
DIR/detections: on the same machine the same command goes on after an interruption, and other schedules need no further
detection. Overrides hold for all models.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate
from tqdm import tqdm

from msad.cli import load_models, parse, positive, positive_float
from msad.cli import run as run_command
from msad.config_values import value_at
from msad.data.argoverse_hd import category_ids, read_content, sequences_of
from msad.data.synthetic import DEMO
from msad.data.synthetic_videos import make_videos
from msad.engine.provenance import fingerprint, machine, write_measurements
from msad.engine.setup import load_model
from msad.evaluation import streaming
from msad.evaluation.coco_stats import box_stats
from msad.evaluation.streaming_detector import FrameDetector, categories_of, detect_frames, play_sequences
from msad.evaluation.sweep import at_size
from msad.files import finite, read_json, write_json
from msad.modeling.adapters import num_classes_key
from msad.visualization.plots import save_figure
from msad.visualization.streaming import streaming_figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="streaming_ap.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs=2, action="append", required=True, metavar=("YAML", "WEIGHTS"), help="may be repeated")
    add("--output", required=True, metavar="DIR", help="folder to write to")
    add("--scenes", action="store_true", help="on videos of the scenes of tools/quickstart.py, drawn into DIR/scenes")
    add("--sizes", nargs="+", type=positive, metavar="PX", help="short sides (default: INPUT.MIN_SIZE_TEST)")
    add("--schedule", choices=("greedy", "shrinking-tail", "infinite"), default="greedy",
        help="one device that takes the newest frame; or that waits for the next if it loses no frame by that; or a "
        "device for every frame")  # fmt: skip
    add("--real-time", action="store_true", help="play the videos instead of simulating them")
    add("--stride", type=positive, default=1, metavar="N", help="process every N-th examined frame")
    add("--eta", type=float, default=0.0, metavar="FRAMES", help="ask so many frames earlier (default 0)")
    add("--fps", type=positive_float, metavar="F", help="frames a second (default: the data's frame_rate, else 30)")
    add("--runtime-ms", nargs="+", type=positive_float, metavar="MS", help="to simulate instead of those measured")
    add("--performance", type=positive_float, default=1.0, metavar="X", help="simulate a device X times as fast")
    args = parse(parser, argv)
    if args.real_time and (args.schedule == "infinite" or args.runtime_ms or args.performance != 1):
        parser.error("--real-time runs this device: --schedule infinite, --runtime-ms and --performance are simulated")
    if args.schedule == "infinite" and args.stride != 1:
        parser.error("--stride needs one device")
    given = next((key for key in args.opts[::2] if key in ("DATASETS.REGISTER", "DATASETS.TEST")), None)
    if args.scenes and given:
        parser.error(f"--scenes draws the data set, so {given} would have no effect")
    return args


class Videos:
    """The data set: annotations in COCO's format, sequences, and the files of their frames."""

    def __init__(self, cfg: CfgNode, fps: float | None) -> None:
        if len(cfg.DATASETS.TEST) != 1:
            raise ValueError(f"streaming AP needs one data set in DATASETS.TEST, got {list(cfg.DATASETS.TEST)}")
        self.name = cfg.DATASETS.TEST[0]
        entry = MetadataCatalog.get(self.name).get("definition") or {}
        if entry.get("TYPE") != "argoverse_hd":
            raise ValueError(f"streaming AP needs videos: register {self.name!r} as TYPE argoverse_hd")
        self.content = read_content(entry["JSON"])
        self.sequences = sequences_of(self.content, fps)
        if not self.sequences:
            raise ValueError(f"{entry['JSON']} has no images")
        files = {image["id"]: os.path.join(entry["IMAGES"], image["file_name"]) for image in self.content["images"]}
        self.files = [[files[image] for image in sequence.image_ids] for sequence in self.sequences]
        missing = next((file for names in self.files for file in names if not os.path.isfile(file)), None)
        if missing:
            raise FileNotFoundError(f"data set {self.name!r}: no such frame: {missing}")


def detector_of(cfg: CfgNode, weights: str, videos: Videos) -> FrameDetector:
    classes = value_at(cfg, num_classes_key(cfg))
    categories = categories_of(classes, category_ids(videos.content), videos.content.get("coco_mapping"))
    return FrameDetector(cfg, load_model(cfg, weights), categories)


def measured(cfg: CfgNode, weights: str, videos: Videos, folder: Path, title: str) -> dict:
    """{"runtimes": seconds, "detections": results} of all frames, from ``folder`` if they are there."""
    file = folder / f"{title}_{fingerprint(cfg, weights, machine(cfg.MODEL.DEVICE))}.json"
    if (kept := read_json(file)) is not None:
        return kept
    names = [name for sequence in videos.files for name in sequence]
    detector = detector_of(cfg, weights, videos)
    with tqdm(total=len(names), desc=title, unit="frame", dynamic_ncols=True, disable=None) as bar:
        detections, runtimes = detect_frames(detector, names, bar.update)
    return _keep(file, {"runtimes": runtimes, "detections": detections})


def _keep(file: Path, content: dict) -> dict:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content, indent=None)
    return content


def simulated_stream(args: argparse.Namespace, videos: Videos, found: dict) -> tuple[list, list, list[float]]:
    """Outputs and detections of each sequence, and the runtimes that were drawn from."""
    samples = [ms / 1000 for ms in args.runtime_ms] if args.runtime_ms else found["runtimes"]
    runtimes = streaming.draw_runtimes(samples, args.performance)
    mean = float(np.mean(samples)) / args.performance
    outputs, detections, first = [], [], 0
    for sequence in videos.sequences:
        frames = len(sequence.image_ids)
        if args.schedule == "infinite":
            made = streaming.infinite_devices(frames, sequence.fps, runtimes)
        else:
            tail = mean if args.schedule == "shrinking-tail" else None
            made = streaming.simulate(frames, sequence.fps, runtimes, stride=args.stride, mean_runtime=tail)
        outputs.append(made)
        detections.append([found["detections"][first + output.frame] for output in made])
        first += frames
    return outputs, detections, [sample / args.performance for sample in samples]


def real_stream(args: argparse.Namespace, videos: Videos, cfg: CfgNode, weights: str, title: str) -> tuple[list, list]:
    """Outputs and detections of each sequence, played now or by an earlier command of the same kind."""
    dynamic = args.schedule == "shrinking-tail"
    rates = [sequence.fps for sequence in videos.sequences]
    how = ["real-time", args.stride, dynamic, rates, machine(cfg.MODEL.DEVICE)]
    file = Path(args.output) / "detections" / f"{title}_real_time_{fingerprint(cfg, weights, how)}.json"
    if not file.is_file():
        detector = detector_of(cfg, weights, videos)
        with tqdm(total=len(rates), desc=title, unit="video", dynamic_ncols=True, disable=None) as bar:
            outputs, detections = play_sequences(
                detector, videos.files, rates, stride=args.stride, dynamic=dynamic, on_sequence=bar.update
            )
        times = [[[output.frame, float(output.finished)] for output in made] for made in outputs]
        _keep(file, {"outputs": times, "detections": detections})
    kept = read_json(file)
    outputs = [[streaming.Output(f, streaming.exact(t)) for f, t in made] for made in kept["outputs"]]
    return outputs, kept["detections"]


def evaluate_model(args: argparse.Namespace, videos: Videos, cfg: CfgNode, weights: str, title: str) -> dict:
    """One entry of streaming.json: a model at one size."""
    images = [sequence.image_ids for sequence in videos.sequences]
    found = measured(cfg, weights, videos, Path(args.output) / "detections", title)
    ids = [image for sequence in images for image in sequence]
    single = [{**d, "image_id": image} for image, frame in zip(ids, found["detections"]) for d in frame]
    if args.real_time:
        outputs, detections = real_stream(args, videos, cfg, weights, title)
        samples = found["runtimes"]
    else:
        outputs, detections, samples = simulated_stream(args, videos, found)
    lengths = [(len(sequence.image_ids), sequence.fps) for sequence in videos.sequences]
    pairs = [streaming.pair(made, *length, eta=args.eta) for made, length in zip(outputs, lengths)]
    results = streaming.streamed_results(images, pairs, detections)
    return {
        "short_side": cfg.INPUT.MIN_SIZE_TEST,
        "milliseconds": round(1000 * float(np.mean(samples)), 3),
        "offline": {name: finite(value) for name, value in box_stats(videos.content, single).items()},
        "streaming": {name: finite(value) for name, value in box_stats(videos.content, results).items()},
        "pairing": streaming.summarize_pairing(outputs, pairs)._asdict(),
    }


def run(args: argparse.Namespace) -> str:
    opts = list(args.opts)
    if args.scenes:
        entry = make_videos(Path(args.output) / "scenes", **DEMO)
        opts += ["DATASETS.REGISTER", [entry], "DATASETS.TEST", (entry["NAME"],)]
    loaded = load_models(args.model, opts)
    first = next(cfg for cfg, _ in loaded.values())
    if any(cfg.DATASETS.TEST != first.DATASETS.TEST for cfg, _ in loaded.values()):
        raise ValueError("the models name different DATASETS.TEST; override it for all of them")
    videos = Videos(first, args.fps)
    models: dict[str, list[dict]] = {}
    for name, (cfg, weights) in loaded.items():
        for side in args.sizes or [cfg.INPUT.MIN_SIZE_TEST]:
            entry = evaluate_model(args, videos, at_size(cfg, side), weights, f"{name}_{side}")
            models.setdefault(name, []).append(entry)
    options = ("schedule", "real_time", "stride", "eta", "runtime_ms", "performance")
    about = {
        "dataset": videos.name,
        "sequences": {sequence.name: len(sequence.image_ids) for sequence in videos.sequences},
        "fps": sorted({sequence.fps for sequence in videos.sequences}),
        **{option: getattr(args, option) for option in options},
    }
    output = Path(args.output)
    write_measurements(output / "streaming.json", models, loaded, **about)
    title = f"{videos.name}, {args.schedule}" + (", in real time" if args.real_time else "")
    save_figure(streaming_figure(models, about["fps"][-1], title), output / "streaming.png")
    rows = [
        [name, e["short_side"], e["milliseconds"], e["offline"]["AP"], e["streaming"]["AP"],
         *(e["streaming"][key] for key in ("APs", "APm", "APl")), e["pairing"]["mean_lag"], e["pairing"]["missed"]]
        for name, entries in models.items() for e in entries
    ]  # fmt: skip
    header = ["model", "short side", "ms", "AP of frames", "streaming AP", "s", "m", "l", "lag", "missed"]
    table = tabulate(rows, header, floatfmt=".1f", missingval="-")
    return f"{table}\n\n{output}: streaming.json, streaming.png"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(
        "streaming_ap.py",
        lambda: print(run(args)),
        "interrupted. Finished sizes are kept; the same command goes on with the others.",
    )


if __name__ == "__main__":
    sys.exit(main())
