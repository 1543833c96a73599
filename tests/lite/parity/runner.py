"""Compare detectron2-lite with detectron2 itself, as a black box.

A probe is a file ``probes/<topic>.py`` with ``probe(workdir: pathlib.Path) -> dict[str, object]``. It is run in two
processes, first with the interpreter that has detectron2 and then with the current one, which has lite. Both get the
same ``workdir``: what the first leaves there (weights, for example) the second may read. The dicts must have equal
keys and equal values: arrays, tensors, numbers, strings, None, and lists, tuples and dicts of these. Floating-point
numbers may differ by the module constant ``TOLERANCE`` (1e-4 without one) times max(1, |reference|); all else is exact.

    D2_PYTHON=/path/to/python python tests/lite/parity/runner.py [topic ...] [--report FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import numbers
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PROBES = Path(__file__).resolve().parent / "probes"
DEFAULT_TOLERANCE = 1e-4
CHILD_TIMEOUT = 600  # seconds


class ParityError(Exception):
    """A probe could not be run, or ran with the wrong engine."""


def list_probes() -> list[str]:
    """Topics of all probes."""
    return sorted(path.stem for path in PROBES.glob("*.py") if not path.stem.startswith("_"))


def load_probe(topic: str):
    """Import the module of a probe."""
    spec = importlib.util.spec_from_file_location(f"parity_probe_{topic}", PROBES / f"{topic}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_lite() -> bool:
    """Whether the detectron2 of this interpreter is lite."""
    import detectron2

    return "lite" in detectron2.__version__


def run_child(python: str, topic: str, workdir: Path, want_lite: bool) -> dict[str, object]:
    """Run a probe in its own process and return ``{"values": dict, "tolerance": float, "version": str}``."""
    result = workdir / f"result-{'lite' if want_lite else 'reference'}.pkl"
    env = dict(os.environ, OMP_NUM_THREADS="1")
    if not want_lite:
        # It would lead the reference interpreter to lite.
        env.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).resolve()), "--child", topic, str(workdir), str(result)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=CHILD_TIMEOUT)
    name = "lite" if want_lite else "detectron2"
    if done.returncode != 0:
        raise ParityError(f"probe '{topic}' failed with {name} ({python}):\n{done.stderr[-4000:]}")
    with open(result, "rb") as f:
        answer = pickle.load(f)
    if ("lite" in answer["version"]) != want_lite:
        raise ParityError(f"{python} was expected to have {name} but has version {answer['version']}")
    return answer


def child_main(topic: str, workdir: Path, result: Path) -> None:
    """Body of :func:`run_child` in the other process."""
    import detectron2
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    module = load_probe(topic)
    answer = {
        "values": to_plain(module.probe(workdir)),
        "tolerance": getattr(module, "TOLERANCE", DEFAULT_TOLERANCE),
        "version": detectron2.__version__,
    }
    with open(result, "wb") as f:
        pickle.dump(answer, f, protocol=4)


def to_plain(value):
    """Replace tensors by arrays, so that the result can be read by another version of torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return value.float().numpy() if "bfloat16" in str(value.dtype) else value.numpy()
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, (str, bytes, numbers.Number, np.ndarray, np.generic)):
        return value
    raise TypeError(f"a probe returned a {type(value).__name__}; allowed are arrays, numbers, strings, lists, dicts")


def difference(reference, value) -> float:
    """Largest difference of two plain values relative to max(1, |reference|); inf if they do not correspond."""
    if isinstance(reference, dict):
        if not isinstance(value, dict) or list(reference) != list(value):
            return float("inf")
        return max((difference(reference[key], value[key]) for key in reference), default=0.0)
    if isinstance(reference, list):
        if not isinstance(value, list) or len(reference) != len(value):
            return float("inf")
        return max((difference(a, b) for a, b in zip(reference, value)), default=0.0)
    if reference is None or isinstance(reference, (str, bytes)):
        return 0.0 if type(value) is type(reference) and value == reference else float("inf")
    a, b = np.asarray(reference), np.asarray(value)
    if b.dtype.kind not in "biufc" or a.shape != b.shape or (a.dtype.kind == "f") != (b.dtype.kind == "f"):
        return float("inf")
    if a.dtype.kind != "f":
        return 0.0 if np.array_equal(a, b) else float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(a)))
    return float(np.nan_to_num(error, nan=np.inf, posinf=np.inf).max(initial=0.0))


def compare(topic: str, reference_python: str) -> tuple[dict[str, float], float]:
    """Run a probe with both engines. Returns the difference of every key and the tolerance of the probe."""
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        workdir = Path(folder)
        reference = run_child(reference_python, topic, workdir, want_lite=False)
        lite = run_child(sys.executable, topic, workdir, want_lite=True)
    missing = {key: float("inf") for key in set(reference["values"]) ^ set(lite["values"])}
    common = [key for key in reference["values"] if key in lite["values"]]
    found = {key: difference(reference["values"][key], lite["values"][key]) for key in common}
    return {**found, **missing}, reference["tolerance"]


def report(results: dict[str, tuple[dict[str, float], float]]) -> str:
    """Markdown table of the differences."""
    lines = ["| probe | value | largest difference | tolerance |", "|---|---|---|---|"]
    for topic, (differences, tolerance) in results.items():
        lines += [f"| {topic} | {key} | {value:.1e} | {tolerance:.0e} |" for key, value in differences.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("topics", nargs="*", help="probes to run; default: all")
    parser.add_argument("--report", type=Path, help="write the differences to this file as a markdown table")
    args = parser.parse_args(argv)
    python = os.environ.get("D2_PYTHON")
    if not python:
        parser.error("set D2_PYTHON to an interpreter that has detectron2")
    unknown = sorted(set(args.topics) - set(list_probes()))
    if unknown:
        parser.error(f"no probe named {', '.join(unknown)}; there are {', '.join(list_probes())}")

    results, failed = {}, False
    for topic in args.topics or list_probes():
        try:
            results[topic] = differences, tolerance = compare(topic, python)
        except (ParityError, subprocess.TimeoutExpired) as error:
            print(f"ERROR {error}")
            failed = True
            continue
        for key, value in differences.items():
            bad = value > tolerance
            failed |= bad
            print(f"{'DIFFERS' if bad else 'ok':8}{topic:28}{key:40}{value:.2e}")
    if args.report:
        args.report.write_text(report(results))
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_main(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main())
