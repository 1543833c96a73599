#!/usr/bin/env python3
"""Run an exported detector on images, folders, videos or a camera; needs numpy, opencv and onnxruntime alone.

    python run.py model.onnx --input photos/ drive.mp4 --output found/
    python run.py model.onnx --camera 0 --frames 500 --output found/ --threads 2

Writes found/detections.json (boxes as x, y, width, height in pixels of the original, masks as COCO run lengths) and the
images and videos with the detections drawn, and prints milliseconds and frames per second. What cannot be read is named
and passed over; inputs are never written to.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
PRECISION = 22  # bits of the weights when resizing, as in Pillow


def _resize_rows(image: np.ndarray, size: int) -> np.ndarray:
    """``image`` (H, W, 3) uint8 with H changed to ``size`` in Pillow's integers: a triangle as wide as the cut."""
    if size == len(image):
        return image
    image, scale = np.ascontiguousarray(image), len(image) / size
    reach, centre = max(scale, 1.0), (np.arange(size) + 0.5) * scale
    index = np.maximum((centre - reach + 0.5).astype(int), 0) + np.arange(int(2 * reach) + 1)[:, None]
    weight = np.maximum(1 - np.abs(index + 0.5 - centre) / reach, 0) * (index < len(image))
    weight = (weight / weight.sum(axis=0) * 2**PRECISION + 0.5).astype(np.int32)
    total = np.full((size, *image.shape[1:]), 2 ** (PRECISION - 1), np.int32)
    part = np.empty_like(total)
    for i, w in zip(np.minimum(index, len(image) - 1), weight):
        total += np.multiply(image[i], w[:, None, None], out=part)
    return (total >> PRECISION).astype(np.uint8)


class TooNarrow(ValueError):
    """Nothing would be left of an image at the model's size."""


def resize_shortest_edge(image: np.ndarray, short: int, longest: int) -> np.ndarray:
    """As detectron2 resizes test images: the short side to ``short``, unless the other would exceed ``longest``.

    TooNarrow if nothing would be left of the short side."""
    if short <= 0:
        return image
    scale = short / min(image.shape[:2])
    sides = [short if side == min(image.shape[:2]) else side * scale for side in image.shape[:2]]
    if max(sides) > longest:  # a second factor: products round in this order
        scale = longest / max(sides)
        sides = [side * scale for side in sides]
    height, width = (int(side + 0.5) for side in sides)
    if not height or not width:
        raise TooNarrow(f"{image.shape[1]}x{image.shape[0]} pixels would be {width}x{height} at the model's size")
    return _resize_rows(_resize_rows(image.swapaxes(0, 1), width).swapaxes(0, 1), height)


def network_input(image: np.ndarray, about: dict) -> np.ndarray:
    """A BGR image (h, w, 3) in the channel order and size of a model that says ``about`` of itself."""
    ordered = image if about["format"] == "BGR" else image[:, :, ::-1]
    return resize_shortest_edge(ordered, about["min_size"], about["max_size"])


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (S, S) of probabilities inside ``box``, bilinearly resampled: (height, width) bool, true from 0.5 on."""
    whole = np.zeros((height, width), bool)
    (x0, y0), (x1, y1) = np.maximum(np.floor(box[:2]) - 1, 0).astype(int), (np.ceil(box[2:]) + 1).astype(int)
    inside = whole[y0:y1, x0:x1]
    scale = len(mask) / (box[2:] - box[:2])
    shift = ((x0, y0) - box[:2] + 0.5) * scale - 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    inside[:] = cv2.warpAffine(mask, np.column_stack([np.diag(scale), shift]), inside.shape[::-1], flags=flags) >= 0.5
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
            self.about = json.loads(self.session.get_modelmeta().custom_metadata_map["msad"])
        except Exception as error:  # onnxruntime's errors have no class in common
            raise ValueError(f"{file} cannot be loaded, or is not of export_model.py: {error!r}") from None
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, images: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Detections of resized images (h, w, 3) in the model's channel order, in their own pixels."""
        sizes = np.array([image.shape[:2] for image in images], np.int64)
        batch = np.zeros((len(images), *sizes.max(axis=0), 3), np.uint8)
        for slot, image in zip(batch, images):
            slot[: image.shape[0], : image.shape[1]] = image
        found = dict(zip(self.outputs, self.session.run(None, {"images": batch, "sizes": sizes})))
        if "sem_seg" in found:  # a segmentor's class scores, not yet detections
            return [{"sem_seg": scores[:, :h, :w]} for scores, (h, w) in zip(found["sem_seg"], sizes)]
        owner = found.pop("image")
        return [{name: value[owner == i] for name, value in found.items()} for i in range(len(images))]

    def __call__(self, images: list[np.ndarray], sizes: list[tuple[int, int]] | None = None) -> list[dict]:
        """Detections of BGR images (h, w, 3), best first, in the pixels of each, as arrays: boxes (M, 4), scores (M,),
        classes (M,), and where the model has them masks (M, h, w) and keypoints (M, K, 3). With ``sizes``, they are as
        in images of these heights and widths that show the same."""
        small = [network_input(image, self.about) for image in images]
        sizes = [image.shape[:2] for image in images] if sizes is None else sizes
        return [to_size(found, x.shape, size) for found, x, size in zip(self.run(small), small, sizes)]


