"""Counting of faults in data: how many of each reason, and the first culprit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..finding import ERROR, Finding


class Tally:
    """Counts by reason; keeps the first culprit of each.

    Args:
        check: name of the findings, which says what data they are about.
    """

    def __init__(self, check: str) -> None:
        self.check = check
        self._counts: dict[str, int] = {}
        self._first: dict[str, tuple[str, str, str, str, str]] = {}

    def add(
        self, level: str, reason: str, culprit: str, fix: str, of: str = "", seen: str = "", count: int = 1
    ) -> None:
        """One more of a kind.

        Args:
            reason: what is wrong, after the culprit's name, e.g. "has no bbox"; faults of one reason are one finding.
            culprit: which one it is; the first of a reason is told.
            of: among what it is counted, e.g. "18 annotations".
            seen: what is wrong with the first one, in place of the reason.
        """
        if reason not in self._first:
            self._first[reason] = (level, culprit, seen or reason, fix, of)
        self._counts[reason] = self._counts.get(reason, 0) + count

    def among(self, pairs: Sequence[tuple[dict, dict]]) -> Callable[..., None]:
        """``add(level, reason, record, fix, seen, count)``, which counts among annotations and names the image.

        Args:
            pairs: (dataset dict, one of its annotations).
        """
        of = f"{len(pairs)} annotations"

        def add(level: str, reason: str, record: dict, fix: str, seen: str = "", count: int = 1) -> None:
            self.add(level, reason, f"an annotation of {record['file_name']}", fix, of, seen, count)

        return add

    def __getitem__(self, reason: str) -> int:
        return self._counts.get(reason, 0)

    def reasons(self) -> list[str]:
        """In the order of :meth:`findings`."""
        return list(self._first)

    def findings(self) -> list[Finding]:
        """One finding a reason, in the order of the first culprits."""
        out = []
        for reason, (level, culprit, seen, fix, of) in self._first.items():
            counted = f" ({self._counts[reason]} of {of})" if of else ""
            out.append(Finding(level, self.check, f"{culprit} {seen}{counted}".lstrip(), fix))
        return out


def raise_errors(findings: Iterable[Finding]) -> None:
    """Raise a ValueError with all errors among ``findings``, if there are any."""
    errors = [str(finding) for finding in findings if finding.level == ERROR]
    if errors:
        raise ValueError("; ".join(errors))


def shorten(names: Iterable[str]) -> str:
    """Names of a message, the first few."""
    names = list(names)
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
