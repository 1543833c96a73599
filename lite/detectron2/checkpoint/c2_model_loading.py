"""Find out which tensor of a checkpoint belongs to which tensor of a model when their names differ."""

import logging
import re
from collections import Counter
from typing import Any

logger = logging.getLogger(__name__)

# Caffe2's ImageNet models: "res2_0_branch2a_bn_s" is the scale of the norm after the first convolution
# of the first block of stage 2.
_C2_ENDINGS = {
    "_w": ".weight",
    "_b": ".bias",
    "_bn_s": ".norm.weight",
    "_bn_b": ".norm.bias",
    "_bn_rm": ".norm.running_mean",
    "_bn_riv": ".norm.running_var",
    "_gn_s": ".norm.weight",
    "_gn_b": ".norm.bias",
    "_gn_bias": ".norm.bias",
}
_C2_LAYERS = {"conv1": "stem.conv1", "res_conv1": "stem.conv1", "pred": "linear"}
_C2_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_C2_BLOCK = re.compile(r"res(\d)_(\d+)_branch(1|2a|2b|2c)")


def _rename_c2(name: str) -> str:
    layer, ending = name, ""
    for c2_ending in sorted(_C2_ENDINGS, key=len, reverse=True):
        if name.endswith(c2_ending):
            layer, ending = name[: -len(c2_ending)], _C2_ENDINGS[c2_ending]
            break
    block = _C2_BLOCK.fullmatch(layer)
    if block is not None:
        stage, index, branch = block.groups()
        return f"res{stage}.{index}.{_C2_BRANCHES[branch]}{ending}"
    return _C2_LAYERS.get(layer, layer.replace("_", ".")) + ending


def convert_c2_detectron_names(weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Give the tensors of a Caffe2 ImageNet model (R-50.pkl and the like) detectron2's names.

    Args:
        weights: tensors by Caffe2 name. Names of detection heads are not known here.

    Returns:
        the same tensors by new name, and the Caffe2 name of each new name.

    Raises:
        ValueError: two tensors get the same name.
    """
    renamed: dict[str, Any] = {}
    c2_names: dict[str, str] = {}
    for name in sorted(weights):
        new = _rename_c2(name)
        if new in renamed:
            raise ValueError(f"{c2_names[new]} and {name} of the checkpoint both stand for {new}")
        renamed[new] = weights[name]
        c2_names[new] = name
    return renamed, c2_names


def align_and_update_state_dicts(
    model_state_dict: dict[str, Any], ckpt_state_dict: dict[str, Any], c2_conversion: bool = True
) -> dict[str, Any]:
    """Rename the tensors of a checkpoint to those of a model by the ends of their names.

    A model tensor "backbone.bottom_up.res2.0.conv1.weight" takes the checkpoint's "res2.0.conv1.weight", or a
    longer such ending if there is one. Endings begin at a dot.

    Args:
        model_state_dict: tensors of the model; only names and shapes are read.
        ckpt_state_dict: tensors of the checkpoint.
        c2_conversion: the checkpoint has Caffe2's names.

    Returns:
        the tensors of the checkpoint, those that found a place under the model's name, the others (also those
        of a wrong shape) under their own.

    Raises:
        ValueError: a tensor of the checkpoint fits two places of the model.
    """
    original = {name: name for name in ckpt_state_dict}
    if c2_conversion:
        ckpt_state_dict, original = convert_c2_detectron_names(ckpt_state_dict)

    taken: dict[str, str] = {}  # checkpoint name -> model name
    for name in sorted(model_state_dict):
        source = _longest_ending(name, ckpt_state_dict)
        if source is None:
            continue
        have, want = tuple(ckpt_state_dict[source].shape), tuple(model_state_dict[name].shape)
        if have != want:
            logger.warning(
                "%s of the checkpoint has shape %s but %s of the model has %s: not loaded.",
                original[source], have, name, want,
            )  # fmt: skip
            continue
        if source in taken:
            raise ValueError(
                f"{original[source]} of the checkpoint fits both {taken[source]} and {name} of the model"
            )
        taken[source] = name
    _report(taken, len(ckpt_state_dict))

    aligned = {name: ckpt_state_dict[source] for source, name in taken.items()}
    aligned.update((source, value) for source, value in ckpt_state_dict.items() if source not in taken)
    return aligned


def _longest_ending(name: str, candidates: dict[str, Any]) -> str | None:
    while name not in candidates:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name


def _report(taken: dict[str, str], total: int) -> None:
    prefixes = Counter(name[: -len(source)].rstrip(".") for source, name in taken.items())
    places = "".join(f"; {count} below {prefix or 'the root'}" for prefix, count in sorted(prefixes.items()))
    logger.info("%d of %d tensors of the checkpoint have a place in the model%s.", len(taken), total, places)
