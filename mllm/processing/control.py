"""Control tokens: what structures a conversation, and must never be read from, or spoken as, somebody's words."""

import re

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from mllm.errors import CompositionError
from mllm.processing.templates import TEMPLATES


def control_tokens(tokenizer: PreTrainedTokenizerBase, *extra: str | None) -> list[str]:
    """The tokenizer's special tokens, those our templates write, and `extra` ones (a placeholder), each once.

    Other added tokens are vocabulary: a model may read and speak `<think>` or `<tool_call>`.
    """
    added = tokenizer.added_tokens_decoder.values()
    ours = {token for template in TEMPLATES.values() for token in template.tokens}
    special = [token.content for token in added if token.special or token.content in ours]
    return list(dict.fromkeys([*special, *(token for token in extra if token is not None)]))


def control_pattern(tokens: list[str]) -> re.Pattern[str]:
    """Match any of `tokens` that has two characters or more, the longest first."""
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def cut_control_tokens(text: str, pattern: re.Pattern[str], mark: str) -> str:
    """Put `mark` behind the first character of each control token, so that no tokenizer can find it in a piece.

    Example: "a <image> b" becomes "a <|image> b" where mark is "|".
    """
    while pattern.search(text):  # again, for the tokens that a cut one contained
        text = pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
    return text


def add_placeholder(tokenizer: PreTrainedTokenizerBase, text: str, *, num_rows: int) -> int:
    """Make `text` a special token and return its id: an unused row of the embedding, if there is one.

    Many models have more embedding rows than their tokenizer has tokens (Qwen2.5: 151,936 and 151,665). Where there is
    none left, the id is `num_rows`, and the embedding has to be extended by one row. Reserved tokens
    (`<|reserved_special_token_0|>`) keep their names.

    Raises:
        CompositionError: The tokenizer has more tokens than the embedding has rows.
    """
    known = tokenizer.get_added_vocab().get(text)
    if known is None:
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)], special_tokens=True)
        known = tokenizer.convert_tokens_to_ids(text)
    if known > num_rows:
        raise CompositionError(
            f"a tokenizer with ids up to {known} and an embedding of {num_rows} rows",
            expected="at least as many embedding rows as tokens",
            do="use the tokenizer that belongs to the language model",
        )
    return known
