"""Loading of yaml files: defaults, overrides, and errors that name key and file."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from msad import add_msad_config, config, load_config
from msad.config import add_imports, default_config
from msad.config_values import plain, value_at
from msad.export import export

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def keys(cfg, prefix=""):
    found = {}
    for key, value in cfg.items():
        found.update(keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return found


def test_adds_keys_and_changes_none_of_detectron2():
    before, after = keys(get_cfg()), keys(load_config(""))
    assert {key: after[key] for key in before} == before
    sections = {key.split(".")[0] for key in set(after) - set(before)}
    assert sections == {"DATASETS", "DISTILL", "INPUT", "MODEL", "MSAD", "SOLVER", "TEST"}


def test_defaults_are_fresh_every_time():
    load_config("").DISTILL.LOSSES.append("changed")
    assert load_config("").DISTILL.LOSSES == []
    cfg = get_cfg()
    assert add_msad_config(cfg) is cfg and cfg.MSAD.RESOLUTIONS == ["H", "L"]


def test_defaults_of_the_methods():
    cfg = load_config("")
    assert (cfg.MSAD.EVAL_BRANCH, cfg.MSAD.DOWNSAMPLE, cfg.MSAD.FUSION.REDUCTION) == ("fused", "antialias", 16)
    assert (cfg.DISTILL.TEACHERS, cfg.DISTILL.STUDENT_RESOLUTION) == ([], "L")
    assert (cfg.DISTILL.INIT_STUDENT, cfg.DISTILL.TEACHER_BN) == ("full", "eval")


OWN = """
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone

def add_config(cfg):
    cfg.MODEL.OWN_NET = CfgNode({"WIDTH": 32, "NOTE": "unchanged"})

