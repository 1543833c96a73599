"""Conversion of mmdetection's checkpoints: the detections that mmdetection itself made of the same weights, and no
tensor that is lost, guessed or passed over.

EXPECTED comes from mmdetection 3.3.0 (with mmcv-lite 2.1.0 and torchvision's operators) on the CPU, with the weights
and the image of mmdet_layout.py, at the thresholds of ``detect``. A case is a detector, and behind "+" its backbone.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import NamedTuple

import mmdet_layout
import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from msad import load_config
from msad.convert import convert
from msad.convert.backbones import merging_order, swin_indices
from msad.convert.files import Checkpoint, read_checkpoint
from msad.convert.rules import Rule, anchor_order, make_plan, reorder

TOOL = Path(__file__).parents[2] / "tools" / "convert_mmdet.py"


class Expected(NamedTuple):
    """What mmdetection found: number of detections, sums over all of them, and the two best."""

    count: int
    score_sum: float
    box_sum: float
    label_sum: int
    mask_area: int
    scores: list[float]
    boxes: list[list[float]]


EXPECTED = {
    "retinanet": Expected(
        100, 57.7455, 30732.95, 65, 0,
        [0.63916, 0.63754], [[57.203, 0.0, 185.629, 53.968], [113.69, 3.494, 192.0, 70.576]],
    ),
    "retinanet+x": Expected(
        100, 58.6368, 30859.12, 64, 0,
        [0.66337, 0.65222], [[63.132, 2.484, 192.0, 69.081], [45.588, 18.214, 173.256, 85.333]],
    ),
    "fcos": Expected(
        100, 38.452, 29335.82, 86, 0,
        [0.48714, 0.47698], [[54.419, 22.905, 56.916, 24.648], [26.481, 11.142, 29.588, 13.17]],
    ),
    "fcos_normbbox": Expected(
        100, 38.0554, 28154.7, 87, 0,
        [0.46198, 0.45903], [[48.853, 12.0, 58.006, 13.55], [79.54, 19.39, 88.0, 24.0]],
    ),
    "gfl": Expected(
        38, 23.3508, 11780.14, 20, 0,
        [0.83456, 0.79323], [[86.104, 0.0, 192.0, 68.901], [0.0, 0.0, 60.885, 94.922]],
    ),
    "reppoints": Expected(
        100, 56.5435, 31657.68, 100, 0,
        [0.64171, 0.60375], [[53.152, 13.799, 59.715, 18.823], [48.531, 4.904, 50.816, 11.004]],
    ),
    "faster+dcn2": Expected(
        100, 32.2131, 34748.18, 50, 0,
        [0.41917, 0.39531], [[178.218, 18.507, 190.174, 55.758], [73.528, 64.911, 87.239, 85.753]],
    ),
    "mask+dcn1": Expected(
        100, 32.656, 34543.88, 51, 23529,
        [0.43977, 0.41037], [[179.351, 17.138, 191.408, 52.441], [143.163, 74.352, 150.663, 103.679]],
    ),
    "mask+swin": Expected(
        100, 25.8782, 33611.71, 50, 40350,
        [0.44744, 0.37432], [[67.992, 110.722, 82.478, 128.0], [1.263, 85.147, 60.21, 97.327]],
    ),
    "cascade": Expected(
        100, 26.1136, 34928.14, 43, 0,
        [0.3259, 0.31771], [[110.411, 113.113, 123.868, 127.85], [167.095, 73.564, 174.658, 108.695]],
    ),
    "cascade_mask": Expected(
        100, 26.1136, 34928.14, 43, 10628,
        [0.3259, 0.31771], [[110.411, 113.113, 123.868, 127.85], [167.095, 73.564, 174.658, 108.695]],
    ),
    "htc": Expected(
        100, 25.7959, 34357.71, 43, 4270,
        [0.33087, 0.31848], [[110.456, 113.089, 123.85, 127.862], [167.069, 73.219, 174.613, 108.782]],
    ),
    "htc_without": Expected(
        100, 26.1136, 34928.14, 43, 4213,
        [0.3259, 0.31771], [[110.411, 113.113, 123.868, 127.85], [167.095, 73.564, 174.658, 108.695]],
    ),
    "detectors_htc": Expected(
        84, 27.078, 29704.81, 42, 2195,
        [0.34932, 0.34556], [[134.227, 13.521, 153.102, 45.515], [142.23, 38.29, 160.834, 70.195]],
    ),
    "retinanet+swin": Expected(
        100, 61.9308, 29022.68, 69, 0,
        [0.67085, 0.65979], [[121.167, 66.652, 171.596, 108.768], [179.257, 42.458, 192.0, 79.877]],
    ),
    "fcos+r101": Expected(
        100, 38.7834, 30289.06, 83, 0,
        [0.51073, 0.50751], [[138.238, 106.832, 141.18, 108.709], [54.673, 23.055, 57.024, 24.858]],
    ),
    "fcos_normbbox+x": Expected(
        100, 38.3683, 27001.92, 80, 0,
        [0.4938, 0.45348], [[78.76, 20.298, 90.196, 24.0], [110.467, 27.948, 116.0, 36.0]],
    ),
    "fcos_deform+dcn2_one": Expected(
        100, 37.9815, 28556.8, 83, 0,
        [0.48873, 0.48543], [[96.838, 11.702, 101.164, 12.908], [10.874, 12.0, 22.511, 15.047]],
    ),
    "gfl+x_dcn_c45": Expected(
        32, 20.5284, 9805.67, 16, 0,
        [0.82235, 0.78295], [[6.644, 0.0, 136.159, 70.925], [83.618, 0.0, 192.0, 66.917]],
    ),
    "reppoints+x_dcn": Expected(
        100, 56.8589, 35004.76, 100, 0,
        [0.62759, 0.62132], [[166.315, 51.915, 172.469, 58.396], [78.844, 29.646, 84.164, 35.19]],
    ),
    "faster+x": Expected(
        100, 27.5563, 30116.34, 51, 0,
        [0.36474, 0.35955], [[92.697, 51.194, 126.025, 78.429], [64.237, 82.226, 72.511, 109.358]],
    ),
    "mask+r101": Expected(
        100, 27.8571, 38258.91, 52, 25457,
        [0.43018, 0.39449], [[68.031, 55.526, 77.1, 80.923], [166.044, 73.214, 170.977, 105.36]],
    ),
    "cascade+swin": Expected(
        100, 30.7343, 33396.15, 45, 0,
        [0.49967, 0.4397], [[118.552, 67.841, 146.19, 94.362], [32.252, 1.694, 47.153, 25.73]],
    ),
    "cascade_mask+x_dcn": Expected(
        100, 26.0895, 31809.36, 45, 13851,
        [0.3238, 0.32253], [[0.0, 4.49, 13.606, 26.911], [0.0, 0.0, 5.571, 11.068]],
    ),
    "htc+dcn1": Expected(
        100, 25.6112, 35145.66, 45, 4056,
        [0.33342, 0.31439], [[110.263, 113.718, 123.526, 127.832], [166.907, 71.896, 174.175, 107.613]],
    ),
    "detectors_cascade": Expected(
        83, 26.8274, 29317.25, 41, 0,
        [0.35208, 0.34723], [[88.0, 23.941, 110.07, 62.203], [134.142, 13.41, 153.287, 45.625]],
    ),
}  # fmt: skip


KINDS = {
    "retinanet": "RetinaNet", "fcos": "FCOS", "gfl": "GFL", "reppoints": "RepPoints", "faster": "Faster R-CNN",
    "mask": "Mask R-CNN", "htc": "HTC",
}  # fmt: skip


def checkpoint(case: str) -> Checkpoint:
    tensors, text = mmdet_layout.tensors(case)
    return Checkpoint(tensors, [], [], text)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_mmdet", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def detect(folder: Path, case: str):
    """Detections of the converted detector, built from its yaml, in pixels of the image."""
    two_stage = case.startswith(("faster", "mask", "cascade", "htc", "detectors"))
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TEST", 60 if two_stage else 1000]
    if "htc" in case:
        opts += ["MODEL.ROI_BOX_CASCADE_HEAD.MASK_MEAN", "last"]  # as mmdetection 3.x
    for node in ("RETINANET", "FCOS", "GFL", "REPPOINTS", "ROI_HEADS"):
        opts += [f"MODEL.{node}.SCORE_THRESH_TEST", 0.02 if two_stage else 0.01]
    cfg = load_config(folder / "config.yaml", opts)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    image = mmdet_layout.image()
    with torch.no_grad():
        return model([{"image": image if cfg.INPUT.FORMAT == "BGR" else image.flip(0)}])[0]["instances"]


@pytest.mark.parametrize("case", EXPECTED)
def test_detections_are_mmdetections(tool, tmp_path, case):
    expected = EXPECTED[case]
    tensors, text = mmdet_layout.tensors(case)
    torch.save({"state_dict": tensors, "meta": {"config": text, "CLASSES": ("cat", "dog")}}, tmp_path / "zoo.pth")
    said = tool.run(str(tmp_path / "zoo.pth"), str(tmp_path / "out"))
    assert said.endswith("classes: cat, dog")
    found = detect(tmp_path / "out", case)
    boxes, scores = found.pred_boxes.tensor, found.scores
    assert len(found) == expected.count and found.pred_classes.sum() == expected.label_sum
    torch.testing.assert_close(scores[:2], torch.tensor(expected.scores), atol=2e-5, rtol=0)
    torch.testing.assert_close(boxes[:2], torch.tensor(expected.boxes), atol=2e-3, rtol=0)
    assert scores.sum().item() == pytest.approx(expected.score_sum, abs=1e-3)
    assert boxes.double().sum().item() == pytest.approx(expected.box_sum, abs=0.05)
    if expected.mask_area:
        assert found.pred_masks.sum() == pytest.approx(expected.mask_area, abs=3)  # pixels on the edge of 0.5


@pytest.mark.parametrize("case", EXPECTED)
def test_every_bit_has_its_place(case):
    given = checkpoint(case)
    converted = convert(given)
    head = case.removeprefix("detectors_").split("+")[0]
    assert converted.kind == KINDS.get(head.split("_")[0], f"Cascade {'Mask ' if 'mask' in head else ''}R-CNN")
    moves = converted.plan.moves
    assert {move.source for move in moves} | set(converted.plan.computed) == set(given.tensors)
    for move in moves:
        value = given.tensors[move.source]
        found = converted.tensors[move.target] if move.index is None else converted.tensors[move.target][move.index]
        origin = move.transform(torch.arange(value.numel()).view(value.shape)).flatten()
        assert torch.equal(origin.sort().values, torch.arange(value.numel())), "each element has one place"
        assert torch.equal(found.flatten(), value.flatten()[origin])
    assert len(converted.tensors) == len({move.target for move in converted.plan.moves}) + len(converted.added)


# --- orders -----------------------------------------------------------------------------------------------------------


def test_order_of_anchors_by_hand():
    """One row an anchor: 3 * shape + size there, 3 * size + shape here."""
    rows = torch.tensor([10 * shape + size for shape in range(3) for size in range(3)])
    assert rows[anchor_order(9)].tolist() == [0, 10, 20, 1, 11, 21, 2, 12, 22]
    assert anchor_order(18)[:4].tolist() == [0, 1, 6, 7]  # rows of an anchor stay together


def test_anchors_of_a_location():
    """Those of stride 8 in mmdetection's order: the first is 22.6 x 11.3 to each side, the second 2^(1/3) of it."""
    model = build_model(load_config("", _flat(convert(checkpoint("retinanet")).config)))
    anchors = next(iter(model.anchor_generator.cell_anchors))[anchor_order(9).argsort()]
    first = torch.tensor([-22.627, -11.314, 22.627, 11.314])
    torch.testing.assert_close(anchors[0], first, rtol=0, atol=1e-3)
    torch.testing.assert_close(anchors[1], 2 ** (1 / 3) * first, rtol=0, atol=2e-3)
    torch.testing.assert_close(anchors[3], torch.tensor([-16.0, -16, 16, 16]))


