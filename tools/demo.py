#!/usr/bin/env python3
"""Draw what a detector finds in images and videos, alone or beside a teacher and the ground truth."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from tqdm import tqdm

from msad import cli, load_config
from msad.data import register_datasets
from msad.data.low_res import LowResOnly
from msad.engine.checkpoint import CheckedCheckpointer, atomic_write
from msad.export.names import read_names
from msad.visualization import Panel, draw_objects, predictions, save_panels
from msad.visualization.objects import as_json
from msad.visualization.panels import legend_strip

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
EXAMPLES = """\
examples:
  a student on a folder of images
    %(prog)s --config-file student.yaml --weights student.pth --input photos/ --output out/
  ground truth | teacher | student, for the images of a validation set
    %(prog)s --config-file student.yaml --weights student.pth --input "val/*.jpg" --output out/ \\
        --teacher-config teacher.yaml --teacher-weights teacher.pth --ground-truth annotations_val.json
  a video, with everything that scores at least 0.4
    %(prog)s --config-file student.yaml --weights student.pth --input drive.mp4 --output drive_out.mp4 --threshold 0.4

Every image is scaled to the model's own test size (INPUT.MIN_SIZE_TEST): a low-resolution student sees it small. What
is drawn is in the pixels of the original. Inputs that cannot be read are named and passed over. KEY VALUE overrides
go to --config-file. Names of classes come from --ground-truth, from metadata.json beside an exported config, or from
the config's data sets.

--json FILE gets a list of {"file", "width", "height", "detections"}, of videos with "frame"; a detection of the student
is {"bbox": [x, y, width, height], "score", "category_id", "category"}, with a mask "segmentation" (COCO's compressed
run lengths) and "keypoints" [x, y, score, ...] where the model has them. category_id counts from 0.
"""


class Unreadable(Exception):
    """An input that cannot be used; the message says why."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="YAML", help="config of the detector")
    parser.add_argument("--weights", required=True, metavar="PTH", help="its checkpoint")
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="PATH", help="images, videos, folders of them, or quoted globs"
    )
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="folder, or a file (.jpg, .png, .mp4) if there is one input"
    )
    parser.add_argument("--threshold", type=float, default=0.7, help="least score that is drawn (default: 0.7)")
    parser.add_argument("--teacher-config", metavar="YAML", help="config of a second model, drawn on the left")
    parser.add_argument("--teacher-weights", metavar="PTH", help="its checkpoint")
    parser.add_argument(
        "--ground-truth", metavar="JSON", help="COCO annotations, matched to the images by file name; name the classes"
    )
    parser.add_argument(
        "--low-res-images", metavar="DIR", help="folder of the student's own images, with the names of the inputs"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: that of the config, or cpu if there is no GPU)")
    parser.add_argument("--json", metavar="FILE", help="also write the detections that are drawn, see below")
    args = cli.parse(parser, argv)
    args.prog = parser.prog
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold must be between 0 and 1, got {args.threshold:g}")
    if bool(args.teacher_config) != bool(args.teacher_weights):
        parser.error("--teacher-config and --teacher-weights belong together")
    return args


def find_inputs(patterns: list[str]) -> list[Path]:
    """Files of the patterns in order: a folder stands for the images and videos in it; a name may not exist."""
    found: list[Path] = []
    for pattern in patterns:
        if os.path.exists(pattern):
            paths = [Path(pattern)]
        else:
            paths = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))] or [Path(pattern)]
        for path in paths:
            if path.is_dir():
                found += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES | VIDEOS)
            else:
                found.append(path)
    return list(dict.fromkeys(found))


