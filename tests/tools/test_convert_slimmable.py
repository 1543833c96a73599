"""tools/convert_slimmable.py: from a public checkpoint to the weights that a yaml loads."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from load_tool import as_program

from msad import load_config
from msad.engine.checkpoint import CheckedCheckpointer

YAML = """
MODEL:
  META_ARCHITECTURE: FCOS
  DEVICE: cpu
  WEIGHTS: {weights}
  BACKBONE: {{NAME: build_level_fpn_backbone, FREEZE_AT: 0}}
  MOBILENETV2: {{WIDTH: 0.35}}
  FPN: {{BOTTOM_UP: build_mobilenetv2_backbone, IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 8,
        LEVELS: [p3, p4]}}
  FCOS: {{IN_FEATURES: [p3, p4], CONV_DIMS: [8], NORM: ""}}
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
INPUT: {{FORMAT: RGB}}
"""


@pytest.fixture
def convert(monkeypatch, capsys):
    return as_program("convert_slimmable", monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path):
    """The yaml, and a checkpoint with two sets of norms, of width 0.35 and of another."""
    (tmp_path / "slim.yaml").write_text(YAML.format(weights=tmp_path / "made" / "slim.pkl"))
    network = build_model(load_config(tmp_path / "slim.yaml")).backbone.bottom_up
    state, counts = {}, {}
    for name, value in network.state_dict().items():
        module, _, tensor = name.rpartition(".")
        block, inside, _ = module.partition(".conv.")
        if inside:
            modules = counts.setdefault(block, [])
            if module not in modules:
                modules.append(module)
            at = modules.index(module)
            module = f"{block}.body.{at + at // 2}"
        value = torch.randn(value.shape) if value.is_floating_point() else value
        if tensor == "weight" and value.dim() == 4:
            state[f"module.{module}.weight"] = value
        else:
            state[f"module.{module}.bn.1.{tensor}"] = value
            state[f"module.{module}.bn.0.{tensor}"] = torch.zeros(3) if value.dim() else value
    torch.save({"model": state}, tmp_path / "public.pt")
    return tmp_path


def test_the_file_fills_the_bottom_up_of_detector_and_teacher(folder, convert):
    code, said, error = convert("--weights", folder / "public.pt", "--config-file", folder / "slim.yaml")
    assert (code, error) == (0, "") and said.endswith(f"tensors of a MobileNetV2 written to {folder}/made/slim.pkl")
    source = torch.load(folder / "public.pt")["model"]
    for architecture in ("FCOS", "MultiScaleTeacher"):
        model = build_model(load_config(folder / "slim.yaml", ["MODEL.META_ARCHITECTURE", architecture]))
        checkpointer = CheckedCheckpointer(model)
        checkpointer.load(str(folder / "made" / "slim.pkl"))
        assert not [name for name in checkpointer.missing_or_mismatched if "bottom_up" in name]
        detector = getattr(model, "detector", model)
        features = detector.backbone.bottom_up.features
        assert torch.equal(features[0][0].weight, source["module.features.0.0.weight"])
        assert torch.equal(features[5].conv[3].running_var, source["module.features.5.body.7.bn.1.running_var"])


def test_torchvisions_names_load_without_conversion(folder):
    from torchvision.models import mobilenet_v2

    public = mobilenet_v2(weights=None, width_mult=0.35)
    torch.save(public.state_dict(), folder / "torchvision.pth")
    model = build_model(load_config(folder / "slim.yaml", ["MODEL.META_ARCHITECTURE", "MultiScaleTeacher"]))
    checkpointer = CheckedCheckpointer(model)
    checkpointer.load(f"{folder}/torchvision.pth?matching_heuristics=True")
    assert not [name for name in checkpointer.missing_or_mismatched if "bottom_up" in name]
    assert torch.equal(model.detector.backbone.bottom_up.features[18][0].weight, public.features[18][0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["INPUT.FORMAT", "BGR"], "slimmable networks were trained with ('RGB', (123.675, 116.28, 103.53), (58.395"),
        (["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"], "(1.0, 1.0, 1.0)); slimmable networks were trained with"),
        (["MODEL.WEIGHTS", "https://somewhere/slim.pkl"], "cannot write to 'https://somewhere/slim.pkl': --output or"),
        (["MODEL.WEIGHTS", ""], "cannot write to ''"),
        (["MODEL.MOBILENETV2.WIDTH", "0.75"], "no set of BatchNorms in the checkpoint has the network's channels"),
        (["MODEL.MOBILENETV2.WITH", "0.75"], "did you mean MODEL.MOBILENETV2.WIDTH?"),
    ],
)
def test_errors_are_one_line(folder, convert, options, message):
    code, _, error = convert("--weights", folder / "public.pt", "--config-file", folder / "slim.yaml", *options)
    assert code == 2 and message in error
    assert not (folder / "made").exists()


def test_missing_checkpoint(folder, convert):
    code, _, error = convert("--weights", folder / "absent.pt", "--config-file", folder / "slim.yaml")
    assert code == 2 and error.endswith(f"no checkpoint {folder}/absent.pt")