@BACKBONE_REGISTRY.register()
def build_own_net(cfg, shape):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.OWN_NET.WIDTH
    return build_resnet_backbone(cfg, shape)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a yaml file on one that names an own module, whose backbone has a key."""
    if "own_net_of_a_test" not in sys.modules:  # registries take a name once
        write(tmp_path, "own_net_of_a_test.py", OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path, "base.yaml", "MSAD: {IMPORTS: [own_net_of_a_test]}\nMODEL: {OWN_NET: {WIDTH: 16}}\n")
    text = "_BASE_: base.yaml\nMODEL:\n  META_ARCHITECTURE: RetinaNet\n  BACKBONE: {NAME: build_own_net}\n"
    text += "  RESNETS: {WIDTH_PER_GROUP: 4, OUT_FEATURES: [res3, res4]}\n  RETINANET: {IN_FEATURES: [res3, res4]}\n"
    text += "  DEVICE: cpu\nMSAD: {IMPORTS: [json]}\n"
    return write(tmp_path, "own.yaml", text)


def test_own_modules_register_parts_and_add_keys(own, tmp_path):
    cfg = load_config(own, ["MODEL.OWN_NET.WIDTH", "8"])
    assert cfg.MODEL.OWN_NET.WIDTH == 8 and cfg.MSAD.IMPORTS == ["own_net_of_a_test", "json"]
    model = build_model(cfg)
    assert model.backbone.output_shape()["res3"].channels == 16
    again = load_config(write(tmp_path, "run/config.yaml", cfg.dump()))  # as children and other tools read it
    assert plain(again) == plain(cfg)
    assert "OWN_NET" not in load_config("").MODEL and default_config(["own_net_of_a_test"]).MODEL.OWN_NET.WIDTH == 32


def test_exports_have_what_own_modules_need(own, tmp_path):
    cfg = load_config(own)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "w.pth")
    said = export(cfg, str(tmp_path / "w.pth"), tmp_path / "out")
    assert "where own_net_of_a_test registers MODEL.BACKBONE.NAME build_own_net." in said
    stock = add_imports(get_cfg(), ["own_net_of_a_test"])
    stock.merge_from_file(str(tmp_path / "out/config.yaml"))  # without keys of the project
    assert stock.MODEL.OWN_NET == {"WIDTH": 16, "NOTE": "unchanged"}
    whole = load_config(tmp_path / "out/config.yaml")
    assert whole.MSAD.IMPORTS == cfg.MSAD.IMPORTS and whole.MODEL.OWN_NET == cfg.MODEL.OWN_NET


@pytest.mark.parametrize(
    "text, opts, message",
    [
        ("MSAD: {IMPORTS: [no_such_module]}", [], r"MSAD\.IMPORTS: no_such_module cannot be imported .*PYTHONPATH"),
        ("MSAD: {IMPORTS: json}", [], r"a\.yaml: MSAD\.IMPORTS is a list of modules, such as \[mynet\], not 'json'"),
        ("VERSION: 2", ["MSAD.IMPORTS", "['json']"], r"MSAD\.IMPORTS belongs into the yaml file"),
    ],
)
def test_modules_that_are_not_there_are_named(tmp_path, text, opts, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, "a.yaml", text + "\n"), opts)


def test_yaml_then_overrides(tmp_path):
    write(tmp_path, "base.yaml", "MSAD: {W_FUSE: 0.1, EVAL_BRANCH: H}\nSOLVER: {MAX_ITER: 7}\n")
    path = write(tmp_path, "leaf.yaml", "_BASE_: base.yaml\nMSAD: {W_FUSE: 0.2}\n")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "9", "MSAD.RESOLUTIONS", "['H', 'L', 'EL']"])
    assert (cfg.MSAD.W_FUSE, cfg.MSAD.EVAL_BRANCH, cfg.SOLVER.MAX_ITER) == (0.2, "H", 9)
    assert cfg.MSAD.RESOLUTIONS == ["H", "L", "EL"]
    assert load_config(Path(path)).MSAD.W_FUSE == 0.2, "a pathlib path"


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_of_the_repository_loads(path):
    cfg = load_config(str(path))
    for teacher in cfg.DISTILL.TEACHERS:
        if "MEAN_OF" in teacher:
            continue
        assert Path(teacher["CONFIG"]).is_file()
        assert load_config(teacher["CONFIG"]).MODEL.META_ARCHITECTURE


# Not the controls of curricula, which train a finished student on.
LONG = [p for p in YAMLS if p.stem.endswith("_3x") and "longer" not in p.stem]


@pytest.mark.parametrize("path", LONG, ids=lambda p: p.stem)
def test_long_schedules_see_three_times_the_images(path):
    """Of the 1x schedule: 90,000 iterations of 16 images; steps in the last 60,000 and 20,000, as detectron2's 3x."""
    solver = load_config(path).SOLVER
    assert solver.IMS_PER_BATCH * solver.MAX_ITER == 3 * 16 * 90000
    assert [round((solver.MAX_ITER - step) * solver.IMS_PER_BATCH / 16) for step in solver.STEPS] == [60000, 20000]


ZOO = {
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "keypoint_rcnn": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "cascade_rcnn": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}


