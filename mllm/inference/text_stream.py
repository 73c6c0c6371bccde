"""Token ids in, text out, piece by piece, with no character ever shown in half."""

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_WINDOW = 64


def decode_answer(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of generated ids; end-of-turn and other control tokens are not part of it."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Decodes an answer while it is generated, in constant time per token.

    For every sequence of ids that decodes to valid text, the pieces joined are `decode_answer` of the ids. A piece
    never ends inside a character: bytes of an unfinished one wait for the next token.
    (`tokenizers.decoders.DecodeStream` would do, but raises on the byte tokens that a young model strings together.)

    Example: the three tokens of "é!" in UTF-8 bytes, 0xC3 0xA9 0x21, give "", "é", "!".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # The window: tokens that gave the last piece, kept because spaces depend on the token before; then new ones.
        self._window: list[int] = []
        self._num_context = 0
        self._shown = ""

    def push(self, token_id: int) -> str:
        """Take one more token and return the text that is now certain, which may be empty."""
        self._window.append(token_id)
        text = decode_answer(self._tokenizer, self._window)
        is_full = len(self._window) > LONGEST_WINDOW
        is_whole = is_full or not text.endswith(UNFINISHED)
        piece = self._show(text if is_whole else text.rstrip(UNFINISHED))
        if is_full or (is_whole and piece):
            self._slide()
        return piece

    def end(self) -> str:
        """The text still held back, after the last token."""
        return self._show(decode_answer(self._tokenizer, self._window))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._shown += piece
        return piece

    def _slide(self) -> None:
        """Keep only the tokens of the last piece."""
        del self._window[: self._num_context]
        self._num_context = len(self._window)
        self._shown = decode_answer(self._tokenizer, self._window)
