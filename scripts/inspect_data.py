"""Look at data before a model does: what is broken, what rows become, how long they are.

    python scripts/inspect_data.py audit --config train/configs/mine.yaml --html audit.html
    python scripts/inspect_data.py show --data llava_v1_5_mix665k.json --media_root images --model runs/mine --rows 5
    python scripts/inspect_data.py stats --mixture mixture.yaml --model runs/mine --batch_size 16 --html stats.html

audit  looks at every row and at the header of every media file: what is missing, damaged, mistyped, too long,
       duplicated, or teaches nothing. Exit status 1 if something cannot be used.
show   prints rows as the model will read them: every token with its role, and whether it is learned.
stats  draws the lengths of rows and the composition of batches.
count  counts the tokens of every row, once: training on more than 20,000 rows then knows all lengths at its start.

Without --model (a checkpoint or a language model's tokenizer) there are texts and media, but no tokens.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mllm.data.auditing.audit import audit_source, spread
from mllm.data.auditing.audit_findings import audit_table, findings
from mllm.data.auditing.audit_page import inspection_page, row_view
from mllm.data.auditing.charts import statistics_charts
from mllm.data.auditing.inspection import (
    Inspected,
    decode_item,
    load_reader,
    open_inspected,
    pick_rows,
    reader_of_config,
)
from mllm.data.auditing.row_text import legend, row_text
from mllm.data.auditing.statistics import measure
from mllm.data.indexing.token_counts import count_tokens
from mllm.errors import OptionError, user_errors
from mllm.training.arguments import read_config

HELP = {  # option: (for which commands, what argparse is told)
    "--decode": ("audit", {"action": "store_true", "help": "read all pixels, frames and samples, too: slow, and the "
                           "only way to find files that end too early"}),
    "--rows": ("show", {"type": int, "default": 8, "help": "how many rows, drawn at random (default: %(default)s)"}),
    "--id": ("show", {"nargs": "+", "default": [], "help": "the rows with these ids instead"}),
    "--colour": ("show", {"choices": ("auto", "always", "never"), "default": "auto", "help": "in the terminal"}),
    "--batch_size": ("stats", {"type": int, "default": 16, "help": "rows of a batch (default: %(default)s)"}),
    "--batches": ("stats", {"type": int, "default": 60, "help": "first batches to look at (default: %(default)s)"}),
    "--seed": ("show stats", {"type": int, "default": 0, "help": "which rows, and in which order"}),
    "--max_rows": ("audit stats", {"type": int, "help": "look at this many rows of a source, evenly spread (default: "
                                   "all for audit, 5,000 for stats)"}),
    "--json": ("audit stats", {"type": Path, "metavar": "FILE", "help": "write the figures here"}),
    "--html": ("audit show stats", {"type": Path, "metavar": "FILE", "help": "write a page here: one file that needs "
                                    "neither network nor script"}),
}  # fmt: skip


def main() -> None:
    args = parse_options()
    commands = {"audit": audit, "show": show, "stats": stats, "count": count}
    with user_errors():
        with tqdm(desc="indexing", unit=" rows", disable=None, leave=False) as bar:
            data = open_data(args, bar.update)
        sys.exit(commands[args.command](args, data))


def audit(args: argparse.Namespace, data: Inspected) -> int:
    """Audit every source; the table goes to the terminal."""
    audits, seen = [], set()
    for index in data.indexes:
        positions = data.positions(index, args.max_rows)
        with tqdm(total=len(positions), desc=Path(index.source.path).name, unit=" rows", disable=None) as bar:
            options = {"processor": data.processor, "max_length": data.max_length, "positions": positions}
            decode = decode_item if args.decode else None
            audits.append(audit_source(index, **options, decode=decode, seen=seen, progress=bar.update))
    found = findings(audits)
    print(audit_table(audits))
    write_json(args.json, {"sources": [asdict(one) for one in audits], "findings": [one._asdict() for one in found]})
    write_page(args.html, "Audit of data", data, audits=audits)
    return int(any(finding.level == "bad" for finding in found))


def show(args: argparse.Namespace, data: Inspected) -> int:
    """Print rows, and write them as a page."""
    rows = pick_rows(data.mixture, count=args.rows, seed=args.seed, ids=args.id)
    may_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colour = args.colour == "always" or (args.colour == "auto" and may_colour)
    print(legend(colour=colour, has_tokens=data.processor is not None))
    for row in rows:
        print("\n" + row_text(row, data.processor, colour=colour))
    views = [row_view(row, data.processor) for row in rows] if args.html else []
    write_page(args.html, "Rows as the model reads them" if data.processor else "Rows", data, rows=views)
    return 0


def stats(args: argparse.Namespace, data: Inspected) -> int:
    """Measure a sample of the rows and the first batches of an epoch."""
    positions = spread(len(data.mixture), args.max_rows or 5000).tolist()
    found = measure(
        data.mixture, data.processor, positions=positions, batch_size=args.batch_size, num_batches=args.batches,
        seed=args.seed, progress=lambda rows: tqdm(rows, desc="measuring", unit=" rows", disable=None),
    )  # fmt: skip
    print(json.dumps(found.summary(), indent=2))
    write_json(args.json, {**found.summary(), "batches": [asdict(batch) for batch in found.batches]})
    charts = statistics_charts(found, max_length=data.max_length) if args.html else []
    write_page(args.html, "Lengths and batches", data, charts=charts)
    return 0


def count(args: argparse.Namespace, data: Inspected) -> int:
    """Count the tokens of all rows under the reader; the counts are kept with the index."""
    if data.processor is None:
        raise OptionError("no --model", expected="whose tokens to count", do="name the model that will be trained")
    for index in data.indexes:
        with tqdm(total=len(index), desc=Path(index.source.path).name, unit=" rows", disable=None) as bar:
            tokens = count_tokens(index, data.processor, progress=bar.update)
        longest = int(tokens.max(initial=0))
        print(f"{index.source.path}: {len(tokens):,} rows, {int(tokens.sum()):,} tokens, longest {longest:,}")
    return 0


def parse_options() -> argparse.Namespace:
    """The command line; each command says only what holds for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="audit|show|stats|count")
    for name in ("audit", "show", "stats", "count"):
        command = commands.add_parser(name, description=__doc__, formatter_class=parser.formatter_class)
        add_data_options(command)
        group = command.add_argument_group(f"of {name}")
        for option, (of_commands, told) in HELP.items():
            if name in of_commands.split():
                group.add_argument(option, **told)
    return parser.parse_args()


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where the rows come from, and who reads them."""
    data = parser.add_argument_group("data: one of the first three")
    data.add_argument(
        "--data", nargs="+", default=[], metavar="FILE", help="files, directories or hub:// ids, any form"
    )
    data.add_argument("--mixture", type=Path, metavar="FILE", help="YAML file of sources")
    data.add_argument("--config", type=Path, metavar="FILE", help="YAML of train/sft.py: its data, model, max_length")
    data.add_argument("--stage", help="which stage, where --config is a plan")
    data.add_argument("--format", help="of --data, by name; by default it is told from the records")
    data.add_argument("--media_root", help="what media paths are relative to; by default the file's directory")
    data.add_argument("--coordinates", help="how boxes are written: pixel, unit, padded_unit or thousandths")
    data.add_argument("--licence", help="of --data, for the record")
    model = parser.add_argument_group("reader")
    model.add_argument("--model", "--processor", metavar="DIR", help="a checkpoint, or a language model's tokenizer")
    model.add_argument("--chat_template", help="for a bare tokenizer: plain, vicuna_v1, chatml or llama3")
    model.add_argument("--max_length", type=int, help="longest row in tokens; by default that of --config")


def open_data(args: argparse.Namespace, progress: Callable[[int], Any]) -> Inspected:
    """The sources that --data, --mixture or --config name, and the reader that --model or --config names."""
    if sum(map(bool, (args.data, args.mixture, args.config))) != 1:
        raise OptionError("not one of --data, --mixture and --config", expected="one of them", do="name the data")
    config: dict[str, Any] = read_config(args.config, stage=args.stage) if args.config else {}
    given = {name: getattr(args, name) for name in ("format", "coordinates", "licence") if getattr(args, name)}
    if args.media_root:
        given["media_root"] = os.path.abspath(args.media_root)
    data: Any = {"mixture": str(args.mixture)} if args.mixture else [{"path": path, **given} for path in args.data]
    root = config.get("data_root") or (args.config.parent if args.config else None)
    model = args.model or reader_of_config(config)
    reader, fact = load_reader(model, chat_template=args.chat_template) if model else (None, "no tokenizer")
    return open_inspected(
        config.get("data") or data, root=root, processor=reader, facts=[fact], progress=progress,
        max_length=args.max_length or config.get("max_length"), seed=getattr(args, "seed", 0),
    )  # fmt: skip


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def write_page(path: Path | None, title: str, data: Inspected, **parts: Any) -> None:
    if path:
        has_tokens = data.processor is not None
        page = inspection_page(title, facts=data.facts, has_tokens=has_tokens, max_length=data.max_length, **parts)
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
        print(f"\npage: {path}")


if __name__ == "__main__":
    main()
