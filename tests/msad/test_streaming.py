"""Streaming AP: schedules and pairing by hand and against a clock of ticks, Argoverse-HD's format, COCO's numbers."""

from __future__ import annotations

import itertools
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from msad import load_config
from msad.data import check_data
from msad.data.argoverse_hd import category_ids, read_content, sequences_of
from msad.data.register import register_datasets
from msad.evaluation.coco_stats import STATS, box_stats
from msad.evaluation.evaluators import build_evaluator
from msad.evaluation.streaming import (
    Output,
    draw_runtimes,
    infinite_devices,
    pair,
    play,
    simulate,
    streamed_results,
    summarize_pairing,
)
from msad.evaluation.streaming_detector import categories_of


def always(seconds):
    return itertools.repeat(seconds)


def in_frames(outputs, fps):
    return [(output.frame, float(output.finished * fps)) for output in outputs]


def frames_of(outputs, pairs):
    return [None if index is None else outputs[index].frame for index in pairs]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_40_ms_at_30_frames_a_second():
    outputs = simulate(9, 30, always(0.040))
    assert [(o.frame, float(o.finished)) for o in outputs][:5] == [(0, 0.04), (1, 0.08), (2, 0.12), (3, 0.16), (4, 0.2)]
    assert frames_of(outputs, pair(outputs, 9, 30)) == [None, None, 0, 1, 2, 3, 4, 4, 6]


def test_one_and_a_half_frames_greedy_and_shrinking_tail():
    greedy = simulate(8, 30, always(0.05))
    assert in_frames(greedy, 30) == [(0, 1.5), (1, 3.0), (3, 4.5), (4, 6.0), (6, 7.5)]
    paired = pair(greedy, 8, 30)
    assert frames_of(greedy, paired) == [None, None, 0, 1, 1, 3, 4, 4]
    assert summarize_pairing([greedy], [paired]) == (8, 2, 0, 14 / 6, 5)
    dynamic = simulate(8, 30, always(0.05), mean_runtime=0.05)
    assert in_frames(dynamic, 30) == [(0, 1.5), (2, 3.5), (4, 5.5), (6, 7.5)]
    paired = pair(dynamic, 8, 30)
    assert frames_of(dynamic, paired) == [None, None, 0, 0, 2, 2, 4, 4]
    assert summarize_pairing([dynamic], [paired]).mean_lag == 15 / 6


def test_the_shrinking_tail_is_for_detectors_slower_than_a_frame():
    for runtime in (0.02, 1 / 30):
        assert simulate(20, 30, always(runtime), mean_runtime=runtime) == simulate(20, 30, always(runtime))


def test_the_shrinking_tail_takes_a_frame_that_it_loses_nothing_by():
    # Exactly two frames each, always from the start of a frame: waiting would gain nothing.
    outputs = simulate(9, 25, always(0.08), mean_runtime=0.08)
    assert in_frames(outputs, 25) == [(0, 2), (2, 4), (4, 6), (6, 8)] == in_frames(simulate(9, 25, always(0.08)), 25)


def test_a_fast_detector_waits_for_frames():
    outputs = simulate(4, 10, always(0.03))
    assert [(o.frame, o.finished) for o in outputs] == [(i, Fraction(i, 10) + Fraction(3, 100)) for i in range(4)]
    assert frames_of(outputs, pair(outputs, 4, 10)) == [None, 0, 1, 2]
    # Asked one frame earlier, answers are one frame older.
    assert frames_of(outputs, pair(outputs, 4, 10, eta=1)) == [None, None, 0, 1]


def test_stride_counts_examined_frames():
    assert [o.frame for o in simulate(9, 10, always(0.03), stride=3)] == [0, 3, 6]
    # Busy for 1.5 frames: examined are 0, 1 (skipped), 2, ... every second examined frame runs.
    assert [o.frame for o in simulate(9, 10, always(0.15), stride=2)] == [0, 2, 4, 6]


def test_results_after_the_end_are_discarded():
    assert simulate(3, 10, always(0.3)) == []
    assert simulate(3, 10, always(0.299)) == [Output(0, Fraction(299, 1000))]
    assert frames_of([], pair([], 3, 10)) == [None, None, None]


