"""Time detectors (R50-FPN, 320 px) on detectron2 and on detectron2-lite, in turn; print the ratios.

    D2_PYTHON=/path/to/python python tests/lite/parity/bm_speed.py [--pairs 3] [--detector faster_rcnn]

Both engines run in processes of their own, one after the other: reference, lite, reference, lite, ... One thread, two
images, random weights; the time is the processor's. Inference keeps 100 detections an image, whatever their scores, so
that masks are pasted and keypoints decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

DETECTORS = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "keypoint_rcnn": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "cascade_mask_rcnn": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
}


def child(detector: str) -> dict[str, float]:
    """Median processor seconds of a training step (forward, backward) and of inference, on this process's engine."""
    import torch
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
    from detectron2.utils.events import EventStorage

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = model_zoo.get_config(DETECTORS[detector])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg)
    gt = Instances((320, 320))
    gt.gt_boxes = Boxes(torch.tensor([[20.0, 30, 120, 200], [100, 100, 300, 310], [5, 200, 60, 250]]))
    gt.gt_classes = torch.zeros(3, dtype=torch.int64)
    boxes = gt.gt_boxes.tensor
    if cfg.MODEL.MASK_ON:
        gt.gt_masks = PolygonMasks([[corners] for corners in boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()])
    if cfg.MODEL.KEYPOINT_ON:
        centres = torch.cat([gt.gt_boxes.get_centers(), torch.full((3, 1), 2.0)], dim=1)
        gt.gt_keypoints = Keypoints(centres[:, None].repeat(1, 17, 1))
    inputs = [{"image": torch.randint(0, 255, (3, 320, 320)).float(), "instances": gt} for _ in range(2)]

    def train() -> None:
        sum(model(inputs).values()).backward()
        model.zero_grad()

    def infer() -> None:
        with torch.no_grad():
            model(inputs)

    seconds = {}
    with EventStorage():
        for name, step in (("training", train), ("inference", infer)):
            model.train(name == "training")
            step()
            times = []
            for _ in range(5):
                begin = time.process_time()
                step()
                times.append(time.process_time() - begin)
            seconds[name] = statistics.median(times)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--detector", choices=DETECTORS, action="append", help="default: all")
    parser.add_argument("--child", choices=DETECTORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return 0
    reference = os.environ.get("D2_PYTHON")
    if not reference:
        parser.error("D2_PYTHON must name an interpreter that has detectron2")
    for detector in args.detector or DETECTORS:
        compare(detector, reference, args.pairs)
    return 0


def compare(detector: str, reference: str, pairs: int) -> None:
    """Print the times of one detector and the ratios of the engines."""
    print(detector)
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ratios: dict[str, list[float]] = {"training": [], "inference": []}
    for pair in range(pairs):
        runs = [
            json.loads(subprocess.check_output(
                [python, "-W", "ignore", __file__, "--child", detector], env=env
            ).splitlines()[-1])
            for python, env in ((reference, plain), (sys.executable, dict(os.environ)))
        ]
        for name, values in ratios.items():
            values.append(runs[1][name] / runs[0][name])
        print(f"pair {pair + 1}: " + ", ".join(f"{n} {runs[0][n]:.3f} s -> {runs[1][n]:.3f} s" for n in ratios))
    for name, values in ratios.items():
        spread = f"min {min(values):.3f}, max {max(values):.3f}"
        print(f"{name}: lite / detectron2 = {statistics.median(values):.3f} ({spread})")


if __name__ == "__main__":
    sys.exit(main())
