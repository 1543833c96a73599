#!/usr/bin/env python3
"""Run an exported detector on images, folders, videos or a camera; needs numpy, opencv and onnxruntime alone.

    python run.py model.onnx --input photos/ drive.mp4 --output found/
    python run.py model.onnx --camera 0 --frames 500 --output found/ --threads 2

writes found/detections.json, boxes as (x, y, width, height) in pixels of the original, masks as COCO run lengths, and
the pictures and videos with the detections drawn. Prints milliseconds and frames per second. What cannot be read is
named and passed over. Inputs are never written to.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"}
PRECISION = 22  # bits of the weights when resizing, as in Pillow


def _resample(image: np.ndarray, size: int) -> np.ndarray:
    """``image`` (H, W, 3) uint8 with H changed to ``size`` as Pillow does it: a triangle as wide as the reduction."""
    scale = len(image) / size
    reach = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(int), 0)
    last = np.minimum((centre + reach + 0.5).astype(int), len(image))
    index = first + np.arange((last - first).max())[:, None]
    weight = np.maximum(1 - np.abs(index + 0.5 - centre) / reach, 0) * (index < last)
    weight = (weight / weight.sum(axis=0) * 2**PRECISION + 0.5).astype(np.int32)
    total = np.full((size, *image.shape[1:]), 2 ** (PRECISION - 1), np.int32)
    part = np.empty_like(total)
    for i, w in zip(np.minimum(index, len(image) - 1), weight):
        total += np.multiply(image[i], w[:, None, None], out=part)
    return (total >> PRECISION).astype(np.uint8)


def resize_shortest_edge(image: np.ndarray, short: int, longest: int) -> np.ndarray:
    """As detectron2 resizes test images: the short side to ``short``, unless the other would exceed ``longest``."""
    height, width = image.shape[:2]
    if short <= 0:
        return image
    scale = short / min(height, width)
    if scale * max(height, width) > longest:
        scale = scale * (longest / (scale * max(height, width)))
    new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
    if new_width != width:
        image = _resample(np.ascontiguousarray(image.swapaxes(0, 1)), new_width).swapaxes(0, 1)
    return _resample(image, new_height) if new_height != height else image


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (S, S) of probabilities inside ``box``, bilinearly resampled: (height, width) bool, true from 0.5 on."""
    whole = np.zeros((height, width), bool)
    x0, y0 = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(box[2:]).astype(int) + 1, (width, height))
    cells = np.arange(len(mask))
    x = (np.arange(x0, x1) + 0.5 - box[0]) / (box[2] - box[0]) * len(mask) - 0.5
    y = (np.arange(y0, y1) + 0.5 - box[1]) / (box[3] - box[1]) * len(mask) - 0.5
    along_x, along_y = (np.maximum(1 - np.abs(at[:, None] - cells), 0) for at in (x, y))
    whole[y0:y1, x0:x1] = along_y @ mask @ along_x.T >= 0.5
    return whole


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length encoding of a bool mask."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0, append=len(flat)).tolist()}


