"""One request to an OpenAI-compatible endpoint: sent, sent again, and kept once it is answered.

Nothing is sent anywhere but to the URL that the user's settings name: redirects are errors.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.errors import PipelineError
from lit_align.files import write_atomically
from lit_align.strict_json import check_form, read_json_file

Messages = Sequence[dict[str, str]]

RETRIED = {408, 425, 429, 500, 502, 503, 504, 529}
# The whole endpoint is at fault, not one request: a wrong key or address, or a redirect.
FATAL = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}
LONGEST_WAIT_SECONDS = 120.0
LONGEST_REPLY_BYTES = 1 << 24
SHOWN_CHARACTERS = 300
MALFORMED_RETRIES = 1  # such a reply is paid for, and mostly comes again
MALFORMED = "malformed reply of the endpoint"
REFUSED = "refused by the endpoint"


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how patiently.

    Attributes:
        url: base address, to which `/chat/completions` is appended: `http://localhost:8000/v1`.
        model: as the endpoint calls it.
        cache: folder that keeps every answer, so that none is paid for twice.
        key_variable: environment variable that holds the API key; None sends none.
        max_tokens: of an answer.
        temperature: of the endpoint's sampling.
        timeout_seconds: to wait for the next bytes of a reply.
        max_retries: of a request that the endpoint does not answer: 429, 5xx, no connection, no
            reply in time.
        concurrency: requests under way at once.
        backoff_seconds: before the first retry; doubled for each further one, unless the endpoint
            says how long.
    """

    url: str
    model: str
    cache: Path
    key_variable: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    timeout_seconds: float = 60.0
    max_retries: int = 6
    concurrency: int = 4
    backoff_seconds: float = 1.0

    def __post_init__(self) -> None:
        """Check the address.

        Raises:
            PipelineError: it is not an address of this kind.
        """
        check_url(self.url)

    @property
    def address(self) -> str:
        """What is posted to."""
        return self.url.rstrip("/") + "/chat/completions"

    def key(self) -> str | None:
        """The API key.

        Raises:
            PipelineError: the variable that shall hold it is not set, or holds no key.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise PipelineError(
                f"the environment variable {self.key_variable}, which shall hold the API key for "
                f"{self.url}, is not set"
            )
        if not (key.isascii() and key.isprintable()):  # the header's own error would show it
            raise PipelineError(
                f"the environment variable {self.key_variable} holds no API key: line breaks, or "
                "characters that are not ASCII"
            )
        return key


class Answer(NamedTuple):
    """What became of one request.

    Attributes:
        text: of the answer; None where there is none.
        reason: why there is none, as such requests are counted.
        detail: what the endpoint said.
    """

    text: str | None
    reason: str = ""
    detail: str = ""


def check_url(url: str) -> None:
    """Make sure that an address is one that requests may go to.

    Raises:
        PipelineError: says what it has to be.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        (parts.hostname or "").encode("idna")
        readable = parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        readable = False
    if not readable:  # the error's own words may show a password
        raise PipelineError("teacher_url is no address: see its host, its port, white space")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PipelineError(f"teacher_url {url!r}: it must begin with http:// or https://")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PipelineError(
            f"teacher_url of {parts.hostname}: no key and no query belong into the address; name "
            "the environment variable that holds the key in teacher_key_variable"
        )
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise PipelineError(f"teacher_url {url!r}: without /chat/completions, which is appended")


