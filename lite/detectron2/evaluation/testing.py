"""Printing, checking and flattening of evaluation results."""

import logging
import math
import sys
from collections.abc import Mapping

__all__ = ["print_csv_format", "verify_results"]

logger = logging.getLogger(__name__)


def print_csv_format(results: Mapping) -> None:
    """Log results as lines that paste into a spreadsheet; per-category numbers (with "-") are left out.

    Args:
        results: {task: {metric: value}} or {name: value}.
    """
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info("copypaste: %s=%s", task, metrics)
            continue
        shown = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(shown))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in shown.values()))


def verify_results(cfg, results: Mapping) -> bool:
    """Compare results with `cfg.TEST.EXPECTED_RESULTS` and end the process with status 1 if they are off.

    Args:
        cfg: EXPECTED_RESULTS is a list of [task, metric, expected value, tolerance].
        results: {task: {metric: value}}.

    Returns:
        True: everything is within its tolerance.
    """
    wrong = []
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        actual = results.get(task, {}).get(metric)
        if actual is None or not math.isfinite(actual) or abs(actual - expected) > tolerance:
            wrong.append(f"{task}/{metric} is {actual}, expected {expected} +- {tolerance}")
    if wrong:
        logger.error("Results are not as TEST.EXPECTED_RESULTS says: %s", "; ".join(wrong))
        logger.error("All results: %s", results)
        sys.exit(1)
    if cfg.TEST.EXPECTED_RESULTS:
        logger.info("Results are as TEST.EXPECTED_RESULTS says.")
    return True


def flatten_results_dict(results: Mapping) -> dict:
    """{"bbox": {"AP": 1}} becomes {"bbox/AP": 1}, to any depth."""
    flat = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": number for inner, number in flatten_results_dict(value).items()})
        else:
            flat[name] = value
    return flat