def _flat(config, prefix=""):
    pairs = ["MODEL.DEVICE", "cpu"] if not prefix else []
    for key, value in config.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, f"{name}.") if isinstance(value, dict) else [name, value]
    return pairs


def test_order_of_merged_patches_by_hand():
    """Weights 0..7 of the official order are 0, 4, 2, 6, 1, 5, 3, 7 in mmdetection."""
    there = torch.tensor([0, 4, 2, 6, 1, 5, 3, 7])
    assert there[merging_order(8)].tolist() == list(range(8))
    # The same sum over a patch of two channels in either order of gathering.
    token, weight = torch.tensor([0.0, 10, 40, 50, 1, 11, 41, 51]), torch.arange(8.0)[there]
    official = torch.tensor([0.0, 1, 40, 41, 10, 11, 50, 51])
    assert token @ weight == official @ reorder(merging_order)(weight)


def test_indices_of_windows_by_hand():
    name = "backbone.bottom_up.layers.0.blocks.0.attn.relative_position_bias_table"
    found = swin_indices({name: torch.zeros(9, 3)})
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert found[name.replace("bias_table", "index")].tolist() == expected


# --- files ------------------------------------------------------------------------------------------------------------


class Stranger:
    """Of a module that whoever reads the file does not have."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a file ran code')",)


def test_objects_of_other_classes_do_nothing(tmp_path):
    state = {"a.weight": torch.ones(2)}
    for legacy in (True, False):
        content = {"state_dict": state, "meta": {"config": "x = 1"}, "message_hub": Stranger(), "optimizer": {1: 2}}
        torch.save(content, tmp_path / "users.pth", _use_new_zipfile_serialization=not legacy)
        found = read_checkpoint(str(tmp_path / "users.pth"))
        assert found.tensors["a.weight"].tolist() == [1, 1] and found.config == "x = 1"


@pytest.mark.parametrize(
    ("names", "prefix", "kept", "left_out"),
    [
        (["module.a", "module.b"], None, ["a", "b"], []),
        (["student.a", "student.b", "teacher.a", "connector.w"], None, ["a", "b"], ["teacher.a", "connector.w"]),
        (["module.student.a", "module.teacher.a"], None, ["a"], ["teacher.a"]),
        (["architecture.a", "distiller.x"], None, ["a"], ["distiller.x"]),
        (["student.a", "teacher.a", "teacher.b"], "teacher.", ["a", "b"], ["student.a"]),
    ],
)
def test_wrappers_and_distillations(tmp_path, names, prefix, kept, left_out):
    torch.save({"state_dict": {name: torch.ones(1) for name in names}}, tmp_path / "x.pth")
    found = read_checkpoint(str(tmp_path / "x.pth"), prefix)
    assert list(found.tensors) == kept and found.left_out == left_out


def test_averaged_weights_are_preferred(tmp_path):
    """mmengine's EMAHook exchanges them when it saves, so that "state_dict" is what mmdetection tests."""
    raw = {"module.a": torch.zeros(1), "steps": torch.ones(1)}
    content = {"state_dict": {"a": torch.ones(1)}, "ema_state_dict": raw}
    torch.save({**content, "meta": {"dataset_meta": {"classes": ["x", "y"]}, "cfg": "b = 2"}}, tmp_path / "x.pth")
    found = read_checkpoint(str(tmp_path / "x.pth"))
    assert found.tensors["a"] == 1 and found.classes == ["x", "y"] and found.config == "b = 2"


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*x\.pth"):
        read_checkpoint(str(path))
    path.write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match=r"x\.pth cannot be read"):
        read_checkpoint(str(path))
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"x\.pth"):
        read_checkpoint(str(path))
    torch.save({"meta": {}}, path)
    with pytest.raises(ValueError, match=r"x\.pth has no tensors under 'state_dict'"):
        read_checkpoint(str(path))
    torch.save({"state_dict": {"a": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"no tensors that begin with 'teacher\.', but e\.g\. a"):
        read_checkpoint(str(path), "teacher.")


# --- nothing is passed over -------------------------------------------------------------------------------------------


def test_unknown_tensors_are_named():
    given = checkpoint("retinanet")
    given.tensors["bbox_head.retina_iou.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"1 tensors of the RetinaNet are unknown: bbox_head\.retina_iou\.weight"):
        convert(given)


def test_lacking_and_misshapen_tensors_are_named():
    given = checkpoint("gfl")
    del given.tensors["neck.fpn_convs.1.conv.bias"]
    given.tensors["backbone.layer2.1.conv3.weight"] = torch.zeros(7, 8, 1, 1)
    with pytest.raises(
        ValueError, match=r"missing: backbone\.fpn_output4\.bias; of another shape: .*res3\.1\.conv3.*\(7, 8, 1, 1\)"
    ):
        convert(given)
    del given.tensors["bbox_head.scales.1.scale"]
    with pytest.raises(ValueError, match=r"head\.scales lacks elements.*\[0, 2, 3, 4\]"):
        convert(given)


@pytest.mark.parametrize(
    ("drop", "text"),
    [
        ("bbox_head.", "no known detector"),
        ("backbone.", "no known backbone"),
        ("neck.", "no known neck"),
        ("backbone.layer3.5", r"stages of \(3, 4, 5, 3\) blocks"),
    ],
)
def test_other_structures_are_refused(drop, text):
    given = checkpoint("fcos")
    for name in [name for name in given.tensors if name.startswith(drop)]:
        del given.tensors[name]
    with pytest.raises(ValueError, match=text):
        convert(given)


def test_two_tensors_never_become_one():
    with pytest.raises(ValueError, match="b and a would both become x"):
        make_plan(["a", "b"], [Rule("a|b", "x")])


def test_what_the_file_does_not_tell_must_be_given():
    given = checkpoint("retinanet")._replace(config="")
    with pytest.raises(ValueError, match="style"):
        convert(given)
    with pytest.raises(ValueError, match=r"pixels; give one of.*torchvision"):
        convert(given, style="pytorch")
    told = convert(given, "caffe", "caffe").config
    assert told["INPUT"]["FORMAT"] == "BGR" and told["MODEL"]["PIXEL_STD"] == [1.0, 1.0, 1.0]
    assert told["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is True
    with pytest.raises(ValueError, match="'gray'"):
        convert(given, "gray", "caffe")


def test_a_config_of_version_2_and_older_names():
    """Plain FCOS: pixels of detectron, stride in the first convolution, exponential distances."""
    given = checkpoint("fcos")
    renamed = {
        name.replace("conv_cls", "fcos_cls").replace("conv_reg", "fcos_reg").replace("conv_cent", "fcos_cent"): value
        for name, value in given.tensors.items()
    }
    said = given.config.rstrip()[:-1].replace("data_preprocessor", "unknown") + ", bbox_head=dict(norm_on_bbox=False))"
    text = f"{said}\nimg_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)"
    found = convert(Checkpoint(renamed, [], [], text))
    same = convert(given)
    assert found.config == same.config and found.config["MODEL"]["FCOS"]["BOXES"] == "exp"
    assert all(torch.equal(value, same.tensors[name]) for name, value in found.tensors.items())


def test_official_swin_detectors_keep_their_order():
    """Names of the official detectors are detectron2's, and so is their order."""
    given = checkpoint("mask+swin")
    for old, new in (
        ("patch_embed.projection", "patch_embed.proj"), ("stages.", "layers."), ("attn.w_msa", "attn"),
        ("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2"),
    ):  # fmt: skip
        for name in [name for name in given.tensors if name.startswith("backbone.") and old in name]:
            given.tensors[name.replace(old, new)] = given.tensors.pop(name)
    name = "layers.1.downsample.reduction.weight"
    found = convert(given)
    assert torch.equal(found.tensors[f"backbone.bottom_up.{name}"], given.tensors[f"backbone.{name}"])


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tool, tmp_path, capsys):
    tensors, _ = mmdet_layout.tensors("mask+dcn1")
    students = {f"student.{name}": value for name, value in tensors.items()}
    path, out = tmp_path / "kd.pth", tmp_path / "out"
    torch.save({"state_dict": {**students, "teacher.x": torch.ones(1)}, "meta": {}}, path)
    assert tool.main([str(path), "--output", str(out)]) == 2
    assert "style" in capsys.readouterr().err and not out.exists()
    assert tool.main([str(path), "--output", str(out), "--style", "pytorch", "--pixels", "torchvision"]) == 0
    said = capsys.readouterr().out
    assert "1 tensors of another model, left out, e.g. teacher.x" in said and "num_batches_tracked" in said
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["MODEL"]["WEIGHTS"] == "model.pth" and config["MODEL"]["RESNETS"]["DEFORM_ON_PER_STAGE"][1]
    stored = torch.load(out / "model.pth", weights_only=True)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in convert(checkpoint("mask+dcn1")).tensors.items())
