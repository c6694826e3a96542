"""One thing that was looked at: how it stands, what was found, what to do."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.errors import RaystillError

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Check:
    """One line of a doctor's report."""

    where: str
    """The machine or service that was looked at."""
    what: str
    status: Status
    found: str
    fix: str = ""
    """What to do, where it is not `ok` and `found` does not say so."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def guarded(where: str, what: str, look: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks of `look`; one that raises is a failure of its own, in one line."""
    try:
        return list(look())
    except RaystillError as error:  # says what to do itself
        return [Check(where, what, "failure", " ".join(str(error).split()))]
    except Exception as error:  # whatever a service does wrong is what a doctor is asked about
        text = " ".join(str(error).split())[:300]
        return [Check(where, what, "failure", f"{type(error).__name__}: {text}")]
