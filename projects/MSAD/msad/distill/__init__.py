"""Distillation: a student, frozen teachers and losses between their features."""
