"""The published forms that can be read, and how a source's form is found out."""

from collections import Counter
from collections.abc import Sequence

from mllm.data.importers import (
    audiocaps,
    cauldron,
    clotho,
    column_map,
    conversational,
    llama_factory,
    llava,
    mdpo,
    mllm_rows,
    mpo,
    ms_swift,
    openai,
    openaqa,
    preference_trl,
    re_align,
    rlaif_v,
    rlhf_v,
    videochat,
    videoinstruct,
    vlfeedback,
    wavcaps,
    webdataset,
)
from mllm.data.importers.base import Importer, Record
from mllm.data.importers.llama_factory_info import is_described, resolve
from mllm.data.importers.messages import is_text_alone
from mllm.data.sources import Source
from mllm.errors import OptionError

IMPORTERS: dict[str, Importer] = {
    module.IMPORTER.name: module.IMPORTER
    for module in (
        llava,
        conversational,
        cauldron,
        webdataset,
        openai,
        llama_factory,
        ms_swift,
        videochat,
        videoinstruct,
        audiocaps,
        clotho,
        wavcaps,
        openaqa,
        column_map,
        preference_trl,
        re_align,
        rlhf_v,
        rlaif_v,
        vlfeedback,
        mpo,
        mdpo,
        mllm_rows,
    )
}
"""Every importer under the name that `format:` of a source knows it by."""

FIRST_RECORDS = 100
"""How many records `detect_format` is given."""


def detect_format(records: Sequence[Record], source: Source) -> Importer:
    """The importer that `source.format` names, or else the one that the first records match.

    Args:
        records: The first records, about `FIRST_RECORDS` of them.
        source: Its `options` are checked, too.

    Raises:
        OptionError: There is no importer of that name, none or more than one matches, or an option is unknown to it.
    """
    if source.format and source.format not in IMPORTERS:
        raise OptionError(
            f"format = {source.format!r} of {source.path}",
            expected=f"one of {', '.join(IMPORTERS)}",
            do="correct `format`, or leave it out to have it found out",
        )
    source = resolve(source)
    importer = IMPORTERS[source.format] if source.format else _matching(records, source)
    if unknown := [key for key in source.options if key not in importer.options]:
        raise OptionError(
            f"options {', '.join(unknown)} of {source.path}",
            expected=f"options of the form {importer.name}: {', '.join(importer.options) or 'it has none'}",
            do="correct `options`",
        )
    return importer


def _matching(records: Sequence[Record], source: Source) -> Importer:
    if is_described(source):
        return IMPORTERS["llama_factory"]
    votes: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    for record in records:
        names = [name for name, importer in IMPORTERS.items() if importer.matches(record.fields, source)]
        # A conversation of texts alone reads the same in several forms: it has that of the rows around it.
        is_plain = names in (["llava"], ["conversational"]) and is_text_alone(record.fields)
        (plain if is_plain else votes).update(names)
    votes = votes or plain
    if len(votes) == 1:
        return IMPORTERS[next(iter(votes))]
    keys = dict.fromkeys(key for record in records for key in _keys(record))
    seen = f"the first {len(records)} records have the keys {', '.join(keys)[:500] or '(none)'}"
    if votes:
        forms = ", ".join(f"{name} ({count} records)" for name, count in votes.items())
        found = f"{source.path} could be of the forms {forms}; {seen}"
    else:
        found = f"{source.path} is of no form that is known; {seen}"
    raise OptionError(
        found,
        expected="records of precisely one form",
        do=f"name it as `format:`, one of {', '.join(IMPORTERS)}; column_map reads other columns",
    )


def _keys(record: Record) -> list[str]:
    if isinstance(record.fields, dict):
        return [str(key) for key in record.fields]
    return [f"({type(record.fields).__name__} in place of an object)"]
