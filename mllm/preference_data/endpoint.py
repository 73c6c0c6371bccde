"""Ask an OpenAI-compatible endpoint many things at once, and survive its bad days.

What may pass (a time-out, a broken connection, status 408, 429 or 5xx, a reply that cannot be read) is tried again
with growing pauses. What does not pass costs one question. Where many in a row fail, or the endpoint refuses us,
asking stops with an error; the answers so far have been given.
"""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from mllm.errors import EndpointError, OptionError, RowError
from mllm.preference_data.phrases import BAD_REPLY, UNANSWERED
from mllm.preference_data.replies import read_reply, text_of_reply

MAX_PAUSE = 60.0
_PASSING = (408, 409, 425, 429)
"""Status codes that may pass, beside all from 500 on."""
_REFUSALS = (401, 403, 404, 405)
"""Status codes that every further question would meet, too."""
_BROKEN = (OSError, http.client.HTTPException)
"""What urllib raises where no answer comes: time-outs and `HTTPError` are `OSError`s, too."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and how the reply is read.

    Args:
        messages: Makes the messages, as the endpoint takes them; called when they are sent.
        read: Makes of a reply what is wanted. A `RowError` says that the reply is of no use: it is asked again.
    """

    messages: Callable[[], list[dict[str, Any]]]
    read: Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that got no usable answer; `reason` is `UNANSWERED` or `BAD_REPLY`."""

    reason: str


class Endpoint:
    """A chat endpoint as OpenAI defined it, and as vLLM, SGLang, Ollama and llama.cpp serve it.

    Example:
        endpoint = Endpoint("http://localhost:8000/v1", model="Qwen/Qwen3-VL-8B-Instruct")

    Args:
        url: Its address up to and including the version.
        model: The name that it serves the model under.
        api_key: Sent as bearer token; "" for none.
        options: Further fields of each request, such as `temperature` or `max_tokens`.
        timeout: Seconds for one whole reply.
        tries: How often one question is asked.
        pause: Seconds before the second try; doubled before each further one. A `Retry-After` header goes before.
        concurrency: Questions under way at once.
        most_failures: Asking stops after this many questions in a row without any answer.

    Attributes:
        counts: Events so far: "requests", "answers", "time-outs", "broken connections", "status 503" and the like,
            "unreadable replies", "useless replies", "prompt tokens", "completion tokens".
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        api_key: str = "",
        options: Mapping[str, Any] | None = None,
        timeout: int | float = 120.0,
        tries: int = 4,
        pause: int | float = 1.0,
        concurrency: int = 8,
        most_failures: int = 8,
    ):
        _check_options(url, timeout=timeout, tries=tries, concurrency=concurrency, most_failures=most_failures)
        self.url = url.rstrip("/") + ("" if url.rstrip("/").endswith("/chat/completions") else "/chat/completions")
        self.model, self.options = model, dict(options or {})
        self.timeout, self.tries, self.pause = timeout, tries, pause
        self.concurrency, self.most_failures = concurrency, most_failures
        self.counts: Counter[str] = Counter()
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._opener = build_opener(_NoRedirect())
        self._lock = threading.Lock()

    def ask_all(self, questions: Sequence[Question]) -> Iterator[tuple[int, Any]]:
        """Ask several questions at once; closing the iterator asks no more.

        Yields:
            A question's index, and what its `read` made of the reply or a `Failure`, in the order in which they come.

        Raises:
            EndpointError: The endpoint refuses us, or has answered none of many questions in a row. Whatever it did
                answer has been yielded.
        """
        run = _Run(self)
        with ThreadPoolExecutor(max_workers=self.concurrency, thread_name_prefix="endpoint") as pool:
            try:
                futures = {pool.submit(run.answer, question): index for index, question in enumerate(questions)}
                for future in as_completed(futures):
                    result = future.result()
                    if result is not _NOT_ASKED:
                        yield futures[future], result
            finally:
                run.is_over.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if run.error is not None:
            raise run.error

    def ask(self, messages: list[dict[str, Any]], *, deadline: float) -> str:
        """One try: the text of one reply.

        Args:
            messages: As the endpoint takes them.
            deadline: When to give up, as `time.monotonic()` tells it.

        Raises:
            OSError, http.client.HTTPException: No reply came.
            RowError: What came is no reply of such an endpoint.
        """
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        request = Request(self.url, data=body, headers=self._headers)
        with self._opener.open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
            data = read_reply(response, deadline)
        text, usage = text_of_reply(data)
        self.count(**usage)
        return text

    def count(self, **events: int) -> None:
        """Add to `counts`; underscores become blanks."""
        with self._lock:
            self.counts.update({name.replace("_", " "): number for name, number in events.items()})


