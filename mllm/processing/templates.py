"""Chat templates by name, and the choice of one for a tokenizer. The texts are in `templates/*.jinja`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from transformers import PreTrainedTokenizerBase

from mllm.errors import OptionError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class NamedTemplate:
    """What a template of ours needs of a tokenizer.

    Args:
        end_of_turn: The token an answer ends with; None for the tokenizer's own end-of-sequence token.
        tokens: Tokens it writes, which the tokenizer must have as single tokens.
        recognised_by: A token that only tokenizers of this family have; None where the name must be given.
        flattens_content: Whether `content.jinja` stands in front of it.
    """

    end_of_turn: str | None
    tokens: tuple[str, ...] = ()
    recognised_by: str | None = None
    flattens_content: bool = True


TEMPLATES: dict[str, NamedTemplate] = {
    "plain": NamedTemplate(end_of_turn=None, flattens_content=False),
    "vicuna_v1": NamedTemplate(end_of_turn=None),
    "chatml": NamedTemplate(
        end_of_turn="<|im_end|>", tokens=("<|im_start|>", "<|im_end|>"), recognised_by="<|im_start|>"
    ),
    "llama3": NamedTemplate(
        end_of_turn="<|eot_id|>",
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        recognised_by="<|start_header_id|>",
    ),
}


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, complete in itself, and its end of turn (None: to be read off its output)."""

    text: str
    end_of_turn: str | None


def choose_template(
    tokenizer: PreTrainedTokenizerBase, choice: str | None, *, placeholders: Mapping[str, str]
) -> ChatTemplate:
    """Find the template to train and speak with.

    A name is one of `TEMPLATES`; a text with jinja statements is taken as it is. Without a choice it is the
    tokenizer's own template if that marks what the assistant says by `{% generation %}`, else the one of ours whose
    control tokens the tokenizer has.

    Raises:
        OptionError: The tokenizer lacks what the template writes, or nothing fits.
    """
    if choice in TEMPLATES:
        return named_template(tokenizer, choice, placeholders=placeholders)
    if choice is not None:
        if not marks_generation(choice):
            raise OptionError(
                f"chat_template = {choice[:60]!r}",
                expected=f"one of {', '.join(TEMPLATES)}, or the text of a template with {{% generation %}} blocks",
                do="choose a name, or mark what the assistant says by {% generation %} ... {% endgeneration %}",
            )
        return ChatTemplate(_with_content(choice, placeholders), end_of_turn=None)
    own = _own_template(tokenizer)
    if own is not None and marks_generation(own):
        return ChatTemplate(_with_content(own, placeholders), end_of_turn=None)
    known = tokenizer.get_added_vocab()
    for name, template in TEMPLATES.items():
        if template.recognised_by in known:
            return named_template(tokenizer, name, placeholders=placeholders)
    raise OptionError(
        "no chat_template was chosen, and the tokenizer brings none that marks what the assistant says",
        expected="a tokenizer with {% generation %} in its template, or with the control tokens of ChatML or Llama 3",
        do=f"choose `chat_template` among {', '.join(TEMPLATES)}",
    )


def named_template(tokenizer: PreTrainedTokenizerBase, name: str, *, placeholders: Mapping[str, str]) -> ChatTemplate:
    """One of ours, if the tokenizer has every token that it writes.

    Raises:
        OptionError: Tokens are missing.
    """
    template = TEMPLATES[name]
    end_of_turn = template.end_of_turn or tokenizer.eos_token
    known = tokenizer.get_added_vocab()
    missing = [token for token in template.tokens if token not in known]
    if end_of_turn is None:
        missing.append("an end-of-sequence token")
    if missing:
        raise OptionError(
            f"chat_template = {name!r}, and a tokenizer without {', '.join(missing)}",
            expected="a tokenizer that has each of the template's control tokens as one token",
            do=f"choose another of {', '.join(TEMPLATES)}, or a language model of the {name} family",
        )
    text = _read(name)
    text = _with_content(text, placeholders) if template.flattens_content else _with_tokens(text, placeholders)
    return ChatTemplate(text, end_of_turn)


def marks_generation(text: str) -> bool:
    """Whether a template says which of its output is the assistant's."""
    return _GENERATION.search(text) is not None


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _with_content(text: str, placeholders: Mapping[str, str]) -> str:
    """Put `content.jinja` in front, so that a template made for strings takes lists with media, in stock code too."""
    return _with_tokens(_read("content").rstrip("\n"), placeholders) + text


def _with_tokens(text: str, placeholders: Mapping[str, str]) -> str:
    """A template of ours, which writes `<image>`, `<audio>` and `<video>`, with a model's own placeholders."""
    for kind, token in placeholders.items():
        text = text.replace(f"<{kind}>", token)
    return text


def _read(name: str) -> str:
    return resources.files("mllm.processing").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")
