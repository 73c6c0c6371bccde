"""Who does the steps of a construction, as its options name them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mllm.data.indexing.content_keys import file_digests, hash_of
from mllm.errors import OptionError
from mllm.load import ADAPTER_CONFIG, base_model_path, checkpoint_directory, load_model, load_processor, merged
from mllm.preference_data.acceptance import ModelSimilarity, SentenceSimilarity
from mllm.preference_data.arguments import ConstructArguments
from mllm.preference_data.completer import EndpointCompleter, ForcedCompleter, InstructedCompleter
from mllm.preference_data.construct import Opened
from mllm.preference_data.construction import Components
from mllm.preference_data.embedders import ClipEmbedder, ModelEmbedder
from mllm.preference_data.endpoint import Endpoint
from mllm.preference_data.masker import EndpointMasker, RuleMasker
from mllm.processing import TrainingProcessor
from mllm.version import __version__

CENTRE_ON = 256
"""Answers whose average embedding is taken off before the language model compares two."""

MANIFEST = "digests.json"
"""Beside the steps' results: hashes of model files, so that they are read once."""

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")
_RECORDS = ("complete.json", "run.json", "trainer_state.json")
"""What a checkpoint says about its making."""

Made = tuple[Any, Any]
"""A component and the facts about it."""


def load_components(arguments: ConstructArguments, opened: Opened, *, work: Path, api_key: str = "") -> Components:
    """Make the components; models are loaded that some of them need.

    Args:
        arguments: What they are, by name.
        opened: The rows.
        work: Where the steps' results are kept.
        api_key: Of the endpoint; "" for none.

    Raises:
        CheckpointError: A model cannot be loaded.
        OptionError: A component is not known, or lacks what it needs.
    """
    return _Loader(arguments, opened, work, api_key).components()


