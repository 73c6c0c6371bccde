"""What an OpenAI-compatible endpoint sends back, from bytes to words."""

import http.client
import json
import time
from re import compile as pattern

from mllm.errors import RowError

MAX_REPLY_BYTES = 1 << 23
_FENCE = pattern(r"^```\w*\n|\n?```$")


def read_reply(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body of a response, which may come in drops: a socket's time-out only bounds the pause between two.

    Raises:
        TimeoutError: It is not whole by the deadline, as `time.monotonic()` tells it.
        http.client.IncompleteRead: The other side hung up.
        RowError: It is far longer than any reply.
    """
    data = b""
    while chunk := response.read1(1 << 16):
        data += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > MAX_REPLY_BYTES:
            raise _unreadable(f"more than {MAX_REPLY_BYTES} bytes")
    if response.length:  # `read1` does not tell
        raise http.client.IncompleteRead(data, response.length)
    return data


def text_of_reply(data: bytes) -> tuple[str, dict[str, int]]:
    """The text of a reply, and the tokens it was billed: "prompt_tokens" and "completion_tokens".

    Raises:
        RowError: It is no chat completion, holds no text, or was cut off at its longest.
    """
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(f"{data[:200]!r}") from error
    if not isinstance(text, str) or not text.strip() or reason == "length":
        raise _unreadable(f"content {text!r:.200}, finish_reason {reason!r}")
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    names = [name for name in ("prompt_tokens", "completion_tokens") if isinstance(usage.get(name), int)]
    return text, {name: usage[name] for name in names}


def plain_reply(reply: str) -> str:
    """A reply without a code fence or quotation marks around it."""
    reply = _FENCE.sub("", reply.strip()).strip()
    is_quoted = len(reply) > 1 and reply[0] == reply[-1] == '"' and '"' not in reply[1:-1]
    return reply[1:-1] if is_quoted else reply


def _unreadable(found: str) -> RowError:
    return RowError(
        f"a reply of {found}",
        expected="a chat completion as OpenAI defined it, with text that ended by itself",
        do="see what the endpoint serves, or raise `max_tokens` among its options",
    )
