"""The augmentation interface: a policy looks at its inputs and returns the transform that it applied."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _named_parameters(function) -> list[inspect.Parameter] | None:
    """Parameters of a bound function, or None when it takes ``*args`` or ``**kwargs``."""
    parameters = list(inspect.signature(function).parameters.values())
    return None if any(p.kind in _VARIADIC for p in parameters) else parameters


class Augmentation:
    """A random (or input-dependent) choice of a transform.

    Subclasses write ``get_transform``. Its parameter names say what it needs to see: each is the name of an
    attribute of the :class:`AugInput`, e.g. ``get_transform(self, image, boxes)``. A subclass whose
    ``get_transform`` is variadic lists the names in ``input_args`` instead.
    """

    input_args: tuple[str, ...] | None = None

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Store the arguments of ``__init__``, given as ``locals()``, as attributes."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def get_transform(self, *args) -> Transform:
        """Choose a transform for the given inputs without changing them."""
        raise NotImplementedError(f"{type(self).__name__} does not say which transform to use.")

    def __call__(self, aug_input: Any) -> Transform:
        """Choose a transform, apply it to ``aug_input`` in place and return it.

        Raises:
            AttributeError: ``aug_input`` lacks something that ``get_transform`` asks for.
        """
        if self.input_args is None:
            self.input_args = tuple(p.name for p in _named_parameters(self.get_transform) or ())
        for name in self.input_args:
            if not hasattr(aug_input, name):
                raise AttributeError(
                    f"{type(self).__name__} looks at '{name}', which {type(aug_input).__name__} does not have."
                )
        chosen = self.get_transform(*(getattr(aug_input, name) for name in self.input_args))
        if not isinstance(chosen, (Transform, TransformList)):
            raise AssertionError(f"{type(self).__name__}.get_transform returned {chosen!r}, not a Transform.")
        aug_input.transform(chosen)
        return chosen

    def _rand_range(self, low: float = 1.0, high: float | None = None, size=None):
        """Uniform draw from numpy's global generator: in [0, low), or in [low, high) when both are given."""
        bounds = (0, low) if high is None else (low, high)
        return np.random.uniform(*bounds, size=[] if size is None else size)

    def __repr__(self) -> str:
        """Class name with the arguments that differ from their defaults."""
        parameters = _named_parameters(type(self).__init__)
        if parameters is None or not all(hasattr(self, p.name) for p in parameters[1:]):
            return object.__repr__(self)
        shown = []
        for p in parameters[1:]:
            value = getattr(self, p.name)
            if value is p.default:
                continue
            text = repr(value)
            shown.append(f"{p.name}={'...' if chr(10) in text else text}")
        return f"{type(self).__name__}({', '.join(shown)})"

    __str__ = __repr__


class _Fixed(Augmentation):
    """Always the same transform."""

    def __init__(self, tfm: Transform):
        self.tfm = tfm

    def get_transform(self) -> Transform:
        return self.tfm

    def __repr__(self) -> str:
        return repr(self.tfm)

    __str__ = __repr__


def as_augmentation(item: Augmentation | Transform) -> Augmentation:
    """Let a fixed transform stand where an augmentation is expected."""
    if isinstance(item, Augmentation):
        return item
    if isinstance(item, (Transform, TransformList)):
        return _Fixed(item)
    raise AssertionError(f"Expected an Augmentation or a Transform, got {item!r}.")


class AugmentationList(Augmentation):
    """Apply augmentations (or fixed transforms) one after the other; each sees what the former ones left."""

    def __init__(self, augs: list[Augmentation | Transform]):
        self.augs = [as_augmentation(item) for item in augs]

    def __call__(self, aug_input: Any) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.augs!r}"

    __str__ = __repr__


class AugInput:
    """What augmentations look at and change together.

    Args:
        image: ``H x W`` or ``H x W x C``, uint8 in [0, 255] or floating point.
        boxes: ``N x 4`` XYXY in absolute pixels.
        sem_seg: ``H x W`` labels.

    Attributes of the same names hold the current state. Anything else that needs the same treatment can be
    handled by a subclass, or afterwards with the returned transform.
    """

    def __init__(self, image: np.ndarray, *, boxes: np.ndarray | None = None, sem_seg: np.ndarray | None = None):
        if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
            what = f"shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise AssertionError(f"An image must be a numpy array of shape HxW or HxWxC, got {what}.")
        self.image, self.boxes, self.sem_seg = image, boxes, sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply ``tfm`` to everything held, in place."""
        for name, apply in (("image", tfm.apply_image), ("boxes", tfm.apply_box), ("sem_seg", tfm.apply_segmentation)):
            held = getattr(self, name)
            setattr(self, name, None if held is None else apply(held))

    def apply_augmentations(self, augmentations: list[Augmentation | Transform]) -> TransformList:
        """Run the augmentations in order and return the transforms that they chose."""
        return AugmentationList(augmentations)(self)


def apply_augmentations(augmentations: list[Augmentation | Transform], inputs: AugInput | np.ndarray):
    """Run augmentations on an :class:`AugInput`, or on a bare image.

    Returns:
        (inputs, transforms): the changed inputs, of the type that was given, and a ``TransformList``.
    """
    if isinstance(inputs, np.ndarray):
        held = AugInput(inputs)
        transforms = held.apply_augmentations(augmentations)
        return held.image, transforms
    return inputs, inputs.apply_augmentations(augmentations)


# Names that older training scripts import.
TransformGen = Augmentation
StandardAugInput = AugInput
apply_transform_gens = apply_augmentations
