"""The configuration node and the process-wide configuration."""

import logging
import os

from fvcore.common.config import CfgNode as _FvcoreNode

from detectron2.utils.file_io import PathManager

from .defaults import CONFIG_VERSION, default_tree

logger = logging.getLogger(__name__)


class CfgNode(_FvcoreNode):
    """A nested configuration with attribute access, yaml input and ``_BASE_`` inheritance."""

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = True) -> None:
        """Overwrite values by those of a yaml file.

        Args:
            cfg_filename: the yaml file. Its ``_BASE_`` (one path or a list of paths, relative to the file)
                is read first.
            allow_unsafe: accept yaml tags that run Python code; a file that has some is reported by a warning.

        Raises:
            AssertionError: there is no such file, or it is written for a newer config version.
            KeyError: the file has a key that this configuration does not have.
            ValueError: a value has another type than the default, the file is written for an older config
                version, or it is no mapping of keys to values.
        """
        cfg_filename = os.fspath(cfg_filename)
        assert PathManager.isfile(cfg_filename), f"{cfg_filename}: no such config file"
        tree = self.load_yaml_with_base(cfg_filename, allow_unsafe=allow_unsafe)
        if not isinstance(tree, dict):
            raise ValueError(f"{cfg_filename}: expected a mapping of config keys to values, got {tree!r}")
        self._check_version(tree, cfg_filename)
        self.merge_from_other_cfg(type(self)(tree))

    @classmethod
    def _open_cfg(cls, filename):
        return PathManager.open(filename)

    def _check_version(self, tree: dict, filename: str) -> None:
        ours = self.get("VERSION")
        if ours is None:  # a tree of somebody's own, without versions
            return
        theirs = tree.get("VERSION")
        if theirs is None:
            logger.warning("%s names no VERSION; it is read as version %s.", filename, ours)
            return
        assert theirs <= ours, f"{filename} is of config version {theirs}, newer than the known version {ours}"
        if theirs < ours:
            raise ValueError(
                f"{filename} is of config version {theirs}; rename its keys to those of version {ours} "
                f"and set VERSION: {ours}"
            )


global_cfg = CfgNode()


def get_cfg() -> CfgNode:
    """A fresh copy of the default configuration."""
    return CfgNode({"VERSION": CONFIG_VERSION, **default_tree()})


def set_global_cfg(cfg: CfgNode) -> None:
    """Let ``global_cfg`` hold the values of ``cfg``, in place for those who already imported it."""
    global_cfg.clear()
    global_cfg.update(cfg)
