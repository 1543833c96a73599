"""Semantic segmentation: data, model and metrics. Passes on detectron2 and on detectron2-lite."""

import detectron2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_sem_seg
from detectron2.evaluation import SemSegEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY, Backbone, build_model
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from PIL import Image
from torch import nn

lite_only = pytest.mark.skipif("lite" not in detectron2.__version__, reason="detectron2 is less strict here")
IGNORED = 255


@BACKBONE_REGISTRY.register()
class _StrideFour(Backbone):
    """Means of 4x4 pixels; sides must divide by 16."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self._out_features = ["p2"]
        self._out_feature_channels, self._out_feature_strides = {"p2": 3}, {"p2": 4}

    @property
    def size_divisibility(self):
        return 16

    def forward(self, x):
        return {"p2": F.avg_pool2d(x, 4)}


@SEM_SEG_HEADS_REGISTRY.register()
class _Recorder(nn.Module):
    """Scores are the features; remembers its targets."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE

    def forward(self, features, targets=None):
        self.targets = targets
        scores = F.interpolate(features["p2"], scale_factor=4)
        return (None, {"loss_sem_seg": scores.mean()}) if self.training else (scores, {})


def model_with(head, **settings):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "cpu", "SemanticSegmentor", "_StrideFour"
    cfg.MODEL.SEM_SEG_HEAD.NAME = head
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2"]
    cfg.MODEL.SEM_SEG_HEAD.update(settings)
    return build_model(cfg)


class TestSegmentor:
    def test_labels_are_padded_with_the_ignored_one(self):
        model = model_with("_Recorder", IGNORE_VALUE=77)
        inputs = [
            {"image": torch.zeros(3, 8, 20), "sem_seg": torch.ones(8, 20, dtype=torch.int64)},
            {"image": torch.zeros(3, 16, 12), "sem_seg": torch.full((16, 12), 2)},
        ]
        assert list(model(inputs)) == ["loss_sem_seg"]
        targets = model.sem_seg_head.targets
        assert targets.shape == (2, 16, 32) and targets.dtype == torch.int64
        assert (targets[0, :8, :20] == 1).all() and (targets[1, :, :12] == 2).all()
        assert int((targets == 77).sum()) == 2 * 16 * 32 - 8 * 20 - 16 * 12

    def test_output_has_the_wanted_size_and_no_padding(self):
        model = model_with("_Recorder").eval()
        image = torch.arange(3.0).view(3, 1, 1).expand(3, 8, 20) * 50 + model.pixel_mean
        plain, resized = model([{"image": image}, {"image": image, "height": 24, "width": 10}])
        assert plain["sem_seg"].shape == (3, 8, 20) and resized["sem_seg"].shape == (3, 24, 10)
        for scores in (plain["sem_seg"], resized["sem_seg"]):  # padding would be 0
            torch.testing.assert_close(scores, torch.tensor([0.0, 50.0, 100.0]).view(3, 1, 1).expand_as(scores))

    @lite_only
    def test_inputs_without_labels_are_named(self):
        model = model_with("_Recorder")
        labelled = {"image": torch.zeros(3, 16, 16), "sem_seg": torch.zeros(16, 16, dtype=torch.int64)}
        with pytest.raises(ValueError, match=r"sem_seg.*\[1\]"):
            model([labelled, {"image": torch.zeros(3, 16, 16)}])

    @lite_only
    def test_unknown_level_is_named(self):
        with pytest.raises(ValueError, match="p7"):
            model_with("SemSegFPNHead", IN_FEATURES=["p7"])


