"""Two gloo processes on CPU: the same gradients as one process with the joint batch, and exact resume.

What can be equal and what cannot: detectron2's dense detectors divide their losses by a running count of positives
that every process keeps for itself, and DistributedDataParallel averages the gradients. With as many positives in
each process, and running counts that start at half of the joint one, the average of the processes is the joint
gradient; the tests are set up so. With different numbers of positives the two differ by design of detectron2.
Distillation losses are means over equally many elements and need no such care. Batch normalisation over the batch
would differ too, hence FrozenBN here.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase, create_ddp_model, defaults, launch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from runs import TEACHER, left_by_a_killed_run

from msad import load_config
from msad.data import register_datasets
from msad.engine import DistillTrainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="detectron2 would use the GPUs")

STUDENTS = ("student", "retinanet_student", "gfl_student", "stock_student")
PARTS = ("distillation", "detection", "both")
# detectron2 asks for a GPU unless it is told that there is none.
on_cpu = functools.partial(create_ddp_model, device_ids=None)
COUNT = 8.0  # initial running count of positives in each of two processes
UNEVEN = (3, 1)  # objects of images with different numbers of positives, of which GFL keeps no running count


def student_config(project: Path, name: str, output: Path):
    """A student's config; the stock student gets the project's keys and the teacher of the other RetinaNet."""
    teacher = TEACHER.get(name, "retinanet_teacher")
    cfg = load_config(project / f"{name}.yaml")
    cfg.DATASETS.REGISTER = load_config(project / "base.yaml").DATASETS.REGISTER
    cfg.DISTILL.TEACHERS = [{"CONFIG": str(project / f"{teacher}.yaml"), "WEIGHTS": str(project / f"{teacher}.pth")}]
    cfg.DISTILL.LOSSES = [{"NAME": "AlignedL1", "WEIGHT": 0.6}]
    if name == "student":  # also with parts of the loss that are trained
        adapted = {"NAME": "FitNet", "WEIGHT": 0.1, "ADAPTATION": "always"}
        cfg.DISTILL.LOSSES += [adapted, {"NAME": "FGD"}, {"NAME": "LAD"}]
    cfg.DISTILL.WARMUP_ITERS = 3
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 3
    cfg.OUTPUT_DIR = str(output)
    return cfg


def images(objects: tuple[int, int] = (3, 3)) -> list[dict]:
    """Two images of different content with the same ground truth, or the first objects of it."""
    generator = torch.Generator().manual_seed(1)
    gt = Instances((64, 64))
    gt.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 30.0, 34.0], [20.0, 24.0, 62.0, 60.0], [40.0, 2.0, 52.0, 14.0]]))
    gt.gt_classes = torch.tensor([0, 2, 5])
    return [{"image": torch.rand(3, 64, 64, generator=generator) * 255, "instances": gt[:n]} for n in objects]


def gradients(
    project: Path, name: str, batch: list[dict], count: float, losses: list[dict] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of the distillation loss, of the detection losses, and of both, after one more step before them."""
    cfg = student_config(project, name, project / "unused")
    cfg.DISTILL.LOSSES = losses or cfg.DISTILL.LOSSES
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    torch.manual_seed(3)
    distiller = DistillTrainer.build_model(cfg).train()
    out = {}
    for part in PARTS:
        distiller.w_det = float(part != "distillation")
        distiller.factor = lambda iteration, part=part: float(part != "detection")
        model = on_cpu(distiller, broadcast_buffers=False)
        for _ in range(2):  # an unused parameter is an error of the second pass
            if name != "gfl_student":
                distiller.student.loss_normalizer = count
            model.zero_grad()
            with EventStorage():
                sum(model(batch).values()).backward()
        trained = [*distiller.student.named_parameters(), *distiller.losses.named_parameters()]
        out[part] = {k: p.grad.clone() for k, p in trained if p.grad is not None}
        if comm.get_world_size() > 1:
            assert sum(p.requires_grad for p in model.parameters()) == sum(p.requires_grad for _, p in trained)
    return out