def test_a_device_for_every_frame():
    outputs = infinite_devices(4, 10, iter([0.35, 0.05, 0.15, 0.05]))
    assert in_frames(outputs, 10) == [(1, 1.5), (0, 3.5), (2, 3.5), (3, 3.5)]
    assert frames_of(outputs, pair(outputs, 4, 10)) == [None, None, 1, 1]


def test_runtimes_are_drawn_as_by_the_authors_simulator():
    samples = [0.01, 0.02, 0.05]
    np.random.seed(0)
    expected = [np.random.choice(samples) for _ in range(20)]
    assert list(itertools.islice(draw_runtimes(samples), 20)) == expected
    assert list(itertools.islice(draw_runtimes(samples, performance=2), 20)) == [e / 2 for e in expected]
    with pytest.raises(ValueError, match="positive runtimes"):
        next(draw_runtimes([0.01, 0.0]))


# --- against ticks of a millisecond ----------------------------------------------------------------------------------


def ticking(frames, period, runtimes, stride, mean):
    """The same by walking through every millisecond; ``period`` ms a frame."""
    outputs, last, examined, busy_until = [], -1, 0, 0
    for now in range(frames * period):
        frame = now // period
        if now < busy_until or frame == last:
            continue
        last, examined = frame, examined + 1
        skip_tail = mean is not None and mean > period and mean * period < (now % period + mean) // period * period**2
        if (examined - 1) % stride or skip_tail:
            continue
        busy_until = now + next(runtimes)
        if busy_until < frames * period:
            outputs.append((frame, busy_until))
    return outputs


@pytest.mark.parametrize("seed", range(30))
def test_equals_a_clock_of_ticks(seed):
    rng = np.random.default_rng(seed)
    period, frames, stride = int(rng.choice([20, 25, 40])), int(rng.integers(1, 60)), int(rng.integers(1, 4))
    milliseconds = rng.integers(1, 4 * period, 200).tolist()
    mean = None if seed % 2 else int(rng.integers(1, 4 * period))
    expected = ticking(frames, period, iter(milliseconds), stride, mean)
    found = simulate(
        frames, 1000 / period, iter([ms / 1000 for ms in milliseconds]), stride=stride,
        mean_runtime=None if mean is None else mean / 1000,
    )  # fmt: skip
    assert [(o.frame, o.finished * 1000) for o in found] == expected
    pairs = pair(found, frames, 1000 / period)
    for frame, index in enumerate(pairs):
        ready = [number for number, (_, end) in enumerate(expected) if end <= frame * period]
        assert index == (ready[-1] if ready else None)


class Clock:
    """A clock that goes on by a little at every look and by the runtime at every detection."""

    def __init__(self, runtimes, tick=1e-5):
        self.now, self.runtimes, self.tick = 100.0, iter(runtimes), tick

    def __call__(self):
        self.now += self.tick
        return self.now

    def detect(self, frame):
        self.now += next(self.runtimes)
        return f"result of {frame}"


def test_play_is_what_is_simulated_up_to_the_time_of_looking():
    runtimes = [0.031, 0.052, 0.011, 0.094, 0.04, 0.045, 0.012, 0.033] * 3
    clock = Clock(runtimes)
    outputs, results = play(list("abcdefghijkl"), clock.detect, 30, clock=clock)
    expected = simulate(12, 30, iter(runtimes))
    assert [o.frame for o in outputs] == [o.frame for o in expected]
    assert results == [f"result of {'abcdefghijkl'[o.frame]}" for o in outputs]
    for mine, other in zip(outputs, expected):
        assert 0 < float(mine.finished - other.finished) < 0.002


@pytest.mark.parametrize(("runtime", "in_time"), [(0.75, 1), (1.0, 0)])
def test_a_result_at_the_very_end_comes_too_late(runtime, in_time):
    """Played as simulated, exactly: of one frame of a second, no moment is left at which it would be asked for."""
    clock = Clock([runtime], tick=0)
    outputs, results = play(["a"], clock.detect, 1, clock=clock)
    assert len(outputs) == len(results) == in_time
    assert outputs == simulate(1, 1, always(runtime))


