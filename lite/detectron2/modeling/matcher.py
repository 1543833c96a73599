"""Assign predicted elements (anchors, proposals) to ground truth by a table of match qualities."""

import itertools
import math

import torch

__all__ = ["Matcher"]


class Matcher:
    """Labels each prediction by the quality of its best ground truth.

    Args:
        thresholds: ascending positive numbers that cut the range of qualities into intervals, each closed below.
        labels: one label (1 match, 0 no match, -1 ignore) an interval, so one more than ``thresholds``.
        allow_low_quality_matches: also label 1 the best predictions of every ground truth, however poor.
    """

    def __init__(self, thresholds: list[float], labels: list[int], allow_low_quality_matches: bool = False):
        cuts = list(thresholds)
        if not cuts or cuts[0] <= 0 or any(low > high for low, high in itertools.pairwise(cuts)):
            raise ValueError(f"Matcher: thresholds must be positive and ascending, not {cuts}")
        if any(label not in (-1, 0, 1) for label in labels):
            raise ValueError(f"Matcher: labels must be -1, 0 or 1, not {list(labels)}")
        if len(labels) != len(cuts) + 1:
            raise ValueError(f"Matcher: {len(cuts)} thresholds need {len(cuts) + 1} labels, not {len(labels)}")
        self.thresholds = [-math.inf, *cuts, math.inf]
        self.labels = labels
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(M ground truths, N predictions) qualities >= 0 -> for every prediction the index of its best ground
        truth, (N,) int64, and its label, (N,) int8.

        Without ground truth (M = 0) all indices are 0 and all labels those of the lowest interval.
        """
        quality = match_quality_matrix
        if quality.dim() != 2:
            raise ValueError(f"Matcher: expects a matrix (M, N), not shape {tuple(quality.shape)}")
        num_gt, num_pred = quality.shape
        labels = quality.new_full((num_pred,), self.labels[0], dtype=torch.int8)
        if num_gt == 0:
            return quality.new_zeros((num_pred,), dtype=torch.int64), labels

        best, matches = quality.max(dim=0)
        for cut, label in zip(self.thresholds[1:-1], self.labels[1:]):
            labels.masked_fill_(best >= cut, label)
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(labels, quality)
        return matches, labels

    def set_low_quality_matches_(self, match_labels: torch.Tensor, match_quality_matrix: torch.Tensor) -> None:
        """Set to 1 in place the labels of all predictions that are (equal) best for some ground truth.

        The index of the match is not touched: such a prediction keeps its own best ground truth.
        """
        if match_quality_matrix.numel() == 0:
            return
        best_of_gt = match_quality_matrix.amax(dim=1, keepdim=True)
        match_labels.masked_fill_((match_quality_matrix == best_of_gt).any(dim=0), 1)