class _Run:
    """The questions of one call of `ask_all`: what they share."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.is_over = threading.Event()
        self.error: EndpointError | None = None
        self._lock = threading.Lock()
        self._failures = 0

    def answer(self, question: Question) -> Any:
        """What `read` made of the reply, a `Failure`, or `_NOT_ASKED` after the end."""
        failure, text = Failure(UNANSWERED), ""
        for attempt in range(self.endpoint.tries):
            if self.is_over.is_set():
                return _NOT_ASKED
            self.endpoint.count(requests=1)
            found = self._try(question)
            if not isinstance(found, _Trouble):
                self.endpoint.count(answers=1)
                self._failures = 0
                return found
            self.endpoint.count(**{found.event: 1})
            if found.is_refusal:
                self._end(found.text)
                return _NOT_ASKED
            failure, text = Failure(found.reason), found.text
            is_last = attempt + 1 == self.endpoint.tries
            if not found.may_pass or is_last:
                break
            wait = self.endpoint.pause * 2**attempt if found.wait is None else found.wait
            self.is_over.wait(min(wait, MAX_PAUSE))
        self._note(failure, text)
        return failure

    def _try(self, question: Question) -> Any:
        messages = question.messages()
        try:
            reply = self.endpoint.ask(messages, deadline=time.monotonic() + self.endpoint.timeout)
        except HTTPError as error:
            return _trouble_of_status(error)
        except TimeoutError:
            return _Trouble("time-outs", f"no whole reply within {self.endpoint.timeout:g} seconds")
        except _BROKEN as error:
            is_slow = isinstance(getattr(error, "reason", None), TimeoutError)  # urllib wraps it while it connects
            return _Trouble("time-outs" if is_slow else "broken connections", f"{error}")
        except RowError as error:
            return _Trouble("unreadable replies", error.found)
        try:
            return question.read(reply)
        except RowError as error:
            return _Trouble("useless replies", error.found, reason=BAD_REPLY)

    def _note(self, failure: Failure, text: str) -> None:
        """Count failures in a row. A useless reply shows that the endpoint is there."""
        with self._lock:
            self._failures = self._failures + 1 if failure.reason == UNANSWERED else 0
            is_dead = self._failures >= self.endpoint.most_failures
        if is_dead:
            self._end(f"{self._failures} questions in a row without an answer, the last: {text}")

    def _end(self, text: str) -> None:
        self.error = EndpointError(
            f"{self.endpoint.url}: {text}",
            expected=f"an OpenAI-compatible endpoint that serves {self.endpoint.model!r}",
            do="see that it runs and takes this key and model, then start again: its answers so far are kept",
        )
        self.is_over.set()


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a try failed.

    Args:
        event: What it is counted as.
        text: What was seen.
        reason: Of the `Failure` if it was the last try.
        may_pass: Whether another try may help.
        is_refusal: Whether every other question would fail, too.
        wait: Seconds that the endpoint asks us to wait; None if it does not.
    """

    event: str
    text: str
    reason: str = UNANSWERED
    may_pass: bool = True
    is_refusal: bool = False
    wait: float | None = None


class _NoRedirect(HTTPRedirectHandler):
    """A redirect would carry the key to a stranger: it stays an `HTTPError`."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_NOT_ASKED = object()


def _trouble_of_status(error: HTTPError) -> _Trouble:
    with error:
        try:
            text = error.read(300).decode(errors="replace")
        except _BROKEN:
            text = ""
    after = error.headers.get("Retry-After", "")
    return _Trouble(
        f"status {error.code}",
        f"status {error.code} {' '.join(text.split())}",
        # A request that the endpoint takes for bad, such as one that its filter stops: final for this question.
        reason=UNANSWERED if error.code in _PASSING or error.code >= 500 else BAD_REPLY,
        may_pass=error.code in _PASSING or error.code >= 500,
        is_refusal=error.code in _REFUSALS or 300 <= error.code < 400,
        wait=float(after) if after.isdigit() else None,
    )


def _check_options(url: str, **numbers: int | float) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OptionError(
            f"endpoint {url!r}", expected="an address such as http://localhost:8000/v1", do="correct the address"
        )
    if wrong := [f"{name} = {number}" for name, number in numbers.items() if number <= 0]:
        raise OptionError(", ".join(wrong), expected="numbers above 0", do="correct them")
