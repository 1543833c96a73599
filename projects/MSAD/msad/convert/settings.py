"""What the training config inside a checkpoint of mmdetection says of its detector, its pixels and its tests.

Each function turns a part of it into detectron2's values, and refuses by name what these cannot express. What a config
does not say has the value that mmdetection's own configs give it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


def read(text: str, prefix: str = "") -> dict[str, Any]:
    """The variables of the text of a config: dicts, lists, numbers; other expressions are kept as text.

    ``model`` is the dict of the detector alone, where the config is of a distillation: of the one whose tensors have
    ``prefix``, of the student if that is "".

    Raises:
        ValueError: the text is not Python.
    """
    text = re.sub(r"\A\s*\S+\.py\s*\n", "", text)  # older files begin with the path of their config
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"the training config in the file cannot be read as Python: {error}") from None
    known: dict[str, Any] = {}
    for line in body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            known[line.targets[0].id] = _value(line.value, known)
    whole = part(known, "model")
    known.setdefault("data_preprocessor", part(whole, "data_preprocessor"))
    known["model"] = _detector(whole, prefix)
    return known


def _detector(model: dict, prefix: str) -> dict[str, Any]:
    found = part(model, *(key for key in prefix.split(".") if key not in ("", "module")))
    while inner := next((found[key] for key in ("student", "architecture", "detector") if part(found, key)), None):
        found = inner
    return found


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, known) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(k, known): _value(v, known) for k, v in zip(node.keys, node.values) if k is not None}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value, known) for word in node.keywords if word.arg}
    try:
        return ast.literal_eval(node)  # signed numbers
    except ValueError:
        return ast.unparse(node)


def merge(*parts: dict) -> dict:
    """Nested dicts in one; of values that occur twice, the last."""
    out: dict[str, Any] = {}
    for one in parts:
        for key, value in one.items():
            out[key] = merge(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def part(config: Any, *keys: str) -> dict[str, Any]:
    """The dict at a path of ``config``; {} where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def test(config: dict) -> dict[str, Any]:
    """``test_cfg`` of the detector; version 1.x has it beside the model."""
    return part(config, "model", "test_cfg") or part(config, "test_cfg")


def require(told: dict, where: str, **wanted: tuple) -> None:
    """ValueError unless each of these keys is absent or has one of the values."""
    for key, values in wanted.items():
        if key in told and told[key] not in values:
            raise ValueError(
                f"the training config's {where}.{key} is {told[key]!r}, which a converted config cannot express; "
                f"known: {', '.join(map(repr, values))}"
            )


def _numbers(value: Any, where: str, count: int = 0) -> list[float]:
    """``value`` as positive numbers, ``count`` of them where it is given; ValueError names ``where`` otherwise."""
    good = isinstance(value, list) and value and count in (0, len(value))
    if not good or not all(isinstance(x, int | float) and x > 0 for x in value):
        raise ValueError(f"the training config's {where} is {value!r} instead of {count or 'some'} positive numbers")
    return value


def check_resnet(config: dict) -> None:
    """ValueError if the backbone has settings of a ResNet that its tensors do not show and ours lacks."""
    told = part(config, "model", "backbone")
    require(told, "backbone", strides=([1, 2, 2, 2],), dilations=([1, 1, 1, 1],))
    require(part(told, "conv_cfg"), "backbone.conv_cfg", type=("ConvAWS",))


def neck_relu(config: dict, usual: bool) -> bool:
    """Whether P7 is made of ReLU(P6); ``usual`` where no neck is described. ValueError names what ours lacks."""
    told = part(config, "model", "neck")
    require(
        told, "neck", type=("FPN", "RFP"), add_extra_convs=(False, True, "on_input", "on_output"), conv_cfg=(None,),
        act_cfg=(None,),
    )  # fmt: skip
    require(part(told, "upsample_cfg"), "neck.upsample_cfg", mode=("nearest",))
    return bool(told.get("relu_before_extra_convs", False)) if told else usual


