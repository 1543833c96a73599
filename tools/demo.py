#!/usr/bin/env python3
"""Draw what a detector or segmentor finds in images and videos, alone or beside a teacher and the ground truth."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.transforms import ResizeShortestEdge
from tqdm import tqdm

from msad import cli
from msad.data.media import Unreadable, choose_outputs, find_inputs, is_video, open_video, read_picture, require_bytes
from msad.data.names import class_names
from msad.engine.predictor import GroundTruth, class_metadata, is_segmentor, load_predictor, predict_low_res
from msad.files import prepare_folder, write_json
from msad.visualization import LabelMap, Objects, Panel, as_content, draw_objects, save_panels
from msad.visualization.objects import as_json
from msad.visualization.video import VideoWriter, draw_frame

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
run lengths) and "keypoints" [x, y, score, ...] where the model has them; of a segmentor, each class that occurs with
"pixels" and "segmentation". category_id counts from 0.
"""


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
        "--ground-truth", metavar="PATH", help="COCO annotations, matched to the images by file name; name the "
        "classes; for segmentors also a folder of label maps NAME.png",
    )  # fmt: skip
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


class Demo:
    """Models, ground truth and the way they are drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        student = load_predictor(args.config_file, args.weights, args.device, args.opts)
        self.models = {"Student" if args.teacher_config else "Predictions": student}
        if args.teacher_config:
            teacher = load_predictor(args.teacher_config, args.teacher_weights, args.device, [])
            self.models = {"Teacher": teacher, **self.models}
        truth, segments = args.ground_truth, is_segmentor(student.cfg)
        if any(is_segmentor(model.cfg) != segments for model in self.models.values()):
            raise ValueError("a segmentor and a detector have nothing in common that could be drawn side by side")
        self.ground_truth = GroundTruth(truth, segments) if truth else None
        self.metadata = class_metadata(student.cfg, self.ground_truth, args.config_file)
        self.threshold = args.threshold
        self.student = student
        self.low_res = Path(args.low_res_images) if args.low_res_images else None
        self.records: list[dict] = []  # of --json

    def detect(self, image: np.ndarray, source: Path | None = None) -> dict:
        """Title -> what is to be drawn in a BGR image; ``source`` is its file, for --low-res-images.

        Unreadable if a model's test size leaves nothing of a side."""
        found = {}
        for title, model in self.models.items():
            own = self.low_res and model is self.student
            sides = model.cfg.INPUT.MIN_SIZE_TEST, model.cfg.INPUT.MAX_SIZE_TEST
            if not own and all(sides) and 0 in ResizeShortestEdge.get_output_shape(*image.shape[:2], *sides):
                raise Unreadable(f"{image.shape[1]}x{image.shape[0]} pixels are too narrow for INPUT.MIN_SIZE_TEST")
            found[title] = as_content(self._see_own_image(image, source) if own else model(image))
        return {title: content.above(self.threshold) for title, content in found.items()}

    def _see_own_image(self, image: np.ndarray, source: Path) -> dict:
        """What the student finds in its own file, in the pixels of ``image``."""
        record = {"file_name": str(source), "low_res_file_name": str(self.low_res / source.name)}
        require_bytes(self.low_res / source.name)
        try:
            return predict_low_res(self.student, {**record, "height": image.shape[0], "width": image.shape[1]})
        except OSError as error:
            raise Unreadable(f"--low-res-images: {error}") from None

    def image(self, source: Path, target: Path) -> None:
        """One picture: the detections, or a row of panels."""
        image = read_picture(source)
        columns, rgb = {}, np.ascontiguousarray(image[:, :, ::-1])
        record = self.ground_truth.find(source) if self.ground_truth else None
        if record is not None:
            columns["Ground truth"] = annotated(record, image.shape[:2])
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
        detections = as_json(list(found.values())[-1], class_names(self.metadata))
        size = {"width": image.shape[1], "height": image.shape[0]}
        self.records.append({"file": str(source), **more, **size, "detections": detections})

    def video(self, source: Path, target: Path) -> None:
        """The video with the detections drawn, side by side if there are two models."""
        if self.low_res:
            raise Unreadable("--low-res-images are for images, not for videos")
        seen: set[int] = set()
        frames, total, rate = open_video(source)
        with VideoWriter(target, rate) as video:
            progress = tqdm(frames, source.name, total=total, unit="frame", leave=False, disable=None)
            for number, frame in enumerate(progress):
                found = self.detect(frame)
                self.record(source, frame, found, frame=number)
                seen |= {c for content in found.values() for c in content.classes.tolist()}
                video.write(draw_frame(frame, found, self.metadata, seen, self.threshold))


def annotated(record: dict, size: tuple[int, int]) -> Objects | LabelMap:
    """What a dataset dict says of an image of ``size`` (height, width); Unreadable if it is for another size."""
    content = as_content(record)
    wanted = content.labels.shape if isinstance(content, LabelMap) else (record["height"], record["width"])
    if wanted != size:
        raise Unreadable(f"it has {size[1]}x{size[0]} pixels, but its annotations are for {wanted[1]}x{wanted[0]}")
    return content


def check_paths(args: argparse.Namespace, inputs: list[Path], outputs: list[Path]) -> None:
    """ValueError, before anything is written, if something that is read would be written over."""
    read = [*inputs, args.config_file, args.weights, args.teacher_config, args.teacher_weights, args.ground_truth]
    written = [*outputs, *([args.json] if args.json else [])]
    cli.refuse_overwriting(written, [path for path in read if path])
    # Drawings among photographs would be inputs of the next call.
    folders = {Path(pattern) for pattern in args.input if os.path.isdir(pattern)}
    cli.refuse_overwriting({path.parent for path in outputs}, folders & {path.parent for path in inputs})


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 if anything was made, 1 if nothing, 2 for a wrong call, 130 after Ctrl-C."""
    args = parse_args(argv)

    def work() -> int:
        inputs = find_inputs(args.input)
        if not inputs:
            raise ValueError(f"no images or videos in {' '.join(args.input)}; folders inside of it are not searched")
        outputs = choose_outputs(inputs, Path(args.output))
        check_paths(args, inputs, outputs)
        return draw_all(Demo(args), args, list(zip(inputs, outputs)))

    return cli.run(args.prog, work)


def draw_all(demo: Demo, args: argparse.Namespace, pairs: list[tuple[Path, Path]]) -> int:
    """Draw every input into its output and write --json; the exit status."""
    if args.json:
        prepare_folder(args.json)
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
    finally:  # what was found is kept, whatever happens
        if args.json:
            write_json(args.json, demo.records)
    status = "stopped, " if stopped else ""
    print(f"{status}{made} of {len(pairs)} inputs drawn into {args.output}" + f", {skipped} skipped" * (skipped > 0))
    return 130 if stopped else 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
