"""The options of a construction, as a program reads them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.data.sources import Source
from mllm.preference_data.acceptance import PAPERS_MODEL, TAU
from mllm.preference_data.construction import Construction
from mllm.preference_data.retriever import Retrieval, search_by_default


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ConstructArguments:
    """Options of `data_recipes/re_align.py construct`."""

    rows: str = field(metadata={"help": "Rows with good answers about one image: any form that `data:` reads."})
    out: str = field(metadata={"help": "Directory to write; must not exist. OUT.work, beside it, keeps every step."})
    model: str | None = _option(None, "Checkpoint of the model to be aligned: it completes, and compares images.")
    format: str = _option("", "Form of the rows, by name; by default it is told from the records.")
    media_root: str | None = _option(None, "What media paths are relative to; by default the file's directory.")
    licence: str = _option("", "Of the rows, for the record.")
    take: str = _option("all", "Which rows: all, first:N, end:N or random:N. Images of all of them are retrieved.")
    on_bad: str = _option("error", "What becomes of malformed rows: error or quarantine.")
    max_bad_rate: float = _option(0.05, "Above it, quarantine is an error, too.")
    seed: int = _option(0, "Decides which rows random:N takes.")

    masker: str = _option("rules", "Who masks phrases: rules (English, no model) or endpoint.")
    encoder: str | None = _option(
        None, "Who compares images: a CLIP, SigLIP or DINO; by default the model's own encoder."
    )
    completer: str = _option(
        "forced",
        "Who writes the phrases anew: forced (the model, into the gaps alone), instructed (the model, asked with the "
        "paper's prompt) or endpoint.",
    )
    similarity: str = _option(
        "model", "Who compares answers: model, or sentences (the library sentence-transformers)."
    )
    similarity_model: str = _option(PAPERS_MODEL, "Of sentences: a name on the Hub, or a directory.")
    tau: float = _option(TAU, "A completion is taken when its similarity to the answer is below.")
    top_k: int = _option(10, "How many images are tried for an answer, nearest first.")
    max_similarity: float = _option(1.0, "Images with a higher cosine are taken for copies; 1 for no such limit.")
    copy_levels: float = _option(2.0, "Images that differ by less, of 255, when shrunk to 16 x 16 are copies, too.")
    search: str = _option(search_by_default(), "Who finds neighbours: faiss or numpy.")

    endpoint: str | None = _option(None, "Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
    endpoint_model: str | None = _option(None, "Name of the model that it serves.")
    masker_model: str | None = _option(None, "Name of the one that masks; by default the same.")
    api_key_name: str = _option("OPENAI_API_KEY", "Environment variable that holds its key; it may be unset.")
    timeout: float = _option(120.0, "Seconds for one reply.")
    concurrency: int = _option(8, "Questions under way at once.")
    on_unanswered: str = _option(
        "error", "Rows to which it gives no answer: error (asked again when started again) or reject."
    )

    device: str = _option("cpu", "Where models run.")
    dtype: str = _option("auto", "Type of the models' weights; auto for the saved one.")
    batch_size: int = _option(8, "Answers completed, and images embedded, at once.")
    max_new_tokens: int = _option(512, "Longest completion of instructed and endpoint.")
    portion: int = _option(256, "Answers whose completions are kept together: what a kill may cost a model at hand.")
    chunk: int = _option(2048, "Rows that go through all steps together.")
    examples: int = _option(24, "Pairs on the page.")

    @property
    def source(self) -> Source:
        """The rows as a source."""
        return Source(
            path=self.rows,
            format=self.format,
            media_root=Path(self.media_root) if self.media_root else None,
            licence=self.licence,
            take=self.take,
            on_bad=self.on_bad,
            max_bad_rate=self.max_bad_rate,
        )

    @property
    def construction(self) -> Construction:
        """How pairs are made."""
        return Construction(
            tau=self.tau,
            retrieval=Retrieval(self.top_k, self.max_similarity, self.copy_levels),
            batch_size=self.batch_size,
            portion=self.portion,
            chunk=self.chunk,
            search=self.search,
            on_unanswered=self.on_unanswered,
            examples=self.examples,
        )
