"""Variants of a folder, of files and of a sweep; the input size of equal cost."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from msad import load_config
from msad.config_values import value_at
from msad.evaluation.cost import count_macs, random_inputs
from msad.evaluation.region_limits import fill_regions
from msad.experiments import costs
from msad.experiments.comparison import Comparison
from msad.experiments.costs import measure_costs, nearest_size, typical_record
from msad.experiments.jobs import Run
from msad.experiments.variants import QUICK, Variant, choose, equal_cost, standard_variants, sweep, unique_names

CONFIGS = Path(__file__).parents[2] / "configs"
ON_SCENES = ["DATASETS.TEST", ("scenes_val",)]  # which configs/quickstart leaves to the tool


def test_names():
    assert unique_names([Path("x/a.yaml"), Path("x/b.yaml")]) == {"a": Path("x/a.yaml"), "b": Path("x/b.yaml")}
    assert set(unique_names([Path("/x/a.yaml"), Path("/y/a.yaml")])) == {"x_a", "y_a"}
    with pytest.raises(ValueError, match="several files are called x_a"):
        unique_names([Path("/x/a.yaml"), Path("/x/a.yaml")])


def test_a_folder_makes_the_standard_study(tmp_path):
    variants = standard_variants(CONFIGS / "quickstart")
    assert list(variants)[: len(QUICK)] == list(QUICK)
    assert all(v.title and len(v.description) > 50 for v in variants.values())
    assert len({v.description for v in variants.values()}) == len(variants)
    # What a variant refers to comes along; what has no file is not there.
    assert set(choose(variants, ["baseline_L_shifted@equal_time"])) == {
        "baseline_L_shifted", "baseline_L_shifted@equal_time", "student_L",
    }  # fmt: skip
    assert "student_L_light" not in standard_variants(CONFIGS / "mouse")
    with pytest.raises(ValueError, match=r"baseline_XL.*did you mean baseline_"):
        choose(variants, ["baseline_XL"])
    with pytest.raises(ValueError, match=r"none of baseline_H\.yaml"):
        standard_variants(tmp_path)


def test_a_study_has_its_controls(tmp_path):
    comparison = Comparison(standard_variants(CONFIGS / "quickstart"), tmp_path, ON_SCENES)
    no_kd, student = (comparison.config(Run(name, 0)) for name in ("student_L_no_kd", "student_L"))
    assert no_kd.DISTILL.LOSSES == [] and no_kd.DISTILL.TEACHERS == student.DISTILL.TEACHERS != []
    longer = comparison.config(Run("baseline_L_shifted@equal_iterations", 0)).SOLVER.MAX_ITER
    assert longer == comparison.config(Run("teacher", 0)).SOLVER.MAX_ITER + student.SOLVER.MAX_ITER
    assert comparison.needs(Run("baseline_L_shifted@equal_time", 0)) == [
        Run(name, 0) for name in ("baseline_L_shifted", "student_L", "teacher")
    ]


def test_input_scale_reaches_every_variant(tmp_path):
    variants = choose(standard_variants(CONFIGS / "quickstart"), ["baseline_H", "baseline_L"])
    comparison = Comparison(variants, tmp_path, ON_SCENES, input_scale=3.0)
    high, low = (comparison.config(Run(name, 0)).INPUT for name in variants)
    assert high.MIN_SIZE_TEST == 384 and tuple(high.MIN_SIZE_TRAIN) == (384,)
    assert low.MIN_SIZE_TEST == 192 and low.MAX_SIZE_TEST == high.MAX_SIZE_TEST // 2


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def losses(tmp_path):
    """Files of a student without a loss, and of two with one of weight 0.2 and 3."""
    entries_of = {"no_kd": [], "lad": [{"NAME": "LAD", "WEIGHT": 0.2}], "cad": [{"NAME": "CAD", "WEIGHT": 3}]}
    for name, entries in entries_of.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"DISTILL": {"LOSSES": entries}}))
    return {name: Variant(tmp_path / f"{name}.yaml") for name in ("no_kd", "lad", "cad")}


def test_a_position_in_a_list_is_swept(losses):
    swept = sweep(losses, "DISTILL.LOSSES.0.WEIGHT=x0.1,x10")
    assert list(swept) == ["no_kd", "lad_WEIGHT_0.02", "lad_WEIGHT_2.0", "cad_WEIGHT_0.3", "cad_WEIGHT_30"]
    assert swept["no_kd"] == losses["no_kd"]  # it has no such key
    assert sweep(losses, "DISTILL.LOSSES.0.WEIGHT=x10", ["DISTILL.LOSSES", "[{NAME: CWD, WEIGHT: 3}]"])[
        "lad_WEIGHT_30"
    ].overrides == ("DISTILL.LOSSES", [{"NAME": "CWD", "WEIGHT": 30}]), "overrides belong to the config"
    one = swept["lad_WEIGHT_0.02"]
    assert load_config(one.file, list(one.overrides)).DISTILL.LOSSES == [{"NAME": "LAD", "WEIGHT": 0.02}]
    assert one.swept == ("lad", "DISTILL.LOSSES.0.WEIGHT", 0.02)


def test_an_ordinary_key_is_swept(losses):
    swept = sweep(losses, "SOLVER.BASE_LR=0.01,0.1")
    assert len(swept) == 6 and swept["cad_BASE_LR_0.1"].overrides == ("SOLVER.BASE_LR", 0.1)


@pytest.mark.parametrize(
    ("assignment", "values"),
    [
        ("DISTILL.BALANCE.RATIO=0,1", [0.0, 1.0]),
        ("SOLVER.MAX_ITER=x1,x0.5,1e2", [5, 2, 100]),
        ("SOLVER.BASE_LR=1e-3,x2", [0.001, 0.02]),
        ("DISTILL.INIT_STUDENT=none,x2", ["none", "x2"]),
        ("MSAD.FUSION.NORMALIZE=True,false", [True, False]),
        ("SOLVER.STEPS.1=4,x0.75", [(2, 4), (2, 3)]),
        ("DISTILL.STAGES.0.SOLVER.MAX_ITER=x3,7", [[{"SOLVER": {"MAX_ITER": 9}}], [{"SOLVER": {"MAX_ITER": 7}}]]),
    ],
)
def test_a_swept_value_has_the_type_of_its_key(tmp_path, assignment, values):
    solver = {"MAX_ITER": 5, "STEPS": [2, 4], "BASE_LR": 0.01}
    content = {"SOLVER": solver, "DISTILL": {"STAGES": [{"SOLVER": {"MAX_ITER": 3}}]}}
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(content))
    found = []
    for variant in sweep({"it": Variant(tmp_path / "it.yaml")}, assignment).values():
        key = re.sub(r"\.\d.*", "", variant.overrides[0])
        found.append(value_at(load_config(variant.file, list(variant.overrides)), key))
        number = assignment.startswith(("DISTILL.INIT", "MSAD"))
        assert number or isinstance(variant.swept[2], (int, float)), "the report draws it"
    assert found == values and list(map(type, found)) == list(map(type, values))


def test_paths_and_lists_are_swept(losses):
    """A name is a folder's, and commas inside of brackets are not those between values."""
    paths = sweep(losses, "MODEL.WEIGHTS=/a/model_final.pth,/b/model_final.pth")
    names = [name for name in paths if name.startswith("cad")]
    assert names == ["cad_WEIGHTS_a_model_final.pth", "cad_WEIGHTS_b_model_final.pth"]
    assert paths[names[1]].overrides == ("MODEL.WEIGHTS", "/b/model_final.pth")
    sizes = sweep(losses, "INPUT.MIN_SIZE_TRAIN=(128,),(192, 256)")
    found = {name: load_config(v.file, list(v.overrides)).INPUT.MIN_SIZE_TRAIN for name, v in sizes.items()}
    assert found["cad_MIN_SIZE_TRAIN_128"] == (128,) and found["cad_MIN_SIZE_TRAIN_192_256"] == (192, 256)