def regions(scores: np.ndarray, wanted: tuple) -> dict:
    """A segmentor's class scores (K, h, w) as detections in an image of shape ``wanted``: each class that occurs, with
    its mask, the box around it, and as score the mean of its probability in the mask."""
    scores = cv2.resize(scores.transpose(1, 2, 0), wanted[1::-1], interpolation=cv2.INTER_LINEAR)
    scores = scores.reshape(*wanted[:2], -1)  # one channel loses its axis
    probability = 1 / np.exp(scores - scores.max(axis=2, keepdims=True)).sum(axis=2)
    labels = scores.argmax(axis=2)
    classes = np.unique(labels)
    masks = labels == classes[:, None, None]
    boxes = np.array([cv2.boundingRect(mask.astype(np.uint8)) for mask in masks], np.float32)
    boxes[:, 2:] += boxes[:, :2]
    means = np.array([probability[mask].mean() for mask in masks], np.float32)
    order = np.argsort(-means)
    return {"boxes": boxes[order], "scores": means[order], "classes": classes[order], "masks": masks[order]}


def to_size(found: dict, seen: tuple, wanted: tuple) -> dict:
    """Detections in an image of shape ``seen`` as they are in one of shape ``wanted``; empty boxes are dropped."""
    if "sem_seg" in found:
        return regions(found["sem_seg"], wanted)
    factor = np.array([wanted[1] / seen[1], wanted[0] / seen[0]], np.float32)
    boxes = np.clip(found["boxes"] * np.tile(factor, 2), 0, np.array([wanted[1], wanted[0]] * 2, np.float32))
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    found = {**{name: value[kept] for name, value in found.items()}, "boxes": boxes[kept]}
    if "keypoints" in found:
        found["keypoints"] = found["keypoints"] * np.append(factor, 1).astype(np.float32)
    if "masks" in found:
        pasted = [paste(mask, box, *wanted[:2]) for mask, box in zip(found["masks"], found["boxes"])]
        found["masks"] = np.array(pasted, bool).reshape(-1, *wanted[:2])  # also without any
    return found


