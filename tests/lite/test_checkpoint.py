"""Checkpoints. Passes on detectron2 and on detectron2-lite but for what is stricter in lite on purpose."""

import logging
import os
import pickle

import detectron2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts, convert_c2_detectron_names
from torch import nn

lite_only = pytest.mark.skipif("lite" not in detectron2.__version__, reason="detectron2 is less strict here")


def small_model():
    backbone = nn.Sequential()
    backbone.add_module("stem", nn.Sequential())
    backbone.stem.add_module("conv1", nn.Conv2d(3, 2, 1, bias=False))
    model = nn.Module()
    model.add_module("backbone", backbone)
    model.add_module("head", nn.Linear(2, 2))
    model.register_buffer("pixel_mean", torch.full((3,), 7.0))
    for parameter in model.parameters():
        nn.init.constant_(parameter, -1.0)
    return model


@pytest.fixture
def records(caplog):
    for name in ("detectron2", "fvcore"):
        caplog.set_level(logging.INFO, name)
    return caplog


CONV = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)


def dump(content, path):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("zoo.pkl", {"model": {"backbone.stem.conv1.weight": CONV}, "__author__": "me"}),
        ("converted.pkl", {"model": {"stem.conv1.weight": CONV}, "__author__": "me", "matching_heuristics": True}),
        ("caffe2.pkl", {"conv1_w": CONV, "conv1_w_momentum": CONV, "pred_b": np.zeros(3, np.float32)}),
        ("blobs.pkl", {"blobs": {"conv1_w": CONV}}),
        ("full.pth", {"model": {"backbone.stem.conv1.weight": torch.from_numpy(CONV)}, "iteration": 3}),
        ("bare.pth", {"backbone.stem.conv1.weight": torch.from_numpy(CONV)}),
        ("ddp.pth", {"model": {"module.backbone.stem.conv1.weight": torch.from_numpy(CONV)}}),
        ("query.pth?matching_heuristics=True", {"model": {"stem.conv1.weight": torch.from_numpy(CONV)}}),
    ],
)
def test_formats(tmp_path, name, content):
    model = small_model()
    dump(content, tmp_path / name.partition("?")[0])
    rest = DetectionCheckpointer(model).load(str(tmp_path / name))
    assert np.array_equal(model.backbone.stem.conv1.weight.detach().numpy(), CONV)
    assert (model.head.weight == -1).all() and (model.pixel_mean == 7).all()
    assert "model" not in rest and rest.get("iteration") == content.get("iteration")


def test_checkpoints_of_pycls(tmp_path):
    model = small_model()
    weights = {"stem.conv1.weight": torch.from_numpy(CONV), "stem.bn.num_batches_tracked": torch.tensor(7)}
    path = dump({"model_state": weights, "epoch": 4, "optimizer_state": {}}, tmp_path / "m.pyth")
    rest = DetectionCheckpointer(model).load(path)
    assert np.array_equal(model.backbone.stem.conv1.weight.detach().numpy(), CONV)
    assert rest == {"__author__": "pycls", "matching_heuristics": True}
    with pytest.raises((ValueError, AssertionError), match="model_state"):
        DetectionCheckpointer(model).load(dump({"model": weights}, tmp_path / "other.pyth"))


def test_report_of_what_does_not_fit(tmp_path, records):
    weights = {
        "backbone.stem.conv1.weight": torch.from_numpy(CONV),
        "head.weight": torch.zeros(5, 2),
        "foreign": torch.zeros(1),
    }
    DetectionCheckpointer(small_model()).load(dump({"model": weights}, tmp_path / "a.pth"))
    warnings = "\n".join(record.getMessage() for record in records.records if record.levelname == "WARNING")
    for part in ("head.weight", "(5, 2)", "(2, 2)", "foreign", "bias"):
        assert part in warnings
    assert "pixel_mean" not in warnings and "stem" not in warnings


@lite_only
def test_a_checkpoint_that_fits_nowhere_is_an_error_in_the_log(tmp_path, records):
    path = dump({"model": {"foreign": torch.zeros(1), "head.weight": torch.zeros(9)}}, tmp_path / "a.pth")
    DetectionCheckpointer(small_model()).load(path)
    (message,) = [record.getMessage() for record in records.records if record.levelname == "ERROR"]
    assert path in message and "NOTHING" in message


@lite_only
def test_report_counts(tmp_path, records):
    weights = {"stem.conv1.weight": CONV, "fc.weight": np.zeros((4, 2), np.float32)}
    content = {"model": weights, "__author__": "me", "matching_heuristics": True}
    DetectionCheckpointer(small_model()).load(dump(content, tmp_path / "a.pkl"))
    text = "\n".join(record.getMessage() for record in records.records if record.levelname == "INFO")
    assert "1 of 2 tensors of the checkpoint have a place in the model; 1 below backbone" in text
    assert "Loaded 1 of the 2 tensors" in text


def test_save_and_resume(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return model, optimizer, DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer)

    model, optimizer, checkpointer = make()
    assert not checkpointer.has_checkpoint()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpointer.save("first", iteration=1)
    optimizer.step()
    checkpointer.save("second", iteration=2)

    other, other_optimizer, other_checkpointer = make()
    assert other_checkpointer.has_checkpoint()
    assert other_checkpointer.get_checkpoint_file() == str(tmp_path / "second.pth")
    assert other_checkpointer.resume_or_load("", resume=True) == {"iteration": 2}
    optimizer.step()
    other.weight.grad, other.bias.grad = model.weight.grad, model.bias.grad
    other_optimizer.step()
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)

    _, _, checkpointer = make()
    rest = checkpointer.resume_or_load(str(tmp_path / "first.pth"), resume=False)
    assert "optimizer" in rest and rest["iteration"] == 1  # weights only, the rest is handed back


