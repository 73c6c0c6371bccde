"""Pairs from plain rows, as Re-Align makes them: mask an answer, complete it under a retrieved image, compare the two.

    opened = open_rows(Source("rows.jsonl"))
    report = construct_pairs(opened, Path("pairs"), components=components)

`pairs` appears when it is whole; `pairs.work`, beside it, keeps what every step has found. A construction that is
killed is started again as it was: it goes on to the same pairs, and asks no endpoint twice.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mllm.checkpoints import atomic_directory, refuse_existing
from mllm.data.indexing.content_keys import hash_of
from mllm.data.indexing.index import RowIndex, open_index
from mllm.data.mixture import Mixture
from mllm.data.schema import MediaItem
from mllm.errors import OptionError
from mllm.preference_data.answered import Unfit, take_apart
from mllm.preference_data.construction import Bar, Components, Construction
from mllm.preference_data.examples_page import examples_page, pair_view
from mllm.preference_data.outcomes import Outcome
from mllm.preference_data.pair_files import Pair, write_pairs
from mllm.preference_data.pictures import images_of
from mllm.preference_data.report import report_of
from mllm.preference_data.steps import Steps

RECIPE, REPORT, EXAMPLES = "recipe.json", "report.json", "examples.html"
WORK_SUFFIX = ".work"


@dataclass(frozen=True)
class Opened:
    """Rows to be made pairs of.

    Args:
        index: All rows of their source.
        rows: Those that are taken (`take` of the source).
        images: The images of all rows, taken or not, each with its number: what can be retrieved.
        seed: Decides which rows `take: random:N` takes.
    """

    index: RowIndex
    rows: Mixture
    images: Mapping[MediaItem, int]
    seed: int

    @property
    def key(self) -> str:
        """A hash of the rows that are taken."""
        return hash_of([self.index.key, self.index.source.take, self.seed])

    def answers(self, count: int) -> list[str]:
        """The answers of the first rows that have one."""
        found: list[str] = []
        for position in range(len(self.rows)):
            if len(found) == count:
                break
            try:
                found.append(take_apart(self.rows[position]).answer)
            except Unfit:
                continue
        return found


def open_rows(source: Any, *, seed: int = 0, progress: Callable[[int], Any] | None = None) -> Opened:
    """Read the rows of a `Source`.

    Raises:
        OptionError: There is no such file, or no image in it.
        RowError, MediaError: Rows are broken, more than may be.
    """
    index = open_index(source, progress=progress)
    images = images_of(index)
    if not images:
        raise OptionError(f"{source.path}: no row has an image", expected="answers about images", do="name other rows")
    return Opened(index, Mixture([index], seed=seed), images, seed)


def construct_pairs(
    opened: Opened,
    out: Path,
    *,
    components: Components,
    options: Construction | None = None,
    bar: Bar | None = None,
) -> dict[str, Any]:
    """Make pairs, and write them as rows with everything that is known about them.

    Args:
        opened: The rows.
        out: Directory to write: `rows.jsonl` and `mixture.yaml` for training, `report.json`, `examples.html` and
            `recipe.json`.
        components: Who masks, retrieves, completes and compares.
        options: How; as in the paper by default.
        bar: Shows what is done.

    Returns:
        The report, see `report_of`.

    Raises:
        CheckpointError: `out` exists, or a file of a former start is damaged.
        EndpointError: An endpoint cannot be used. What it answered is kept.
        OptionError: No pair was made, or an endpoint left rows without an answer, or another process is at it.
    """
    refuse_existing(out)
    options = options or Construction()
    work = work_directory(out)
    with _alone(work):
        steps = Steps(
            opened.rows,
            opened.images,
            images_key=opened.index.key,
            rows_key=opened.key,
            components=components,
            options=options,
            directory=work,
            bar=bar or _no_bar,
        )
        steps.carry_out()
        report = report_of(steps.outcomes())
        _check_pairs(report)
        with atomic_directory(out, kind="data") as directory:
            write_pairs(_pairs(opened, steps), opened.images, directory, licence=opened.index.licence)
            _write_json(directory / REPORT, report)
            _write_json(directory / RECIPE, _recipe(opened, components, options, report))
            page = _page(opened, steps, report, options)
            (directory / EXAMPLES).write_text(page, encoding="utf-8", errors="backslashreplace")
    return report


def work_directory(out: Path) -> Path:
    """Where what every step has found is kept for an output."""
    return out.with_name(out.name + WORK_SUFFIX)


def _pairs(opened: Opened, steps: Steps) -> Iterator[Pair]:
    return (_pair(opened, steps, outcome) for outcome in steps.outcomes() if outcome.is_pair)


def _pair(opened: Opened, steps: Steps, outcome: Outcome) -> Pair:
    return take_apart(opened.rows[outcome.number]), steps.items[outcome.neighbour], outcome


def _page(opened: Opened, steps: Steps, report: Mapping[str, Any], options: Construction) -> str:
    """Some pairs, evenly spread over all."""
    count = min(options.examples, report["pairs"])
    wanted = {number * report["pairs"] // count for number in range(count)}
    shown = [outcome for number, outcome in enumerate(o for o in steps.outcomes() if o.is_pair) if number in wanted]
    views = [pair_view(*_pair(opened, steps, outcome)) for outcome in shown]
    facts = [f"{opened.index.source.path}: {count} of {report['pairs']:,} pairs", *_sentences(steps.components.facts)]
    return examples_page(views, report, title="Pairs made as Re-Align makes them", facts=facts)


def _sentences(facts: Mapping[str, Any]) -> Sequence[str]:
    return [f"{name}: {json.dumps(fact, default=repr)}" for name, fact in facts.items()]


def _recipe(
    opened: Opened, components: Components, options: Construction, report: Mapping[str, Any]
) -> dict[str, Any]:
    """Where the pairs come from, under the names that all recipes use."""
    (source,) = opened.rows.fingerprints()
    return {
        "recipe": "re_align",
        "part": "construct",
        "source": source,
        "licence": opened.index.licence,
        "components": dict(components.facts),
        "options": dataclasses.asdict(options),
        "seed": opened.seed,
        "records": report["rows"],
        "rows": report["pairs"],
        "bad": opened.index.num_bad,
        "dropped": report["rejected_rows"],
    }


def _check_pairs(report: Mapping[str, Any]) -> None:
    if not report["pairs"]:
        raise OptionError(
            f"no pair of {report['rows']} rows: {report['rejected_rows']}; completions: "
            f"{report['rejected_completions']}",
            expected="at least one",
            do="choose a higher tau, another masker or another completer; what the others found is kept",
        )


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """No other process may write to these files."""
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(work / "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OptionError(
            f"{work} is in use by another process",
            expected="one construction for one output at a time",
            do="wait for it, or choose another output",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _no_bar(title: str, total: int) -> Callable[[int], Any]:
    return lambda count: None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=repr) + "\n", encoding="utf-8")
