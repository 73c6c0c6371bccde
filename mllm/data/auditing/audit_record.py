"""What an audit writes down: counts and examples, ready for JSON."""

from dataclasses import dataclass, field

EXAMPLES = 5


@dataclass
class Tally:
    """A thing that was found, how often, and where first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


Tallies = dict[str, Tally]


@dataclass
class MediaAudit:
    """The media of a source below one prefix of their paths.

    Args:
        prefix: The first directories of the path, as published.
        items: How often rows of good standing use one.
        files: Different files among them.
        refused: Files that cannot be used, by kind of reason.
        notes: Files that can be used and are not quite what they should be.
    """

    prefix: str
    items: int = 0
    files: int = 0
    refused: Tallies = field(default_factory=dict)
    notes: Tallies = field(default_factory=dict)


@dataclass
class TokenAudit:
    """What a processor makes of the rows, counted over all sides.

    Args:
        lengths: Smallest, median, 95th percentile and largest length of a row, in tokens.
        total: Tokens of all rows.
        learned: Those that the loss is computed on.
        media: Those that stand for media.
        nothing_learned: Rows without a token to learn from.
        only_ends: Rows that teach no more than to end an answer.
        not_encoded: Rows that the processor refuses, by reason.
        max_length: The limit, None for none.
        overlong: Rows longer than that.
        overlong_learned: Tokens to learn from that are lost with them.
        overlong_media: Those of them whose media alone are longer, so that cutting text does not help.
    """

    lengths: list[int] = field(default_factory=list)
    total: int = 0
    learned: int = 0
    media: int = 0
    nothing_learned: Tally = field(default_factory=Tally)
    only_ends: Tally = field(default_factory=Tally)
    not_encoded: Tallies = field(default_factory=dict)
    max_length: int | None = None
    overlong: Tally = field(default_factory=Tally)
    overlong_learned: int = 0
    overlong_media: int = 0


@dataclass
class SourceAudit:
    """Everything that was found out about one source.

    Args:
        name: Of the source.
        path: Its file or directory.
        licence: As stated; "" if nobody did.
        rows: Rows of good standing.
        looked_at: How many of them this audit looked at.
        bad_rows: Rows that were left out.
        bad: Reasons why, other than media.
        dropped: Records left out on purpose, by reason.
        media: By prefix.
        target_media: Rows whose answer holds media, which only a model that draws can learn.
        coordinates: Rows that declare boxes.
        same_id: Rows whose id another row has.
        same_row: Rows that say the same about the same media as an earlier one.
        tokens: None without a processor.
        decoded: Whether pixels and samples were read, not only headers.
    """

    name: str
    path: str
    licence: str
    rows: int
    looked_at: int = 0
    bad_rows: int = 0
    bad: Tallies = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    media: list[MediaAudit] = field(default_factory=list)
    target_media: int = 0
    coordinates: int = 0
    same_id: Tally = field(default_factory=Tally)
    same_row: Tally = field(default_factory=Tally)
    tokens: TokenAudit | None = None
    decoded: bool = False
