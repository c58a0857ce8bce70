"""Why a process cannot join a Ray cluster that answers: in one line, with what to do about it.

Ray wants its own version and Python's to be the same on both sides, to the last digit, and says so in six lines of
which the first names neither; a token that is missing or wrong it reports as no connection, after twenty seconds. The
courier asks here when `ray.init` fails; the training goes on, its partials wait in the spool. No Ray is imported.
"""

import re
from typing import NamedTuple

_VERSIONS = re.compile(
    r"Version mismatch: The cluster was started with:\s+Ray: (\S+)\s+Python: (\S+)\s+"
    r"This process on .+ was started with:\s+Ray: (\S+)\s+Python: (\S+)"
)
"""As Ray 2.52 to 2.60 write it (ray/_private/utils.py, check_version_info)."""
_NO_CONNECTION = "Failed to connect to Ray cluster"


class _Versions(NamedTuple):
    ray: str
    python: str

    def __str__(self) -> str:
        return f"Ray {self.ray} on Python {self.python}"


def why_not_joined(address: str, error: BaseException) -> str | None:
    """What keeps this process out of the cluster for good; None where trying again may help.

    Args:
        address: host:port of the cluster, of which it is known that somebody listens there.
        error: what `ray.init` raised.
    """
    found = _VERSIONS.search(str(error))
    if found is not None:
        theirs, ours = _Versions(*found.groups()[:2]), _Versions(*found.groups()[2:])
        fix = f"install ray=={theirs.ray}" if theirs.python == ours.python else f"use {theirs}"
        return (
            f"the cluster at {address} runs {theirs}, this job {ours}, and Ray wants both the same: {fix} in the "
            f"job's environment, or serve from a cluster of {ours}"
        )
    if _NO_CONNECTION in str(error):
        return (
            f"somebody listens at {address} and does not let this process in: if it is a Ray with a token, give the "
            "job the same in RAY_AUTH_TOKEN or ~/.ray/auth_token; else pass the address that `eigenwatch serve` printed"
        )
    return None
