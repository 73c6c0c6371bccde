"""Chat with a model in the browser: python serve/demo.py --model DIR.

With --pruner the language model sees fewer visual tokens, and the page shows which: --pruner visiondrop tokens=64
"""

import argparse
import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mllm.errors import MediaError, MllmError, RowError, user_errors
from mllm.inference import Chat, MediaLimits
from mllm.inference.history import NO_ANSWER, messages_from_gradio
from mllm.inference.pruned_media import draw_kept, stacked
from mllm.pruning import Pruner, build_pruner
from mllm.pruning.statistics import ItemStages

FILE_TYPES = {
    "image": [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"],
    "audio": [".wav", ".flac", ".mp3", ".ogg", ".m4a"],
    "video": [".mp4", ".webm", ".mkv", ".mov", ".avi"],
}
WORDS = {"image": "pictures", "audio": "sounds", "video": "videos"}
UPLOAD_MB = {"image": 10, "audio": 20, "video": 50}
# Gradio draws HTML that somebody wrote or a model spoke; tags in this list are shown as the text they are.
TAGS_AS_TEXT = (  # noqa: SIM905 - readable as words
    "a abbr audio b big blockquote body br button center code dd del details div dl dt em font form h1 h2 h3 h4 h5 h6 "
    "head hr html i iframe image img input ins kbd label li link mark math meta nobr object ol option p picture pre q "
    "s script section select small source span strike strong style sub summary sup svg table tbody td textarea tfoot "
    "th thead think title tool_call tr tt u ul unk var video"
).split()
CACHE = (3600, 24 * 3600)
HELP = "Add {} with the paper clip, ask about them, and go on asking. The model may be wrong."
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
        limits = MediaLimits(args.max_images, args.max_sounds, args.max_videos, args.max_seconds)
        pruner = build_pruner(" ".join(args.pruner)) if args.pruner else None
        chat = Chat.from_pretrained(args.model, device=args.device, limits=limits, pruner=pruner)
        page = build_page(chat, args, uploads=Path(uploads))
        page.queue(max_size=32).launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            max_file_size=f"{args.max_upload_mb or largest_upload(chat.processor.media_kinds)}mb",
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a model or adapter, or Hub id of a model")
    parser.add_argument("--device", help="where the model runs, e.g. cuda; the CPU by default")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 shows it to the network")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="make a public link through Gradio's servers")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer at the start, in tokens")
    parser.add_argument(
        "--max_upload_mb", type=int, help="largest file; by default 10, 20 with sounds, 50 with videos"
    )
    parser.add_argument("--max_images", type=int, default=8, help="most images in one conversation")
    parser.add_argument("--max_sounds", type=int, default=4, help="most sounds in one conversation")
    parser.add_argument("--max_videos", type=int, default=2, help="most videos in one conversation")
    parser.add_argument("--max_seconds", type=float, default=120.0, help="longest sound or video")
    parser.add_argument(
        "--pruner", nargs="+", metavar=("METHOD", "OPTION=VALUE"), help="fewer visual tokens: visiondrop tokens=64"
    )
    parser.add_argument(
        "--examples", type=Path, help="directory with media files and, in NAME.txt, what to ask about NAME.*"
    )
    return parser.parse_args()


def build_page(chat: Chat, args: argparse.Namespace, *, uploads: Path) -> gr.Blocks:
    """The page: a conversation, and under a pruner what is left of its pictures."""
    if chat.pruner is None:
        return build_conversation(chat, args, uploads=uploads, kept=None)
    with gr.Blocks(title=Path(args.model).resolve().name, delete_cache=CACHE, analytics_enabled=False) as page:
        kept = gr.Image(show_label=False, interactive=False, format="png", visible=False, render=False, elem_id="kept")
        build_conversation(chat, args, uploads=uploads, kept=kept)
        kept.render()
    return page


def build_conversation(
    chat: Chat, args: argparse.Namespace, *, uploads: Path, kept: gr.Image | None
) -> gr.ChatInterface:
    """A conversation, a box to write and attach in, and two settings; `kept` gets what a pruner left of pictures."""
    kinds = chat.processor.media_kinds
    things = " or ".join(", ".join(WORDS[kind] for kind in kinds).rsplit(", ", 1))

    def shown(message: dict, pictures: list[Image.Image] | None = None) -> Any:
        if kept is None:
            return message
        if pictures is None:
            return message, gr.skip()
        return message, gr.Image(
            stacked([("", one) for one in pictures]) if pictures else None, visible=bool(pictures)
        )

    def answer(message: dict, history: list[dict], max_new_tokens: float, temperature: float) -> Iterator[Any]:
        try:
            messages = messages_from_gradio(message, history, folder=uploads)
            check_request(messages)
            pieces = chat.stream(messages, max_new_tokens=int(max_new_tokens), temperature=temperature)
            text, stages = "", []
            with contextlib.closing(pieces):
                for piece in pieces:
                    text += piece
                    stages = stages or stages_of(chat)  # now, while no other answer can be under way
                    yield shown(said(text))
            if not text:
                yield shown(notice("The model had nothing to say. Ask in other words."))
            elif kept is not None:
                yield shown(said(text), pictures_of(chat, messages, stages))
        except MediaError as error:
            yield shown(notice(f"This cannot be used: {error.found}. Expected: {error.expected}. Please {error.do}."))
        except MllmError as error:
            yield shown(notice(f"Found: {error.found}. Expected: {error.expected}. Please {error.do}."))
        except Exception:
            logger.exception("an answer failed")
            yield shown(notice("Something went wrong on the server; its log says more. You can go on asking."))

    return gr.ChatInterface(
        answer,
        multimodal=True,
        title=f"Chat with {Path(args.model).resolve().name}",
        description=HELP.format(things)
        + (f" It gets fewer tokens, by {' '.join(args.pruner)}." if args.pruner else ""),
        chatbot=gr.Chatbot(
            show_label=False,
            height="62vh",
            render_markdown=False,
            allow_tags=TAGS_AS_TEXT,
            buttons=["copy"],
            placeholder="### Ask me something",
        ),
        textbox=gr.MultimodalTextbox(
            file_types=[suffix for kind in kinds for suffix in FILE_TYPES[kind]],
            file_count="multiple",
            sources=["upload", "microphone"] if "audio" in kinds else ["upload"],
            placeholder=f"Ask about your {things}",
            max_plain_text_length=1_000_000,
            stop_btn=True,
            autofocus=True,
        ),
        additional_inputs=[
            gr.Slider(16, 2048, value=args.max_new_tokens, step=16, label="Longest answer, in tokens", render=False),
            gr.Slider(
                0, 1.5, value=0, step=0.1, label="Temperature", info="0: always the likeliest word", render=False
            ),
        ],
        additional_inputs_accordion="Settings",
        examples=read_examples(args.examples) if args.examples else None,
        additional_outputs=kept,
        delete_cache=CACHE,
        analytics_enabled=False,
        api_visibility="private",
    )


def stages_of(chat: Chat) -> list[ItemStages]:
    """What became of the visual items of the answer under way; nothing without a pruner, or without any."""
    return [item for row in chat.pruner.statistics.items for item in row] if isinstance(chat.pruner, Pruner) else []


def pictures_of(chat: Chat, messages: list[dict], stages: list[ItemStages]) -> list[Image.Image]:
    """What a pruner left of the pictures. A drawing that fails is no reason to lose an answer."""
    try:
        return draw_kept(chat.processor, messages, stages)
    except Exception:
        logger.exception("the pictures of what was kept failed")
        return []


def check_request(messages: list[dict]) -> None:
    """Refuse what is empty."""
    if not messages[-1]["content"]:
        raise RowError("an empty message", expected="a question, or a file", do="write something")


def largest_upload(kinds: tuple[str, ...]) -> int:
    """Megabytes that files of these kinds may have."""
    return max((UPLOAD_MB[kind] for kind in kinds), default=min(UPLOAD_MB.values()))


def said(text: str) -> dict:
    """A message of the model."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def notice(text: str) -> dict:
    """A message of the page, not of the model: it never becomes part of the conversation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}], "metadata": {"title": NO_ANSWER}}


def read_examples(directory: Path) -> list[list[dict]]:
    """Media files with their questions, to click on."""
    suffixes = [suffix for kind in FILE_TYPES.values() for suffix in kind]
    return [
        [{"text": path.with_suffix(".txt").read_text(encoding="utf-8").strip(), "files": [str(path)]}]
        for path in sorted(directory.iterdir())
        if path.suffix.lower() in suffixes and path.with_suffix(".txt").is_file()
    ]


if __name__ == "__main__":
    main()
