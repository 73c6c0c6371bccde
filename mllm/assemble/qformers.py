"""What a Q-Former needs at assembly beside its options: weights to begin with, and a tokenizer for questions."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from mllm.assemble.options import Connector as Choice
from mllm.assemble.qformer_weights import check_family, fit_weights, read_weights
from mllm.assemble.reading import read_config
from mllm.errors import CompositionError
from mllm.models.connectors import Connector, connector_options, written_connector
from mllm.models.connectors.instruct_qformer import InstructQFormerOptions
from mllm.models.connectors.qformer import QFormerOptions

TOKENIZERS = {"instructblip": "qformer_tokenizer", "bert": ""}
"""In what folder of a checkpoint the tokenizer of its Q-Former stands, by its type."""

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """A connector as it is built, and what it begins with.

    Args:
        choice: With all options; those that only assembly reads are none.
        init_from: Where its weights come from; None for fresh ones.
        tokenizer: For questions; None where it reads none.
        question_tokens: How many of a question it reads.
    """

    choice: Choice | None
    init_from: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    question_tokens: int = 0


def connector_start(choice: Choice | None) -> Start:
    """What a chosen connector begins with; None, a choice not made yet, with nothing.

    Raises:
        CompositionError: There is no checkpoint or no tokenizer of that name.
        OptionError: As `connector_options`.
    """
    if choice is None:
        return Start(None)
    _, options = connector_options(choice)
    if not isinstance(options, QFormerOptions):
        return Start(choice)
    source = None if options.init_from is None else read_config(options.init_from, "init_from")
    if source is not None:
        check_family(source.model_type, where=str(options.init_from))
        _check_heads(options, source)
    built = {**written_connector(choice), "init_from": None}
    if not isinstance(options, InstructQFormerOptions):
        return Start(built, options.init_from)
    tokenizer = _question_tokenizer(options, source)
    rows = max(len(tokenizer), _word_rows(source))
    return Start(
        {**built, "tokenizer": None, "vocab_size": rows}, options.init_from, tokenizer, options.max_question_tokens
    )


def begin(connector: Connector, start: Start) -> None:
    """Give a fresh connector the weights that it begins with.

    Raises:
        CompositionError: They do not fit.
    """
    if start.init_from is None:
        return
    model_type = read_config(start.init_from, "init_from").model_type
    fitted = fit_weights(connector, read_weights(start.init_from, model_type), where=start.init_from)
    connector.load_state_dict({**connector.state_dict(), **fitted.weights})
    logger.log(
        logging.WARNING if fitted.fresh else logging.INFO,
        "%d of %d weights of the connector come from %s; fresh: %s; left behind: %s",
        len(fitted.weights),
        len(connector.state_dict()),
        start.init_from,
        ", ".join(fitted.fresh) or "none",
        ", ".join(fitted.left) or "none",
    )


def question_options(starts: Mapping[str, Start], built: Mapping[str, Choice]) -> dict[str, Any]:
    """The tokenizer of questions, and who reads how many tokens of one, as `build_processor` takes them.

    Args:
        starts: Of each modality.
        built: Its connector, as it is written; that of another model where it was taken from one.

    Raises:
        CompositionError: A connector has no tokenizer, or two have different ones.
    """
    for modality, written in built.items():
        if isinstance(connector_options(written)[1], InstructQFormerOptions) and not starts[modality].tokenizer:
            raise CompositionError(
                f"an `instruct_qformer` of another model for {modality}, without its tokenizer for questions",
                expected="`connector` beside `connector_from`, with its options and its `tokenizer`",
                do="write it as in the plan of that model",
            )
    readers = {modality: start for modality, start in starts.items() if start.tokenizer is not None}
    if not readers:
        return {}
    vocabularies = [start.tokenizer.get_vocab() for start in readers.values() if start.tokenizer is not None]
    if any(one != vocabularies[0] for one in vocabularies):
        raise CompositionError(
            f"connectors of {', '.join(readers)} that read questions with different tokenizers",
            expected="one tokenizer for all questions of a model",
            do="name the same `tokenizer` for each of these connectors",
        )
    tokens = {modality: start.question_tokens for modality, start in readers.items()}
    return {"question_tokenizer": next(iter(readers.values())).tokenizer, "question_tokens": tokens}


def _question_tokenizer(options: InstructQFormerOptions, source: PreTrainedConfig | None) -> PreTrainedTokenizerBase:
    path, folder = options.tokenizer, ""
    if path is None and source is not None and source.model_type in TOKENIZERS:
        path, folder = options.init_from, TOKENIZERS[source.model_type]
    if path is None:
        raise CompositionError(
            "an `instruct_qformer` without a tokenizer for questions",
            expected="`tokenizer`, or `init_from` with an InstructBLIP or BERT checkpoint, which has one",
            do="set, e.g., `tokenizer: google-bert/bert-base-uncased` for the connector",
        )
    try:
        return AutoTokenizer.from_pretrained(path, subfolder=folder)
    except (OSError, ValueError) as error:
        raise CompositionError(
            f"tokenizer = {path!r} cannot be read: {str(error).splitlines()[0]}",
            expected="a directory with a tokenizer, or the id of one on the Hub",
            do="check the path or id given as the connector's `tokenizer`",
        ) from error


def _check_heads(options: QFormerOptions, source: PreTrainedConfig) -> None:
    """Of all sizes the only one that the shapes of the weights do not tell."""
    own = source if source.model_type == "bert" else source.qformer_config
    if own.num_attention_heads != options.heads:
        raise CompositionError(
            f"init_from = {options.init_from!r}, of {own.num_attention_heads} heads",
            expected=f"heads: {options.heads}, as the connector has",
            do=f"set `heads: {own.num_attention_heads}` for the connector, or name another checkpoint",
        )


def _word_rows(source: PreTrainedConfig | None) -> int:
    """Rows of a checkpoint's table of words; 0 where there is none to begin with."""
    if source is None:
        return 0
    if source.model_type == "bert":
        return source.vocab_size
    if source.model_type == "instructblip" or source.qformer_config.use_qformer_text_input:
        return source.qformer_config.vocab_size
    return 0
