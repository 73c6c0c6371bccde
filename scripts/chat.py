"""Talk to a model in the terminal, about pictures, sounds and videos if it reads them.

    python scripts/chat.py runs/quickstart/run/sft/final --image scene.png
    python scripts/chat.py runs/quickstart/run/sft/final --image scene.png --pruner visiondrop tokens=3

Type a question and press enter. /image PATH, /audio PATH or /video PATH adds a file to the next question, /new starts
over, /quit ends. Questions can be piped in, too: one a line.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from mllm.errors import MllmError, user_errors
from mllm.inference import Chat
from mllm.inference.media import KINDS, NOUNS, read_medium
from mllm.processing.images import decode_image
from mllm.pruning import build_pruner


def main() -> None:
    """Load the model, then answer line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a model or adapter, or Hub id of a model")
    for kind, noun in NOUNS.items():
        parser.add_argument(f"--{kind}", type=Path, nargs="+", default=[], help=f"{noun}s for the first question")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument(
        "--pruner", nargs="+", metavar=("METHOD", "OPTION=VALUE"),
        help="let the language model see fewer visual tokens: visiondrop tokens=64",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with user_errors():
        media = [media_item(kind, path) for kind in KINDS for path in getattr(args, kind)]
        chat = Chat.from_pretrained(
            args.model,
            device=args.device,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            pruner=build_pruner(" ".join(args.pruner)) if args.pruner else None,
        )
        converse(chat, media)


def converse(chat: Chat, media: list[dict]) -> None:
    """Answer until the input ends. What cannot be answered is said, and does not become part of the conversation."""
    messages: list[dict] = []
    while (line := read_line()) is not None:
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/new":
                messages, media = [], []
            elif command.removeprefix("/") in KINDS and command.startswith("/"):
                media = [*media, media_item(command[1:], Path(rest.strip()))]
            elif line:
                question = {"role": "user", "content": [*media, {"type": "text", "text": line}]}
                answer = say(chat, [*messages, question])
                messages += [question, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
                media = []
        except MllmError as error:
            if not sys.stdin.isatty():
                raise
            print(error, file=sys.stderr)


def say(chat: Chat, messages: list[dict]) -> str:
    """Print the answer while it is generated, and return it; Ctrl-C stops it."""
    answer = ""
    pieces = chat.stream(messages)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        pieces.close()
    print()
    return answer


def read_line() -> str | None:
    """The next line, None at the end of the input; with a prompt only where somebody types."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def media_item(kind: str, path: Path) -> dict:
    """A content item, if there is a file of this kind that can be read."""
    item = {"type": kind, kind: str(path)}
    if kind == "image":
        decode_image(path)
    else:
        read_medium(item, name=f"/{kind}")
    return item


if __name__ == "__main__":
    main()