class Anchors(NamedTuple):
    """Anchors of each location.

    Attributes:
        sizes: of each level, square roots of their areas in pixels.
        ratios: of height to width.
    """

    sizes: list[list[float]]
    ratios: list[float]

    def config(self) -> dict:
        return {"SIZES": self.sizes, "ASPECT_RATIOS": [self.ratios]}


def anchors(head: dict, where: str, strides: list[int], scales: list[float], ratios: list[float]) -> Anchors:
    """Anchors of a head on maps of these strides; ``scales`` (in strides) and ``ratios`` where it tells none."""
    name = f"{where}.anchor_generator"
    told = part(head, "anchor_generator") or {key.removeprefix("anchor_"): value for key, value in head.items()
                                              if key.startswith(("anchor_", "octave_", "scales_per_"))}  # fmt: skip
    require(
        told, name, type=("AnchorGenerator",), strides=(strides,), center_offset=(0,), scale_major=(True,),
        centers=(None,),
    )  # fmt: skip
    bases = _numbers(told.get("base_sizes") or strides, f"{name}.base_sizes", len(strides))
    if told.get("octave_base_scale") is not None:
        octave = [told["octave_base_scale"], told.get("scales_per_octave")]
        first, count = _numbers(octave, f"{name}.octave_base_scale, scales_per_octave")
        scales = [first * 2 ** (k / count) for k in range(int(count))]
    elif told.get("scales") is not None:
        scales = _numbers(told["scales"], f"{name}.scales")
    ratios = _numbers(told.get("ratios") or ratios, f"{name}.ratios")
    return Anchors([[float(base * scale) for scale in scales] for base in bases], [float(x) for x in ratios])


def box_weights(head: dict, where: str, stds: tuple[float, ...]) -> list[float]:
    """BBOX_REG_WEIGHTS of a head; ``stds`` where it tells none."""
    name = f"{where}.bbox_coder"
    told = part(head, "bbox_coder") or {key: head[key] for key in ("target_means", "target_stds") if key in head}
    require(
        told, name, type=("DeltaXYWHBBoxCoder",), target_means=([0.0] * 4,), clip_border=(True,),
        add_ctr_clamp=(False,),
    )  # fmt: skip
    return [1 / std for std in _numbers(told.get("target_stds") or list(stds), f"{name}.target_stds", 4)]


def pooler(head: dict, kind: str, resolution: int) -> dict:
    """POOLER_* of the box or mask head, which all stages share; ``resolution`` where ``head`` tells none.

    A mask head whose extractor is None takes the regions of the box head, 7 x 7 where nothing is told.
    """
    where = f"{kind}_roi_extractor"
    if kind == "mask" and head.get(where, {}) is None:
        return pooler(head, "bbox", 7)
    told = head.get(where) or {}
    stages = told if isinstance(told, list) else [told]
    if any(stage != stages[0] for stage in stages):
        raise ValueError(f"the training config's {where} differs between stages: {told}")
    layer = part(stages[0], "roi_layer")
    require(stages[0], where, type=("SingleRoIExtractor",), featmap_strides=([4, 8, 16, 32],), finest_scale=(56,))
    require(layer, f"{where}.roi_layer", type=("RoIAlign",), aligned=(True, False), pool_mode=("avg",))
    size = _first(layer, f"{where}.roi_layer", "output_size", "out_size")
    samples = _first(layer, f"{where}.roi_layer", "sampling_ratio", "sample_num")
    return {
        "POOLER_TYPE": "ROIAlignV2" if layer.get("aligned", True) else "ROIAlign",
        "POOLER_RESOLUTION": resolution if size is None else int(size), "POOLER_SAMPLING_RATIO": int(samples or 0),
    }  # fmt: skip


def _first(told: dict, where: str, *keys: str) -> float | None:
    """The number under the first of these keys that is there; None if none is."""
    key = next((key for key in keys if told.get(key) is not None), None)
    if key is None:
        return None
    if not isinstance(told[key], int | float) or told[key] < 0:
        raise ValueError(f"the training config's {where}.{key} is {told[key]!r} instead of a number of at least 0")
    return told[key]


