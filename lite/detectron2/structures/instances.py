"""A table of per-instance fields that belongs to one image."""

from __future__ import annotations

import itertools
import numbers
from typing import Any

import torch
from torch import Tensor


class Instances:
    """Fields of equal length that describe the instances of one image.

    Any sequence with a length (tensor, list, Boxes, masks ...) can be a field; it is read and written
    like an attribute: ``x.gt_boxes = Boxes(...)``. Names that start with an underscore are ordinary
    attributes, not fields.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any):
        """
        Args:
            image_size: (height, width) of the image in pixels.
            kwargs: initial fields.
        """
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._image_size

    def __setattr__(self, name: str, val: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, val)
        else:
            self.set(name, val)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are not ordinary attributes. "_fields" itself can be missing
        # while an object is being unpickled or copied.
        if name != "_fields" and name in self._fields:
            return self._fields[name]
        known = ", ".join(self._fields) if name != "_fields" else ""
        raise AttributeError(f"Instances has no field {name!r}; fields: {known or 'none'}")

    def set(self, name: str, value: Any) -> None:
        """Add or replace a field.

        Raises:
            ValueError: the length of `value` differs from that of the present fields.
        """
        if self._fields and len(value) != len(self):
            raise ValueError(f"Field {name!r} has length {len(value)}, the Instances {len(self)}")
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Whether there is a field of that name."""
        return name in self._fields

    def get(self, name: str) -> Any:
        """The field of that name; KeyError if there is none."""
        return self._fields[name]

    def remove(self, name: str) -> None:
        """Drop the field of that name; KeyError if there is none."""
        del self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """All fields as a dict from name to value. Changes to the dict change the object."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """A new object in which every field that has a `to` method went through it."""
        return self._derive(
            {k: v.to(*args, **kwargs) if hasattr(v, "to") else v for k, v in self._fields.items()}
        )

    def __getitem__(self, item: int | slice | Tensor) -> "Instances":
        """The selected instances. An integer selects one, as an object of length 1."""
        if isinstance(item, numbers.Integral):
            total = len(self)
            if not -total <= item < total:
                raise IndexError(f"Index {item} is out of range for {total} instances")
            item %= total
            item = slice(item, item + 1)
        return self._derive({k: v[item] for k, v in self._fields.items()})

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without fields have no length")

    def __iter__(self):
        raise NotImplementedError("Instances cannot be iterated; index them with integers instead")

    @staticmethod
    def cat(instance_lists: list["Instances"]) -> "Instances":
        """Join instances of one image size field by field.

        The first element decides which fields are joined. Tensors and lists are concatenated, other
        types by their static `cat` method.
        """
        if len(instance_lists) == 0 or not all(isinstance(x, Instances) for x in instance_lists):
            raise TypeError("Instances.cat takes at least one Instances, and nothing else")
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        sizes = {tuple(x.image_size) for x in instance_lists}
        if len(sizes) > 1:
            raise ValueError(f"Instances.cat needs one image size, got {sorted(sizes)}")
        return first._derive(
            {name: _join(name, [x.get(name) for x in instance_lists]) for name in first._fields}
        )

    def _derive(self, fields: dict[str, Any]) -> "Instances":
        """New Instances of the same image with other fields (whose lengths are known to agree)."""
        out = Instances(self._image_size)
        out._fields.update(fields)
        return out

    def __repr__(self) -> str:
        height, width = self._image_size
        count = len(self) if self._fields else 0
        fields = ", ".join(f"{k}: {v}" for k, v in self._fields.items())
        return (
            f"Instances(num_instances={count}, image_height={height}, image_width={width}, fields=[{fields}])"
        )


def _join(name: str, values: list[Any]) -> Any:
    """Concatenate the values of one field."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, list):
        return list(itertools.chain.from_iterable(values))
    if hasattr(type(first), "cat"):
        return type(first).cat(values)
    raise ValueError(f"Field {name!r} of type {type(first).__name__} cannot be concatenated")
