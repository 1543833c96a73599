"""Semantic segmentation: data sets, mapped samples, the model with its head, training, and the metrics."""

import json
import os

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import load_sem_seg
from detectron2.evaluation import SemSegEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model, build_sem_seg_head
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from PIL import Image

CLASSES = ["sky", "road", "car", "tree", "never"]
IGNORED = 255


def _write(folder, count=5):
    """Images and label maps of blocks; the last class never occurs."""
    rng = np.random.RandomState(5)
    for kind in ("images", "labels"):
        os.makedirs(folder / kind, exist_ok=True)
    for i in range(count):
        h, w = 40 + 10 * i, 60
        labels = np.kron(rng.randint(0, 5, (h // 10, w // 10)), np.ones((10, 10))).astype(np.uint8)
        labels[labels == 4] = IGNORED
        Image.fromarray(labels).save(folder / "labels" / f"{9 - i}.png")
        Image.fromarray(rng.randint(0, 255, (h, w, 3)).astype(np.uint8)).save(folder / "images" / f"{9 - i}.png")
    Image.fromarray(labels).save(folder / "labels" / "alone.png")
    (folder / "images" / "note.txt").write_text("no image")


def _config():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (48, 64), 50
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("blocks",)
    return cfg


def _plain(sample, folder):
    return {k: v.replace(str(folder), "") if isinstance(v, str) else v for k, v in sample.items()}


def _data(out, cfg, folder):
    out["load_sem_seg"] = [_plain(s, folder) for s in DatasetCatalog.get("blocks")]
    out["dicts"] = len(get_detection_dataset_dicts("blocks"))
    for crop in (False, True):
        cfg.INPUT.CROP.ENABLED = crop
        for train in (True, False):
            mapper = DatasetMapper(cfg, train)
            for seed in range(3):
                np.random.seed(seed)
                out[f"mapper/{crop}/{train}/{seed}"] = _plain(mapper(DatasetCatalog.get("blocks")[seed]), folder)
    cfg.INPUT.CROP.ENABLED = False
    np.random.seed(0)
    batch = next(iter(build_detection_train_loader(cfg)))
    out["train_loader"] = [sorted(x) for x in batch]
    tested = [x for (x,) in build_detection_test_loader(cfg, "blocks")]
    out["test_loader"] = [[x["sem_seg"], x["height"], x["width"]] for x in tested]


def _heads(out):
    shapes = {f"p{i}": ShapeSpec(channels=12, stride=2**i) for i in range(2, 7)}
    generator = torch.Generator().manual_seed(8)
    sizes = {name: (2, 12, 256 // s.stride, 128 // s.stride) for name, s in shapes.items()}
    features = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    labels = torch.randint(0, 7, (2, 256, 128), generator=generator)
    labels[labels == 6] = IGNORED
    variants = ((["p5", "p2", "p3"], 4, "GN"), (["p2", "p4"], 8, ""), (["p6", "p4"], 16, "BN"), (["p3"], 4, None))
    for names, stride, norm in variants:
        torch.manual_seed(3)
        head = SemSegFPNHead(
            {n: shapes[n] for n in names}, num_classes=6, conv_dims=32, common_stride=stride, loss_weight=0.7,
            norm=norm, ignore_value=IGNORED,
        )
        name = f"head/{names}/{stride}/{norm}"
        out[f"{name}/state"] = [list(head.state_dict()), [float(v.double().sum()) for v in head.state_dict().values()]]
        if names == ["p2", "p4"]:
            continue  # the maps of its levels have different sizes
        nothing, losses = head(features, labels)
        losses["loss_sem_seg"].backward()
        out[f"{name}/training"] = [nothing, losses, [p.grad for p in head.parameters()]]
        out[f"{name}/eval"] = head.eval()(features)
        out[f"{name}/layers"] = head.layers(features)


def _model(out, cfg, folder, workdir):
    torch.manual_seed(0)
    model = build_model(cfg)
    out["model/state"] = [list(model.state_dict()), [float(v.double().sum()) for v in model.state_dict().values()]]
    out["model/registered"] = ["SemSegFPNHead" in SEM_SEG_HEADS_REGISTRY, type(model.sem_seg_head).__name__]
    out["model/builder"] = list(build_sem_seg_head(cfg, model.backbone.output_shape()).state_dict())
    mapper = DatasetMapper(cfg, True)
    np.random.seed(1)
    inputs = [mapper(s) for s in DatasetCatalog.get("blocks")[:3]]  # of different sizes: padded
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        losses = model(inputs)
        out[f"model/losses/{step}"] = losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    model.eval()
    plain = [{"image": x["image"]} for x in inputs]
    with torch.no_grad():
        out["model/output"] = model(inputs)
        out["model/output of the input's size"] = model(plain)


def _metrics(out, folder, workdir):
    samples = DatasetCatalog.get("blocks")
    rng = np.random.RandomState(2)
    for name, noise in (("good", 0.5), ("bad", 3.0)):
        target = workdir / f"output-{name}"
        evaluator = SemSegEvaluator("blocks", output_dir=str(target))
        evaluator.reset()
        for sample in samples:
            truth = np.array(Image.open(sample["sem_seg_file_name"])).astype(int)
            scores = rng.normal(scale=noise, size=(5, *truth.shape))
            for k in range(5):
                scores[k][truth == k] += 1.0
            evaluator.process([sample], [{"sem_seg": torch.from_numpy(scores)}])
        results = evaluator.evaluate()["sem_seg"]
        out[f"metrics/{name}"] = {k: float(v) for k, v in results.items()}
        saved = json.loads((target / "sem_seg_predictions.json").read_text())
        out[f"metrics/{name}/file"] = [_plain(x, folder) for x in saved]
        weights = torch.load(target / "sem_seg_evaluation.pth", weights_only=False)
        out[f"metrics/{name}/saved"] = {k: float(v) for k, v in weights.items()}
    empty = SemSegEvaluator("blocks")
    empty.reset()
    size = np.array(Image.open(samples[0]["sem_seg_file_name"])).shape
    empty.process([samples[0]], [{"sem_seg": torch.zeros(5, *size)}])
    out["metrics/one class predicted"] = {k: float(v) for k, v in empty.evaluate()["sem_seg"].items()}


def probe(workdir):
    folder = workdir / "data"
    _write(folder)
    labels, images = str(folder / "labels"), str(folder / "images")
    DatasetCatalog.register("blocks", lambda: load_sem_seg(labels, images, image_ext="png"))
    MetadataCatalog.get("blocks").set(
        stuff_classes=CLASSES, ignore_label=IGNORED, evaluator_type="sem_seg",
        stuff_dataset_id_to_contiguous_id={10 * i + 7: i for i in range(5)},
    )
    out = {}
    cfg = _config()
    _data(out, cfg, folder)
    _heads(out)
    _model(out, cfg, folder, workdir)
    _metrics(out, folder, workdir)
    return out
