"""Pictures for people: panels ground truth | teacher | student, training curves, accuracy against cost."""

from .colours import variant_styles
from .costs import CostRow, plot_ap_vs_cost
from .intervals import IntervalRow, plot_intervals
from .label_maps import LabelMap
from .objects import Objects, as_content, ground_truth, predictions
from .panels import Panel, draw_objects, save_panels
from .plots import plot_curves
from .weights import plot_sweep_lines

__all__ = [
    "CostRow",
    "IntervalRow",
    "LabelMap",
    "Objects",
    "Panel",
    "as_content",
    "draw_objects",
    "ground_truth",
    "plot_ap_vs_cost",
    "plot_curves",
    "plot_intervals",
    "plot_sweep_lines",
    "predictions",
    "save_panels",
    "variant_styles",
]
