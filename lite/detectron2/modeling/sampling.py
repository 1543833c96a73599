"""Random subsets of labelled elements with a wanted share of positives."""

import torch

__all__ = ["subsample_labels"]


def subsample_labels(
    labels: torch.Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw at most ``num_samples`` elements of ``labels`` (N,), without replacement.

    -1 is never drawn, ``bg_label`` is negative, any other label positive. At most
    ``int(num_samples * positive_fraction)`` positives are drawn; negatives fill the rest as far as there are any.

    Returns the indices of the drawn positives and of the drawn negatives, both int64.
    """
    negative = labels == bg_label
    positive = (labels != -1) & ~negative

    def draw(mask: torch.Tensor, limit: int) -> torch.Tensor:
        candidates = mask.nonzero().squeeze(1)
        order = torch.randperm(candidates.numel(), device=candidates.device)
        return candidates[order[:limit]]

    chosen = draw(positive, int(num_samples * positive_fraction))
    return chosen, draw(negative, num_samples - chosen.numel())
