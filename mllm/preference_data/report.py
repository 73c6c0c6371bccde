"""What became of all rows: in figures, as a table, and as a page of examples."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mllm.preference_data.outcomes import ACCEPTED, Outcome

QUANTILES = 20
"""Of which the first, the middle and the last edge are told: 5 %, 50 % and 95 %."""


def report_of(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Figures about a construction.

    Returns:
        `rows` and `pairs`, `acceptance` (pairs of rows that had a completion tried), `rejected_rows` by reason,
        `completions` tried and `rejected_completions` by reason, `pairs_by_rank` (how far the retrieved image stood
        from the nearest, from 1), `masked_phrases` by kind, and the spread of `similarity` and of `cosine` over pairs.
    """
    rows = tried = 0
    reasons, tries, ranks, kinds = Counter[str](), Counter[str](), Counter[int](), Counter[str]()
    similarities, cosines = [], []
    for outcome in outcomes:
        rows += 1
        tried += bool(outcome.tries)
        tries.update(outcome.tries)
        if not outcome.is_pair:
            reasons[outcome.reason] += 1
            continue
        ranks[len(outcome.tries)] += 1
        kinds.update(phrase.kind or "of no stated kind" for phrase in outcome.phrases)
        similarities.append(outcome.similarity)
        cosines.append(outcome.cosine)
    accepted = tries.pop(ACCEPTED, 0)
    return {
        "rows": rows,
        "pairs": len(similarities),
        "acceptance": round(len(similarities) / tried, 4) if tried else None,
        "rejected_rows": dict(reasons.most_common()),
        "completions": accepted + tries.total(),
        "rejected_completions": dict(tries.most_common()),
        "pairs_by_rank": {str(rank): ranks[rank] for rank in sorted(ranks)},
        "masked_phrases": dict(kinds.most_common()),
        "similarity": _spread(similarities),
        "cosine": _spread(cosines),
    }


def report_table(report: Mapping[str, Any]) -> str:
    """The figures as text for a terminal."""
    lines = [("rows", report["rows"], "")]
    lines += [
        (f"  {reason}", count, _share(count, report["rows"])) for reason, count in report["rejected_rows"].items()
    ]
    lines += [("  pairs", report["pairs"], _share(report["pairs"], report["rows"]))]
    lines += [("completions", report["completions"], "")]
    lines += [
        (f"  {reason}", count, _share(count, report["completions"]))
        for reason, count in report["rejected_completions"].items()
    ]
    lines += [("  accepted", report["pairs"], _share(report["pairs"], report["completions"]))]
    width = max(len(name) for name, *_ in lines)
    table = "\n".join(f"{name:<{width}}  {count:>9,}  {share:>6}".rstrip() for name, count, share in lines)
    spreads = [
        f"{name}: {' / '.join(f'{value:.3f}' for value in report[name].values())} (5 %, median, 95 % of the pairs)"
        for name in ("similarity", "cosine")
        if report[name]
    ]
    return "\n".join([table, *spreads])


def _spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    edges = statistics.quantiles(values, n=QUANTILES, method="inclusive")
    return {"5 %": round(edges[0], 4), "median": round(edges[9], 4), "95 %": round(edges[-1], 4)}


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else ""
