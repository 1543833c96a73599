"""Logging, events, communication, seeds and paths. Passes on detectron2 and on detectron2-lite."""

import io
import json
import logging
import os
import pickle
import random
from pathlib import Path

import detectron2
import numpy as np
import pytest
import termcolor
import torch
import torch.multiprocessing as mp
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import (
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
)
from detectron2.utils.registry import Registry, locate
from detectron2.utils.serialize import PicklableWrapper

IS_LITE = "lite" in detectron2.__version__


# events


def test_event_storage_scalars():
    assert not has_event_storage()
    with pytest.raises(AssertionError, match="EventStorage"):
        get_event_storage()
    with EventStorage(5) as storage:
        assert get_event_storage() is storage and has_event_storage()
        storage.put_scalar("loss", 1.5)
        storage.put_scalars(a=torch.tensor(2.0), b=3, smoothing_hint=False)
        with storage.name_scope("head"):
            storage.put_scalar("loss", 4, cur_iter=3)
        storage.step()
        storage.put_scalar("loss", 2.5)
        assert (storage.iter, storage.iteration) == (6, 6)
        assert storage.latest() == {"loss": (2.5, 6), "a": (2.0, 5), "b": (3.0, 5), "head/loss": (4.0, 3)}
        assert storage.history("loss").values() == [(1.5, 5), (2.5, 6)]
        assert storage.smoothing_hints() == {"loss": True, "a": False, "b": False, "head/loss": True}
        storage.iter = 20
        assert storage.iter == 20
        with pytest.raises(KeyError, match="nothing"):
            storage.history("nothing")
        with pytest.raises(AssertionError, match="loss"):
            storage.put_scalar("loss", 1.0, smoothing_hint=False)
    assert not has_event_storage()


def test_event_storages_nest():
    with EventStorage() as outer:
        with EventStorage() as inner:
            get_event_storage().put_scalar("x", 1)
        assert get_event_storage() is outer
        assert "x" in inner.latest() and "x" not in outer.latest()


def test_smoothing_is_the_median_of_a_window_of_iterations():
    with EventStorage() as storage:
        for value in (100.0, 1.0, 2.0, 9.0):
            storage.put_scalar("noisy", value)
            storage.put_scalar("exact", value, smoothing_hint=False)
            storage.step()
        assert storage.latest_with_smoothing_hint(3) == {"noisy": (2.0, 3), "exact": (9.0, 3)}
        assert storage.count_samples("noisy", 3) == 3


def test_json_writer_appends_a_line_per_iteration(tmp_path):
    path = tmp_path / "metrics.json"
    with EventStorage(4) as storage:
        writer = JSONWriter(str(path))
        storage.put_scalars(loss=1.0, lr=0.5, smoothing_hint=False)
        storage.put_scalar("late", 7, cur_iter=2)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("loss", 3.0, smoothing_hint=False)
        writer.write()
        writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"iteration": 4, "loss": 1.0, "lr": 0.5},
        {"iteration": 2, "late": 7.0},
        {"iteration": 5, "loss": 3.0},
    ]


def test_tensorboard_writer_writes_everything_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with EventStorage(3) as storage:
        writer = TensorboardXWriter(str(tmp_path))
        storage.put_scalar("loss", 1.25)
        storage.put_image("picture", np.zeros((3, 4, 5), np.uint8))
        storage.put_histogram("values", torch.arange(10.0), bins=5)
        writer.write()
        storage.step()
        writer.write()
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 1.25)]
    assert [(event.step, event.width, event.height) for event in events.Images("picture")] == [(3, 5, 4)]
    (histogram,) = events.Histograms("values")
    assert histogram.histogram_value.num == 10 and histogram.histogram_value.sum == 45


