"""What an audit amounts to: a list of findings, the worst first, each with what to do; and a terminal's table."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mllm.data.auditing.audit_record import MediaAudit, SourceAudit, Tallies, Tally, TokenAudit
from mllm.data.auditing.row_text import visible

LEVELS = ("bad", "look", "fine")
"""Rows that are lost or learn nothing; what somebody should look at; what is only said for completeness."""

HARMLESS = ("palette", "alpha")
"""Notes on images that lose nothing by becoming RGB."""


class Finding(NamedTuple):
    """One line of the summary."""

    level: str
    what: str
    do: str = ""
    examples: tuple[str, ...] = ()
    source: str = ""


def findings(audits: Sequence[SourceAudit]) -> list[Finding]:
    """The findings of all sources, the worst first."""
    found = [Finding(*finding[:-1], source=audit.name) for audit in audits for finding in _of_source(audit)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def audit_table(audits: Sequence[SourceAudit]) -> str:
    """All audits as text for a terminal, which obeys nothing that the data say."""
    return visible("\n\n".join([*map(_source_table, audits), _findings_table(findings(audits))]))


def _of_source(audit: SourceAudit) -> Iterator[Finding]:
    if audit.bad_rows:
        share = audit.bad_rows / (audit.bad_rows + audit.rows)
        advice = "mend them, or train with `on_bad: quarantine`, which leaves them out"
        yield Finding("bad", f"rows that cannot be used: {audit.bad_rows:,} ({share:.2%})", advice)
    for reason, tally in _by_count(audit.bad):
        yield _finding("bad", tally, f"rows malformed: {reason}", "mend the rows, or name another `format`")
    for prefix in audit.media:
        yield from _of_media(prefix)
    if audit.tokens is not None:
        yield from _of_tokens(audit.tokens, audit.looked_at)
    if audit.same_id.count:
        yield _finding("look", audit.same_id, "rows with the id of another row", "messages name rows by their id")
    if audit.same_row.count:
        what = "rows repeating an earlier one: the same words about the same media"
        yield _finding("look", audit.same_row, what, "drop them, unless they are meant to weigh more")
    if not audit.licence:
        yield Finding("look", "no licence stated", "write `licence:` into the source, for the record of the run")
    if audit.target_media:
        what = f"{audit.target_media:,} rows answer with media"
        yield Finding("look", what, "only a model that generates media can learn them")
    for dropped, count in audit.dropped.items():
        yield Finding("fine", f"{count:,} records left out on purpose: {dropped}")


def _of_media(media: MediaAudit) -> Iterator[Finding]:
    for kind, tally in _by_count(media.refused):
        advice = "set `media_root` or `remap`, or fetch them" if kind == "missing" else "fetch or convert them again"
        yield _finding("bad", tally, f"files {kind}, under {media.prefix}", advice)
    for note, tally in _by_count(media.notes):
        level = "fine" if note in HARMLESS else "look"
        yield _finding(
            level, tally, f"files: {note}, under {media.prefix}", "they are read as RGB, upright, first frame"
        )


def _of_tokens(tokens: TokenAudit, rows: int) -> Iterator[Finding]:
    if tokens.nothing_learned.count:
        advice = "training drops them; look at `loss` and at the template"
        yield _finding("bad", tokens.nothing_learned, "rows without a token to learn from", advice)
    if tokens.only_ends.count:
        yield _finding("look", tokens.only_ends, "rows with an empty answer: they teach to say nothing", "drop them")
    for reason, tally in _by_count(tokens.not_encoded):
        yield _finding("bad", tally, f"rows that cannot be encoded: {reason}", "mend or drop them")
    if tokens.overlong.count:
        lost_rows = tokens.overlong.count / max(rows, 1)
        lost = tokens.overlong_learned / max(tokens.learned, 1)
        what = f"rows longer than {tokens.max_length:,} tokens"
        advice = f"`overlong: drop` loses {lost_rows:.2%} of the rows and {lost:.2%} of the tokens to learn from; "
        advice += "`overlong: error` stops"
        if tokens.overlong_media:
            advice += f"; of {tokens.overlong_media:,} the media alone are longer"
        yield _finding("look", tokens.overlong, what, advice)


def _by_count(tallies: Tallies) -> list[tuple[str, Tally]]:
    return sorted(tallies.items(), key=lambda entry: -entry[1].count)


def _finding(level: str, tally: Tally, what: str, do: str) -> Finding:
    if tally.count == 1:
        what = what.replace("rows ", "row ", 1).replace("files", "file", 1)
    return Finding(level, f"{tally.count:,} {what}", do, tuple(tally.examples))


def _source_table(audit: SourceAudit) -> str:
    looked = "" if audit.looked_at == audit.rows else f" ({audit.looked_at:,} of them looked at)"
    depth = "decoded" if audit.decoded else "headers"
    lines = [
        f"{audit.name}: {audit.path}",
        f"  {audit.rows:,} rows{looked}, {audit.bad_rows:,} left out as broken, {sum(audit.dropped.values()):,} on "
        f"purpose; licence: {audit.licence or 'not stated'}",
    ]
    if audit.tokens is not None and audit.tokens.lengths:
        low, median, high, top = audit.tokens.lengths
        share = audit.tokens.learned / max(audit.tokens.total, 1)
        lines.append(
            f"  tokens a row: {low:,} to {top:,}, median {median:,}, 95 % below {high + 1:,}; {share:.1%} learned from"
        )
    if audit.media:
        head = ("media under", "uses", "files", "refused", f"odd ({depth})")
        rows = [
            (
                media.prefix,
                f"{media.items:,}",
                f"{media.files:,}",
                _counts(media.refused) or "0",
                _counts(media.notes) or "0",
            )
            for media in audit.media
        ]
        lines += [f"  {line}" for line in _columns([head, *rows])]
    return "\n".join(lines)


def _counts(tallies: dict[str, Tally]) -> str:
    return ", ".join(f"{tally.count:,} {name}" for name, tally in tallies.items())


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _findings_table(found: Sequence[Finding]) -> str:
    if not found:
        return "Nothing to complain about."
    lines = ["Findings, the worst first:"]
    for finding in found:
        lines.append(f"  {finding.level:4}  {finding.source}: {finding.what}")
        lines += [f"          e.g. {example}" for example in finding.examples[:2]]
        if finding.do:
            lines.append(f"        -> {finding.do}")
    return "\n".join(lines)