def _limits(told: dict, where: str) -> tuple[float | None, int | None, int | None]:
    """Threshold of the suppression, candidates before and boxes after it."""
    nms = part(told, "nms")
    require(nms, f"{where}.nms", type=("nms",), class_agnostic=(False,))
    require(told, where, min_bbox_size=(0, -1), mask_thr_binary=(0.5,))
    iou = _first({**told, **nms}, f"{where}.nms", "iou_threshold", "iou_thr", "nms_thr")
    counts = _first(told, where, "nms_pre"), _first(told, where, "max_per_img", "max_num", "nms_post")
    if 0 in counts:
        raise ValueError(f"the training config's {where} keeps 0 boxes: {told}")
    return iou, *counts


def _said(**values: float | None) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def detections(config: dict, node: str, *path: str) -> dict:
    """Thresholds of the detections under MODEL.``node``, and their number; ``path`` of them in ``test_cfg``."""
    where, told = ".".join(("test_cfg", *path)), part(test(config), *path)
    iou, before, after = _limits(told, where)
    score = _first(told, where, "score_thr")
    own = _said(SCORE_THRESH_TEST=score and float(score), NMS_THRESH_TEST=iou and float(iou))
    if not path:  # a dense detector's candidates; those of a second stage are all suppressed
        own |= _said(TOPK_CANDIDATES_TEST=before)
    return {"MODEL": {node: own}, "TEST": _said(DETECTIONS_PER_IMAGE=after)}


def proposals(config: dict) -> dict:
    """MODEL.RPN's suppression and numbers of proposals in tests."""
    iou, before, after = _limits(part(test(config), "rpn"), "test_cfg.rpn")
    return _said(NMS_THRESH=iou, PRE_NMS_TOPK_TEST=before, POST_NMS_TOPK_TEST=after)


def _test_steps(config: dict) -> Iterator[dict]:
    """The steps of the test pipeline, those inside of others too."""
    data = part(config, "test_dataloader", "dataset") or part(config, "data", "test")
    steps = data.get("pipeline") or config.get("test_pipeline") or []
    if not isinstance(steps, list):
        raise ValueError(f"the training config's test pipeline is {steps!r} instead of a list")
    for step in map(part, steps):
        yield step
        yield from map(part, step.get("transforms", ()))


def pixels(config: dict) -> tuple[str, list[float], list[float]] | None:
    """Order of the channels, and their means and deviations in that order; None if the config does not tell them."""
    places = [
        part(config, "model", "data_preprocessor"), part(config, "data_preprocessor"),
        *(step for step in _test_steps(config) if step.get("type") == "Normalize"), part(config, "img_norm_cfg"),
    ]  # fmt: skip
    for told in places:
        swapped = told.get("bgr_to_rgb", told.get("to_rgb"))
        values = told.get("mean"), told.get("std")
        if isinstance(swapped, bool) and all(isinstance(value, list) and len(value) == 3 for value in values):
            return "RGB" if swapped else "BGR", *([float(x) for x in value] for value in values)
    return None


def test_size(config: dict) -> dict:
    """INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST; 800 and 1333 where the config tells none."""
    short, longest = 800, 1333
    for one in _test_steps(config):
        kind = one.get("type", "")
        if "Resize" in kind:
            require({"type": kind}, "test pipeline", type=("Resize",))
            require(one, "Resize of the test pipeline", keep_ratio=(True,), scale_factor=(None,))
        require(one, f"{kind} of the test pipeline", flip=(False,))
        scale = one.get("img_scale", one.get("scale"))
        if scale is not None:
            pair = scale[0] if isinstance(scale, list) and len(scale) == 1 else scale
            short, longest = sorted(_numbers(pair, f"scale of {kind} in the test pipeline", 2))
    return {"INPUT": {"MIN_SIZE_TEST": int(short), "MAX_SIZE_TEST": int(longest)}}