@pytest.mark.parametrize("row", ["H", "L", "L_shifted", "T", "S_L"])
@pytest.mark.parametrize("detector", ZOO)
def test_detectors_are_set_as_in_the_model_zoo(detector, row):
    """Heads, proposals, schedule, data; students and shifted baselines read one level lower, with half the anchors."""
    cfg, zoo = load_config(ROOT / f"configs/MSAD/{detector}_R_50_{row}_1x.yaml"), model_zoo.get_config(ZOO[detector])
    zoo = add_msad_config(zoo)
    shift = int(row in ("L_shifted", "S_L"))
    used = "RETINANET" if detector == "retinanet" else ("RPN", "ROI_", "KEYPOINT_ON")
    for section in [section for section in zoo.MODEL if section.startswith(used)]:
        options = zoo.MODEL[section]
        if isinstance(options, CfgNode) and options.get("IN_FEATURES", [""])[0].startswith("p"):
            options.IN_FEATURES = [f"p{int(name[1:]) - shift}" for name in options.IN_FEATURES]
        assert cfg.MODEL[section] == options, section
    sizes = [[pytest.approx(size / 2**shift, abs=0.01) for size in level] for level in zoo.MODEL.ANCHOR_GENERATOR.SIZES]
    assert sizes == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = zoo.MODEL.ANCHOR_GENERATOR.SIZES
    assert cfg.MODEL.ANCHOR_GENERATOR == zoo.MODEL.ANCHOR_GENERATOR
    assert (detector == "mask_rcnn") == cfg.MODEL.MASK_ON
    assert zoo.SOLVER == cfg.SOLVER
    assert (zoo.DATASETS.TRAIN, zoo.DATASETS.TEST) == (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    # The loader of a student reads H.
    half = row in ("L", "L_shifted")
    assert type(cfg.INPUT.MIN_SIZE_TRAIN)(s >> half for s in zoo.INPUT.MIN_SIZE_TRAIN) == cfg.INPUT.MIN_SIZE_TRAIN
    assert ((1333, 667)[half], (800, 400)[half or row == "S_L"]) == (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST)


def test_every_run_has_a_folder_of_its_own():
    folders = ("MSAD", "LD", "RawFeatures", "losses")
    for path in [path for name in folders for path in (ROOT / "configs" / name).glob("*.yaml")]:
        if not path.stem.startswith(("Base", "teacher_")):
            assert f"output/{path.parent.name}/{path.stem}" == load_config(path).OUTPUT_DIR


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wrong", "hint"),
    [
        ("DISTILL: {W_DETT: 0.5}", "DISTILL.W_DETT", "DISTILL.W_DET"),
        ("MSAD: {FUSION: {MASK_PADING: True}}", "MSAD.FUSION.MASK_PADING", "MSAD.FUSION.MASK_PADDING"),
        ("MODEL: {FCOS: {CONV_DIM: [8]}}", "MODEL.FCOS.CONV_DIM", "MODEL.FCOS.CONV_DIMS"),
        ("SOLVER: {MAX_ITERS: 5}", "SOLVER.MAX_ITERS", "SOLVER.MAX_ITER"),
    ],
)
def test_unknown_key_names_file_and_nearest_key(tmp_path, text, wrong, hint):
    path = write(tmp_path, "wrong.yaml", text)
    message = f"{path}: unknown config key {wrong}; did you mean {hint}?"
    with pytest.raises(KeyError, match=re.escape(message)):
        load_config(path)


def test_unknown_key_without_anything_near(tmp_path):
    path = write(tmp_path, "wrong.yaml", "ZZZZZZ: 1")
    with pytest.raises(KeyError, match="unknown config key ZZZZZZ") as caught:
        load_config(path)
    assert "did you mean" not in str(caught.value)


def test_unknown_override_names_the_nearest_key():
    with pytest.raises(KeyError, match=r"command line: unknown config key MSAD\.W_FUZE; did you mean MSAD\.W_FUSE\?"):
        load_config("", ["MSAD.W_FUZE", "1.0"])


def test_overrides_come_in_pairs():
    with pytest.raises(ValueError, match=r"KEY VALUE pairs, got \['MSAD\.W_FUSE'\]"):
        load_config("", ["MSAD.W_FUSE"])


def test_wrong_type_is_not_called_an_unknown_key(tmp_path):
    with pytest.raises(ValueError, match=r"MSAD\.W_FUSE"):
        load_config("", ["MSAD.W_FUSE", "[1]"])
    with pytest.raises(ValueError, match="W_FUSE"):
        load_config(write(tmp_path, "wrong.yaml", "MSAD: {W_FUSE: [1]}"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config file .*nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))


# --- the teacher's yaml -----------------------------------------------------------------------------------------------

STUDENT = "DISTILL: {TEACHERS: [{CONFIG: %s, WEIGHTS: w.pth}]}"


