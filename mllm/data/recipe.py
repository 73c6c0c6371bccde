"""Recipes: from a published data set, as it lies on disk after the download, to checked rows with a record of it all.

A program in `data_recipes/` states the facts of its data set in a `Recipe` and calls `run_recipe`.
"""

import argparse
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.data.importers import IMPORTERS
from mllm.data.importers.base import Importer
from mllm.data.recipe_build import ON_MISSING, Build, Records, build_rows
from mllm.data.schema import COORDINATES
from mllm.data.sources import ON_BAD, Source
from mllm.errors import OptionError


@dataclass(frozen=True)
class Part:
    """One published file, or set of files, that can be converted by itself.

    Args:
        files: Names, as published.
        about: What it holds.
        rows: How many rows its publishers state, in their words.
        size: On disk, as stated.
        coordinates: How boxes in its texts are written (`mllm.data.schema.COORDINATES`); "" if there are none.
    """

    files: str
    about: str
    rows: str = ""
    size: str = ""
    coordinates: str = ""


@dataclass(frozen=True)
class Recipe:
    """The facts of a published data set, and how its rows are made.

    Args:
        name: Of the recipe; rows say `source: NAME`, or NAME/PART where there are several parts.
        about: One line.
        source: Where it is published.
        revision: Which version these facts are about. Files carry no version, so `recipe.json` also has their hashes.
        licence: Of annotations and media, as stated by their publishers.
        parts: What can be converted, by name.
        importer: Name of the published form's importer, or an importer that only this recipe has.
        fetch: How to get the files, for `--help`.
        dropped: What is left out, and why.
        layout: Where media lie: each prefix of published paths, and what to put there.
        columns: Columns by what they hold, with help, for a source whose columns are not documented.
        arguments: Adds options of its own to the parser.
        records: Changes the stream of records; gets it, the options and a counter for `recipe.json`.
    """

    name: str
    about: str
    source: str
    revision: str
    licence: str
    parts: Mapping[str, Part]
    importer: str | Importer
    fetch: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    records: Callable[[Records, argparse.Namespace, Counter[str]], Records] | None = None


def run_recipe(
    recipe: Recipe, argv: Sequence[str], *, progress: Callable[[Records], Records] = iter
) -> dict[str, Any]:
    """Convert what the command line names. Returns what `recipe.json` holds.

    Args:
        recipe: The recipe.
        argv: The command line, without the program's name.
        progress: Wraps the stream of records, such as `tqdm`.

    Raises:
        OptionError: The command line is wrong; and what `build_rows` raises.
    """
    args = recipe_parser(recipe).parse_args(argv)
    importer = IMPORTERS[recipe.importer] if isinstance(recipe.importer, str) else recipe.importer
    name = recipe.name if len(recipe.parts) == 1 else f"{recipe.name}/{args.part}"
    part = recipe.parts[args.part]
    source = Source(
        path=args.annotations,
        format=importer.name,
        name=name,
        media_root=args.media_root,
        remap=_pairs(args.remap, "--remap", "PREFIX=DIR"),
        columns=_pairs(args.columns, "--columns", "MEANING=COLUMN") if recipe.columns else {},
        options={key: getattr(args, key) for key in importer.options},
        coordinates=part.coordinates if args.coordinates is None else args.coordinates,
        licence=recipe.licence,
        on_bad=args.on_bad,
        max_bad_rate=args.max_bad_rate,
    )
    changes: Counter[str] = Counter()
    build = Build(
        source=source,
        importer=importer,
        out=args.out,
        facts={
            "recipe": recipe.name,
            "part": args.part,
            "files": part.files,
            "stated_rows": part.rows,
            "source": recipe.source,
            "revision": args.revision or recipe.revision,
            "licence": recipe.licence,
            "options": source.options,
            "columns": source.columns,
            "changes": changes,
        },
        limit=args.limit,
        on_missing=args.on_missing,
        embed=args.embed,
        prefixes=tuple(recipe.layout),
        change=lambda records: progress(recipe.records(records, args, changes) if recipe.records else records),
    )
    return build_rows(build)


def recipe_parser(recipe: Recipe) -> argparse.ArgumentParser:
    """The command line of a recipe; its help says where to fetch the files and where to put them."""
    parser = argparse.ArgumentParser(
        description=f"{recipe.about}\n\n{_facts(recipe)}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = list(recipe.parts)
    parser.add_argument("--part", choices=parts, required=len(parts) > 1, default=parts[0], help="what to convert")
    parser.add_argument("--annotations", type=Path, required=True, help="the published file, or a directory of them")
    parser.add_argument("--media_root", type=Path, help="what media paths are relative to; default: beside the file")
    parser.add_argument(
        "--remap", action="append", metavar="PREFIX=DIR", help="where media of a path prefix lie; may be repeated"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--revision", default="", help="commit of the Hub that you fetched, for the record")
    parser.add_argument("--limit", type=_count, help="stop after so many rows")
    parser.add_argument("--on_bad", choices=ON_BAD, default="error", help="what becomes of malformed records")
    parser.add_argument("--max_bad_rate", type=float, default=0.05, help="above it, quarantine is an error, too")
    parser.add_argument(
        "--on_missing",
        choices=ON_MISSING,
        default="error",
        help="rows whose media are not there: bad, dropped and counted, or kept without a look",
    )
    parser.add_argument("--embed", action="store_true", help="write parquet shards that hold the media")
    stated = ", ".join(f"{name}: {part.coordinates or 'none'}" for name, part in recipe.parts.items())
    parser.add_argument(
        "--coordinates",
        choices=("", *COORDINATES),
        help=f"how boxes in the texts are written; default ({stated})",
    )
    if recipe.columns:
        meanings = "; ".join(f"{key}: {text}" for key, text in recipe.columns.items())
        parser.add_argument("--columns", nargs="+", metavar="MEANING=COLUMN", help=meanings)
    importer = IMPORTERS[recipe.importer] if isinstance(recipe.importer, str) else recipe.importer
    for key, default in importer.options.items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(f"--{key}", default=default, help="default: %(default)s", **kind)
    if recipe.arguments:
        recipe.arguments(parser)
    return parser


def _facts(recipe: Recipe) -> str:
    """Everything a user has to know before the download, as text."""
    lines = [f"source    {recipe.source}", f"revision  {recipe.revision}", f"licence   {recipe.licence}", ""]
    for name, part in recipe.parts.items():
        rows = f", {part.rows} rows" if part.rows else ""
        lines.append(f"part {name}: {part.files}{rows}{', ' + part.size if part.size else ''}. {part.about}")
    lines += ["", "How to get it", textwrap.dedent(recipe.fetch).strip()]
    if recipe.layout:
        lines += ["", "Media paths begin with (--media_root holds these folders, or --remap says where they are)"]
        lines += [f"  {prefix:<32} {what}" for prefix, what in recipe.layout.items()]
    if recipe.dropped:
        lines += ["", "Left out"]
        lines += [f"  {what}: {why}" for what, why in recipe.dropped.items()]
    return "\n".join(
        line if line.startswith(" ") else textwrap.fill(line, 110) for line in "\n".join(lines).split("\n")
    )


def _pairs(given: Sequence[str] | None, option: str, form: str) -> dict[str, str]:
    pairs = {}
    for entry in given or ():
        key, equals, value = entry.partition("=")
        if not equals or not key or not value:
            raise OptionError(f"{option} {entry}", expected=form, do="correct it")
        pairs[key] = value
    return pairs


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count
