"""Whether the hub answers: asked once, since its clients retry for minutes where nobody does."""

from __future__ import annotations

from functools import cache

_PATIENCE = 6.0  # seconds for each of connecting and answering


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached from here; False in offline mode. Takes seconds at most."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # name, proxy, certificate, timeout: the client's own type for each, and one meaning
        return False
    return True