def test_a_value_is_swept_once(losses):
    with pytest.raises(ValueError, match=r"--sweep SOLVER.MAX_ITER=1,1.0: MAX_ITER_1 twice"):
        sweep(losses, "SOLVER.MAX_ITER=1,1.0")


@pytest.mark.parametrize("wrong", ["SOLVER.BASE_LR", "SOLVER.BASE_LR=", "SOLVER.NO_SUCH=1", "DISTILL.LOSSES.7.NAME=1"])
def test_what_cannot_be_swept_is_said(losses, wrong):
    with pytest.raises(ValueError, match="--sweep"):
        sweep(losses, wrong)


# --- equal cost -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "size"), [(1, 32), (3.9, 64), (4, 64), (5.5, 64), (7, 96), (99, 96), (0, 32)])
def test_the_largest_size_of_the_nearest_cost(target, size):
    """Inputs padded to multiples of 32, costs of 1, 4 and 9; at most 96."""
    calls = []

    def cost(short):
        calls.append(short)
        return (-(-short // 32)) ** 2

    assert nearest_size(cost, target, 96) == size
    assert len(calls) < 25


def test_equal_cost_is_the_students(project, tmp_path):
    """H is 512 px; inputs are padded to multiples of 32."""
    sizes = {"MIN_SIZE_TRAIN": (512,), "MAX_SIZE_TRAIN": 512, "MIN_SIZE_TEST": 512, "MAX_SIZE_TEST": 512}
    high = tuple(item for key, size in sizes.items() for item in (f"INPUT.{key}", size))
    low = ("INPUT.MIN_SIZE_TEST", 256, "INPUT.MAX_SIZE_TEST", 256)
    baseline = replace(equal_cost(project / "fcos.yaml", "student")["baseline_equal_cost"], overrides=high)
    student = Variant(project / "student.yaml", low)
    comparison = Comparison({"student": student, "baseline_equal_cost": baseline}, tmp_path)
    cfg, students = (comparison.config(Run(name, 0)) for name in ("baseline_equal_cost", "student"))
    # Stock levels; of the sizes that are padded alike the largest, in training too.
    size = cfg.INPUT.MIN_SIZE_TEST
    assert cfg.MODEL.FCOS.IN_FEATURES[0] == "p3" and size % 32 == 0 and 256 < size < 512
    assert (tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == ((size,), size, size)
    detector = build_model(cfg).eval()
    costs = measure_costs({"it": (cfg, detector), "student": (students, build_model(students).eval())}, rounds=1)
    assert costs["it"]["input"] == [size, size]
    target = costs["student"]["gmacs"]["total"]
    near = [count_macs(detector, random_inputs(size + step, size + step))["total"] for step in (-32, 0, 32)]
    assert min(near, key=lambda macs: abs(macs - target)) == near[1] == pytest.approx(target, rel=0.1)


def size_of_equal_cost(project, tmp_path, short, reference, channels=32):
    """Short side of a detector at the cost of the same network, with 32 channels, at the short side ``reference``."""
    own = ("INPUT.MIN_SIZE_TEST", short, "INPUT.MAX_SIZE_TEST", 2 * short, "MODEL.FPN.OUT_CHANNELS", channels)
    other = ("INPUT.MIN_SIZE_TEST", reference, "INPUT.MAX_SIZE_TEST", 2 * reference)
    baseline = replace(equal_cost(project / "fcos.yaml", "other")["baseline_equal_cost"], overrides=own)
    variants = {"other": Variant(project / "fcos.yaml", other), "baseline_equal_cost": baseline}
    return Comparison(variants, tmp_path).config(Run("baseline_equal_cost", 0)).INPUT.MIN_SIZE_TEST


def test_a_reference_may_cost_many_times_more(project, tmp_path, monkeypatch):
    assert size_of_equal_cost(project, tmp_path, 32, 128) == 128
    monkeypatch.setattr(costs, "LARGEST", 2)
    costs._equal_cost_size.cache_clear()
    said = r"equal cost: the reference takes [\d.]+ GMACs, and the conventional detector [\d.]+ at 64 px"
    with pytest.raises(ValueError, match=said):
        size_of_equal_cost(project, tmp_path, 32, 128)


def test_a_detector_that_costs_more_at_any_size_is_not_called_equal(project, tmp_path):
    with pytest.raises(ValueError, match=r"equal cost: the reference takes [\d.]+ GMACs, .* at 32 px"):
        size_of_equal_cost(project, tmp_path, 64, 32, channels=256)


def test_equal_cost_of_files_that_are_not_resized(project, tmp_path):
    """A detector has no scale then; a reference has the size of the first file."""
    with pytest.raises(ValueError, match=r"INPUT\.MIN_SIZE_TEST is 0, the size of the files"):
        size_of_equal_cost(project, tmp_path, 0, 64)
    image = json.loads((project / "data/annotations_val.json").read_text())["images"][0]
    short = min(image["height"], image["width"])
    as_it_is, resized = (size_of_equal_cost(project, tmp_path, 64, size) for size in (0, short))
    assert as_it_is == resized >= short


def test_costs_are_those_of_an_image_like_most(project, clean_catalogs):
    sizes = [(520, 696), (256, 320), (256, 256), (None, None), (256, 256)]
    records = [{"file_name": number, "height": h, "width": w} for number, (h, w) in enumerate(sizes)]
    DatasetCatalog.register("sizes", lambda: records)
    MetadataCatalog.get("sizes")
    assert typical_record(load_config(project / "fcos.yaml", ["DATASETS.TEST", ["sizes"]]))["file_name"] == 2


def test_equal_cost_passes_over_sizes_that_norms_refuse(project, tmp_path):
    """A map of one pixel has one value a group, of a single image."""
    sizes = []
    for norm in ("", "GN"):
        variants = {"reference": Variant(project / "fcos.yaml"), **equal_cost(project / "fcos.yaml", "reference")}
        comparison = Comparison(variants, tmp_path, ["MODEL.FCOS.NORM", norm])
        sizes.append(comparison.config(Run("baseline_equal_cost", 0)).INPUT.MIN_SIZE_TEST)
    assert sizes == [64, 64]


def test_networks_that_are_alike_are_measured_once(project, monkeypatch):
    loaded, get = [], DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: loaded.append(name) or get(name))
    configs = {name: load_config(project / "fcos.yaml", ["MODEL.WEIGHTS", f"{name}.pth"]) for name in ("a", "b")}
    configs["c"] = load_config(project / "fcos.yaml", ["INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 32])
    configs["t"] = load_config(project / "teacher.yaml")
    costs = measure_costs({name: (cfg, build_model(cfg).eval()) for name, cfg in configs.items()}, rounds=2)
    assert loaded == ["tiny_val"]
    assert costs["a"] is costs["b"] and set(costs) == {"a", "b", "c", "t_H", "t_L", "t_fused"}
    networks = {name: entry["network"] for name, entry in costs.items()}
    assert networks["a"] == networks["c"] and len(set(networks.values())) == 4  # c has another input
    assert costs["a"]["input"] != costs["c"]["input"]
    assert costs["t_fused"]["gmacs"]["total"] > costs["t_H"]["gmacs"]["total"] > costs["t_L"]["gmacs"]["total"]
    assert all(entry["ms"]["total"] > 0 and entry["parameters"] > 0 for entry in costs.values())


def test_regions_of_networks_that_are_alike_are_their_own(project, tiny_cfg):
    """With random weights there are few detections that have a mask, with others as many as the limits allow."""
    cfg = load_config(project / "fcos.yaml")
    cfg.MODEL = tiny_cfg("MaskRCNN").MODEL
    few, many = build_model(cfg).eval(), fill_regions(build_model(cfg).eval())
    few.roi_heads.box_predictor.test_score_thresh = 1.0
    costs = measure_costs({"few": (cfg, few), "many": (cfg, many)}, rounds=1)
    assert costs["few"]["gmacs"]["head"] < costs["many"]["gmacs"]["head"]
    assert costs["few"]["network"] == costs["many"]["network"]


def test_latency_is_that_of_the_least_disturbed_round(project, monkeypatch):
    """Of the rounds after the first, which warms up; times by part are those of one round."""
    totals = iter([1.0, 9.0, 4.0, 6.0])
    monkeypatch.setattr(costs, "time_parts", lambda *_: {"head": 10.0 * (now := next(totals)), "total": now})
    cfg = load_config(project / "fcos.yaml")
    found = measure_costs({"it": (cfg, build_model(cfg).eval())}, rounds=3)
    assert found["it"]["ms"] == {"head": 40.0, "total": 4.0}
