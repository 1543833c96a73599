"""Pictures for people: panels ground truth | teacher | student, training curves, accuracy against cost."""

from .intervals import IntervalRow, plot_intervals
from .objects import Objects, ground_truth, predictions
from .panels import Panel, draw_objects, save_panels
from .plots import RowPoint, plot_ap_vs_cost, plot_curves, plot_results
from .weights import plot_weights

__all__ = [
    "IntervalRow",
    "Objects",
    "Panel",
    "RowPoint",
    "draw_objects",
    "ground_truth",
    "plot_ap_vs_cost",
    "plot_curves",
    "plot_intervals",
    "plot_results",
    "plot_weights",
    "predictions",
    "save_panels",
]
