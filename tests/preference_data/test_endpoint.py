"""An endpoint on its good and bad days: what passes is tried again, what does not costs one question or ends it all.

Against a real server on this machine. An answer that came is never lost, and nobody is asked more often than said.
"""

import json
import socket
from collections import Counter

import pytest

from mllm.errors import EndpointError, MediaError, OptionError, RowError
from mllm.preference_data.endpoint import Endpoint, Failure, Question
from mllm.preference_data.phrases import BAD_REPLY, UNANSWERED

SECRET = "sk-secret"
PATIENT = {"timeout": 20.0, "pause": 0.001}


def test_every_question_gets_its_own_answer(serve):
    server = serve(lambda body, number: f"you said {_words(body)}")
    endpoint = Endpoint(server.url, model="m", api_key=SECRET, options={"temperature": 0}, concurrency=4)
    answers = dict(endpoint.ask_all(_questions(20)))
    assert answers == {number: f"you said {number}" for number in range(20)}
    assert {body["model"] for body in server.bodies} == {"m"} and {body["temperature"] for body in server.bodies} == {
        0
    }
    assert {headers["path"] for headers in server.headers} == {"/v1/chat/completions"}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    counts = {"requests": 20, "answers": 20, "prompt tokens": 140, "completion tokens": 60}
    assert endpoint.counts == Counter(counts)


def test_without_a_key_none_is_sent(serve):
    server = serve(lambda body, number: "hi")
    assert dict(Endpoint(f"{server.url}/chat/completions", model="m").ask_all(_questions(1))) == {0: "hi"}
    assert "Authorization" not in server.headers[0] and server.headers[0]["path"] == "/v1/chat/completions"


def test_nothing_asked_nothing_answered(serve):
    assert list(Endpoint("http://127.0.0.1:1/v1", model="m").ask_all([])) == []


BAD_DAYS = {
    "busy": (503, "status 503"),
    "too many": ({"status": 429, "headers": {"Retry-After": "0"}}, "status 429"),
    "hangs": ({"manner": "hang"}, "time-outs"),
    "drips": ({"manner": "drip", "body": b" " * 10_000}, "time-outs"),
    "hangs up": ({"manner": "cut", "body": b'{"choices": '}, "broken connections"),
    "a page": ({"body": b"<html>502</html>"}, "unreadable replies"),
    "no choices": ({"body": b'{"choices": []}'}, "unreadable replies"),
    "a list": ({"body": b"[1]"}, "unreadable replies"),
    "no text": (json.dumps({"choices": [{"message": {"content": None}}]}), "unreadable replies"),
    "refused": (json.dumps({"choices": [{"message": {"content": None, "refusal": "no"}}]}), "unreadable replies"),
    "cut off": (
        json.dumps({"choices": [{"message": {"content": "A re"}, "finish_reason": "length"}]}),
        "unreadable replies",
    ),
    "odd bytes": ({"body": b"\xff\xfe\x00"}, "unreadable replies"),
}


@pytest.mark.parametrize(("day", "event"), BAD_DAYS.values(), ids=BAD_DAYS.keys())
def test_what_passes_is_tried_again(serve, day, event):
    day = {"body": day.encode()} if isinstance(day, str) else day
    server = serve(lambda body, number: day if number < 2 else "at last")
    endpoint = Endpoint(server.url, model="m", timeout=0.4, pause=0.001, tries=3)
    assert dict(endpoint.ask_all(_questions(1))) == {0: "at last"}
    assert endpoint.counts[event] == 2 and endpoint.counts["requests"] == len(server.bodies) == 3


@pytest.mark.parametrize(("day", "event"), BAD_DAYS.values(), ids=BAD_DAYS.keys())
def test_what_does_not_pass_costs_one_question(serve, day, event):
    day = {"body": day.encode()} if isinstance(day, str) else day
    server = serve(lambda body, number: day if _words(body) == "1" else "fine")
    endpoint = Endpoint(server.url, model="m", timeout=0.4, pause=0.001, tries=2)
    assert dict(endpoint.ask_all(_questions(3))) == {0: "fine", 1: Failure(UNANSWERED), 2: "fine"}
    assert endpoint.counts[event] == 2 and len(server.bodies) == 4


def test_a_useless_reply_is_asked_again_and_then_counted(serve):
    server = serve(lambda body, number: "sure!" if _words(body) == "1" or number == 0 else "5")
    endpoint = Endpoint(server.url, model="m", tries=3, concurrency=1, **PATIENT)
    answers = dict(endpoint.ask_all(_questions(3, read=_number)))
    assert answers == {0: 5, 1: Failure(BAD_REPLY), 2: 5}
    assert endpoint.counts["useless replies"] == 4 and len(server.bodies) == 6