class _NoAnswerError(Exception):
    """No answer this time; `wait_seconds` is the endpoint's wish."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class _MalformedError(Exception):
    """A reply that is no chat completion."""


class Request:
    """One request, and where its answer is kept."""

    def __init__(self, endpoint: Endpoint, messages: Messages, sample: int) -> None:
        self.endpoint = endpoint
        self.payload = {
            "model": endpoint.model,
            "messages": list(messages),
            "max_tokens": endpoint.max_tokens,
            "temperature": endpoint.temperature,
        }
        named = json.dumps([endpoint.address, self.payload, sample], sort_keys=True)
        name = hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()
        self.path = endpoint.cache / f"{name}.json"

    def cached(self) -> str:
        """The text in the cache."""
        try:
            found = read_json_file(self.path)
            check_form(found, {"text": str})
            return str(found["text"])
        except (OSError, ValueError) as error:
            raise PipelineError(f"{self.path}: damaged; remove it to ask again") from error

    def send(self, key: str | None, stopping: threading.Event) -> Answer:
        """Ask until there is an answer; it goes into the cache."""
        endpoint, malformed = self.endpoint, 0
        for attempt in range(endpoint.max_retries + 1):
            if stopping.is_set():
                raise concurrent.futures.CancelledError
            try:
                return self._kept(self._sent(key))
            except _MalformedError as error:
                malformed += 1
                if malformed > MALFORMED_RETRIES or attempt == endpoint.max_retries:
                    return Answer(None, MALFORMED, str(error))
                wait = endpoint.backoff_seconds
            except _NoAnswerError as error:
                if attempt == endpoint.max_retries:
                    raise PipelineError(
                        f"{endpoint.address} gives no answer, asked {attempt + 1} times: {error}; "
                        f"the answers so far are kept in {endpoint.cache}: run again to go on"
                    ) from error
                wait = error.wait_seconds or endpoint.backoff_seconds * 2**attempt
            stopping.wait(min(wait, LONGEST_WAIT_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    def _kept(self, answer: Answer) -> Answer:
        if answer.text is not None:
            kept = json.dumps({"text": answer.text, "model": self.endpoint.model}) + "\n"
            write_atomically(self.path, kept.encode())
        return answer

    def _sent(self, key: str | None) -> Answer:
        """One try.

        Raises:
            _NoAnswerError: another one may have more luck.
            _MalformedError: the reply is no chat completion.
            PipelineError: no other request will.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps(self.payload).encode()
        request = urllib.request.Request(self.endpoint.address, body, headers, method="POST")
        try:
            with OPENER.open(request, timeout=self.endpoint.timeout_seconds) as reply:
                return _answer(_read(reply, key))
        except urllib.error.HTTPError as error:
            with error:
                said = _read(error, key).decode("utf-8", "replace")
            return self._refused(error, said)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise _NoAnswerError(f"no connection or no reply in time: {reason}") from error

    def _refused(self, error: urllib.error.HTTPError, said: str) -> Answer:
        """What a status of 300 and more means."""
        detail = f"status {error.code}: {' '.join(said.split())[:SHOWN_CHARACTERS]}"
        if error.code in RETRIED:
            raise _NoAnswerError(detail, _seconds(error.headers.get("Retry-After"))) from error
        if error.code in FATAL:
            raise PipelineError(f"{self.endpoint.address}: {detail}") from error
        return Answer(None, REFUSED, detail)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirect)


def _read(reply: Any, key: str | None) -> bytes:
    """What a reply says, without the key, which some servers repeat.

    Raises:
        _NoAnswerError: it breaks off.
    """
    try:
        body: bytes = reply.read(LONGEST_REPLY_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _NoAnswerError(f"the reply breaks off: {error or type(error).__name__}") from error
    return body.replace(key.encode(), b"<key>") if key else body


def _answer(body: bytes) -> Answer:
    """The text of a reply.

    Raises:
        _MalformedError: it is not a chat completion.
    """
    shown = body[:SHOWN_CHARACTERS].decode("utf-8", "replace")
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
        str(text).encode()  # half a surrogate pair is no text
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _MalformedError(f"not a chat completion: {shown}") from error
    if not isinstance(text, str):
        return Answer(None, MALFORMED, f"no text: {shown}")
    return Answer(text)


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds; a date, which it may also be, is left to the backoff."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if seconds >= 0 else None  # NaN is neither