class Detector:
    """An exported model. ``about`` is what it says of itself: classes, sizes, thresholds."""

    def __init__(self, file: str, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime's errors have no class in common
            raise ValueError(f"{file} cannot be loaded: {error}") from None
        told = self.session.get_modelmeta().custom_metadata_map
        if "msad" not in told:
            raise ValueError(f"{file} was not written by export_model.py: it has no metadata 'msad'")
        self.about = json.loads(told["msad"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Detections of resized images (h, w, 3) in the model's channel order, in their own pixels."""
        sizes = np.array([image.shape[:2] for image in images], np.int64)
        batch = np.zeros((len(images), *sizes.max(axis=0), 3), np.uint8)
        for slot, image in zip(batch, images):
            slot[: image.shape[0], : image.shape[1]] = image
        values = self.session.run(None, {"images": batch, "sizes": sizes})
        found = dict(zip(self.outputs, values))
        owner = found.pop("image")
        return [{name: value[owner == i] for name, value in found.items()} for i in range(len(images))]

    def __call__(self, images: list[np.ndarray]) -> list[dict]:
        """Detections of BGR images (h, w, 3), best first, in the pixels of each, as arrays: boxes (M, 4), scores (M,),
        classes (M,), and where the model has them masks (M, h, w) and keypoints (M, K, 3)."""
        ordered = [image if self.about["format"] == "BGR" else image[:, :, ::-1] for image in images]
        small = [resize_shortest_edge(x, self.about["min_size"], self.about["max_size"]) for x in ordered]
        return [to_size(found, x.shape, y.shape) for found, x, y in zip(self.run(small), small, images)]


def to_size(found: dict, seen: tuple, wanted: tuple) -> dict:
    """Detections in an image of shape ``seen`` as they are in one of shape ``wanted``; empty boxes are dropped."""
    factor = np.array([wanted[1] / seen[1], wanted[0] / seen[0]], np.float32)
    boxes = np.clip(found["boxes"] * np.tile(factor, 2), 0, np.array([wanted[1], wanted[0]] * 2, np.float32))
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    found = {**{name: value[kept] for name, value in found.items()}, "boxes": boxes[kept]}
    if "keypoints" in found:
        found["keypoints"] = found["keypoints"] * np.append(factor, 1).astype(np.float32)
    if "masks" in found:
        pasted = [paste(mask, box, *wanted[:2]) for mask, box in zip(found["masks"], found["boxes"])]
        found["masks"] = np.array(pasted, bool).reshape(-1, *wanted[:2])
    return found


def records(found: dict, names: list[str]) -> list[dict]:
    """Detections as JSON."""
    result = []
    for i, (x0, y0, x1, y1) in enumerate(found["boxes"].tolist()):
        label = int(found["classes"][i])
        one = {"category": names[label], "class": label, "score": float(found["scores"][i])}
        one["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if "masks" in found:
            one["segmentation"] = run_lengths(found["masks"][i])
        if "keypoints" in found:
            one["keypoints"] = found["keypoints"][i].tolist()
        result.append(one)
    return result


def draw(image: np.ndarray, found: dict, about: dict) -> np.ndarray:
    """A copy of a BGR image with the detections, worst first."""
    image = image.copy()
    for i in reversed(range(len(found["boxes"]))):
        label = int(found["classes"][i])
        hue = np.uint8([[[label * 67 % 180, 200, 230]]])
        colour = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()
        if "masks" in found:
            inside = found["masks"][i]
            image[inside] = (image[inside] * 0.6 + np.array(colour) * 0.4).astype(np.uint8)
        x0, y0, x1, y1 = found["boxes"][i].round().astype(int).tolist()
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 2)
        text = f"{about['classes'][label]} {found['scores'][i]:.2f}"
        cv2.putText(image, text, (x0, max(y0 - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)
        if "keypoints" in found:
            points = found["keypoints"][i, :, :2].round().astype(int).tolist()
            for a, b in about.get("skeleton", []):
                cv2.line(image, points[a], points[b], colour, 1, cv2.LINE_AA)
            for point in points:
                cv2.circle(image, point, 2, colour, -1, cv2.LINE_AA)
    return image


def find_inputs(paths: list[str]) -> list[Path]:
    """Files in order; a folder stands for the images and videos in it. FileNotFoundError names what is absent."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found += [p for p in inside if not path.is_dir() or p.suffix.lower() in IMAGES | VIDEOS]
    return list(dict.fromkeys(found))


def choose_targets(inputs: list[Path], output: Path) -> list[Path]:
    """A file in ``output`` for every input. ValueError if one of them, or detections.json, is an input itself."""
    targets, taken = [], set()
    for path in inputs:
        suffix, number = ".mp4" if path.suffix.lower() in VIDEOS else ".jpg", 1
        name = path.stem + suffix
        while name in taken:  # of another folder or format
            number += 1
            name = f"{path.stem}_{number}{suffix}"
        taken.add(name)
        targets.append(output / name)
    sources = {path.resolve() for path in inputs}
    for target in (*targets, output / "detections.json"):
        if target.resolve() in sources:
            raise ValueError(f"{target} is an input and would be overwritten: choose another --output")
    return targets


def is_still(source: Path | int) -> bool:
    return isinstance(source, Path) and source.suffix.lower() not in VIDEOS


def frames_of(source: Path | int):
    """BGR images of a file or of a camera's number; OSError if there is none."""
    if is_still(source):
        image = cv2.imread(str(source))
        if image is None:
            raise OSError(f"cannot read {source}")
        yield image
        return
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    try:
        good, image = capture.read()
        if not good:
            raise OSError(f"cannot read {source}")
        while good:
            yield image
            good, image = capture.read()
    finally:
        capture.release()


def process(detector: Detector, source: Path | int, target: Path, args: argparse.Namespace, results: list) -> float:
    """Detect in every frame of ``source``, draw to ``target``, add to ``results``; returns the seconds of detecting."""
    writer, spent = None, 0.0
    try:
        for number, image in enumerate(itertools.islice(frames_of(source), args.frames)):
            start = time.perf_counter()
            found = detector([image])[0]
            spent += time.perf_counter() - start
            found = {name: value[found["scores"] >= args.threshold] for name, value in found.items()}
            entry = {"file": str(source), "frame": number, "width": image.shape[1], "height": image.shape[0]}
            results.append({**entry, "detections": records(found, detector.about["classes"])})
            if args.no_drawing:
                continue
            picture = draw(image, found, detector.about)
            if is_still(source):
                good = cv2.imwrite(str(target), picture)
            else:
                if writer is None:
                    code = cv2.VideoWriter_fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(target), code, args.rate, picture.shape[1::-1])
                good = writer.isOpened()
                writer.write(picture)
            if not good:
                raise OSError(f"cannot write {target}")
    finally:
        if writer is not None:
            writer.release()  # also after Ctrl-C: what is there can be played
    return spent


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 if anything was detected in, 1 if nothing, 2 for a wrong call, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="images, videos, folders of them")
    parser.add_argument("--camera", type=int, metavar="N", help="number of a camera")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (default: 0.5)")
    parser.add_argument("--frames", type=int, metavar="N", help="of a video or camera, at most")
    parser.add_argument("--rate", type=float, default=25.0, help="frames per second of written videos (default: 25)")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: one a core)")
    parser.add_argument("--no-drawing", action="store_true", help="detections.json alone")
    args = parser.parse_args(argv)
    output = Path(args.output)
    try:
        inputs = find_inputs(args.input)
        jobs = list(zip(inputs, choose_targets(inputs, output)))
        jobs += [(args.camera, output / f"camera_{args.camera}.mp4")] if args.camera is not None else []
        if not jobs:
            raise ValueError("nothing to do: give --input or --camera")
        detector = Detector(args.model, args.threads)
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results, seconds, status = [], 0.0, 0
    try:
        for source, target in jobs:
            try:
                seconds += process(detector, source, target, args, results)
            except OSError as error:
                print(f"skipped: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    (output / "detections.json").write_text(json.dumps(results))
    speed = f", {1e3 * seconds / len(results):.1f} ms each, {len(results) / seconds:.1f} fps" if seconds else ""
    print(f"{len(results)} images{speed}; {sum(len(r['detections']) for r in results)} detections in {output}")
    return status or int(not results)


if __name__ == "__main__":
    sys.exit(main())