def test_a_request_that_is_taken_for_bad_is_not_sent_twice(serve):
    server = serve(lambda body, number: 400 if _words(body) == "1" else "fine")
    endpoint = Endpoint(server.url, model="m", **PATIENT)
    assert dict(endpoint.ask_all(_questions(3))) == {0: "fine", 1: Failure(BAD_REPLY), 2: "fine"}
    assert len(server.bodies) == 3 and endpoint.counts["status 400"] == 1


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_ends_it_at_once(serve, status):
    elsewhere = serve(lambda body, number: "hello, stranger")
    refusal = {"status": status, "headers": {"Location": elsewhere.url}}
    server = serve(lambda body, number: refusal if number >= 5 else "fine")
    endpoint = Endpoint(server.url, model="some-model", api_key=SECRET, concurrency=1, **PATIENT)
    answers = {}
    with pytest.raises(EndpointError, match=f"status {status}(?s:.)*some-model") as caught:
        _collected(endpoint, answers)
    assert answers == dict.fromkeys(range(5), "fine") and len(server.bodies) == 6
    assert SECRET not in str(caught.value) and not elsewhere.bodies


def test_a_dead_endpoint_ends_it_and_loses_nothing(serve):
    """After the fourth request it is gone: the answers so far come, then the error."""
    server = serve(lambda body, number: "fine" if number < 4 else 500)
    endpoint = Endpoint(server.url, model="m", tries=2, concurrency=1, most_failures=3, **PATIENT)
    answers = {}
    with pytest.raises(EndpointError, match="3 questions in a row(?s:.)*status 500"):
        _collected(endpoint, answers)
    failures = dict.fromkeys((4, 5, 6), Failure(UNANSWERED))
    assert answers == dict.fromkeys(range(4), "fine") | failures and len(server.bodies) == 4 + 3 * 2


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", model="m", tries=1, most_failures=2, **PATIENT)
    with pytest.raises(EndpointError, match="in a row"):
        list(endpoint.ask_all(_questions(20)))
    assert endpoint.counts["broken connections"] < 20


def test_failures_between_answers_end_nothing(serve):
    server = serve(lambda body, number: 500 if int(_words(body)) % 3 else "fine")
    endpoint = Endpoint(server.url, model="m", tries=1, concurrency=1, most_failures=3, **PATIENT)
    assert Counter(map(str, dict(endpoint.ask_all(_questions(12))).values()))["fine"] == 4


def test_closing_asks_no_more(serve):
    server = serve(lambda body, number: "fine")
    answers = Endpoint(server.url, model="m", concurrency=1, **PATIENT).ask_all(_questions(200))
    assert next(answers) == (0, "fine")
    answers.close()
    at_close = len(server.bodies)
    assert at_close < 200 and len(server.bodies) == at_close


def test_closing_waits_for_no_pause(serve):
    """A question that is to be asked again in a minute is not asked again."""
    server = serve(lambda body, number: "fine" if _words(body) == "0" else 503)
    answers = Endpoint(server.url, model="m", tries=2, pause=60, concurrency=2).ask_all(_questions(2))
    assert next(answers) == (0, "fine")
    answers.close()
    assert [_words(body) for body in server.bodies].count("1") <= 1


def test_an_error_of_ours_is_raised(serve):
    """A medium that cannot be read is no bad day of the endpoint."""

    def unreadable():
        raise MediaError("no such file", expected="a file", do="look for it")

    server = serve(lambda body, number: "fine")
    with pytest.raises(MediaError, match="no such file"):
        list(Endpoint(server.url, model="m", **PATIENT).ask_all([Question(messages=unreadable, read=str)]))
    assert not server.bodies


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("file:///etc/passwd", {}),
        ("localhost:8000", {}),
        ("http://", {}),
        ("ftp://localhost/v1", {}),
        ("http://localhost", {"timeout": 0}),
        ("http://localhost", {"tries": 0}),
        ("http://localhost", {"concurrency": 0}),
    ],
)
def test_bad_options_are_refused(url, options):
    with pytest.raises(OptionError, match="|".join(options) or "endpoint"):
        Endpoint(url, model="m", **options)


def _collected(endpoint: Endpoint, answers: dict) -> dict:
    for number, answer in endpoint.ask_all(_questions(20)):
        answers[number] = answer
    return answers


def _questions(count: int, read=str) -> list[Question]:
    def messages(number: int):
        return lambda: [{"role": "user", "content": str(number)}]

    return [Question(messages=messages(number), read=read) for number in range(count)]


def _number(reply: str) -> int:
    if not reply.isdigit():
        raise RowError(reply, expected="a number", do="ask again")
    return int(reply)


def _words(body: dict) -> str:
    return body["messages"][0]["content"]
