"""How many vectors and parameters the connectors have at published sizes: the tables of docs/models.md.

    python scripts/list_connectors.py             print them
    python scripts/list_connectors.py --write     put them into docs/models.md

Nothing is downloaded, and no weights are made: both numbers are known before a model is.
"""

import argparse
from pathlib import Path

from mllm.assemble.tiles import TILES
from mllm.models import MllmTowerConfig
from mllm.models.connectors import connector_options, num_parameters
from mllm.sizes import ImageTokenRule, num_tokens

DOC = Path(__file__).resolve().parent.parent / "docs" / "models.md"
TEXT = 4096  # width of a language model of 7B

# What an encoder gives: words for it, features of each view and stream, and their widths.
PICTURE = ("a picture, CLIP ViT-L/14 at 336 px", (576,), (1024,))
TILES_SEEN = ("a picture and 4 tiles of it, CLIP ViT-L/14 at 336 px", (576,) * 5, (1024,))
BLIP = ("a picture, BLIP-2's ViT-g", (257,), (1408,))
SOUND = ("30 s of sound, Whisper large-v3", (1500,), (1280,))
FRAMES = ("8 frames, BLIP-2's queries of each", (32,) * 8, (768,))
CLIPS = ("8 clips of 2 s, CLAP", (14,) * 8, (768,))
STREAMS = ("a picture, SPHINX's two streams", (32, 257), (768, 1024 + 2048 + 1536))
SPEECH = ("30 s of sound, an encoder of 50 features a second", (1500,), (1024,))

TWO_LAYERS = {"per": "item", "layers": 2, "cross_attention_frequency": 1}
CASES = [  # what the connector is of, its options in a plan, what it reads
    ("LLaVA", "linear", PICTURE),
    ("LLaVA-1.5", "mlp", PICTURE),
    ("", {"type": "mlp", "layers": 3}, PICTURE),
    ("InternVL", "patch_merge", PICTURE),
    ("", {"type": "pool", "over": "grid"}, PICTURE),
    ("Idefics2", "perceiver", PICTURE),
    ("BLIP-2", {"type": "qformer", "feature_norm": True}, BLIP),
    ("InstructBLIP", {"type": "instruct_qformer", "feature_norm": True}, BLIP),
    ("Lyrics", {"type": "multi_stream_qformer", "per": "item"}, TILES_SEEN),
    ("SPHINX", "streams", STREAMS),
    ("Video-LLaMA, vision", {"type": "qformer", **TWO_LAYERS, "positions": 32}, FRAMES),
    ("Video-LLaMA, audio", {"type": "qformer", **TWO_LAYERS, "positions": 8, "num_queries": 8}, CLIPS),
    ("Voxtral", "frame_stack", SOUND),
    ("", {"type": "pool"}, SOUND),
    ("Granite-speech", "windowed_qformer", SPEECH),
    ("OneEncoder", "identity", ("features of the language model's width", (576,), (TEXT,))),
]
SIZES = [(336, 336), (480, 640), (672, 672), (500, 1500), (2000, 1000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables between their marks in docs/models.md")
    args = parser.parse_args()
    tables = {"connectors": connector_table(), "tiles": tile_table()}
    if args.write:
        text = DOC.read_text(encoding="utf-8")
        for name, table in tables.items():
            begin, end = f"<!-- {name}: made by scripts/list_connectors.py -->\n", f"<!-- {name}: end -->"
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}{table}{end}{rest.partition(end)[2]}"
        DOC.write_text(text, encoding="utf-8")
    else:
        print("\n".join(tables.values()))


def connector_table() -> str:
    """A line for each case: what goes in, how many vectors come out, and how many parameters there are."""
    lines = ["| connector | as in | reads | vectors | parameters |", "|---|---|---|--:|--:|"]
    for origin, choice, (words, lengths, widths) in CASES:
        config = MllmTowerConfig(connector=choice, feature_sizes=list(widths), text_hidden_size=TEXT)
        _, options = connector_options(choice)
        features = sum(lengths)
        count = options.length_rule().count(features if options.per == "item" or len(widths) > 1 else lengths[0])
        reads = f"{words}: {features:,} of width {' and '.join(f'{width:,}' for width in widths)}"
        lines.append(f"| {_written(choice)} | {origin} | {reads} | {count:,} | {num_parameters(config) / 1e6:.1f} M |")
    return "\n".join(lines) + "\n"


def tile_table() -> str:
    """For each published way, how many tokens images of some sizes become."""
    lines = ["| `tiles` | " + " | ".join(f"{height} x {width}" for height, width in SIZES) + " |"]
    lines.append("|---" * (len(SIZES) + 1) + "|")
    for name, tiles in [("none", None), *TILES.items()]:
        rule = ImageTokenRule(
            image_size=336, patch_size=14, num_prefix_tokens=1, feature_select="default", tiles=tiles
        )
        lines.append(f"| `{name}` | " + " | ".join(f"{num_tokens(size, rule):,}" for size in SIZES) + " |")
    return "\n".join(lines) + "\n"


def _written(choice: str | dict) -> str:
    """A connector as a plan has it."""
    if isinstance(choice, str):
        return f"`{choice}`"
    options = ", ".join(f"{key}: {str(value).lower()}" for key, value in choice.items() if key != "type")
    return f"`{choice['type']}`" + (f" ({options})" if options else "")


if __name__ == "__main__":
    main()