class TestHead:
    def head(self, **options):
        torch.manual_seed(0)
        shapes = {"p2": ShapeSpec(channels=4, stride=4), "p4": ShapeSpec(channels=4, stride=16)}
        options = {"num_classes": 3, "conv_dims": 8, "common_stride": 4, "norm": "", **options}
        return SemSegFPNHead(shapes, **options)

    def test_sum_of_levels_by_hand(self):
        head = self.head(conv_dims=4, num_classes=4)
        for conv in head.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.dirac_(conv.weight)
        assert [type(x).__name__ for x in head.p4] == ["Conv2d", "Upsample", "Conv2d", "Upsample"]
        features = {"p2": torch.full((1, 4, 16, 8), 2.0), "p4": torch.full((1, 4, 4, 2), 5.0)}
        assert torch.equal(head.layers(features), torch.full((1, 4, 16, 8), 7.0))
        scores, losses = head.eval()(features)
        assert torch.equal(scores, torch.full((1, 4, 64, 32), 7.0)) and losses == {}

    def test_loss_is_the_mean_over_labelled_pixels(self):
        head = self.head(loss_weight=0.5, ignore_value=IGNORED)
        features = {"p2": torch.randn(1, 4, 8, 8), "p4": torch.randn(1, 4, 2, 2)}
        targets = torch.randint(0, 3, (1, 32, 32))
        targets[:, 10:] = IGNORED
        nothing, losses = head(features, targets)
        scores = F.interpolate(head.layers(features), scale_factor=4, mode="bilinear").log_softmax(dim=1)[:, :, :10]
        expected = -scores.gather(1, targets[:, None, :10]).mean() / 2
        assert nothing is None
        torch.testing.assert_close(losses, {"loss_sem_seg": expected})

    def test_loss_is_float32_with_amp(self):
        head = self.head()
        features = {"p2": torch.randn(1, 4, 8, 8), "p4": torch.randn(1, 4, 2, 2)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert head(features, torch.zeros(1, 32, 32, dtype=torch.int64))[1]["loss_sem_seg"].dtype == torch.float32


@pytest.fixture()
def folder(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    return tmp_path


def save(folder, stem, labels):
    labels = np.asarray(labels, dtype=np.uint8)
    Image.fromarray(labels).save(folder / "labels" / f"{stem}.png")
    Image.fromarray(np.zeros((*labels.shape, 3), dtype=np.uint8)).save(folder / "images" / f"{stem}.jpg")


def registered(folder, name, classes=("a", "b", "c")):
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    samples = load_sem_seg(str(folder / "labels"), str(folder / "images"))
    DatasetCatalog.register(name, lambda: samples)
    MetadataCatalog.get(name).set(stuff_classes=list(classes), ignore_label=IGNORED)
    return samples


def scores_of(labels, classes=3):
    return F.one_hot(torch.as_tensor(labels), classes).permute(2, 0, 1).float()


class TestData:
    def test_pairs_of_files(self, folder):
        save(folder, "b", [[0]])
        save(folder, "a.1", [[0]])
        (folder / "labels" / "c.png").write_bytes(b"")
        (folder / "images" / "a.txt").write_text("")
        samples = load_sem_seg(str(folder / "labels"), str(folder / "images"))
        assert samples == [
            {"file_name": f"{folder}/images/{stem}.jpg", "sem_seg_file_name": f"{folder}/labels/{stem}.png"}
            for stem in ("a.1", "b")
        ]

    @pytest.mark.parametrize("is_train", [True, False])
    def test_labels_follow_the_image(self, folder, is_train):
        labels = np.zeros((10, 20), dtype=np.uint8)
        labels[:, 10:] = 2
        labels[0] = IGNORED
        save(folder, "x", labels)
        sample = load_sem_seg(str(folder / "labels"), str(folder / "images"))[0]
        mapper = DatasetMapper(
            is_train, augmentations=[T.Resize((20, 40)), T.HFlipTransform(40)], image_format="BGR"
        )
        mapped = mapper(sample)
        assert mapped["sem_seg"].dtype == torch.int64 and "sem_seg_file_name" not in mapped
        assert torch.equal(mapped["sem_seg"], torch.from_numpy(labels.repeat(2, 0).repeat(2, 1)[:, ::-1].astype(int)))
        assert "sem_seg_file_name" in sample  # the data set's own record is untouched

    def test_crop_without_a_dominating_class(self):
        labels = np.zeros((40, 40), dtype=np.uint8)
        labels[:20, :20] = 1
        labels[30:] = IGNORED
        crop = T.RandomCrop_CategoryAreaConstraint("absolute", (10, 10), 0.75, ignored_category=IGNORED)
        np.random.seed(0)
        mixed = 0
        for _ in range(50):
            inputs = T.AugInput(np.zeros((40, 40, 3)), sem_seg=labels)
            crop(inputs)
            assert inputs.image.shape[:2] == inputs.sem_seg.shape == (10, 10)
            areas = [(inputs.sem_seg == k).sum() for k in (0, 1)]
            mixed += min(areas) > 0.25 * sum(areas)
        assert mixed >= 40


class TestMetrics:
    def test_worked_by_hand(self, folder):
        save(folder, "x", [[0, 0, 0, 1], [0, IGNORED, 1, 1]])
        (sample,) = registered(folder, "hand")
        evaluator = SemSegEvaluator("hand")
        evaluator.reset()
        evaluator.process([sample], [{"sem_seg": scores_of([[0, 0, 1, 1], [0, 2, 2, 1]])}])
        metrics = evaluator.evaluate()["sem_seg"]
        # a: 3 of 4 right, nothing else called a. b: 2 of 3 right, 1 wrong. c: not in the ground truth.
        iou_a, iou_b = 3 / 4, 2 / (3 + 3 - 2)
        expected = {
            "IoU-a": iou_a, "IoU-b": iou_b, "mIoU": (iou_a + iou_b) / 2, "fwIoU": (4 * iou_a + 3 * iou_b) / 7,
            "ACC-a": 3 / 4, "ACC-b": 2 / 3, "mACC": (3 / 4 + 2 / 3) / 2, "pACC": 5 / 7,
        }
        assert {k: metrics[k] for k in expected} == pytest.approx({k: 100 * v for k, v in expected.items()})
        assert np.isnan(metrics["IoU-c"]) and np.isnan(metrics["ACC-c"])

    def test_sums_over_images_and_not_means(self, folder):
        save(folder, "x", [[0, 1]])
        save(folder, "y", [[0, 0, 0, 0, 1, 1, 1, 1]])
        samples = registered(folder, "two")
        evaluator = SemSegEvaluator("two")
        evaluator.reset()
        evaluator.process(samples, [{"sem_seg": scores_of([[1, 1]])}, {"sem_seg": scores_of([[0] * 4 + [1] * 4])}])
        assert evaluator.evaluate()["sem_seg"]["IoU-a"] == pytest.approx(100 * 4 / 5)
        evaluator.reset()
        evaluator.process(samples[1:], [{"sem_seg": scores_of([[0] * 4 + [1] * 4])}])
        assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100

    @lite_only
    def test_labels_outside_the_classes_name_the_file(self, folder):
        save(folder, "x", [[0, 7]])
        (sample,) = registered(folder, "outside")
        evaluator = SemSegEvaluator("outside")
        with pytest.raises(ValueError, match=r"x\.png has the label 7; classes are 0 to 2, ignored is 255"):
            evaluator.process([sample], [{"sem_seg": scores_of([[0, 1]])}])
        with pytest.raises(ValueError, match=r"x\.png has labels of \(1, 2\)"):
            evaluator.process([sample], [{"sem_seg": scores_of([[0, 1, 1]])}])