def test_metric_printer(caplog):
    caplog.set_level(logging.INFO, "detectron2")
    with EventStorage() as storage:
        printer = CommonMetricPrinter(max_iter=100)
        for iteration in range(10):
            storage.put_scalars(total_loss=2.0, loss_box=0.5, time=3.0, data_time=0.25)
            storage.put_scalar("lr", 0.01, smoothing_hint=False)
            storage.put_scalar("accuracy", 0.5)
            if iteration < 9:
                storage.step()
        printer.write()
        storage.iter = 100
        printer.write()  # nothing: the training is over
    (line,) = [" ".join(record.getMessage().split()) for record in caplog.records]
    assert line.startswith("eta: 0:04:30 iter: 9 total_loss: 2 loss_box: 0.5 time: 3.0000 last_time: 3.0000")
    assert "data_time: 0.2500" in line and "lr: 0.01" in line and "accuracy" not in line


# logging


@pytest.fixture
def logger_name(request):
    name = f"test_{request.node.name}".replace(".", "_")
    yield name
    logging.getLogger(name).handlers.clear()


def test_setup_logger(tmp_path, capsys, logger_name, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    forget = getattr(getattr(termcolor, "can_colorize", None), "cache_clear", None)
    if forget:  # newer versions decide once a process
        forget()
    logger = setup_logger(str(tmp_path), name=logger_name, abbrev_name="short")
    assert setup_logger(str(tmp_path), name=logger_name, abbrev_name="short") is logger
    logging.getLogger(logger_name + ".part").warning("careful")
    out = capsys.readouterr().out
    assert out.count("careful") == 1
    assert "short.part" in out and "\x1b[" in out and "WARNING" in out
    assert not logger.propagate
    text = (tmp_path / "log.txt").read_text()
    assert "WARNING: careful" in text and "\x1b[" not in text


def test_setup_logger_of_another_rank(tmp_path, capsys, logger_name):
    logger = setup_logger(str(tmp_path / "folder" / "run.log"), distributed_rank=2, color=False, name=logger_name)
    logger.info("hello")
    assert "hello" not in capsys.readouterr().out
    assert "INFO: hello" in (tmp_path / "folder" / "run.log.rank2").read_text()


def test_rare_logging(caplog):
    name = "test_rare_logging"
    for i in range(7):
        log_first_n(logging.WARNING, f"first {i}", n=2, name=name)
        log_first_n(logging.WARNING, "same message", name=name, key="message")
        log_every_n(logging.WARNING, f"every {i}", n=3, name=name)
        log_every_n_seconds(logging.WARNING, f"seconds {i}", n=1000, name=name)
    log_first_n(logging.WARNING, "same message", name=name, key="message")
    assert sorted(record.getMessage() for record in caplog.records) == [
        "every 0", "every 3", "every 6", "first 0", "first 1", "same message", "seconds 0",
    ]  # fmt: skip


def test_small_table():
    lines = create_small_table({"AP": 12.34567, "n": 3}).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["AP", "n"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["12.346", "3"]


# communication


def test_comm_without_processes():
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.get_local_size()) == (0, 1, 0, 1)
    assert comm.is_main_process() and comm.synchronize() is None
    assert comm.all_gather("x") == ["x"] and comm.gather("x") == ["x"]
    assert comm.reduce_dict({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)}
    np.random.seed(3)
    seeds = [comm.shared_random_seed(), comm.shared_random_seed()]
    np.random.seed(3)
    assert seeds[0] == comm.shared_random_seed() and seeds[0] != seeds[1]
    assert 0 <= seeds[0] < 2**31


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        comm.get_local_rank()
        answers = {"local group is needed": False}
    except AssertionError:
        answers = {"local group is needed": True}
    comm.create_local_process_group(1)
    comm.synchronize()
    np.random.seed(rank)
    reduced = comm.reduce_dict({"b": torch.tensor(float(rank)), "a": torch.tensor(3.0 * rank + 1)})
    summed = comm.reduce_dict({"a": torch.tensor(3.0 * rank + 1)}, average=False)
    answers.update(
        rank=comm.get_rank(),
        size=comm.get_world_size(),
        local=(comm.get_local_rank(), comm.get_local_size()),
        main=comm.is_main_process(),
        all_gather=comm.all_gather({"rank": rank, "data": "x" * rank}),
        gather=comm.gather(rank * 10, dst=1),
        seed=comm.shared_random_seed(),
        reduced={name: value.item() for name, value in reduced.items()},
        summed={name: value.item() for name, value in summed.items()},
    )
    with open(f"{folder}/{rank}.pkl", "wb") as file:
        pickle.dump(answers, file)
    torch.distributed.destroy_process_group()


def test_comm_with_two_processes(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in (0, 1))
    assert first["local group is needed"] and second["local group is needed"]
    assert (first["rank"], second["rank"], first["size"]) == (0, 1, 2)
    assert first["local"] == second["local"] == (0, 1)  # one process a "machine"
    assert (first["main"], second["main"]) == (True, False)
    assert first["all_gather"] == second["all_gather"] == [{"rank": 0, "data": ""}, {"rank": 1, "data": "x"}]
    assert (first["gather"], second["gather"]) == ([], [0, 10])
    assert first["seed"] == second["seed"]
    assert first["reduced"] == {"a": 2.5, "b": 0.5}
    assert first["summed"] == {"a": 5.0}


# seeds, objects, paths


def test_seed_all_rng():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_all_rng(5)
    first = draw()
    seed_all_rng(5)
    assert draw() == first
    seed_all_rng()
    assert draw() != first


def test_locate():
    assert locate("torch.nn.Conv2d") is torch.nn.Conv2d
    assert locate("torch.nn.Module.parameters") is torch.nn.Module.parameters
    assert locate("os.path") is os.path
    for name in ("torch.nn.Nothing", "no_such_module.x", "not a name"):
        with pytest.raises(ImportError, match=name.split(".")[-1] if name.startswith("torch") else name):
            locate(name)


def test_registry():
    registry = Registry("THINGS")

    @registry.register()
    class Thing:
        pass

    assert registry.get("Thing") is Thing and "Thing" in registry
    with pytest.raises(KeyError, match="Other"):
        registry.get("Other")


def test_picklable_wrapper():
    wrapper = PicklableWrapper(PicklableWrapper(len))
    assert wrapper([1, 2]) == 2 and wrapper.__name__ == "len"
    assert pickle.loads(pickle.dumps(wrapper))([1, 2, 3]) == 3


def test_path_manager_is_local_by_default(tmp_path):
    path = str(tmp_path / "a.txt")
    with PathManager.open(path, "w") as file:
        file.write("x")
    assert PathManager.isfile(path) and PathManager.get_local_path(path) == path


@pytest.mark.skipif(not IS_LITE, reason="only detectron2-lite has it")
def test_atomic_write(tmp_path):
    from detectron2.utils.file_io import atomic_write

    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(str(path), "w") as file:
        file.write("half")
        file.flush()
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_write(str(path), "w") as file:
        file.write("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not IS_LITE, reason="only detectron2-lite has it")
def test_download_to_the_cache(tmp_path, monkeypatch):
    asked = []

    def serve(url, timeout):
        asked.append(url)
        return io.BytesIO(b"content")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", serve)
    for _ in range(2):
        path = PathManager.get_local_path("detectron2://folder/file.pkl")
    assert asked == ["https://dl.fbaipublicfiles.com/detectron2/folder/file.pkl"]
    assert path == str(tmp_path / "detectron2" / "folder" / "file.pkl")
    assert Path(path).read_bytes() == b"content"
    assert PathManager.exists("detectron2://folder/file.pkl")
    with PathManager.open("detectron2://folder/file.pkl", "rb") as file:
        assert file.read() == b"content"
    with pytest.raises(OSError, match="detectron2://"):
        PathManager.open("detectron2://folder/file.pkl", "wb")


def test_collect_env_info():
    text = collect_env_info()
    assert torch.__version__ in text and np.__version__ in text
    assert ("detectron2-lite" in text) == IS_LITE