def records(found: dict, names: list[str]) -> list[dict]:
    """Detections as JSON."""
    result = []
    for i, (x0, y0, x1, y1) in enumerate(found["boxes"].tolist()):
        label, score = int(found["classes"][i]), float(found["scores"][i])
        one = {"category": names[label], "class": label, "score": score, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        one |= {"segmentation": run_lengths(found["masks"][i])} if "masks" in found else {}
        one |= {"keypoints": found["keypoints"][i].tolist()} if "keypoints" in found else {}
        result.append(one)
    return result


def draw(image: np.ndarray, found: dict, about: dict) -> np.ndarray:
    """A copy of a BGR image with the detections, worst first."""
    image = image.copy()
    for i in reversed(range(len(found["boxes"]))):
        label = int(found["classes"][i])
        colour = cv2.cvtColor(np.uint8([[[label * 67 % 180, 200, 230]]]), cv2.COLOR_HSV2BGR)[0, 0].tolist()
        if "masks" in found:
            image[found["masks"][i]] = (image[found["masks"][i]] * 0.6 + np.array(colour) * 0.4).astype(np.uint8)
        x0, y0, x1, y1 = found["boxes"][i].round().astype(int).tolist()
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 2)
        text = f"{about['classes'][label]} {found['scores'][i]:.2f}"
        cv2.putText(image, text, (x0, max(y0 - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)
        if "keypoints" in found:
            points = found["keypoints"][i, :, :2].round().astype(int)
            for a, b in about.get("skeleton", []) + [[k, k] for k in range(len(points))]:
                cv2.line(image, points[a].tolist(), points[b].tolist(), colour, 1 if a != b else 4, cv2.LINE_AA)
    return image


def find_inputs(paths: list[str]) -> list[Path]:
    """Files in order; a folder stands for the images and videos in it. FileNotFoundError names what is absent."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
        inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in IMAGES | VIDEOS] if path.is_dir() else [path]
        found += inside
    return list(dict.fromkeys(found))


def is_complete(data: bytes) -> bool:
    """Whether an image file has an end, where its format has one: some versions of OpenCV fill in what is cut off."""
    if data.startswith(b"\xff\xd8"):  # JPEG: segments, of which one may hold a thumbnail, then scans
        at = 2
        while at + 4 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        return data.find(b"\xff\xd9", at) >= 0
    return b"IEND" in data if data.startswith(b"\x89PNG") else bool(data)


def read_image(file: Path) -> np.ndarray | None:
    """The image (h, w, 3) in BGR; None for what is no image or is cut off."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if is_complete(data) else None


def frames_of(sources: list, most: int | None):
    """(source, name, number, BGR image, frames a second or 0) of every frame; what cannot be read is said and left."""
    for place, source in enumerate(sources):
        capture, rate, number = None, 0.0, 0
        name = f"{place:03d}_{source.stem}" if isinstance(source, Path) else f"camera_{source}"
        if isinstance(source, Path) and source.suffix.lower() not in VIDEOS:
            image = read_image(source)
        else:
            capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
            image, rate = capture.read()[1], capture.get(cv2.CAP_PROP_FPS) or 25.0
        if image is None:
            print(f"skipped: cannot read {source} (neither an image nor a video, or cut off)", file=sys.stderr)
        while image is not None and number != most:
            yield source, name, number, image, rate
            image, number = capture.read()[1] if capture else None, number + 1


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 if anything was detected in, 1 if nothing, 2 for a wrong call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="images, videos, folders of them")
    parser.add_argument("--camera", type=int, metavar="N", help="number of a camera")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (default: 0.5)")
    parser.add_argument("--frames", type=int, metavar="N", help="of a video or camera, at most")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: one a core)")
    parser.add_argument("--no-drawing", action="store_true", help="detections.json alone")
    args = parser.parse_args(argv)
    try:
        sources = find_inputs(args.input)
        if args.output.resolve() in {path.resolve().parent for path in sources}:
            raise ValueError(f"{args.output} has inputs in it, which might be overwritten: choose another --output")
        if args.input and not sources:
            raise ValueError(f"no images or videos in {' '.join(args.input)}; folders inside of it are not searched")
        sources += [] if args.camera is None else [args.camera]
        if not sources:
            raise ValueError("nothing to do: give --input or --camera")
        detector = Detector(args.model, args.threads)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results, seconds, videos = [], 0.0, {}
    try:
        for source, name, number, image, rate in frames_of(sources, args.frames):
            start = time.perf_counter()
            try:
                found = detector([image])[0]
            except TooNarrow as error:
                print(f"skipped: {source}: {error}", file=sys.stderr)
                continue
            seconds += time.perf_counter() - start
            found = {key: value[found["scores"] >= args.threshold] for key, value in found.items()}
            entry = {"file": str(source), "frame": number, "width": image.shape[1], "height": image.shape[0]}
            results.append({**entry, "detections": records(found, detector.about["classes"])})
            if args.no_drawing:
                continue
            picture, target = draw(image, found, detector.about), str(args.output / name)
            if rate and name not in videos:
                code = cv2.VideoWriter_fourcc(*"mp4v")
                videos[name] = cv2.VideoWriter(f"{target}.mp4", code, rate, picture.shape[1::-1])
            if rate:
                videos[name].write(picture)
            if not (videos[name].isOpened() if rate else cv2.imwrite(f"{target}.jpg", picture)):
                parser.error(f"cannot write {target}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:  # what was found is kept, whatever happens
        for video in videos.values():
            video.release()
        (args.output / "detections.json").write_text(json.dumps(results))
    speed = f", {1e3 * seconds / len(results):.1f} ms each, {len(results) / seconds:.1f} fps" if results else ""
    print(f"{len(results)} images{speed}; {sum(len(r['detections']) for r in results)} detections in {args.output}")
    return int(not results)


if __name__ == "__main__":
    sys.exit(main())
