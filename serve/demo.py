"""Chat with a model in the browser: python serve/demo.py --model DIR."""

import argparse
import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from mllm.errors import MediaError, MllmError, RowError, user_errors
from mllm.inference import Chat
from mllm.inference.history import NO_ANSWER, count_images, messages_from_gradio

IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"]
# Gradio draws HTML that somebody wrote or a model spoke; tags in this list are shown as the text they are.
TAGS_AS_TEXT = (  # noqa: SIM905 - readable as words
    "a abbr audio b big blockquote body br button center code dd del details div dl dt em font form h1 h2 h3 h4 h5 h6 "
    "head hr html i iframe image img input ins kbd label li link mark math meta nobr object ol option p picture pre q "
    "s script section select small source span strike strong style sub summary sup svg table tbody td textarea tfoot "
    "th thead think title tool_call tr tt u ul unk var video"
).split()
HELP = "Add one picture or several with the paper clip, ask about them, and go on asking. The model may be wrong."
CSS = """
.gradio-container { max-width: 860px !important; margin: 0 auto !important; }
.gradio-container, .gradio-container textarea { font-family: system-ui, sans-serif !important; }
.message-content { white-space: pre-wrap; }
"""

logger = logging.getLogger(__name__)


def main() -> None:
    """Load the model, build the page, serve it until interrupted."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    with user_errors(), tempfile.TemporaryDirectory(prefix="mllm-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # everything uploaded lies here, and goes when the server does
        chat = Chat.from_pretrained(args.model, device=args.device)
        page = build_page(chat, args, uploads=Path(uploads))
        page.queue(max_size=32).launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            max_file_size=f"{args.max_upload_mb}mb",
            allowed_paths=[],
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            theme=gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", radius_size="lg"),
            css=CSS,
        )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory of a model or adapter, or Hub id of a model")
    parser.add_argument("--device", help="where the model runs, e.g. cuda; the CPU by default")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 shows it to the network")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer at the start, in tokens")
    parser.add_argument("--max_upload_mb", type=int, default=10, help="largest file")
    parser.add_argument("--max_images", type=int, default=8, help="most images in one conversation")
    parser.add_argument("--examples", type=Path, help="directory with NAME.png and its question in NAME.txt")
    return parser.parse_args()


def build_page(chat: Chat, args: argparse.Namespace, *, uploads: Path) -> gr.ChatInterface:
    """The page: a conversation, a box to write and attach in, and two settings."""

    def answer(message: dict, history: list[dict], max_new_tokens: float, temperature: float) -> Iterator[dict]:
        try:
            messages = messages_from_gradio(message, history, folder=uploads)
            check_request(messages, max_images=args.max_images)
            pieces = chat.stream(messages, max_new_tokens=int(max_new_tokens), temperature=temperature)
            text = ""
            with contextlib.closing(pieces):
                for piece in pieces:
                    text += piece
                    yield {"role": "assistant", "content": [{"type": "text", "text": text}]}
            if not text:
                yield notice("The model had nothing to say. Ask in other words.")
        except MediaError as error:
            yield notice(f"This picture cannot be used: {error.found}. Expected: {error.expected}. Try another one.")
        except MllmError as error:
            yield notice(f"Found: {error.found}. Expected: {error.expected}. Please {error.do}.")
        except Exception:
            logger.exception("an answer failed")
            yield notice("Something went wrong on the server; its log says more. You can go on asking.")

    return gr.ChatInterface(
        answer,
        multimodal=True,
        title=f"Chat with {Path(args.model).resolve().name}",
        description=HELP,
        chatbot=gr.Chatbot(
            show_label=False,
            height="62vh",
            render_markdown=False,
            allow_tags=TAGS_AS_TEXT,
            buttons=["copy"],
            placeholder="### What do you see?",
        ),
        textbox=gr.MultimodalTextbox(
            file_types=IMAGE_TYPES,
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask about your pictures",
            max_plain_text_length=1_000_000,
            stop_btn=True,
            autofocus=True,
        ),
        additional_inputs=[
            gr.Slider(16, 2048, value=args.max_new_tokens, step=16, label="Longest answer, in tokens"),
            gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature", info="0: always the likeliest word"),
        ],
        additional_inputs_accordion=gr.Accordion("Settings", open=False),
        examples=read_examples(args.examples) if args.examples else None,
        delete_cache=(3600, 24 * 3600),
        analytics_enabled=False,
        api_visibility="private",
    )


def check_request(messages: list[dict], *, max_images: int) -> None:
    """Refuse what is empty or too much."""
    if not messages[-1]["content"]:
        raise RowError("an empty message", expected="a question or a picture", do="write something")
    if (found := count_images(messages)) > max_images:
        raise RowError(
            f"{found} pictures in this conversation",
            expected=f"at most {max_images}",
            do="start a new chat with fewer of them",
        )


def notice(text: str) -> dict:
    """A message of the page, not of the model: it never becomes part of the conversation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}], "metadata": {"title": NO_ANSWER}}


def read_examples(directory: Path) -> list[list[dict]]:
    """Pictures with their questions, to click on."""
    return [
        [{"text": picture.with_suffix(".txt").read_text(encoding="utf-8").strip(), "files": [str(picture)]}]
        for picture in sorted(directory.glob("*.png"))
    ]


if __name__ == "__main__":
    main()
