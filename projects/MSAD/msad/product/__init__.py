"""From a folder of images to a student that ships: what ``msad distill`` and :func:`msad.distill` do."""
