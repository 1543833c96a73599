"""RoIAlign as a module."""

from torch import Tensor, nn
from torchvision.ops import roi_align

__all__ = ["ROIAlign", "roi_align"]


class ROIAlign(nn.Module):
    """Pool features inside boxes to a fixed size by averaged bilinear samples (Mask R-CNN, sec. 3)."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ):
        """
        Args:
            output_size: height and width of the result, in cells.
            spatial_scale: factor from the frame of the boxes to feature cells (1 / stride).
            sampling_ratio: samples per cell and axis; 0 chooses by the size of the box.
            aligned: shift by half a cell, so that a cell's value sits at its center. False is the
                behavior of the first RoIAlign.
        """
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """
        Args:
            input: features (N, C, H, W).
            rois: (R, 5): index of the image in the batch, then the corners of the box.

        Returns:
            (R, C, *output_size).
        """
        if rois.dim() != 2 or rois.shape[1] != 5:
            raise ValueError(f"rois must have shape (R, 5), got {tuple(rois.shape)}")
        return roi_align(
            input,
            rois.to(input.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
