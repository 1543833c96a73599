"""Paths that may lie elsewhere: ``PathManager`` opens local files, http(s) and ``detectron2://``."""

import contextlib
import logging
import os
import shutil
import urllib.request
from urllib.parse import urlparse

from iopath.common.file_io import PathHandler, file_lock, get_cache_dir
from iopath.common.file_io import PathManager as _PathManager

__all__ = ["PathHandler", "PathManager", "atomic_write"]

_MODEL_SCHEME = "detectron2://"
_MODEL_HOST = "https://dl.fbaipublicfiles.com/detectron2/"
_TIMEOUT_SECONDS = 20

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "wb"):
    """Open a local file for writing that appears under its name only when it is complete.

    Whoever reads ``path`` meanwhile, or after this process was killed, finds the former file or none.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


class _DownloadHandler(PathHandler):
    """Files on the web, ``detectron2://`` (the public model host) among them, kept in a cache folder.

    The cache is that of iopath, at the same places: what was downloaded for detectron2 is found here.
    """

    def _get_supported_prefixes(self):
        return ["http://", "https://", "ftp://", _MODEL_SCHEME]

    def _get_local_path(self, path, force=False, cache_dir=None, **kwargs):
        url = path
        if path.startswith(_MODEL_SCHEME):
            url = _MODEL_HOST + path[len(_MODEL_SCHEME) :]
        folder = os.path.join(get_cache_dir(cache_dir), os.path.dirname(urlparse(url).path.lstrip("/")))
        cached = os.path.join(folder, url.rsplit("/", 1)[-1])
        if os.path.isfile(cached) and not force:
            return cached
        try:
            os.makedirs(folder, exist_ok=True)
            with file_lock(cached):  # the processes of one job ask at the same time
                if force or not os.path.isfile(cached):
                    _download(url, cached)
        except OSError as error:
            raise FileNotFoundError(
                f"{path} is not on this machine and cannot be downloaded ({error}). Download {url} elsewhere, then "
                f"put it at {cached} or set MODEL.WEIGHTS to where you put it."
            ) from error
        return cached

    def _open(self, path, mode="r", **kwargs):
        if any(letter in mode for letter in "wax+"):
            raise OSError(f"{path}: cannot write to the web")
        return open(self._get_local_path(path), mode, **kwargs)

    def _exists(self, path, **kwargs):
        try:
            return os.path.exists(self._get_local_path(path))
        except FileNotFoundError:
            return False

    _isfile = _exists


def _download(url: str, path: str) -> None:
    logger.info("Downloading %s to %s", url, path)
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as source, atomic_write(path) as sink:
        shutil.copyfileobj(source, sink)


class _CatalogHandler(PathHandler):
    """``catalog://``: names of models of Detectron's first version, which are not resolved here."""

    def _get_supported_prefixes(self):
        return ["catalog://"]

    def _get_local_path(self, path, **kwargs):
        raise FileNotFoundError(
            f"{path}: detectron2-lite has no catalog of Detectron v1 models. Download the file yourself and set "
            f"MODEL.WEIGHTS to where you put it."
        )

    def _open(self, path, mode="r", **kwargs):
        return open(self._get_local_path(path), mode, **kwargs)


PathManager = _PathManager()
PathManager.register_handler(_DownloadHandler())
PathManager.register_handler(_CatalogHandler())
