"""The Hub's client: its errors in one line that says what to do, and patience with a Hub that is busy.

No token passes through here: the client finds it itself. What it says is freed of it, and of addresses, which may be
signed.
"""

import re
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import huggingface_hub
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from timm_deconv.errors import InputError

__all__ = ["CHANGED", "answered", "patiently", "status_of"]

P = ParamSpec("P")
T = TypeVar("T")

PASSING = (429, 500, 502, 503, 504)
"""Answers that may be others a little later."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try, where the Hub does not say how many."""
LONGEST_WAIT = 300.0

LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")
"""What clients of all versions are made with, by the beginnings of their names."""

ADDRESS = re.compile(r"https?://\S+")

CHANGED = "somebody else has just changed it: look at what is there now, and push again"

ANSWERS = {
    401: "the Hub does not know the token: `hf auth login` with one that may write, or set HF_TOKEN to it",
    402: "the Hub asks for a payment first: see its page of the organisation",
    403: "the token may not write there: take one that may, or an organisation of yours (--org)",
    404: "there is no such repository or revision, or the token may not see it: look at --org and --revision",
    409: CHANGED,
    412: CHANGED,
    429: "the Hub is asked too often: push again in some minutes, and it goes on from what is there",
    507: "the Hub has no room for it: make some, or take another organisation",
}


def answered(method: Callable[P, T]) -> Callable[P, T]:
    """Let a method of something with a `repository` say in one line what an error of the client means.

    Raises:
        InputError: no connection, offline mode, a wrong token, no permission, a conflict, or what else the Hub refused.
    """

    @wraps(method)
    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:  # httpx's, requests' or the client's own, of any of its versions
            reason = _reason(error)
        repository = args[0].repository  # type: ignore[attr-defined]
        raise InputError(f"{repository}: {reason}")  # out here no trace holds what the client had in hand

    return asked


def patiently(action: Callable[[], T]) -> T:
    """Act, again where the Hub was busy or the connection broke, as older clients do not; it must bear repeating."""
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not _passes(error):
                raise
            wait = _asked_wait(error, wait)
        time.sleep(wait)
    return action()


def status_of(error: BaseException) -> int | None:
    """Return the status of the Hub's answer that an error is about; None where there was no answer."""
    response = _response(error)
    return None if response is None else response.status_code


def _response(error: BaseException | None) -> Any:
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__
    return None


def _passes(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    return _of_the_network(error) if status is None else status in PASSING


def _of_the_network(error: BaseException | None) -> bool:
    """Tell whether the connection failed."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__module__.startswith(LIBRARIES):
            return True
        error = error.__cause__
    return False


def _asked_wait(error: BaseException, wait: float) -> float:
    response = _response(error)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else wait


def _reason(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing goes up: unset it"
    status = status_of(error)
    if status is None and _of_the_network(error):
        endpoint = ADDRESS.match(huggingface_hub.constants.ENDPOINT)
        where = endpoint.group().rpartition("@")[2] if endpoint else "the Hub"
        return f"no connection to {where} ({type(error).__name__}): look at the network, and push again"
    if status is None:
        kind = "" if isinstance(error, (HFValidationError, ValueError)) else f"{type(error).__name__} "
        return f"it cannot go up ({kind}{_clean(str(error))})"
    said = _clean(_response(error).headers.get("X-Error-Message") or "")
    said = f" ({said})" if said else ""
    if status >= 500 and status not in ANSWERS:
        return f"the Hub answers {status}{said}: push again later, and it goes on from what is there"
    return ANSWERS.get(status, f"the Hub refuses it with {status}") + said


def _clean(text: str) -> str:
    """Shorten a message to one line without token and addresses."""
    text = ADDRESS.sub("...", " ".join(text.split()))
    token = huggingface_hub.get_token()
    return (text.replace(token, "...") if token else text)[:200]