def test_play_waits_for_the_next_frame_after_half_of_one():
    clock = Clock([0.056] * 20)
    outputs, _ = play(list(range(12)), clock.detect, 30, dynamic=True, clock=clock)
    # Free 1.68 frames after the start of a frame: more than half is over, so the frame after next is taken.
    assert [o.frame for o in outputs] == [0, 2, 4, 6, 8, 10]
    clock = Clock([0.046] * 20)  # 1.38 frames: the newest is taken, and then 0.76 of it is over
    outputs, _ = play(list(range(12)), clock.detect, 30, dynamic=True, clock=clock)
    assert [o.frame for o in outputs][:3] == [0, 1, 3]


# --- the format ------------------------------------------------------------------------------------------------------


def content():
    images = [
        {"id": 10 * sid + fid, "sid": sid, "fid": fid, "name": f"{fid}.jpg", "width": 100, "height": 80}
        for sid in (0, 1) for fid in (2, 0, 1)
    ]  # fmt: skip
    boxes = [
        {"id": number, "image_id": image["id"], "category_id": number % 2, "bbox": [5 * number, 10, 20, 20]}
        for number, image in enumerate(images)
    ]
    return {
        "images": images,
        "annotations": [{**box, "area": 400, "iscrowd": False, "ignore": False} for box in boxes],
        "categories": [{"id": 0, "name": "person"}, {"id": 1, "name": "traffic_light"}],
        "sequences": ["first", "second"],
        "seq_dirs": ["a/first", "b/second"],
        "coco_mapping": [0, 80, 1, 80],
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "videos.json"
    path.write_text(json.dumps(content()))
    return path


def test_images_get_files_and_no_object_has_the_id_0(file):
    read = read_content(file)
    assert [image["file_name"] for image in read["images"]][:2] == ["a/first/2.jpg", "a/first/0.jpg"]
    assert [a["id"] for a in read["annotations"]] == [6, 1, 2, 3, 4, 5]
    assert [(s.name, s.image_ids, s.fps) for s in sequences_of(read)] == [
        ("first", (0, 1, 2), 30.0),
        ("second", (10, 11, 12), 30.0),
    ]
    assert sequences_of(read, fps=25)[0].fps == 25.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("seq_dirs"), "no list 'seq_dirs'"),
        (lambda c: c["seq_dirs"].pop(), "2 sequences, but 1 seq_dirs"),
        (lambda c: c["images"][1].pop("fid"), "image 0 has no 'fid'"),
        (lambda c: c["images"][1].update(sid=2), "image 0 is of sequence 2, which does not exist"),
        (lambda c: c["images"][1].update(sid="first"), "image 0 has sid 'first', not a whole number"),
        (lambda c: c["images"][1].update(name=None), "image 0 has name None, not a text"),
        (lambda c: c["annotations"][3].update(image_id=99), "annotation 3 has image_id 99, which is not listed"),
        (lambda c: c["annotations"][3].update(id=2), "annotation 2 has the id of another annotation"),
        (lambda c: c["annotations"][3].pop("id"), "annotation number 3 has no id"),
        (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), r"annotation 3 has bbox \[1, 2, 3\], 3 numbers"),
        (lambda c: c["categories"][1].pop("name"), "category 1 has name None"),
        (lambda c: c["images"][1].update(id=12), "image 'b/second/2.jpg' has the id of another"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    bad = content()
    change(bad)
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=words) as caught:
        read_content(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_two_images_of_one_frame(file):
    read = read_content(file)
    read["images"][1]["fid"] = 2
    with pytest.raises(ValueError, match="'first' has two images of one frame"):
        sequences_of(read)


def test_classes_of_the_model_and_of_coco():
    assert categories_of(2, [0, 5], None) == [0, 5]
    assert categories_of(4, [0, 5], [0, 80, 1, 80]) == [0, None, 5, None]
    with pytest.raises(ValueError, match="the model has 3 classes; the data set has 2 and maps 4 classes"):
        categories_of(3, [0, 5], [0, 80, 1, 80])


@pytest.fixture
def registered(file, tmp_path):
    cfg = load_config("")
    name = f"videos_{tmp_path.name}"
    (tmp_path / "frames").mkdir()
    cfg.DATASETS.REGISTER = [
        {"NAME": name, "TYPE": "argoverse_hd", "JSON": str(file), "IMAGES": str(tmp_path / "frames")}
    ]
    register_datasets(cfg)
    yield name, cfg
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_dataset_dicts_and_single_frame_metrics(registered, tmp_path):
    name, cfg = registered
    records = DatasetCatalog.get(name)
    assert records[0]["file_name"] == str(tmp_path / "frames" / "a/first/2.jpg")
    assert (records[3]["sequence"], records[3]["frame"], records[3]["image_id"]) == ("second", 2, 12)
    assert [a["category_id"] for r in records for a in r["annotations"]] == [0, 1] * 3
    assert MetadataCatalog.get(name).thing_classes == ["person", "traffic_light"]
    for folder in ("one", "two"):  # an evaluator can be made again, elsewhere
        build_evaluator(cfg, name, str(tmp_path / folder))
        assert (tmp_path / folder / f"{name}_coco.json").is_file()


def test_what_is_left_out_is_said_before_training(registered, file):
    name, cfg = registered
    bad = content()
    del bad["annotations"][3]["bbox"]
    file.write_text(json.dumps(bad))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (name,)
    said = [str(finding) for finding in check_data(cfg, images=False)[1]]
    wanted = f"data set {name!r}: annotation 3 has no bbox and is left out, in 'b/second/2.jpg' (1 of 6 annotations)"
    assert sum(wanted in text for text in said) == 1, said
    assert [len(record["annotations"]) for record in DatasetCatalog.get(name)] == [1, 1, 1, 0, 1, 1]


def perfect(read):
    return [{**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for a in read["annotations"]]


def test_numbers_of_coco(file):
    read = read_content(file)
    stats = box_stats(read, perfect(read))
    assert list(stats) == list(STATS) and stats["AP"] == pytest.approx(100) and stats["AR1"] == pytest.approx(100)
    assert math.isnan(stats["APl"])  # no large objects
    # All objects are found, also the one whose id was 0; without it, its class is at two thirds.
    assert box_stats(read, perfect(read)[1:])["AP"] == pytest.approx((100 + 66.34) / 2, abs=0.1)
    assert box_stats(read, [])["AP"] == 0.0


# --- real videos -----------------------------------------------------------------------------------------------------

VIDEOS = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute() / "flying_video"


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"no data set in {VIDEOS}")
def test_a_perfect_detector_loses_by_its_latency():
    read = read_content(VIDEOS / "annotations_val.json")
    sequences = sequences_of(read)
    assert [len(s.image_ids) for s in sequences] and sum(len(s.image_ids) for s in sequences) == 309
    assert category_ids(read) == sorted(c["id"] for c in read["categories"])
    truth = {image["id"]: [] for image in read["images"]}
    for a in read["annotations"]:
        truth[a["image_id"]].append({"category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9})
    ap = []
    for milliseconds in (0.001, 20, 100):
        runtimes = draw_runtimes([milliseconds / 1000])
        outputs = [simulate(len(s.image_ids), s.fps, runtimes) for s in sequences]
        pairs = [pair(made, len(s.image_ids), s.fps) for made, s in zip(outputs, sequences)]
        found = [[truth[s.image_ids[o.frame]] for o in made] for s, made in zip(sequences, outputs)]
        results = streamed_results([s.image_ids for s in sequences], pairs, found)
        ap.append(box_stats(read, results)["AP"])
    lossless = box_stats(read, [{**d, "image_id": i} for i, ds in truth.items() for d in ds])["AP"]
    assert lossless == pytest.approx(100)
    # Even a result that is ready at once comes after its frame's own moment: one frame of lag.
    assert 100 > ap[0] == ap[1] > 2 * ap[2] > 0