def choose_outputs(inputs: list[Path], output: Path) -> list[Path]:
    """A file for every input; ValueError if ``output`` is a file and there are several inputs."""
    if output.suffix.lower() in IMAGES | VIDEOS and not output.is_dir():
        if len(inputs) > 1:
            raise ValueError(f"--output {output} is a file, but there are {len(inputs)} inputs: name a folder")
        wanted = VIDEOS if is_video(inputs[0]) else {".jpg", ".jpeg", ".png"}
        if output.suffix.lower() not in wanted:
            raise ValueError(f"--output {output} cannot hold what is made from {inputs[0]}: use {sorted(wanted)}")
        return [output]
    taken: set[str] = set()
    outputs = []
    for path in inputs:
        suffix = ".mp4" if is_video(path) else path.suffix.lower()
        suffix = suffix if suffix in (".mp4", ".jpg", ".jpeg", ".png") else ".png"
        name, number = path.stem + suffix, 1
        while name in taken:  # images of the same name in two folders
            number += 1
            name = f"{path.stem}_{number}{suffix}"
        taken.add(name)
        outputs.append(output / name)
    return outputs


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def load_predictor(config_file: str, weights: str, device: str | None, opts: list[str]) -> DefaultPredictor:
    """detectron2's predictor with all of its weights: BGR uint8 image (H, W, 3) -> {"instances": ...} in its pixels.

    Raises:
        FileNotFoundError: config or weights.
        ValueError, KeyError: wrong config, or weights of another model.
    """
    cfg = load_config(config_file, opts)
    register_datasets(cfg)
    if device or (cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()):
        cfg.MODEL.DEVICE = device or "cpu"
    cfg.MODEL.WEIGHTS = ""  # loaded below, with a check that they fit
    predictor = DefaultPredictor(cfg)
    CheckedCheckpointer(predictor.model).load_all(weights, config_file)
    return predictor


class GroundTruth:
    """COCO annotations by image file."""

    def __init__(self, json_file: str) -> None:
        json_file = os.path.abspath(json_file)
        if not os.path.isfile(json_file):
            raise FileNotFoundError(f"--ground-truth: no such file: {json_file}")
        name = f"ground truth {json_file}"
        entry = {"NAME": name, "JSON": json_file, "IMAGES": os.path.dirname(json_file)}
        register_datasets(CfgNode({"DATASETS": {"REGISTER": [entry]}}))
        self._records: dict[str, list[dict]] = {}
        for record in DatasetCatalog.get(name):
            self._records.setdefault(os.path.basename(record["file_name"]), []).append(record)
        self.metadata = MetadataCatalog.get(name)

    def find(self, path: Path) -> dict | None:
        """The dataset dict of the image: of several with its file name, that whose folders agree furthest."""
        records = self._records.get(path.name, [])
        return max(records, key=lambda record: _common_tail(path.absolute(), Path(record["file_name"])), default=None)


def _common_tail(a: Path, b: Path) -> int:
    return next((i for i, (x, y) in enumerate(zip(reversed(a.parts), reversed(b.parts))) if x != y), len(a.parts))


def class_metadata(cfg: CfgNode, ground_truth: GroundTruth | None, config_file: str = "") -> Metadata:
    """Class and keypoint names: of the export or of the first test data set, else of the ground truth, else none.

    Raises:
        ValueError: those of the ground truth are others than the model's.
    """
    model = _model_metadata(cfg, config_file)
    if ground_truth is None:
        return model
    ours, theirs = model.get("thing_classes"), ground_truth.metadata.thing_classes
    if ours and list(ours) != list(theirs):
        raise ValueError(
            f"--ground-truth has other classes than the model: {', '.join(theirs)}; the model's are {', '.join(ours)}"
        )
    return ground_truth.metadata


def _model_metadata(cfg: CfgNode, config_file: str) -> Metadata:
    if names := read_names(config_file):
        return Metadata(name=f"metadata beside {config_file}", **names)
    for name in cfg.DATASETS.TEST[:1]:
        if name not in DatasetCatalog.list():
            continue
        if not MetadataCatalog.get(name).get("thing_classes"):
            try:
                DatasetCatalog.get(name)  # its file knows the names
            except FileNotFoundError as error:
                print(f"classes are shown by their indices: {error}", file=sys.stderr)
                continue
        return MetadataCatalog.get(name)
    return MetadataCatalog.get("unnamed classes")


