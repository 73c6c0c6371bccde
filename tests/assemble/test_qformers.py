"""Q-Formers that begin with the weights of published checkpoints, and the tokenizer that some of them read with."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from mllm.assemble import assemble, assemble_checkpoint
from mllm.assemble.qformers import Start, question_options
from mllm.errors import CompositionError
from mllm.models import MllmForConditionalGeneration
from mllm.processing import MllmProcessor
from mllm.testing import save_tiny_parts, tiny_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "this", "how", "many", "digits", "?", "[MASK]"]
SMALL = {"layers": 3, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 5}
QFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 32,
}
TEXT = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 8, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "vocab_size": 20, "max_position_embeddings": 16}
VISION = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Built as BERT's is: words, [CLS] before them and [SEP] behind."""
    backend = Tokenizer(WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Checkpoints by name, and their tensors."""
    root = tmp_path_factory.mktemp("sources")
    fields = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": TEXT, "num_query_tokens": 5}
    with_text = {**fields, "qformer_config": {**QFORMER, "use_qformer_text_input": True}}
    narrow = {**fields, "vision_config": {**VISION, "hidden_size": 24}}
    narrow["text_config"] = {**TEXT, "hidden_size": 24, "word_embed_proj_dim": 24}
    models = {
        "blip2_narrow": Blip2ForConditionalGeneration(Blip2Config(**narrow)),
        "blip2": Blip2ForConditionalGeneration(Blip2Config(**fields)),
        "blip2_itm": Blip2ForImageTextRetrieval(Blip2Config(**with_text)),
        "instructblip": InstructBlipForConditionalGeneration(InstructBlipConfig(**fields)),
        "bert": BertModel(BertConfig(**QFORMER)),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(root / name)
        BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / name)
    bert_tokenizer().save_pretrained(root / "instructblip" / "qformer_tokenizer")
    bert_tokenizer().save_pretrained(root / "bert")
    return {name: (str(root / name), model.eval()) for name, model in models.items()}


@pytest.fixture
def parts(tmp_path):
    """Options of `assemble` with a connector, and with other options of the image tower."""

    def with_connector(connector: dict, **fields) -> dict:
        options = save_tiny_parts(tmp_path)
        return {**options, "image": {**options["image"], "connector": {**SMALL, **connector}, **fields}}

    return with_connector


def weights_of(model: MllmForConditionalGeneration) -> dict[str, torch.Tensor]:
    return model.model.image_tower.connector.state_dict()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


@torch.no_grad()
@pytest.mark.parametrize(("source", "name"), [("blip2", "qformer"), ("instructblip", "instruct_qformer")])
def test_encoder_and_connector_give_what_the_checkpoint_gives(source, name, sources, parts, caplog):
    path, stock = sources[source]
    words = {"max_question_tokens": 32} if name == "instruct_qformer" else {}
    connector = {"type": name, **words, "feature_norm": True, "init_from": path}
    options = parts(connector, encoder=path, feature_layer=-1, feature_select="full")
    with caplog.at_level(logging.INFO):
        model, processor = assemble(**options)
    assert "fresh: none; left behind: " in caplog.text
    pixels = torch.randn(2, 3, 16, 16)
    asked = processor.encode_questions([user("How many digits?"), user("What is this?")])
    own = (asked["image_question_ids"], asked["image_question_mask"]) if words else ()
    expected = stock.get_image_features(pixels, *own).pooler_output
    torch.testing.assert_close(model.get_image_features(pixels, **asked).pooler_output, expected, rtol=0, atol=1e-6)
    assert model.config.image_config.connector["init_from"] is None


def test_questions_are_read_as_the_checkpoint_reads_them(sources, parts, tmp_path):
    """After saving and loading, too."""
    path, _ = sources["instructblip"]
    connector = {"type": "instruct_qformer", "max_question_tokens": 32, "init_from": path}
    saved = assemble_checkpoint(tmp_path / "model", **parts(connector))
    stock = PreTrainedTokenizerFast.from_pretrained(path, subfolder="qformer_tokenizer")
    texts = ["How many digits?", "What is this ?"]
    expected = stock(texts, padding=True, return_tensors="pt")
    for load in (AutoProcessor.from_pretrained, MllmProcessor.from_pretrained):
        asked = load(saved).encode_questions([user(text) for text in texts])
        assert asked["image_question_ids"].tolist() == expected["input_ids"].tolist()
        assert asked["image_question_mask"].tolist() == expected["attention_mask"].tolist()
    long = load(saved).encode_questions([user("digits " * 100)])
    assert long["image_question_ids"].shape == (1, 32) and long["image_question_ids"][0, -1] == 3


def test_from_bert_come_its_attention_and_its_layers_for_words_and_queries(sources, parts):
    path, bert = sources["bert"]
    theirs = bert.state_dict()
    model, _ = assemble(**parts({"type": "instruct_qformer", "max_question_tokens": 32, "init_from": path}))
    ours = weights_of(model)
    layer = "qformer.encoder.layer.1"
    pairs = {
        "qformer.embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "qformer.embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
        "qformer.embeddings.layernorm.bias": "embeddings.LayerNorm.bias",
        f"{layer}.attention.attention.key.weight": "encoder.layer.1.attention.self.key.weight",
        f"{layer}.attention.output.LayerNorm.weight": "encoder.layer.1.attention.output.LayerNorm.weight",
        f"{layer}.intermediate.dense.weight": "encoder.layer.1.intermediate.dense.weight",
        f"{layer}.intermediate_query.dense.weight": "encoder.layer.1.intermediate.dense.weight",
        f"{layer}.output.LayerNorm.bias": "encoder.layer.1.output.LayerNorm.bias",
        f"{layer}.output_query.LayerNorm.bias": "encoder.layer.1.output.LayerNorm.bias",
    }
    for own, other in pairs.items():
        assert torch.equal(ours[own], theirs[other]), own


def test_older_names_of_bert_are_known(sources, parts, tmp_path):
    """Its first checkpoint on the Hub has them."""
    path, bert = sources["bert"]
    shutil.copytree(path, tmp_path / "old")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in bert.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        tensors[f"bert.{name}"] = tensor
    tensors["cls.predictions.bias"] = torch.zeros(len(WORDS))
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    old, new = (
        weights_of(assemble(**parts({"type": "qformer", "init_from": str(one)}))[0])
        for one in (tmp_path / "old", path)
    )
    assert all(torch.equal(old[name], value) for name, value in new.items())


def test_every_stream_begins_with_the_same_layers(sources, parts):
    path, stock = sources["blip2"]
    options = parts({"type": "multi_stream_qformer", "per": "item", "num_local_queries": 5, "init_from": path})
    ours, theirs = weights_of(assemble(**options)[0]), stock.qformer.state_dict()
    for name in ("crossattention.{}attention.key.weight", "output_query.{}dense.bias"):
        expected = theirs[f"encoder.layer.2.{name.format('')}"]
        assert all(torch.equal(ours[f"qformer.layer.2.{name.format(f'{one}.')}"], expected) for one in (0, 1))
    assert torch.equal(ours["qformer.layernorm.weight"], theirs["layernorm.weight"])


def test_another_encoder_and_language_model_leave_fresh_what_has_their_widths(sources, parts, caplog):
    """Which is said; and of BLIP-2 without words, what reads words."""
    path, _ = sources["blip2_narrow"]
    words = sources["bert"][0]
    choice = {"type": "instruct_qformer", "num_queries": 4, "max_question_tokens": 32, "tokenizer": words}
    with caplog.at_level(logging.INFO):
        model, _ = assemble(**parts({**choice, "feature_norm": True, "init_from": path}))
    fresh = caplog.text.split("fresh: ")[1].split(";")[0].split(", ")
    attention = "qformer.encoder.layer.*.crossattention.attention"
    outside = ["feature_norm.bias", "feature_norm.weight", "language_projection.weight", "query_tokens"]
    assert {*outside, f"{attention}.key.weight", f"{attention}.value.weight"} < set(fresh)
    assert f"{attention}.query.weight" not in fresh and "qformer.encoder.layer.*.output.dense.weight" in fresh
    assert not any("layer.*.attention" in name or "_query." in name for name in fresh)
    assert len(weights_of(model)["qformer.embeddings.word_embeddings.weight"]) == len(WORDS)


def test_words_of_a_blip_2_that_reads_them(sources, parts):
    path, stock = sources["blip2_itm"]
    choice = {"type": "instruct_qformer", "max_question_tokens": 32, "tokenizer": sources["bert"][0]}
    ours = weights_of(assemble(**parts({**choice, "init_from": path}))[0])
    expected = stock.embeddings.word_embeddings.weight
    assert torch.equal(ours["qformer.embeddings.word_embeddings.weight"], expected)


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"hidden_size": 16}, r"is \(8,\), and has to be \(16,\)"),
        ({"layers": 4}, r"layer\.3\.\S* is not there"),
        ({"heads": 4}, "of 2 heads(?s:.*)`heads: 2`"),
        ({"cross_attention_frequency": 1}, r"layer\.1\.crossattention\S* is not there"),
        ({"init_from": "encoder"}, "a 'clip_vision_model' model(?s:.*)blip-2, instructblip, bert"),
        ({"init_from": "/nowhere"}, "init_from = '/nowhere' cannot be read"),
        ({"type": "instruct_qformer", "init_from": "encoder"}, "a 'clip_vision_model' model"),
        ({"type": "instruct_qformer"}, "without a tokenizer(?s:.*)tokenizer: google-bert/bert-base-uncased"),
        ({"type": "instruct_qformer", "tokenizer": "/nowhere"}, "tokenizer = '/nowhere' cannot be read"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(choice, found, sources, parts):
    options = parts({"type": "qformer", "init_from": sources["blip2"][0], **choice})
    if choice.get("init_from") == "encoder":
        options["image"]["connector"]["init_from"] = options["image"]["encoder"]
    with pytest.raises(CompositionError, match=found):
        assemble(**options)


def test_weights_that_are_pickled_are_not_read(sources, parts, tmp_path):
    shutil.copytree(sources["blip2"][0], tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(CompositionError, match=r"has no model.safetensors(?s:.*)pickled ones are not read"):
        assemble(**parts({"type": "qformer", "init_from": str(tmp_path / "pickled")}))


def test_of_a_sharded_checkpoint_only_what_is_needed_is_read(sources, parts, tmp_path):
    """One file is missing: it holds nothing of the Q-Former."""
    path, stock = sources["blip2"]
    whole = weights_of(assemble(**parts({"type": "qformer", "init_from": path}))[0])
    stock.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith(("qformer", "query", "language_proj"))}
    unneeded = set(index.values()) - needed
    assert unneeded and needed
    for file in unneeded:
        (tmp_path / "shards" / file).unlink()
    options = parts({"type": "qformer", "init_from": str(tmp_path / "shards")})
    options["image"]["connector"]["feature_norm"] = False
    found = weights_of(assemble(**options)[0])
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_two_connectors_read_questions_with_one_tokenizer(sources, parts, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    words = {"type": "instruct_qformer", "max_question_tokens": 32, "tokenizer": sources["bert"][0]}
    options = parts(words)
    options["video"] = {"connector": {**SMALL, **words, "max_question_tokens": 2}, "frames": "uniform:2"}
    _, processor = assemble(**options)
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "how many digits ?"}]
    asked = processor.encode_questions([[{"role": "user", "content": content}]])
    assert asked["image_question_ids"].tolist() == [[2, 7, 8, 9, 10, 3]]
    assert asked["video_question_ids"].tolist() == [[2, 3]]
    options["video"]["connector"]["tokenizer"] = str(tmp_path / "other")
    with pytest.raises(CompositionError, match="image, video that read questions with different tokenizers"):
        assemble(**options)


def test_a_connector_of_another_model_needs_its_tokenizer_named():
    with pytest.raises(CompositionError, match="of another model for audio(?s:.*)`tokenizer`"):
        question_options({"audio": Start(None)}, {"audio": {"type": "instruct_qformer"}})


@torch.no_grad()
def test_composed_with_a_language_model_it_is_blip_2(sources, tmp_path):
    """Encoder, norm, Q-Former, projection and language model: the logits of transformers' own class."""
    path, parts_of_stock = sources["blip2"]
    connector = {"type": "qformer", **SMALL, "feature_norm": True, "init_from": path}
    image = {"encoder": path, "feature_layer": -1, "feature_select": "full", "connector": connector}
    model, processor = assemble(**{**save_tiny_parts(tmp_path, llm="opt"), "image": image})
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=model.config.text_config.to_dict(),
        num_query_tokens=5,
        image_token_index=model.config.image_token_id,
    )
    stock = Blip2ForConditionalGeneration(config).eval()
    weights = {name: value for name, value in parts_of_stock.state_dict().items() if "language_model" not in name}
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("language_model.") for name in missing)
    stock.language_model.model.decoder.load_state_dict(model.model.language_model.decoder.state_dict())
    stock.language_model.lm_head.load_state_dict(model.lm_head.state_dict())
    chat = processor.encode_chat(user("How many digits?"), media_sizes=[(16, 16)])
    batch = {"input_ids": torch.tensor([chat.input_ids]), "pixel_values": torch.randn(1, 3, 16, 16)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(model(**batch).logits, stock(**batch).logits, rtol=0, atol=1e-5)
