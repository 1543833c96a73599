"""What the storage returns, the lines of metrics.json, and the printed line of a training."""

import json
import logging
import re

import numpy as np
import torch
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter
from detectron2.utils.logger import create_small_table

TOLERANCE = 1e-12


def put(storage, iteration):
    storage.put_scalars(total_loss=float(iteration * 7 % 13), loss_box=torch.tensor(float(iteration * 3 % 5)))
    if iteration % 3 == 0:
        storage.put_scalar("loss_rare", float(iteration * 5 % 11))
    storage.put_scalar("time", float(iteration * 5 % 17))
    storage.put_scalar("data_time", iteration * 5 % 11 / 10)
    storage.put_scalar("lr", 1e-3 * iteration / 7, smoothing_hint=False)
    with storage.name_scope("head"):
        storage.put_scalar("accuracy", iteration / 64)
    if iteration % 20 == 0:
        storage.put_scalar("bbox/AP", iteration / 3, smoothing_hint=False)
        storage.put_scalar("late", 1.0, cur_iter=iteration - 2)


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        # spaces are layout; with a GPU the line has memory as well
        self.lines.append(re.sub(r" max_mem: \S+", "", " ".join(record.getMessage().split())))


def probe(workdir):
    handler = Lines()
    logger = logging.getLogger("detectron2.utils.events")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    metrics = workdir / "metrics.json"
    metrics.unlink(missing_ok=True)
    latest = []
    with EventStorage(3) as storage:
        json_writer, printer = JSONWriter(str(metrics)), CommonMetricPrinter(70)
        for iteration in range(3, 60):
            put(storage, iteration)
            if iteration % 8 == 0:
                json_writer.write()
                printer.write()
                latest.append({k: [float(v), i] for k, (v, i) in storage.latest_with_smoothing_hint(20).items()})
            storage.step()
        json_writer.write()
        json_writer.close()
        counts = {name: [storage.count_samples(name, k) for k in (1, 2, 5, 20)] for name in storage.histories()}
        plain = {name: [float(v), i] for name, (v, i) in storage.latest().items()}
        storage.put_histogram("h", torch.arange(12.0), bins=6)
        histogram = {key: storage._histograms[0][key] for key in sorted(storage._histograms[0])}
    return {
        "metrics.json": [json.loads(line) for line in metrics.read_text().splitlines()],
        "printed": handler.lines,
        "smoothed": latest,
        "latest": plain,
        "counts": counts,
        "smoothing hints": [f"{k} {v}" for k, v in storage.smoothing_hints().items()],
        "histogram": histogram,
        "table": create_small_table({"AP": 12.3456, "AP50": np.float64(1.0), "n": 3}),
    }