class Demo:
    """Models, ground truth and the way they are drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        student = load_predictor(args.config_file, args.weights, args.device, args.opts)
        self.models = {"Student" if args.teacher_config else "Predictions": student}
        if args.teacher_config:
            teacher = load_predictor(args.teacher_config, args.teacher_weights, args.device, [])
            self.models = {"Teacher": teacher, **self.models}
        self.ground_truth = GroundTruth(args.ground_truth) if args.ground_truth else None
        self.metadata = class_metadata(student.cfg, self.ground_truth, args.config_file)
        self.threshold = args.threshold
        self.student = student
        self.low_res = Path(args.low_res_images) if args.low_res_images else None
        self.low_res_mapper = LowResOnly(DatasetMapper(student.cfg, False))
        self.records: list[dict] = []  # of --json

    def detect(self, image: np.ndarray, source: Path | None = None) -> dict:
        """Title -> Objects from the threshold on, for a BGR image; ``source`` is its file, for --low-res-images."""
        found = {}
        for title, model in self.models.items():
            own = self.low_res and model is self.student
            found[title] = predictions((self._see_own_image(image, source) if own else model(image))["instances"])
        return {title: objects.above(self.threshold) for title, objects in found.items()}

    def _see_own_image(self, image: np.ndarray, source: Path) -> dict:
        """What the student finds in its own file, in the pixels of ``image``."""
        record = {"file_name": str(source), "low_res_file_name": str(self.low_res / source.name)}
        try:
            item = self.low_res_mapper({**record, "height": image.shape[0], "width": image.shape[1]})
        except OSError as error:
            raise Unreadable(f"--low-res-images: {error}") from None
        with torch.no_grad():
            return self.student.model([item])[0]

    def image(self, source: Path, target: Path) -> None:
        """One picture: the detections, or a row of panels."""
        try:
            image = read_image(str(source), format="BGR")
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError at broken PNGs
            raise Unreadable(str(error)) from None
        columns, rgb = {}, np.ascontiguousarray(image[:, :, ::-1])
        record = self.ground_truth.find(source) if self.ground_truth else None
        if record is not None:
            if (record["height"], record["width"]) != image.shape[:2]:
                raise Unreadable(
                    f"it has {image.shape[1]}x{image.shape[0]} pixels, but its annotations are for "
                    f"{record['width']}x{record['height']}"
                )
            columns["Ground truth"] = record
        found = self.detect(image, source)
        columns.update(found)
        self.record(source, image, found)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.ground_truth or len(self.models) > 1:
            save_panels(target, [Panel(rgb, columns, source.name)], self.metadata, threshold=self.threshold)
        else:
            picture = draw_objects(rgb, columns.popitem()[1], self.metadata, threshold=self.threshold)
            if not cv2.imwrite(str(target), picture[:, :, ::-1]):
                raise OSError(f"cannot write {target}")

    def record(self, source: Path, image: np.ndarray, found: dict, **more: int) -> None:
        """Keep what the student, the last model, found, for --json."""
        detections = as_json(list(found.values())[-1], self.metadata.get("thing_classes") or ())
        size = {"width": image.shape[1], "height": image.shape[0]}
        self.records.append({"file": str(source), **more, **size, "detections": detections})

    def video(self, source: Path, target: Path) -> None:
        """The video with the detections drawn, side by side if there are two models."""
        if self.low_res:
            raise Unreadable("--low-res-images are for images, not for videos")
        writer, seen = None, set()
        frames, total, rate = _open_video(source)
        try:
            progress = tqdm(frames, source.name, total=total, unit="frame", leave=False, disable=None)
            for number, frame in enumerate(progress):
                found = self.detect(frame)
                self.record(source, frame, found, frame=number)
                cells = [
                    _titled(draw_objects(frame[:, :, ::-1], o, self.metadata, threshold=self.threshold), title, len(o))
                    for title, o in found.items()
                ]
                seen |= {c for o in found.values() for c in o.classes.tolist()}
                picture = np.hstack(cells)
                picture = np.vstack([picture, legend_strip(seen, self.metadata, picture.shape[1])])[:, :, ::-1]
                # Codecs reject odd sides.
                picture = np.ascontiguousarray(picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2])
                if writer is None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    code = cv2.VideoWriter_fourcc(*("mp4v" if target.suffix.lower() != ".avi" else "MJPG"))
                    writer = cv2.VideoWriter(str(target), code, rate, picture.shape[1::-1])
                    if not writer.isOpened():
                        raise OSError(f"cannot write the video {target}")
                writer.write(picture)
        finally:
            if writer is not None:
                writer.release()  # also after Ctrl-C: what is there can be played


def _open_video(source: Path) -> tuple[Iterator[np.ndarray], int | None, float]:
    """BGR frames, how many there should be if that is known, and frames per second."""
    capture = cv2.VideoCapture(str(source))
    good, first = capture.read()
    if not good:
        capture.release()
        raise Unreadable("no frame can be read from it")

    def frames() -> Iterator[np.ndarray]:
        good, frame = True, first
        while good:
            yield frame
            good, frame = capture.read()
        capture.release()

    count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    return frames(), count if count > 0 else None, rate if 0 < rate < 1000 else 25.0


def _titled(picture: np.ndarray, title: str, count: int) -> np.ndarray:
    """The picture under a strip with its title."""
    strip = np.full((28, picture.shape[1], 3), 255, np.uint8)
    text = f"{title}: {count} object" + "s" * (count != 1)
    cv2.putText(strip, text, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 40, 40), 1, cv2.LINE_AA)
    return np.vstack([strip, picture])


def check_paths(args: argparse.Namespace, inputs: list[Path], outputs: list[Path]) -> None:
    """ValueError, before anything is written, if something that is read would be written over."""
    read = [*inputs, args.config_file, args.weights, args.teacher_config, args.teacher_weights, args.ground_truth]
    written = [*outputs, *([args.json] if args.json else [])]
    cli.refuse_overwriting(written, [path for path in read if path])
    # Drawings among photographs would be inputs of the next call.
    cli.refuse_overwriting({path.parent for path in outputs}, {path.parent for path in inputs} & _folders(args.input))


def _folders(patterns: list[str]) -> set[Path]:
    return {Path(pattern) for pattern in patterns if os.path.isdir(pattern)}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 if anything was made, 1 if nothing, 2 for a wrong call, 130 after Ctrl-C."""
    args = parse_args(argv)

    def work() -> int:
        inputs = find_inputs(args.input)
        if not inputs:
            raise ValueError(f"no images or videos in {' '.join(args.input)}")
        outputs = choose_outputs(inputs, Path(args.output))
        check_paths(args, inputs, outputs)
        return draw_all(Demo(args), args, list(zip(inputs, outputs)))

    return cli.run(args.prog, work)


def draw_all(demo: Demo, args: argparse.Namespace, pairs: list[tuple[Path, Path]]) -> int:
    """Draw every input into its output and write --json; the exit status."""
    made, skipped, stopped = 0, 0, False
    try:
        for source, target in tqdm(pairs, "demo", unit="input", disable=None if len(pairs) > 1 else True):
            try:
                (demo.video if is_video(source) else demo.image)(source, target)
                made += 1
            except Unreadable as error:
                skipped += 1
                tqdm.write(f"skipped {source}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        stopped = True
    if args.json:
        with atomic_write(args.json, "w") as file:
            json.dump(demo.records, file, indent=1)
    status = "stopped, " if stopped else ""
    print(f"{status}{made} of {len(pairs)} inputs drawn into {args.output}" + f", {skipped} skipped" * (skipped > 0))
    return 130 if stopped else 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
