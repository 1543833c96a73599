"""Results that are kept as long as what they were made of stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..files import read_whole_json, write_json


def kept(file: Path, key: Any, make: Callable[[], Any], files: Iterable[Path] = ()) -> Any:
    """What ``make`` returned when it was last called with this ``key``; it is called again if a file is missing.

    Args:
        file: JSON that remembers the key and the result.
        key: what the result depends on, as JSON.
        files: that ``make`` writes.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    before = read_whole_json(file)
    if before is not None and before["key"] == digest and all(map(Path.exists, files)):
        return before["result"]
    result = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"key": digest, "result": result})
    return result