class _Loader:
    def __init__(self, arguments: ConstructArguments, opened: Opened, work: Path, api_key: str):
        self.arguments, self.opened, self.work, self.api_key = arguments, opened, work, api_key
        self.counts: dict[str, Mapping[str, int]] = {}

    def components(self) -> Components:
        given = self.arguments
        masker, of_masker = _choose("masker", given.masker, {"rules": self._rules, "endpoint": self._endpoint_masker})
        completers: dict[str, Callable[[], Made]] = {
            "forced": self._forced,
            "instructed": self._instructed,
            "endpoint": self._endpoint_completer,
        }
        completer, of_completer = _choose("completer", given.completer, completers)
        embedder, of_embedder = self._clip() if given.encoder else self._own_encoder()
        similarities = {"model": self._model_similarity, "sentences": self._sentence_similarity}
        similarity, of_similarity = _choose("similarity", given.similarity, similarities)
        remote = {"masker": given.masker, "completer": given.completer}
        return Components(
            masker=masker,
            embedder=embedder,
            completer=completer,
            similarity=similarity,
            facts={
                "masker": of_masker,
                "embedder": of_embedder,
                "completer": of_completer,
                "similarity": of_similarity,
            },
            keeps_each=frozenset(step for step, name in remote.items() if name == "endpoint"),
            counts=self.counts,
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        self._check_model()
        arguments = self.arguments
        return merged(load_model(str(arguments.model), device=arguments.device, dtype=arguments.dtype)).eval()

    @cached_property
    def processor(self) -> TrainingProcessor:
        self._check_model()
        return load_processor(str(self.arguments.model))

    def _rules(self) -> Made:
        masker = RuleMasker()
        return masker, {"rules": asdict(masker), "mllm": __version__}

    def _endpoint_masker(self) -> Made:
        endpoint = self._endpoint("masker", self.arguments.masker_model or self.arguments.endpoint_model)
        masker = EndpointMasker(endpoint)
        return masker, self._facts_of(endpoint, masker.prompt)

    def _forced(self) -> Made:
        completer = ForcedCompleter(self.model, self.processor, batch_size=self.arguments.batch_size)
        return completer, {"forced": {"slack": completer.slack}, **self._model_facts()}

    def _instructed(self) -> Made:
        completer = InstructedCompleter(
            self.model, self.processor,
            batch_size=self.arguments.batch_size, max_new_tokens=self.arguments.max_new_tokens,
        )  # fmt: skip
        told = {"prompt": completer.prompt, "max_new_tokens": completer.max_new_tokens}
        return completer, {"instructed": told, **self._model_facts()}

    def _endpoint_completer(self) -> Made:
        endpoint = self._endpoint("completer", self.arguments.endpoint_model)
        completer = EndpointCompleter(endpoint)
        return completer, self._facts_of(endpoint, completer.prompt)

    def _own_encoder(self) -> Made:
        return ModelEmbedder(self.model, self.processor), {"encoder": "the model's own", **self._model_facts()}

    def _clip(self) -> Made:
        directory = checkpoint_directory(str(self.arguments.encoder))
        embedder = ClipEmbedder.from_pretrained(directory, device=self.arguments.device, dtype=self.arguments.dtype)
        return embedder, {"encoder": self.arguments.encoder, "sha256": hash_of(self._digests(directory))}

    def _model_similarity(self) -> Made:
        answers = self.opened.answers(CENTRE_ON)
        similarity = ModelSimilarity(
            self.model, self.processor, centre_on=answers, batch_size=self.arguments.batch_size
        )
        return similarity, {"centred on": len(answers), **self._model_facts()}

    def _sentence_similarity(self) -> Made:
        name = self.arguments.similarity_model
        return SentenceSimilarity(name, device=self.arguments.device), {"sentences": name}

    def _endpoint(self, role: str, model: str | None) -> Endpoint:
        arguments = self.arguments
        if not (arguments.endpoint and model):
            raise OptionError(
                f"endpoint = {arguments.endpoint!r}, endpoint_model = {model!r}",
                expected="the address of an endpoint, and the name of a model that it serves",
                do="set both, or choose another masker and completer",
            )
        options = {"temperature": 0.0, "max_tokens": arguments.max_new_tokens}
        endpoint = Endpoint(
            arguments.endpoint, model=model, api_key=self.api_key, options=options,
            timeout=arguments.timeout, concurrency=arguments.concurrency,
        )  # fmt: skip
        self.counts[role] = endpoint.counts
        return endpoint

    def _facts_of(self, endpoint: Endpoint, prompt: str) -> dict[str, Any]:
        return {"endpoint": endpoint.url, "model": endpoint.model, "options": endpoint.options, "prompt": prompt}

    def _model_facts(self) -> dict[str, Any]:
        directory = checkpoint_directory(str(self.arguments.model))
        digests = self._digests(directory)
        if (directory / ADAPTER_CONFIG).is_file():
            digests |= {f"base {name}": digest for name, digest in self._digests(base_model_path(directory)).items()}
        return {"model": self.arguments.model, "sha256": hash_of(digests), "dtype": self.arguments.dtype}

    def _digests(self, directory: Path) -> dict[str, str]:
        """Hashes of the files that say what a model is, by name."""
        found = (file for pattern in _MODEL_FILES for file in directory.glob(pattern))
        files = sorted(file for file in found if file.name not in _RECORDS)
        manifest = self.work / f"{directory.resolve().name}-{MANIFEST}"
        return {Path(path).name: digest for path, digest in file_digests(files, manifest=manifest).items()}

    def _check_model(self) -> None:
        if self.arguments.model is None:
            raise OptionError(
                "no --model, which one of the components needs",
                expected="a checkpoint: it completes (forced, instructed), compares images (without --encoder) and "
                "compares answers (model)",
                do="name it, or choose other components",
            )


def _choose(role: str, name: str, makers: dict[str, Callable[[], Made]]) -> Made:
    if name not in makers:
        raise OptionError(f"{role} = {name!r}", expected=f"one of {', '.join(makers)}", do="choose one")
    return makers[name]()
