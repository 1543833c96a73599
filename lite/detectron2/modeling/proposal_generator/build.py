"""From ``cfg.MODEL.PROPOSAL_GENERATOR.NAME`` to a proposal generator."""

from torch import nn

from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

__all__ = ["PROPOSAL_GENERATOR_REGISTRY", "build_proposal_generator"]

PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
PROPOSAL_GENERATOR_REGISTRY.__doc__ = """
Proposal generators by name; each is called as ``constructor(cfg, input_shape)`` with a dict from the name of a feature
map to its :class:`ShapeSpec`.
"""


def build_proposal_generator(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    """Build the generator that ``cfg.MODEL.PROPOSAL_GENERATOR.NAME`` names.

    None for "PrecomputedProposals": the proposals then come with each input, under the key "proposals".
    """
    node = cfg.MODEL.PROPOSAL_GENERATOR
    if node.NAME != "PrecomputedProposals":
        return PROPOSAL_GENERATOR_REGISTRY.get(node.NAME)(cfg, input_shape)
    return None
