"""A template and a tokenizer tried out on each other, before a model is built on them."""

from mllm.errors import OptionError, RowError
from mllm.processing.chat import ChatEncoder, EncodedChat
from mllm.processing.templates import TEMPLATES

PROBE = (
    {"role": "user", "content": "Is there a 5 in the picture?"},
    {"role": "assistant", "content": "No, there is none."},
    {"role": "user", "content": "How many digits are red?"},
    {"role": "assistant", "content": "The 3 and the 8."},
)


def check_template(encoder: ChatEncoder, end_of_turn: str | None) -> str:
    """Check that what is trained is what will be generated; return the end of turn.

    For each answer of a probe conversation: the supervised tokens spell its words and one end of turn, nothing else;
    and they stand exactly behind the ids of the prompt that generation starts from, so that no merge crosses the
    boundary. There is one BOS at most.

    Raises:
        OptionError: One of these does not hold.
    """
    for number, message in enumerate(PROBE):
        if message["role"] != "assistant":
            continue
        try:
            prompt = encoder.encode(PROBE[:number], add_generation_prompt=True)
            full = encoder.encode([*_unsupervised(number), message])
        except RowError as error:
            raise _refused(f"a template that cannot render a plain conversation: {error.found}") from error
        end_of_turn = _check_answer(encoder, prompt, full, message["content"], end_of_turn)
    return str(end_of_turn)


def _check_answer(
    encoder: ChatEncoder, prompt: EncodedChat, full: EncodedChat, words: str, end_of_turn: str | None
) -> str:
    tokenizer = encoder.tokenizer
    labels = [token for token, weight in zip(full.input_ids, full.loss_weights, strict=True) if weight]
    if not labels:
        raise _refused("a template that marks nothing as generated")
    last = tokenizer.convert_ids_to_tokens(labels[-1])
    spoken = tokenizer.decode(labels[:-1]).strip()
    if last not in tokenizer.get_added_vocab() or last != (end_of_turn or last) or spoken != words:
        expected = f"{words!r} and {end_of_turn or 'a control token that ends the turn'}"
        raise _refused(f"a template that marks {tokenizer.decode(labels)!r} as generated, where {expected} is right")
    start = len(prompt.input_ids)
    if full.input_ids[: start + len(labels)] != prompt.input_ids + labels:
        raise _refused(
            f"a generation prompt, {tokenizer.decode(prompt.input_ids)!r}, whose tokens are not those in front of the "
            "answer in training"
        )
    first, second = full.input_ids[:2]
    if first == second and first in tokenizer.added_tokens_decoder:
        raise _refused(f"a conversation that starts with two {tokenizer.convert_ids_to_tokens(first)}")
    return last


def _unsupervised(number: int) -> list[dict]:
    return [{**message, "loss": False} if message["role"] == "assistant" else message for message in PROBE[:number]]


def _refused(found: str) -> OptionError:
    return OptionError(
        f"chat template and tokenizer do not fit: {found}",
        expected="generation blocks that hold an answer's words and one end of turn, behind the generation prompt",
        do=f"choose `chat_template` among {', '.join(TEMPLATES)}",
    )
