"""Streaming AP: detection judged at every frame of a running video by the last result that is ready (Li et al., 2020).

Frame i of a sequence is there at i / fps. A detector that is free takes the newest frame, and a result counts from the
moment it is finished. So a slow detector is judged with results for frames long gone. Here are the schedules (which
frame is processed when) and the pairing of frames with results; latencies are measured or given.

Times are exact fractions of a second: runtimes are rounded to nanoseconds, so that results which are ready exactly at a
frame count for it, whatever the round-off of sums.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import floor
from typing import Any, NamedTuple

import numpy as np


class Output(NamedTuple):
    """A finished result: the frame it is for, and the time since the start of the sequence in seconds."""

    frame: int
    finished: Fraction


def exact(seconds: float) -> Fraction:
    """Seconds, rounded to nanoseconds."""
    return Fraction(round(seconds * 10**9), 10**9)


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(10**6)


def draw_runtimes(samples: Sequence[float], performance: float = 1.0) -> Iterator[float]:
    """Endless runtimes in seconds, drawn from measured ones with replacement, by the authors' generator and its seed 0.

    Args:
        samples: measured runtimes in seconds.
        performance: how many times faster the device is than the measured one.

    Raises:
        ValueError: no samples, one that is not positive, or no positive performance.
    """
    if not len(samples) or min(samples) <= 0 or performance <= 0:
        least = f"the least is {min(samples)} s" if len(samples) else "there are none"
        raise ValueError(f"a simulation needs positive runtimes ({least}) and a positive performance ({performance})")
    generator, samples = np.random.RandomState(0), np.asarray(samples, dtype=float) / performance
    while True:
        yield float(generator.choice(samples))


def simulate(
    frames: int, fps: float, runtimes: Iterator[float], *, stride: int = 1, mean_runtime: float | None = None
) -> list[Output]:
    """One device that processes a frame after the other.

    When it is free, the device examines the newest frame, or waits for the next one if it has examined that already.

    Args:
        frames: number of frames of the sequence.
        fps: frames per second.
        runtimes: seconds of each call of the detector.
        stride: of the examined frames only every so many is processed.
        mean_runtime: if given, in seconds: shrinking tail. A detector slower than a frame rather waits for the next
            frame if its result would otherwise miss one more frame ("dynamic scheduling").

    Returns:
        results by time; one that would be finished at the end of the sequence or later is discarded.
    """
    rate, now, last, examined, outputs = _rate(fps), Fraction(0), -1, 0, []
    mean = exact(mean_runtime) * rate if mean_runtime is not None else Fraction(0)  # in frames
    end = Fraction(frames) / rate
    while now < end:
        frame = floor(now * rate)
        if frame == last:
            frame += 1
            if frame == frames:
                break
            now = frame / rate
        last, examined = frame, examined + 1
        tail = now * rate - frame
        if (examined - 1) % stride or (mean > 1 and mean < floor(tail + mean)):
            continue
        now += exact(next(runtimes))
        if now >= end:
            break
        outputs.append(Output(frame, now))
    return outputs


def infinite_devices(frames: int, fps: float, runtimes: Iterator[float]) -> list[Output]:
    """Every frame is processed as soon as it is there, each on a device of its own; results by time."""
    rate = _rate(fps)
    outputs = [Output(frame, frame / rate + exact(next(runtimes))) for frame in range(frames)]
    return sorted(outputs, key=lambda output: output.finished)


def play(
    frames: Sequence[Any],
    detect: Callable[[Any], Any],
    fps: float,
    *,
    stride: int = 1,
    dynamic: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Output], list[Any]]:
    """Run a detector on a sequence in real time, waiting busily for frames.

    Args:
        frames: loaded images.
        detect: returns when the result is ready (a GPU has been waited for).
        stride: see :func:`simulate`.
        dynamic: wait for the next frame if more than half of the time of the newest one is over.
        clock: seconds; a test may pass a simulated one.

    Returns:
        outputs and, in the same order, what ``detect`` returned.
    """
    end, last, examined, outputs, results = len(frames) / fps, -1, 0, [], []
    start = clock()
    while (now := clock() - start) < end:
        frame = int(now * fps)
        if frame <= last:  # less only by round-off, just after waiting for it
            frame = last + 1
            if frame == len(frames):
                break
            while (now := clock() - start) < frame / fps:
                pass
        last, examined = frame, examined + 1
        if (examined - 1) % stride or (dynamic and now * fps - frame > 0.5):
            continue
        result = detect(frames[frame])
        finished = clock() - start
        if finished >= end:
            break
        outputs.append(Output(frame, exact(finished)))
        results.append(result)
    return outputs, results


def pair(outputs: Sequence[Output], frames: int, fps: float, eta: float = 0.0) -> list[int | None]:
    """For each frame the index of the output that it is judged by: the last one finished at (frame - eta) / fps.

    Args:
        outputs: by time.
        eta: frames by which the question precedes the frame.

    Returns:
        an index or None (nothing is finished yet, which counts as no detections) for each of ``frames``.
    """
    finished, rate, eta = [output.finished for output in outputs], _rate(fps), Fraction(eta).limit_denominator(10**6)
    indices = [bisect_right(finished, (frame - eta) / rate) - 1 for frame in range(frames)]
    return [index if index >= 0 else None for index in indices]


class Pairing(NamedTuple):
    """How frames were paired, over all sequences: frames, those without a result, with a result for themselves, the
    mean lag in frames of those that have one, and the number of results."""

    frames: int
    missed: int
    in_time: int
    mean_lag: float | None
    processed: int


def summarize_pairing(outputs: Sequence[Sequence[Output]], pairs: Sequence[Sequence[int | None]]) -> Pairing:
    """Counts over sequences; ``outputs`` and ``pairs`` (of :func:`pair`) have an entry for each."""
    lags = [
        frame - made[index].frame
        for made, paired in zip(outputs, pairs)
        for frame, index in enumerate(paired)
        if index is not None
    ]
    frames = sum(map(len, pairs))
    mean = sum(lags) / len(lags) if lags else None
    return Pairing(frames, frames - len(lags), lags.count(0), mean, sum(map(len, outputs)))


def streamed_results(
    sequences: Sequence[Sequence[int]],
    pairs: Sequence[Sequence[int | None]],
    detections: Sequence[Sequence[list[dict]]],
) -> list[dict]:
    """COCO results of the stream: each frame has the detections of the output that it is paired with.

    Args:
        sequences: image ids of the frames of each sequence.
        pairs: of :func:`pair`, for each sequence.
        detections: of each sequence and output, COCO results without image_id.
    """
    return [
        {**detection, "image_id": image_id}
        for ids, paired, made in zip(sequences, pairs, detections, strict=True)
        for image_id, index in zip(ids, paired, strict=True)
        if index is not None
        for detection in made[index]
    ]
