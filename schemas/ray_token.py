"""Token authentication of Ray, by the environment of a process.

Whoever reaches a Ray cluster runs code on it, so every Ray that we start asks for a token. Ray reads these variables
when it is imported, and a process that joins a cluster does not turn authentication on by itself, even where it has the
token; a token that a cluster does not ask for does no harm.
"""

from collections.abc import Mapping
from pathlib import Path

MODE = "RAY_AUTH_MODE"
TOKEN_FILE = Path(".ray/auth_token")
"""Below the home folder: where Ray keeps the token that it made."""


def token_environment(environment: Mapping[str, str], starts_ray: bool = False) -> dict[str, str]:
    """What to add to the environment of a process before it imports Ray; a mode that is set is left alone.

    Args:
        environment: of that process.
        starts_ray: whether it starts a cluster of its own, for which Ray makes a token where there is none.
    """
    if MODE in environment:
        return {}
    given = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment
    return {MODE: "token"} if starts_ray or given or (Path.home() / TOKEN_FILE).exists() else {}
