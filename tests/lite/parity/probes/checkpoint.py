"""Models after loading files of the formats in which weights are published; training state after resuming."""

import pickle

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts, convert_c2_detectron_names
from torch import nn

TOLERANCE = 0.0


class Conv(nn.Conv2d):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


def module(**children):
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


def make_model():
    """A tiny network with the names of a detector on a ResNet, all parameters -1."""
    block = module(conv1=Conv(4, 2), conv2=Conv(2, 2), conv3=Conv(2, 4), shortcut=Conv(4, 4))
    bottom_up = module(stem=module(conv1=Conv(3, 4)), res2=nn.Sequential(block))
    model = module(backbone=module(bottom_up=bottom_up, fpn_lateral2=nn.Conv2d(4, 4, 1)), head=nn.Linear(4, 2))
    model.register_buffer("pixel_mean", torch.full((3,), 7.0))
    model.register_buffer("pixel_std", torch.full((3,), 8.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1)
    return model


def numbers(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


BACKBONE = {
    "stem.conv1.weight": (4, 3, 1, 1),
    "stem.conv1.norm.weight": (4,),
    "stem.conv1.norm.bias": (4,),
    "stem.conv1.norm.running_mean": (4,),
    "stem.conv1.norm.running_var": (4,),
    "res2.0.conv1.weight": (2, 4, 1, 1),
    "res2.0.conv2.weight": (2, 2, 1, 1),
    "res2.0.conv3.weight": (4, 2, 1, 1),
    "res2.0.shortcut.weight": (4, 4, 1, 1),
    "res2.0.shortcut.norm.bias": (4,),
    "stem.fc.weight": (10, 4),
}
CAFFE2 = {
    "conv1_w": (4, 3, 1, 1),
    "res_conv1_bn_s": (4,),
    "res_conv1_bn_b": (4,),
    "res2_0_branch1_w": (4, 4, 1, 1),
    "res2_0_branch1_bn_s": (4,),
    "res2_0_branch2a_w": (2, 4, 1, 1),
    "res2_0_branch2a_bn_b": (2,),
    "res2_0_branch2a_bn_rm": (2,),
    "res2_0_branch2a_bn_riv": (2,),
    "res2_0_branch2b_w": (2, 2, 1, 1),
    "res2_0_branch2c_w": (4, 2, 1, 1),
    "res2_0_branch2c_bn_s": (9,),
    "res2_0_branch2c_w_momentum": (4, 2, 1, 1),
    "fc1000_w": (10, 4),
    "fc1000_b": (10,),
}
DETECTOR = {
    **{f"backbone.bottom_up.{name}": shape for name, shape in BACKBONE.items()},
    "head.weight": (2, 4),
    "head.bias": (3,),
    "pixel_mean": (3,),
    "anchor_generator.cell_anchors.0": (3, 4),
}
C2_NAMES = [
    *(name for name in CAFFE2 if not name.endswith("_momentum")),
    "conv1_b", "conv1_gn_s", "conv1_gn_b", "res_conv1_bn_rm", "res4_22_branch2c_gn_s", "res3_1_branch2b_gn_bias",
    "pred_w", "pred_b", "some_other_w",
]  # fmt: skip


def tensors(arrays):
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def write_files(workdir):
    zoo = {"model": numbers(DETECTOR, 1), "__author__": "somebody"}
    converted = {"model": numbers(BACKBONE, 2), "__author__": "torchvision", "matching_heuristics": True}
    detector = tensors(numbers(DETECTOR, 3))
    files = {
        "zoo.pkl": zoo,
        "converted.pkl": converted,
        "caffe2.pkl": numbers(CAFFE2, 4),
        "caffe2_blobs.pkl": {"blobs": numbers(CAFFE2, 5)},
        "own.pth": {"model": detector, "iteration": 5},
        "bare.pth": detector,
        "wrapped.pth": {"model": {f"module.{name}": value for name, value in detector.items()}},
        "endings.pth": {"model": tensors(numbers(BACKBONE, 6)), "matching_heuristics": True},
        "other.pth": {"model": {"something": torch.zeros(2)}},
        "by_query.pth": {"model": tensors(numbers(BACKBONE, 7))},
    }
    for name, content in files.items():
        if name.endswith(".pkl"):
            with open(workdir / name, "wb") as file:
                pickle.dump(content, file, protocol=2)
        else:
            torch.save(content, workdir / name)
    return [name + ("?matching_heuristics=True" if name == "by_query.pth" else "") for name in files]


def loaded(path):
    model = make_model()
    checkpointer = DetectionCheckpointer(model)
    reported = []
    checkpointer._log_incompatible_keys = reported.append
    rest = checkpointer.load(str(path))
    (incompatible,) = reported
    return {
        "state": dict(model.state_dict()),
        "rest": {key: repr(value) for key, value in sorted(rest.items())},
        "missing": sorted(incompatible.missing_keys),
        "unexpected": sorted(incompatible.unexpected_keys),
        "shapes": [repr(item) for item in sorted(incompatible.incorrect_shapes)],
    }


def resumed(workdir):
    """What the reference saved in its run, loaded by both."""
    folder = workdir / "run"

    def make():
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return model, optimizer, DetectionCheckpointer(model, str(folder), optimizer=optimizer)

    if not folder.exists():
        folder.mkdir()
        model, optimizer, checkpointer = make()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        checkpointer.save("model_0000001", iteration=1)
        optimizer.step()
        checkpointer.save("model_0000002", iteration=2)
    model, optimizer, checkpointer = make()
    rest = checkpointer.resume_or_load("", resume=True)
    state = optimizer.state_dict()["state"]
    return {
        "file": checkpointer.get_checkpoint_file()[len(str(folder)) :],
        "rest": rest,
        "model": dict(model.state_dict()),
        "momentum": [state[index]["momentum_buffer"] for index in sorted(state)],
    }


def aligned():
    places = {"a.b.c.weight": 1, "x.c.weight": 1, "my_conv.weight": 1, "deep.conv.bias": 2, "top": 1}
    file = {"c.weight": 1, "b.c.weight": 1, "conv.weight": 1, "conv.bias": 3, "top": 1, "unused": 4}
    model = {name: torch.zeros(size) for name, size in places.items()}
    checkpoint = {name: torch.full((size,), float(i)) for i, (name, size) in enumerate(file.items())}
    result = align_and_update_state_dicts(model, checkpoint, c2_conversion=False)
    return {name: result[name] for name in sorted(result)}


def probe(workdir):
    values = {"aligned": aligned(), "resumed": resumed(workdir)}
    values["c2 names"] = [list(convert_c2_detectron_names({name: torch.zeros(1)})[0]) for name in C2_NAMES]
    for name in write_files(workdir):
        values[name] = loaded(workdir / name)
    return values
