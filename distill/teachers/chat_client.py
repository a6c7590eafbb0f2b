"""Requests to an OpenAI-compatible chat server: patience with a server in trouble, and a cap on what is spent."""

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from distill.errors import DistillError

PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})
"""HTTP states that another attempt may mend."""
LONGEST_WAIT = 30.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class StoppedError(Exception):
    """Another request has failed for good; this one was given up before it was sent."""


class CapReachedError(Exception):
    """The budget leaves no further request."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long to wait and how much to spend.

    Attributes:
        timeout: seconds for one attempt.
        patience: seconds during which a request that fails is sent again, before the run stops.
        max_requests: cap on paid requests; None for none.
        max_cost: cap on the cost of all tokens, in the currency of the prices; None for none.
        input_price: per million input tokens.
        output_price: per million output tokens.
    """

    timeout: float = 60.0
    patience: float = 300.0
    max_requests: int | None = None
    max_cost: float | None = None
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise DistillError("max_cost needs input_price and output_price, per million tokens")

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return what so many tokens cost."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


class Budget:
    """What may still be spent; requests in flight are set aside, so that many at once do not break the cap.

    Args:
        limits: the caps.
        requests: paid before.
        cost: spent before.
    """

    def __init__(self, limits: Limits, *, requests: int, cost: float) -> None:
        self._limits, self._requests, self._cost = limits, requests, cost
        self._dearest, self._flying = 0.0, 0
        self._change = threading.Condition()

    def take(self) -> bool:
        """Set one request aside; False if the cap leaves none, however those in flight end.

        While costs are unknown a request waits for the one in flight: the first tells what the others will cost.
        """
        with self._change:
            self._change.wait_for(lambda: self._fits() or not self._flying)
            if not self._fits():
                return False
            self._flying += 1
            return True

    def _fits(self) -> bool:
        caps = self._limits
        if caps.max_requests is not None and self._requests + self._flying >= caps.max_requests:
            return False
        if caps.max_cost is None:
            return True
        if self._dearest == 0:
            return not self._flying and self._cost < caps.max_cost
        return self._cost + (self._flying + 1) * self._dearest <= caps.max_cost * (1 + 1e-9)

    def lose(self) -> None:
        """Count an attempt without an answer that may be billed all the same."""
        with self._change:
            self._requests += 1

    def settle(self, cost: float, *, paid: bool) -> None:
        """Book a request that was set aside."""
        with self._change:
            self._flying -= 1
            self._requests += paid
            self._cost += cost
            self._dearest = max(self._dearest, cost)
            self._change.notify_all()


class ChatClient:
    """Sends chat requests.

    Args:
        url: base address, such as `http://localhost:8000/v1`.
        key: sent as bearer token; None sends none.
        limits: see `Limits`.

    Raises:
        DistillError: the address is none, or a key would go over the network unencrypted.
    """

    def __init__(self, url: str, *, key: str | None, limits: Limits) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise DistillError(f"server url {url!r} must read http(s)://HOST[:PORT]/v1, without key or question mark")
        local = parts.hostname in LOOPBACK
        if key is not None and parts.scheme == "http" and not local:
            raise DistillError(f"{url} is not encrypted and a key would be readable on the way; use https")
        self.url = url.rstrip("/")
        self.limits = limits
        self._key = key
        # A redirect could carry the key to another host, and a proxy does not know this machine's own ports.
        self._opener = build_opener(_NoRedirect(), *([ProxyHandler({})] if local else []))

    def post(self, body: Mapping[str, Any], stop: threading.Event, on_lost: Callable[[], None]) -> dict[str, Any]:
        """Send one request, again and again while failures may pass.

        Args:
            body: of the request.
            stop: set when waiting has lost its sense.
            on_lost: called for every attempt that timed out or broke off after it was sent, and may be billed.

        Raises:
            DistillError: the server refuses the request, or failed for longer than `patience`.
            StoppedError: `stop` was set.
        """
        begun, attempt = time.monotonic(), 0
        while True:
            if stop.is_set():
                raise StoppedError
            wait = min(LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                return self._send(body)
            except HTTPError as error:
                text = self._text(error)
                if error.code not in PASSING or "insufficient_quota" in text:
                    raise DistillError(f"{self.url} refuses the request (HTTP {error.code}): {text}") from None
                problem, wait = f"HTTP {error.code}: {text}", max(wait, _retry_after(error.headers))
            except (URLError, http.client.HTTPException, ValueError, OSError) as error:
                reason = getattr(error, "reason", error)
                # A connection that was refused was never read, so nobody can bill it.
                if not isinstance(reason, ConnectionRefusedError):
                    on_lost()
                problem = self._hide(f"{type(reason).__name__}: {reason}")
            if time.monotonic() - begun + wait > self.limits.patience:
                raise DistillError(
                    f"{self.url} has failed for {self.limits.patience:g} s ({problem}); start it, or raise patience, "
                    "and run the same command again"
                )
            stop.wait(wait)
            attempt += 1

    def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "cvlm"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self.limits.timeout) as response:
            content = json.loads(response.read())
        if not isinstance(content, dict):
            raise ValueError(f"the answer is no JSON object but {type(content).__name__}")
        return content

    def _text(self, error: HTTPError) -> str:
        try:
            with error:
                return self._hide(" ".join(error.read(2000).decode(errors="replace").split())[:300])
        except (OSError, http.client.HTTPException):
            return "(no text)"

    def _hide(self, text: str) -> str:
        """Some servers repeat the key in their error."""
        return text if self._key is None else text.replace(self._key, "***")


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _retry_after(headers: Message | None) -> float:
    """Read the seconds that a server asks to wait; a date counts as none."""
    value = str(headers.get("Retry-After") or "") if headers is not None else ""
    return float(value) if value.isdecimal() else 0.0
