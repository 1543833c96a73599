"""Two CPU processes: start, collective operations, gradients, evaluation, errors."""

import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import SimpleTrainer, create_ddp_model, launch
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="checks the processes without a GPU")

BATCH = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.25], [-2.0, 1.0]])


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25]))

    def forward(self, x):
        residual = x @ self.weight - 1
        return {"square": residual.square().mean(), "absolute": residual.abs().mean()}


def one_step(model, batch):
    """Scalars after a step, and the weight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [batch], optimizer)
    trainer.train(0, 1)
    weight = next(model.parameters()).detach()
    return {name: value for name, (value, _) in trainer.storage.latest().items()}, weight


def write_annotations(path: Path) -> None:
    images = [{"id": i, "height": 50, "width": 50, "file_name": f"{i}.jpg"} for i in range(7)]
    objects = [
        {
            "id": i + 1,
            "image_id": i,
            "category_id": 1,
            "bbox": [5, 5, 10 + i, 20],
            "area": 200 + 20 * i,
            "iscrowd": 0,
        }
        for i in range(7)
    ]
    categories = [{"id": 1, "name": "thing"}]
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))


class Offset(nn.Module):
    """Finds each object, more shifted in later images."""

    def forward(self, batch):
        results = []
        for item in batch:
            i = item["image_id"]
            shift = 0.8 * i
            found = Instances((50, 50))
            found.pred_boxes = Boxes(torch.tensor([[5.0 + shift, 5, 15 + i + shift, 25], [30, 30, 40, 40]]))
            found.scores = torch.tensor([0.5 + i / 100, 0.51])
            found.pred_classes = torch.zeros(2, dtype=torch.int64)
            results.append({"instances": found})
        return results


def evaluate(folder: Path, image_ids, output: str):
    MetadataCatalog.get("launch_toy").set(
        json_file=str(folder / "truth.json"),
        thing_classes=["thing"],
        thing_dataset_id_to_contiguous_id={1: 0},
    )
    batches = [[{"image_id": i}] for i in image_ids]
    evaluator = COCOEvaluator("launch_toy", output_dir=str(folder / output), use_fast_impl=False)
    return inference_on_dataset(Offset(), batches, evaluator)


def work(folder: Path, text: str) -> None:
    """Everything the tests below want to know, in one start of the processes."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    total = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(total)
    model = create_ddp_model(Regression(), device_ids=None)
    scalars, weight = one_step(model, BATCH[2 * rank : 2 * rank + 2])
    results = evaluate(folder, range(7)[rank::2], "two")
    answer = {
        "text": text,
        "size": comm.get_world_size(),
        "local": (comm.get_local_rank(), comm.get_local_size()),
        "backend": torch.distributed.get_backend(),
        "total": total.item(),
        "gathered": comm.all_gather({"rank": rank}),
        "scalars": scalars,
        "weight": weight,
        "results": results,
    }
    with open(folder / f"rank{rank}.pkl", "wb") as f:
        pickle.dump(answer, f)
    # A process that exits while gloo's thread still frees the last gathered object aborts now and then.
    comm.synchronize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("launch")
    write_annotations(path / "truth.json")
    launch(work, num_gpus_per_machine=2, dist_url="auto", args=(path, "hello"))
    return path


@pytest.fixture(scope="module")
def answers(folder):
    return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(2)]


def test_processes_are_connected(answers):
    for rank, answer in enumerate(answers):
        assert answer["text"] == "hello"
        assert answer["size"] == 2
        assert answer["local"] == (rank, 2)
        assert answer["backend"] == "gloo"
        assert answer["total"] == 3.0
        assert answer["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_gradients_are_those_of_the_joint_batch(answers):
    _, expected = one_step(Regression(), BATCH)
    for answer in answers:
        torch.testing.assert_close(answer["weight"], expected, rtol=0, atol=1e-6)


def test_metrics_are_averages_and_are_in_the_main_process(answers):
    expected, _ = one_step(Regression(), BATCH)
    for name in ("square", "absolute", "total_loss"):
        assert answers[0]["scalars"][name] == pytest.approx(expected[name], abs=1e-6)
        assert name not in answers[1]["scalars"]
    assert answers[0]["scalars"]["data_time"] >= answers[0]["scalars"]["rank_data_time"]


def test_evaluation_does_not_depend_on_the_number_of_processes(answers, folder):
    alone = evaluate(folder, range(7), "one")
    assert 0 < alone["bbox"]["AP"] < 100
    assert answers[0]["results"]["bbox"] == pytest.approx(alone["bbox"], nan_ok=True, abs=0)
    assert answers[1]["results"] == {}
    rows = [
        json.loads((folder / name / "coco_instances_results.json").read_text()) for name in ("one", "two")
    ]
    assert len(rows[0]) == 14
    for part in rows:
        part.sort(key=lambda row: (row["image_id"], row["score"]))
    assert rows[0] == rows[1]


def fail_in_second() -> None:
    if comm.get_rank() == 1:
        raise KeyError("the culprit")
    time.sleep(3600)  # until it is ended; waiting for the other would fail too, by a closed connection


def test_an_error_in_one_process_ends_all():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="the culprit"):
        launch(fail_in_second, 2, dist_url="auto")


def test_a_single_process_is_a_plain_call():
    seen = []
    launch(seen.append, 1, args=(5,))
    assert seen == [5]
    assert comm.get_world_size() == 1


def test_auto_needs_one_machine():
    with pytest.raises((ValueError, AssertionError)):
        launch(fail_in_second, 1, num_machines=2, machine_rank=0, dist_url="auto")


def test_a_model_in_a_single_process_is_not_wrapped():
    model = Regression()
    assert create_ddp_model(model) is model


def test_metrics_can_be_written_without_a_trainer():
    with EventStorage(4) as storage:
        SimpleTrainer.write_metrics({"a": torch.tensor(2.0), "b": torch.tensor(1.0)}, 0.5, 4, prefix="aux_")
    latest = storage.latest()
    assert latest["aux_total_loss"] == (3.0, 4)
    assert latest["a"] == (2.0, 4)
    assert latest["data_time"] == (0.5, 4)