def test_periodic_checkpointer(tmp_path):
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=2, max_iter=5, max_to_keep=1)
    for iteration in range(5):
        periodic.step(iteration)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000003.pth", "model_final.pth"]


def test_only_the_main_process_saves(tmp_path):
    DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("model")
    assert os.listdir(tmp_path) == []


def test_no_path_loads_nothing():
    model = small_model()
    assert DetectionCheckpointer(model).load("") == {}
    assert (model.head.weight == -1).all()


@pytest.mark.parametrize("name", ["nowhere.pth", "nowhere.pkl"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises((AssertionError, FileNotFoundError), match="nowhere"):
        DetectionCheckpointer(small_model()).load(str(tmp_path / name))


@lite_only
def test_interrupted_save_leaves_the_former_file(tmp_path):
    class Breaks:
        def __reduce__(self):
            raise KeyboardInterrupt

    model = nn.Linear(2, 2)
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    checkpointer.save("model", iteration=1)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model", big=torch.zeros(1000), iteration=2, broken=Breaks())
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 1}


@lite_only
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_files_do_not_run_code(tmp_path, suffix):
    target = tmp_path / "written"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    path = dump({"model": {"head.bias": Attack()}, "__author__": "me"}, tmp_path / f"bad{suffix}")
    with pytest.raises(ValueError, match=r"mkdir") as error:
        DetectionCheckpointer(small_model()).load(path)
    assert path in str(error.value)
    assert not target.exists()


@lite_only
@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    dump({"model": {"head.bias": torch.zeros(2).numpy() if "pkl" in name else torch.zeros(2)}}, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=name):
        DetectionCheckpointer(small_model()).load(str(path))


@lite_only
@pytest.mark.parametrize("content", [[1], {"epoch": 3}, {"model": [1]}, {"state_dict": {"a": torch.zeros(1)}}])
def test_files_that_are_no_checkpoints_are_named(tmp_path, content):
    path = dump(content, tmp_path / "strange.pth")
    with pytest.raises(ValueError, match=r"strange\.pth"):
        DetectionCheckpointer(small_model()).load(path)


@lite_only
def test_training_state_may_hold_numpy(tmp_path):
    state = {"rng": np.random.get_state(), "best": np.float64(2.5), "counts": np.arange(3)}
    DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path)).save("model", **state)
    rest = DetectionCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / "model.pth"))
    assert rest["best"] == 2.5 and np.array_equal(rest["counts"], [0, 1, 2])
    assert np.array_equal(rest["rng"][1], state["rng"][1])


@lite_only
def test_pickle_may_hold_tensors(tmp_path):
    model = small_model()
    content = {"model": {"head.bias": torch.tensor([1.0, 2.0])}, "__author__": "me"}
    DetectionCheckpointer(model).load(dump(content, tmp_path / "a.pkl"))
    assert model.head.bias.tolist() == [1.0, 2.0]


@lite_only
@pytest.mark.parametrize("address", ["detectron2://ImageNetPretrained/MSRA/R-50.pkl", "https://127.0.0.1:9/w.pkl"])
def test_failed_download_says_what_to_do(tmp_path, monkeypatch, address):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS") as error:
        DetectionCheckpointer(small_model()).load(address)
    message = str(error.value)
    assert address in message and str(tmp_path) in message and "no route to host" in message
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if not name.endswith(".lock")]


@lite_only
def test_catalog_is_refused():
    with pytest.raises(FileNotFoundError, match=r"catalog://.*MODEL\.WEIGHTS"):
        DetectionCheckpointer(small_model()).load("catalog://ImageNetPretrained/MSRA/R-50")


def test_caffe2_names():
    expected = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res_conv1_bn_b": "stem.conv1.norm.bias",
        "conv1_gn_s": "stem.conv1.norm.weight",
        "res2_0_branch1_w": "res2.0.shortcut.weight",
        "res2_0_branch2a_bn_rm": "res2.0.conv1.norm.running_mean",
        "res4_22_branch2b_bn_riv": "res4.22.conv2.norm.running_var",
        "res5_2_branch2c_bn_b": "res5.2.conv3.norm.bias",
        "fc1000_w": "fc1000.weight",
        "pred_b": "linear.bias",
    }
    for old, new in expected.items():
        tensor = torch.rand(2)
        weights, origin = convert_c2_detectron_names({old: tensor})
        assert list(weights) == [new] and weights[new] is tensor and origin == {new: old}


def shapes(**named):
    return {name.replace("__", "."): torch.full((size,), float(size)) for name, size in named.items()}


def test_longest_ending_wins():
    model = shapes(a__b__c=1, x__c=1, y_c=1)
    result = align_and_update_state_dicts(
        model, {"c": torch.tensor([10.0]), "b.c": torch.tensor([20.0])}, c2_conversion=False
    )
    assert {name: value.item() for name, value in result.items()} == {"a.b.c": 20.0, "x.c": 10.0}


def test_wrong_shape_keeps_its_name():
    result = align_and_update_state_dicts(shapes(a__c=2, a__d=1), shapes(c=3, d=1), c2_conversion=False)
    assert sorted(result) == ["a.d", "c"]


def test_two_places_for_one_tensor_are_an_error():
    with pytest.raises(ValueError):
        align_and_update_state_dicts(shapes(a__c=1, b__c=1), shapes(c=1), c2_conversion=False)
