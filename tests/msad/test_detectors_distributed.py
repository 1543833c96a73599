"""Two gloo processes on the CPU: each detector trains, and both processes have the gradients of the mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.engine import create_ddp_model, launch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from test_every_detector import merged, model_keys, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs"),
]

NARROW = {
    "MODEL": {
        "BACKBONE": {"NAME": "build_rfp_backbone"},
        "FPN": {"BOTTOM_UP": "build_sac_resnet_backbone"},
        "RESNETS": {"DEPTH": 50, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4, "NORM": "FrozenBN"},
    }
}
FEATURES = ["res2", "res3", "res4", "res5"]
WITHOUT_C1 = {"MODEL": {"RESNETS": {"OUT_FEATURES": FEATURES}, "FPN": {"IN_FEATURES": FEATURES}}}
DCN = {
    "MODEL": {
        "BACKBONE": {"FREEZE_AT": 0},
        "FPN": {"BOTTOM_UP": "build_resnet_backbone", "IN_FEATURES": FEATURES},
        "RESNETS": {
            **NARROW["MODEL"]["RESNETS"], "OUT_FEATURES": FEATURES, "DEFORM_MODULATED": True,
            "DEFORM_ON_PER_STAGE": [False, True, True, True],
        },
    }
}  # fmt: skip
SWIN = {
    "MODEL": {
        "FPN": {"BOTTOM_UP": "build_swin_backbone", "IN_FEATURES": ["p0", "p1", "p2", "p3"]},
        "SWIN": {
            "EMBED_DIM": 8, "DEPTHS": [1, 1, 2, 1], "NUM_HEADS": [1, 2, 2, 2], "WINDOW_SIZE": 4, "DROP_PATH_RATE": 0.0,
        },
    }
}  # fmt: skip
FROZEN = {"MODEL": {"RESNETS": {"NORM": "FrozenBN"}}}
SEMANTIC = {"MODEL": {"META_ARCHITECTURE": "HTC", "HTC": {"SEMANTIC_ON": True, "SEMANTIC_CLASSES": 5}}}
DETECTORS = {
    "RepPoints": ("RepPoints", FROZEN),
    "RepPoints_L": ("RepPoints", FROZEN),
    "CascadeMask": ("CascadeMask", FROZEN),
    "HTC": ("HTC", FROZEN),
    "HTC_semantic": ("HTC", merged(FROZEN, SEMANTIC)),
    "DetectoRS": ("HTC", merged(WITHOUT_C1, NARROW)),
    "Swin": ("MaskRCNN", SWIN),
    "DCNv2": ("MaskRCNN", DCN),
}


def config(project: Path, folder: Path, name: str):
    arch, keys = DETECTORS[name]
    finest = 2 if name == "RepPoints_L" or arch != "RepPoints" else 3
    return write(project, folder, name, merged(model_keys(arch, finest), keys))


def images() -> list[dict]:
    """Two images of different content; the second has no objects."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for count in (3, 0):
        boxes = torch.tensor([[4.0, 6.0, 60.0, 64.0], [20.0, 24.0, 90.0, 60.0], [40.0, 2.0, 52.0, 14.0]])[:count]
        gt = Instances((96, 96), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 2, 5])[:count])
        gt.gt_masks = BitMasks(torch.ones(count, 96, 96, dtype=torch.bool))
        image = torch.rand(3, 96, 96, generator=generator) * 255
        made.append({"image": image, "instances": gt, "sem_seg": torch.randint(0, 5, (96, 96), generator=generator)})
    return made


def work(project: Path, output: Path) -> None:
    """What each of the two processes does; leaves its results in ``output``."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    results = {}
    for name in DETECTORS:
        torch.manual_seed(3)
        detector = build_model(config(project, output / str(rank), name)).train()
        model = create_ddp_model(detector, device_ids=None, broadcast_buffers=False)
        for _ in range(2):  # an unused parameter is an error of the second pass
            detector.zero_grad()
            with EventStorage():
                losses = model(images()[rank : rank + 1])
                sum(losses.values()).backward()
        results[name] = {
            "losses": {key: value.item() for key, value in losses.items()},
            "gradients": {key: p.grad for key, p in detector.named_parameters() if p.requires_grad},
        }
    torch.save(results, output / f"{rank}.pth")


@pytest.fixture(scope="module")
def ranks(project, tmp_path_factory) -> list[dict]:
    """Results of both processes."""
    output = tmp_path_factory.mktemp("detectors")
    launch(work, 2, dist_url="auto", args=(project, output))
    return [torch.load(output / f"{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("name", DETECTORS)
def test_two_processes_train(ranks, name):
    first, second = (r[name] for r in ranks)
    assert first["losses"].keys() == second["losses"].keys() and first["losses"] != second["losses"]
    assert first["gradients"].keys() == second["gradients"].keys()
    for key, value in first["gradients"].items():
        assert value is not None and torch.isfinite(value).all() and torch.equal(value, second["gradients"][key]), key
    assert sum(value.abs().max() > 0 for value in first["gradients"].values()) > len(first["gradients"]) / 2
