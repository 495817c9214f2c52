"""An error of the object-store library -> what to say and whether to try again.

The library's own text echoes what the server answered and the endpoint as it was set: signed strings, tokens,
passwords. So nothing of it is passed on but a status, a code and words of our own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,40})</Code>")
_ROLE_SERVICE = re.compile(r"/latest/(api/token|meta-data)")
_REFUSED_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId")
_REGION_CODES = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException")
_PASSING_CODES = ("RequestTimeout", "SlowDown", "ThrottlingException")

KEYS = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN), AWS_PROFILE or the machine's role, "
    "and that s3:GetObject and s3:ListBucket are allowed"
)
REGION = "check AWS_REGION and AWS_ENDPOINT_URL: the bucket lies in another region or at another endpoint"
MISSING = "check the URL and upload the whole folder again"


@dataclass(frozen=True, slots=True)
class Failure:
    """problem: what happened. fix: what to do about it; None where trying again may help.

    role: the service that knows the machine's role did not answer, which may pass on a machine that has one.
    """

    problem: str
    fix: str | None = None
    role: bool = False


def diagnose(error: BaseException) -> Failure:
    """What an error of the library means."""
    text = str(error)
    if _ROLE_SERVICE.search(text):
        return Failure(
            "no credentials in the environment, and the machine has no role that gives them", KEYS, role=True
        )
    status = _STATUS.search(text)
    code = _CODE.search(text)
    if status:
        return _answered(int(status[1]), code[1] if code else "")
    if "BareRedirect" in text or "redirect without" in text:
        return Failure("redirected", REGION)
    if "non-partial" in text:
        return Failure(
            "it gave the whole object where a range was asked for", "use a store, or a proxy, that takes ranges"
        )
    if "kind: " in text or "HTTP error" in text or "error decoding response body" in text:
        return Failure(_broken(text))
    return Failure(f"the client could not start a request ({type(error).__name__})", f"{REGION}; {KEYS}")


def _answered(status: int, code: str) -> Failure:
    problem = f"HTTP {status} {code}".strip()
    if status in (408, 429) or status >= 500 or code in _PASSING_CODES:
        return Failure(problem)
    if status in (301, 307, 308) or code in _REGION_CODES:
        return Failure(problem, REGION)
    if status in (401, 403) or code in _REFUSED_CODES:
        return Failure(f"access denied ({problem})", KEYS)
    if status == 404:
        return Failure(f"there is no such {'bucket' if code == 'NoSuchBucket' else 'object'} ({problem})", MISSING)
    return Failure(problem, f"the store takes no such request; {REGION}")


def _broken(text: str) -> str:
    words = {
        "dns error": "the endpoint's host name is not found",
        "ConnectionRefused": "connection refused",
        "Timeout": "timed out",
        "TimedOut": "timed out",
        "certificate": "the endpoint's certificate is not trusted",
    }
    return next((said for sign, said in words.items() if sign in text), "connection cut")
