"""A JSON file as a text that is read value by value through a window, so that memory does not grow with the file."""

import codecs
import json
import re
from typing import Any, BinaryIO

MAX_RECORD_LENGTH = 256 << 20
"""A longer record is not read: base64 images fit, a file whose closing quote is missing does not."""

HALF_PAIR = "half of a surrogate pair (such as \\ud83d alone), which is no letter"
TOO_DEEP = "lists or objects nested too deeply"

_LONGEST_WORD = 16  # more than `-Infinity` and `\ud83d\ude00`: how far before the end of the window a cut can show
_decode = json.JSONDecoder().raw_decode
_blanks = re.compile(r"[ \t\n\r]*").match
_undecodable = re.compile("[\udc80-\udcff]").search


class BrokenValue(Exception):
    """Bad JSON: the byte in the file where it was noticed, and how."""

    def __init__(self, byte: int, reason: str):
        super().__init__(reason)
        self.byte, self.reason = byte, reason


class JsonText:
    """A window on a file, in which a position moves forward.

    Bytes that are no UTF-8 become lone surrogates (`surrogateescape`), so that only the value they stand in is lost.

    Args:
        file: Read from where it stands.
        chunk: How many bytes are read at a time.
    """

    def __init__(self, file: BinaryIO, *, chunk: int):
        self.text = ""
        self.position = 0
        self.start = 0  # of the value that was read last
        self.noticed = 0  # where in the window bad JSON was noticed
        self._at_end = False
        self._is_damaged = False
        self._file = file
        self._chunk = chunk
        self._bytes = b""  # the beginning of a letter whose rest is still to be read
        self._end = file.tell()  # byte offset of the window's end

    def peek(self) -> str:
        """Go to the next letter that is no blank and return it; "" at the end of the file."""
        while True:
            found = _blanks(self.text, self.position)
            assert found is not None, "the pattern matches an empty text, too"
            self.position = found.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if self._at_end:
                return ""
            self.advance(self.position)

    def value(self) -> Any:
        """Read one value, which begins at the position.

        Raises:
            BrokenValue: It is bad JSON, or cut off by the end of the file.
        """
        while True:
            try:
                value, end = _decode(self.text, self.position)
                # A number may go on behind the window.
                if isinstance(value, dict | list | str) or end < len(self.text) - _LONGEST_WORD or self._at_end:
                    self.start, self.position = self.position, end
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if not is_cut or self._at_end:
                    ending = " (the file ends here: is it complete?)" if is_cut else ""
                    raise self.broken(error.pos, f"bad JSON: {error.msg}{ending}") from None
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits; lists in lists in lists
                reason = TOO_DEEP if isinstance(error, RecursionError) else f"bad JSON: {error}"
                raise self.broken(self.position, reason) from None
            if len(self.text) - self.position > MAX_RECORD_LENGTH:
                raise self.broken(self.position, f"no end of this record within {MAX_RECORD_LENGTH:,} letters")
            self.advance(self.position)

    def expect(self, marks: str) -> str:
        """Read one of these letters, with blanks before it.

        Raises:
            BrokenValue: Something else stands there.
        """
        found = self.peek()
        if not found or found not in marks:
            what = repr(found) if found else "the end of the file"
            raise self.broken(self.position, f"{what} where one of {' '.join(marks)} is expected")
        self.position += 1
        return found

    def broken(self, position: int, reason: str) -> BrokenValue:
        """What to raise where bad JSON is noticed, at a position of the window."""
        self.noticed = position
        return BrokenValue(self.byte(position), reason)

    def find(self, pattern: re.Pattern[str], *, longest: int) -> bool:
        """Go behind the next match of a pattern that is at most `longest` letters long; False if there is none."""
        while not (match := pattern.search(self.text, self.position)):
            if self._at_end:
                return False
            self.advance(max(self.position, len(self.text) - longest))
        self.position = match.end()
        return True

    def problem(self, value: Any) -> tuple[int, str] | None:
        """Byte and reason where the value that was just read holds what cannot be written as UTF-8."""
        if self._is_damaged and (found := _undecodable(self.text, self.start, self.position)):
            return self.byte(found.start()), "bytes that are no UTF-8"
        if has_half_pair(self.text, value, start=self.start, end=self.position):
            return self.byte(self.start), HALF_PAIR
        return None

    def byte(self, position: int) -> int:
        """Offset in the file of a letter of the window."""
        return self._end - len(self.text[position:].encode("utf-8", "surrogateescape"))

    def advance(self, used: int) -> None:
        """Drop the first letters and read on: a chunk, or as much again as is held, whichever is more."""
        self.text = self.text[used:]
        self.position -= used
        data = self._file.read(max(self._chunk, len(self.text)))
        self._at_end = not data
        self._bytes += data
        try:
            new, consumed = codecs.utf_8_decode(self._bytes, "strict", self._at_end)
        except UnicodeDecodeError:
            new, consumed = codecs.utf_8_decode(self._bytes, "surrogateescape", self._at_end)
            self._is_damaged = True
        self._end += consumed
        self._bytes = self._bytes[consumed:]
        self.text += new


def has_half_pair(text: str, value: Any, *, start: int, end: int) -> bool:
    r"""Whether an escape such as \ud83d stands alone: a string with it cannot be written as UTF-8."""
    if text.find("\\ud", start, end) < 0 and text.find("\\uD", start, end) < 0:
        return False
    return not is_unicode(value)


def is_unicode(value: Any) -> bool:
    """Whether all strings in a value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