class Record(HookBase):
    def __init__(self):
        self.losses, self.counts = [], []

    def after_step(self):
        self.losses.append({k: v for k, (v, _) in self.trainer.storage.latest().items() if "loss" in k})
        self.counts.append(self.trainer.distiller.student.loss_normalizer)


def train(cfg, resume=False) -> dict:
    register_datasets(cfg)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume)
    record = Record()
    trainer.register_hooks([record])
    trainer.train()
    weights = trainer.distiller.student.state_dict()
    return {"losses": record.losses, "counts": record.counts, "weights": weights}


def work(project: Path, output: Path) -> None:
    """What each of the two processes does; leaves its results in ``output``."""
    torch.set_num_threads(1)
    defaults.create_ddp_model = on_cpu
    rank = comm.get_rank()
    results = {name: gradients(project, name, images()[rank : rank + 1], COUNT) for name in STUDENTS}
    results["uneven"] = gradients(project, "gfl_student", images(UNEVEN)[rank : rank + 1], COUNT, [{"NAME": "Chen"}])
    results["whole"] = train(student_config(project, "retinanet_student", output / "whole"))
    if comm.is_main_process():
        left_by_a_killed_run(output / "whole", output / "killed")
    comm.synchronize()
    results["resumed"] = train(student_config(project, "retinanet_student", output / "killed"), resume=True)
    torch.save(results, output / f"{rank}.pth")


@pytest.fixture(scope="module")
def ranks(project, teacher_weights, tmp_path_factory) -> list[dict]:
    """Results of both processes."""
    output = tmp_path_factory.mktemp("ranks")
    (output / "whole").mkdir()
    launch(work, 2, dist_url="auto", args=(project, output))
    return [torch.load(output / f"{rank}.pth") for rank in range(2)]


def assert_gradients_of(joint: dict[str, dict[str, torch.Tensor]], ranks: list[dict], name: str) -> None:
    for part in PARTS:
        first, second = (r[name][part] for r in ranks)
        assert first.keys() == second.keys() == joint[part].keys()
        largest = max(g.abs().max().item() for g in joint[part].values())
        assert largest > 1e-3
        for key, value in joint[part].items():
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(
                first[key], value, rtol=1e-5, atol=1e-6 * largest, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", STUDENTS)
def test_two_processes_give_the_gradients_of_the_joint_batch(project, ranks, name):
    joint = gradients(project, name, images(), 2 * COUNT)
    assert_gradients_of(joint, ranks, name)
    moved = {key for key, value in joint["distillation"].items() if value.abs().max() > 0}
    of_losses = ("1.adaptation.", "2.loss.student_context.", "2.loss.teacher_context.")
    assert moved and all(key.startswith(("backbone.", *of_losses)) for key in moved)
    assert all(any(key.startswith(prefix) for key in moved) == (name == "student") for prefix in of_losses)


def test_losses_between_predictions_are_divided_by_the_positives_of_all_processes(project, ranks):
    joint = gradients(project, "gfl_student", images(UNEVEN), 2 * COUNT, [{"NAME": "Chen"}])
    assert_gradients_of(joint, ranks, "uneven")


def test_the_processes_share_weights_and_see_different_images(ranks):
    first, second = (r["whole"] for r in ranks)
    # Running statistics too: what is evaluated at the end is the first process's model, which is saved.
    assert any("running" in name for name in second["weights"])
    assert all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())
    assert first["counts"] != second["counts"]
    assert len(first["losses"]) == 4


def test_two_processes_resume_exactly(ranks):
    for result in ranks:
        whole, resumed = result["whole"], result["resumed"]
        assert resumed["counts"] == whole["counts"][3:]
        assert resumed["losses"] == whole["losses"][3:]
    # BatchNorm's running statistics come from the main process's checkpoint.
    whole, resumed = (ranks[0][key]["weights"] for key in ("whole", "resumed"))
    assert all(map(torch.equal, whole.values(), resumed.values()))
