"""docs/PRETRAINED.md does what it says: its converter and yaml files are run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_backbone
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet50

from msad import load_config
from msad.engine.checkpoint import CheckedCheckpointer
from msad.modeling.backbones.efficientnet_lite import VARIANTS, EfficientNetLite

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "PRETRAINED.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def convert():
    (code,) = blocks("python")
    scope = {"__name__": "converter"}
    exec(code, scope)
    return scope["convert"]


@pytest.mark.parametrize(("network", "depth"), [(resnet18, 18), (resnet50, 50)])
def test_converter_and_its_yaml(convert, tmp_path, network, depth):
    whole = network(weights=None).eval()
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 1.5)
    torch.save(whole.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.pth")
    text = blocks("yaml")[2].replace("configs/", f"{ROOT}/configs/")
    (tmp_path / "r50.yaml").write_text(text)
    path = tmp_path / "r50.yaml" if depth == 50 else ROOT / "configs/MSAD/fcos_R_18_T_1x.yaml"
    cfg = load_config(path, ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", 8])
    assert depth == cfg.MODEL.RESNETS.DEPTH
    neck = build_backbone(cfg).eval()
    checkpointer = CheckedCheckpointer(neck)
    checkpointer.load(str(tmp_path / "b.pth"))
    assert [name for name in checkpointer.missing_or_mismatched if "bottom_up" in name] == []
    x = torch.randn(1, 3, 64, 64)
    y = whole.maxpool(whole.relu(whole.bn1(whole.conv1(x))))
    for layer in (whole.layer1, whole.layer2, whole.layer3, whole.layer4):
        y = layer(y)
    torch.testing.assert_close(neck.bottom_up(x)["res5"], y, rtol=1e-4, atol=1e-4)


def test_the_yaml_of_timm_builds(tmp_path):
    pytest.importorskip("timm")
    path = tmp_path / "a.yaml"
    path.write_text(f"_BASE_: {ROOT}/configs/MSAD/fcos_R_50_H_1x.yaml\n" + blocks("yaml")[1])
    model = build_backbone(load_config(path, ["MODEL.TIMM.PRETRAINED", False, "MODEL.TIMM.NAME", "convnext_atto"]))
    assert list(model.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]


def test_the_yaml_of_efficientnet_lite_builds(tmp_path):
    options = yaml.safe_load(blocks("yaml")[0])
    options["MODEL"]["FPN"]["LEVELS"] = ["p3", "p4"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"VERSION": 2, **options}))
    neck = build_backbone(load_config(tmp_path / "mine.yaml"))
    assert isinstance(neck.bottom_up, EfficientNetLite) and neck.output_shape()["p3"].channels == 64


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_of_the_variants(variant):
    row = re.search(rf"^\| `{variant}` \| ([\d.]+) M \| ([\d.]+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
    with torch.device("meta"):
        net = EfficientNetLite(variant, ["c1", "res2", "res3", "res4", "res5"])
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 224, 224, device="meta"))
    assert float(row[1]) == round(sum(p.numel() for p in net.parameters()) / 1e6, 1)
    assert float(row[2]) == round(counter.get_total_flops() / 2e9, 2)
    assert row[3] == ", ".join(str(shape.channels) for shape in net.output_shape().values())


def test_yaml_files_of_the_first_table_exist():
    table = PAGE.split("## EfficientNet-Lite")[0]
    for pattern in re.findall(r"`configs/([^`]+)`", table):
        assert list((ROOT / "configs").glob(pattern.rstrip("/"))), pattern
