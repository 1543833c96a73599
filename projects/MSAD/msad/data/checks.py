"""What can be wrong with data is said before the first iteration, of DATASETS.TRAIN and DATASETS.TEST alike."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    load_proposals_into_dataset,
)
from detectron2.utils import comm

from ..config_values import copy_with, nearest
from ..finding import ERROR, WARNING, Finding, error_text, log_findings
from .image_files import check_image_files
from .label_maps import check_label_maps
from .low_res import FILE, check_low_res_files, reads_low_res, student_shift
from .needs import needs_of
from .record_checks import check_records, classes_of, judge_box, shorten
from .scales import check_scales
from .tally import Tally, raise_errors


def check_data(
    cfg: CfgNode, images: bool = True, known: dict[str, list[dict]] | None = None
) -> tuple[dict[str, list[dict]], list[Finding]]:
    """Look at every data set of a config once.

    Nothing is raised for a fault in the data: :func:`msad.data.tally.raise_errors` does that.

    Args:
        images: look at image files too, DATASETS.CHECK_IMAGES of each set.
        known: dataset dicts of sets that were loaded since they were registered, by name.

    Returns:
        the dataset dicts of DATASETS.TRAIN, by name, as they are in the catalog; the findings about TRAIN and TEST.
    """
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    loaded: dict[str, list[dict]] = {}
    findings: list[Finding] = []
    for name in dict.fromkeys(train + test):
        try:
            if name not in DatasetCatalog.list():
                raise ValueError(f"no data set is called {name!r}{nearest(name, DatasetCatalog.list())}")
            records = (known or {}).get(name) or DatasetCatalog.get(name)
            if nameless := sum("file_name" not in record for record in records):
                raise ValueError(f"{nameless} of its {len(records)} dataset dicts have no file_name")
            loaded[name] = records
        except (AssertionError, LookupError, OSError, TypeError, ValueError) as error:
            check = f"data set {name!r}"
            findings.append(Finding(ERROR, check, error_text(error).removeprefix(f"{check}: "), _fix_of(name)))
            continue
        findings += MetadataCatalog.get(name).get("findings") or []
        findings += check_records(loaded[name], name, needs_of(cfg, name))
        if images:
            findings += _check_files(cfg, name, loaded[name])
    if images and cfg.MODEL.HTC.SEMANTIC_ON:
        findings += _check_label_maps(cfg, loaded)
    findings += _compare_sets(train, test, loaded, cfg.MODEL.KEYPOINT_ON)
    findings += _never_learned(train, test, loaded)
    learned = [record for name in train for record in loaded.get(name, ())]
    with contextlib.suppress(ArithmeticError, ValueError):  # what cannot be a size is said elsewhere
        for name in test:
            findings += check_scales(cfg, learned, loaded.get(name, ()), name)
    return {name: loaded[name] for name in train if name in loaded}, findings


def _check_files(cfg: CfgNode, name: str, records: list[dict]) -> list[Finding]:
    """Look into the images and the files of LOW_RES_IMAGES that the model of a config reads."""
    count = cfg.DATASETS.CHECK_IMAGES
    images, low_res = (Tally(f"data set {name!r}") for _ in range(2))  # each counts among files of its own
    check_image_files(images, records, name in cfg.DATASETS.TEST, count)
    if reads_low_res(cfg) and any(FILE in record for record in records):
        check_low_res_files(low_res, records, student_shift(cfg), count)
    return [*images.findings(), *low_res.findings()]


def _check_label_maps(cfg: CfgNode, loaded: dict[str, list[dict]]) -> list[Finding]:
    """Look at the label maps of all sets that a semantic branch learns from, or has a loss on."""
    branch, out = cfg.MODEL.HTC, []
    # A mapper of one's own may make the maps of training otherwise, but not of some images alone.
    some = any("sem_seg_file_name" in record for name in cfg.DATASETS.TRAIN for record in loaded.get(name, ()))
    for name, records in loaded.items():
        losses = name in cfg.DATASETS.TEST and cfg.TEST.LOSS_IMAGES > 0
        if name in cfg.DATASETS.TRAIN or losses:
            tally, count = Tally(f"data set {name!r}"), cfg.DATASETS.CHECK_IMAGES
            check_label_maps(tally, records, branch.SEMANTIC_CLASSES, branch.SEMANTIC_IGNORE, count, losses or some)
            out += tally.findings()
    return out


def load_train_dicts(cfg: CfgNode) -> list[dict]:
    """Dataset dicts of ``cfg.DATASETS.TRAIN``, filtered and cleaned; all that is found about TRAIN and TEST is logged.

    Only the main process looks at image files.

    Raises:
        ValueError: there is an error in the data, or they do not fit the config; the message has all errors.
    """
    names = cfg.DATASETS.TRAIN
    if not names:
        raise ValueError("DATASETS.TRAIN is empty")
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else [None] * len(names)
    if len(proposals) != len(names):
        raise ValueError(f"DATASETS.PROPOSAL_FILES_TRAIN has {len(proposals)} files for {len(names)} data sets")
    by_name, findings = check_data(cfg, comm.is_main_process())
    findings = shared_findings(findings)
    log_findings(findings)
    raise_errors(findings)
    loaded: list[dict] = []
    for name, proposal_file in zip(names, proposals):
        dicts = by_name[name]
        if proposal_file:
            dicts = load_proposals_into_dataset(dicts, proposal_file)
        if dicts and "annotations" in dicts[0]:
            dicts = clean(dicts)
            if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
                dicts = filter_images_with_only_crowd_annotations(dicts)
            if cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE > 0:
                dicts = filter_images_with_few_keypoints(dicts, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)
        if not dicts:
            raise ValueError(f"data set {name!r}: none of the images has a usable instance")
        loaded += dicts
    return loaded


def check_test_sets(cfg: CfgNode) -> None:
    """Look at DATASETS.TEST alone, before an evaluation; all that is found is logged.

    Raises:
        ValueError: there is an error in the data, or they do not fit the config; the message has all errors.
    """
    alone = copy_with(cfg, {"DATASETS.TRAIN": ()})
    findings = shared_findings(check_data(alone, images=comm.is_main_process())[1])
    log_findings(findings)
    raise_errors(findings)


def shared_findings(findings: list[Finding]) -> list[Finding]:
    """The findings of all processes, each once, so that all of them stop or none does."""
    return list(dict.fromkeys(finding for part in comm.all_gather(findings) for finding in part))


def clean(dicts: Iterable[dict]) -> list[dict]:
    """Dataset dicts without degenerate boxes and boxes wholly outside the image; the input is left as it is."""
    cleaned = []
    for record in dicts:
        annotations = record.get("annotations")
        if annotations is not None:
            kept = [a for a in annotations if judge_box(a, record) in ("good", "clipped")]
            if len(kept) < len(annotations):
                record = {**record, "annotations": kept}
        cleaned.append(record)
    return cleaned


def _fix_of(name: str) -> str:
    registered = name in DatasetCatalog.list()
    return "" if registered else "correct DATASETS.TRAIN or DATASETS.TEST, or add it to DATASETS.REGISTER"


def _never_learned(train: list[str], test: list[str], loaded: dict[str, list[dict]]) -> list[Finding]:
    """Classes whose objects are only in sets that are not trained on: their AP is 0 and counts in the mean."""
    learned = set().union(*(_objects(loaded.get(name, ())) for name in train))
    out = []
    for name in test if learned else ():
        classes = classes_of(name) or ()
        found = {i: n for i, n in _objects(loaded.get(name, ())).items() if i not in learned and i < len(classes)}
        if found:
            said = shorten([f"{classes[i]} ({n})" for i, n in sorted(found.items())])
            text = f"has objects of classes that are never trained on, whose AP of 0 counts in the mean: {said}"
            fix = "train on objects of these classes too, or remove the classes"
            out.append(Finding(WARNING, f"data set {name!r}", text, fix))
    return out


def _objects(records: Iterable[dict]) -> Counter:
    """Number of objects, without crowds, by class index."""
    annotations = (a for record in records for a in record.get("annotations", ()) if not a.get("iscrowd"))
    return Counter(a["category_id"] for a in annotations if isinstance(a.get("category_id"), int))


def _compare_sets(train: list[str], test: list[str], loaded: dict[str, list[dict]], keypoints: bool) -> list[Finding]:
    """Classes (and keypoints) of all sets against the first one's; images that are trained on and tested on."""
    out = []
    first = train[0] if train and train[0] in loaded else None
    wanted = first and classes_of(first)
    for name in dict.fromkeys(train + test):
        classes = classes_of(name) if name in loaded else None
        if wanted is not None and classes is not None and list(classes) != list(wanted):
            text = f"{first!r} and {name!r} have different classes: {list(wanted)}, {list(classes)}"
            out.append(Finding(ERROR, f"data set {name!r}", text, "give both sets the same classes in the same order"))
        points = [MetadataCatalog.get(n).get("keypoint_names") if n in loaded else None for n in (first, name)]
        if keypoints and None not in points and list(points[0]) != list(points[1]):
            text = f"{first!r} and {name!r} have different keypoints: {list(points[0])}, {list(points[1])}"
            out.append(Finding(ERROR, f"data set {name!r}", text, "give both sets the same keypoints in one order"))
    seen = {record["file_name"] for name in train for record in loaded.get(name, ())}
    for name in test:
        common = [record["file_name"] for record in loaded.get(name, ()) if record["file_name"] in seen]
        if common:
            text = f"{len(common)} of its {len(loaded[name])} images are trained on too, the first is {common[0]}"
            out.append(Finding(WARNING, f"data set {name!r}", text, "test on images that are not trained on"))
    return out