def teacher_of(path):
    return load_config(path).DISTILL.TEACHERS[0]["CONFIG"]


def test_teacher_is_found_beside_the_students_yaml(tmp_path, monkeypatch):
    student = write(tmp_path, "a/student.yaml", STUDENT % "teacher.yaml")
    beside = write(tmp_path, "a/teacher.yaml", "")
    assert teacher_of(student) == beside
    monkeypatch.chdir(tmp_path)
    assert Path(teacher_of("a/student.yaml")) == Path("a/teacher.yaml")
    write(tmp_path, "teacher.yaml", "")  # of another experiment, in the working directory
    assert Path(teacher_of("a/student.yaml")) == Path("a/teacher.yaml")


def test_teacher_relative_to_the_working_directory(tmp_path, monkeypatch):
    student = write(tmp_path, "a/student.yaml", STUDENT % "b/teacher.yaml")
    write(tmp_path, "b/teacher.yaml", "")
    monkeypatch.chdir(tmp_path)
    assert teacher_of(student) == "b/teacher.yaml"


def test_teacher_by_absolute_path(tmp_path):
    teacher = write(tmp_path, "b/teacher.yaml", "")
    assert teacher_of(write(tmp_path, "a/student.yaml", STUDENT % teacher)) == teacher


def test_a_missing_teacher_is_left_for_the_trainer_to_name(tmp_path):
    assert teacher_of(write(tmp_path, "student.yaml", STUDENT % "nowhere.yaml")) == "nowhere.yaml"


def test_a_saved_config_finds_the_same_teacher(tmp_path, monkeypatch):
    """detectron2 writes the run's config to OUTPUT_DIR."""
    write(tmp_path, "a/teacher.yaml", "")
    student = write(tmp_path, "a/student.yaml", STUDENT % "teacher.yaml")
    monkeypatch.chdir(tmp_path)
    cfg = load_config("a/student.yaml")
    saved = write(tmp_path, "output/config.yaml", cfg.dump())
    assert Path(teacher_of(saved)) == Path("a/teacher.yaml") and Path(teacher_of(student)).is_file()


# --- documentation ----------------------------------------------------------------------------------------------------


def test_every_key_has_a_comment_and_a_reader():
    folder = Path(config.__file__).parent
    sources = [folder / "config.py", folder / "config_model.py"]
    lines = [line for source in sources for line in source.read_text().splitlines()]
    package = "".join(path.read_text() for path in folder.rglob("*.py") if path not in sources)
    keys_found = 0
    for above, line in itertools.pairwise(lines):
        match = re.match(r"    cfg\.([A-Z0-9_.]+) = (?!CN\(\))", line)
        if match:
            keys_found += 1
            key = match[1]
            assert above.strip().startswith("# ") and "# ---" not in above, f"{key} has no comment"
            assert re.search(rf"\.{key.split('.')[-1]}\b", package), f"nothing reads {key}"
    assert keys_found == len(set(keys(load_config(""))) - set(keys(get_cfg())))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.yaml is empty"),
        ("# nothing\n", "a.yaml is empty"),
        ("- SOLVER\n", "a.yaml is not a config"),
        ("SOLVER\n", "a.yaml is not a config"),
        ("DISTILL:\n", "a.yaml: DISTILL is a section of keys, not nothing"),
        ("MODEL: {FCOS: [3]}\n", r"a.yaml: MODEL.FCOS is a section of keys, not \[3\]"),
        ("_BASE_: b.yaml\n", "b.yaml is empty"),
        ("DISTILL: {LOSSES: [AlignedL1]}", r"DISTILL.LOSSES\[0\] \('AlignedL1'\): an entry is a mapping with NAME"),
        ("DISTILL: {LOSSES: [{WEIGHT: 1}]}", r"DISTILL.LOSSES\[0\] .*: an entry needs NAME"),
        ("DISTILL: {LOSSES: [{NAME: CWD}, {NAME: PKD, LEVELS: p3}]}", r"DISTILL.LOSSES\[1\] .*: LEVELS is a list"),
        ("DISTILL: {LOSSES: [{NAME: CWD, weight: -1.0}]}", r"DISTILL.LOSSES\[0\] .*: WEIGHT is a number of at least 0"),
        ("DISTILL: {LOSSES: [{NAME: CWD, WEIGHT: .nan}]}", r"WEIGHT is a number of at least 0"),
        ("DISTILL: {LOSSES: [{NAME: CWD, WEIGHT: True}]}", r"WEIGHT is a number of at least 0"),
        ("DISTILL: {TEACHERS: [teacher.yaml]}", r"DISTILL.TEACHERS\[0\] .*: an entry is a mapping with CONFIG"),
        ("MSAD: {FUSION_STUDENT: {BRANCHES: [L]}}", r"MSAD.FUSION_STUDENT.BRANCHES\[0\] .*RESOLUTION"),
    ],
)
def test_what_a_yaml_file_cannot_mean_is_named(tmp_path, text, said):
    (tmp_path / "b.yaml").touch()
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("DISTILL.LOSSES", "[{NAME: CWD, LEVELS: [p3]}]", [{"NAME": "CWD", "LEVELS": ["p3"]}]),
        ("DISTILL.LOSSES", "[{'NAME': 'CWD', 'WEIGHT': '1e-3'}]", [{"NAME": "CWD", "WEIGHT": "1e-3"}]),
        ("MODEL.MASK_ON", "true", True),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.MAX_ITER", "1e4", 10000),
        ("OUTPUT_DIR", "123", "123"),
        ("OUTPUT_DIR", "'quoted'", "quoted"),
        ("MODEL.WEIGHTS", "", ""),
        ("DATASETS.TRAIN", "(a, b)", None),
    ],
)
def test_overrides_are_read_as_they_are_meant(key, text, value):
    if value is None:
        with pytest.raises(ValueError, match=key):
            load_config("", [key, text])
        return
    found = value_at(load_config("", [key, text]), key)
    assert found == value and type(found) is type(value)


def test_entries_in_lower_case(tmp_path):
    path = write(tmp_path, "a.yaml", "DISTILL: {LOSSES: [{name: CWD, weight: 2.0}]}\n")
    cfg = load_config(path, ["DISTILL.ASSISTANTS", "[{name: CrossScaleAssistant}]"])
    assert cfg.DISTILL.LOSSES == [{"NAME": "CWD", "WEIGHT": 2.0}]
    assert cfg.DISTILL.ASSISTANTS == [{"NAME": "CrossScaleAssistant"}]


def test_files_beside_a_yaml_and_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for name in ("w.pth", "teacher.yaml", "runs/w.pth", "runs/teacher.yaml", "here.pth"):
        (tmp_path / name).touch()
    (tmp_path / "runs" / "a.yaml").write_text(
        "MODEL: {WEIGHTS: w.pth}\nDISTILL: {TEACHERS: [{CONFIG: teacher.yaml, WEIGHTS: here.pth}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    cfg = load_config("runs/a.yaml")
    assert cfg.MODEL.WEIGHTS == "runs/w.pth"
    assert cfg.DISTILL.TEACHERS == [{"CONFIG": "runs/teacher.yaml", "WEIGHTS": "here.pth"}]
    assert load_config("runs/a.yaml", ["MODEL.WEIGHTS", "w.pth"]).MODEL.WEIGHTS == "w.pth"
    (tmp_path / "runs" / "b.yaml").write_text("MODEL: {WEIGHTS: 'w.pth?matching_heuristics=True'}\n")
    assert load_config("runs/b.yaml").MODEL.WEIGHTS == "runs/w.pth?matching_heuristics=True"


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config("configs/MSAD/fcos_R_50_T_1x.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher"
    assert load_config("MSAD/fcos_R_50_T_1x.yaml") == cfg
