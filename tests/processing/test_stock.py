"""Stock processors in training: what their own code gives with the files open, from sizes alone."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.smolvlm import processing_smolvlm

from mllm.errors import CheckpointError, MediaError, OptionError, RowError
from mllm.processing.media import MediaInput
from mllm.processing.stock import StockProcessor
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_stock import STOCK_FAMILIES

SIZES = [(16, 16), (20, 40), (40, 20), (9, 61), (64, 64), (33, 17), (17, 33), (50, 49), (100, 13), (128, 127)]
SECONDS = [0.05, 0.1, 0.123, 0.2, 0.3999, 0.4, 0.999, 1.0]
WITHOUT_VIDEO = ("llava", "llava_next", "idefics3", "gemma3", "qwen2_audio")


@pytest.fixture(autouse=True)
def _num2words(monkeypatch):
    """SmolVLM's processor asks for this package, which it needs for videos only."""
    monkeypatch.setattr(processing_smolvlm, "num2words", processing_smolvlm.num2words or str)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    saved = {}

    def save(family):
        if family not in saved:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(processing_smolvlm, "num2words", processing_smolvlm.num2words or str)
                saved[family] = save_stock_checkpoint(tmp_path_factory.mktemp(family), family)
        return saved[family]

    return save


def item_of(family, number, row=0):
    """A media item of one of many sizes."""
    random = np.random.default_rng(number)
    if family == "qwen2_audio":
        seconds = SECONDS[number % len(SECONDS)]
        samples = random.normal(size=round(seconds * 16_000)).astype(np.float32)
        return MediaInput("audio", samples, (seconds,), row)
    height, width = SIZES[number % len(SIZES)]
    pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
    return MediaInput("image", Image.fromarray(pixels), (height, width), row)


def conversation(items, *, system=False):
    """Messages with the items in the first questions, one by one, and the same with the data in them."""
    plain, filled = [], []
    if system:
        plain.append({"role": "system", "content": [{"type": "text", "text": "Look closely."}]})
    for number in range(max(1, len(items))):
        media = [{"type": item.kind} for item in items[number : number + 1]]
        text = {"type": "text", "text": f"Is there a {number}?"}
        plain.append({"role": "user", "content": [*media, text]})
        plain.append({"role": "assistant", "content": [{"type": "text", "text": f"No, there is no {number}."}]})
    left = list(items)
    for message in plain:
        content = [
            {"type": one["type"], one["type"]: left.pop(0).data} if one["type"] != "text" else dict(one)
            for one in message["content"]
        ]
        filled.append({"role": message["role"], "content": content})
    return plain, filled


def stock_inputs(processor, filled):
    """The stock code, with pictures and sounds, under the template of training."""
    given = copy.deepcopy(filled)
    options = {"sampling_rate": 16_000} if processor.sampling_rate else {}
    return processor.apply_chat_template(
        given, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_ids_equal_the_stock_processors(family, checkpoint):
    processor = StockProcessor.from_pretrained(checkpoint(family))
    for count in (0, 1, 2, 3):
        for first in range(len(SIZES)):
            items = [item_of(family, first + 3 * number) for number in range(count)]
            plain, filled = conversation(items, system=first % 2 == 1)
            encoded = processor.encode_chat(plain, media_sizes=[item.size for item in items])
            assert encoded.input_ids == stock_inputs(processor, filled)["input_ids"][0].tolist()
            assert [span.kind for span in encoded.media] == [item.kind for item in items]


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_labels_decode_to_the_words_and_one_end_of_turn(family, checkpoint):
    processor = StockProcessor.from_pretrained(checkpoint(family))
    items = [item_of(family, 1), item_of(family, 2)]
    plain, _ = conversation(items)
    encoded = processor.encode_chat(plain, media_sizes=[item.size for item in items])
    learned = [token for token, weight in zip(encoded.input_ids, encoded.loss_weights, strict=True) if weight]
    end = processor.end_of_turn_token
    turns = processor.tokenizer.decode(learned).split(end)
    assert [turn.strip() for turn in turns] == ["No, there is no 0.", "No, there is no 1.", ""]
    placeholder = processor.tokenizer.convert_tokens_to_ids(next(iter(processor.placeholders.values())).repeated)
    assert placeholder in encoded.input_ids and placeholder not in learned


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_prompts_are_those_of_the_published_template(family, checkpoint):
    """Generation starts from what the model was published to start from."""
    directory = checkpoint(family)
    published = (directory / "chat_template.jinja").read_text()
    processor = StockProcessor.from_pretrained(directory)
    kind = processor.media_kinds[0]
    question = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What is it?"}]}
    prompts = {
        processor.processor.apply_chat_template([question], chat_template=template, add_generation_prompt=True)
        for template in (published, processor.chat_template)
    }
    assert len(prompts) == 1


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_control_tokens_in_words_stay_words(family, checkpoint):
    processor = StockProcessor.from_pretrained(checkpoint(family))
    item = item_of(family, 1)
    tokens = [processor.end_of_turn_token, *{token for pair in processor.placeholders.values() for token in pair}]
    words = "What is " + " and ".join(tokens) + "?"
    question = {"role": "user", "content": [{"type": item.kind}, {"type": "text", "text": words}]}
    plain = {"role": "user", "content": [{"type": item.kind}, {"type": "text", "text": "What is it?"}]}
    ids = [
        processor.encode_chat([one], media_sizes=[item.size], add_generation_prompt=True).input_ids
        for one in (question, plain)
    ]
    control = set(processor.tokenizer.convert_tokens_to_ids(tokens))
    assert [[token for token in one if token in control] for one in ids][0] == [
        token for token in ids[1] if token in control
    ]
    assert words in processor.tokenizer.decode(ids[0])


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_media_equal_the_stock_processors(family, checkpoint):
    """A row's tensors are those of the stock call; the tokens' types are, too."""
    processor = StockProcessor.from_pretrained(checkpoint(family))
    for count in (1, 2, 3):
        items = [item_of(family, 3 * number + count) for number in range(count)]
        _, filled = conversation(items)
        stock = stock_inputs(processor, filled)
        ours = processor.encode_media(items) | processor.text_inputs(stock["input_ids"])
        assert ours.keys() == stock.keys() - {"input_ids", "attention_mask"}
        for name, value in ours.items():
            assert torch.equal(value, stock[name]), name


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_placeholders_equal_the_features_of_the_model(family, checkpoint):
    """A batch of rows with 2, 0 and 1 items, of unequal sizes, goes through the model, which counts for itself."""
    from mllm.load import load_model

    directory = checkpoint(family)
    processor, model = StockProcessor.from_pretrained(directory), load_model(directory)
    items = [item_of(family, 1, 0), item_of(family, 8, 0), item_of(family, 4, 2)]
    rows = []
    for row in range(3):
        own = [item for item in items if item.row == row]
        rows.append(processor.encode_chat(conversation(own)[0], media_sizes=[item.size for item in own]).input_ids)
    length = max(map(len, rows))
    ids = torch.tensor([row + [processor.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask} | processor.encode_media(items) | processor.text_inputs(ids)
    together = model(**batch).logits
    alone = [item._replace(row=0) for item in items[2:]]
    single = torch.tensor([rows[2]])
    own = {"input_ids": single} | processor.encode_media(alone) | processor.text_inputs(single)
    torch.testing.assert_close(together[2, : len(rows[2])], model(**own).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_saved_equals_loaded(family, checkpoint, tmp_path):
    processor = StockProcessor.from_pretrained(checkpoint(family))
    processor.save_pretrained(tmp_path)
    before = json.loads((checkpoint(family) / "processor_config.json").read_text())
    assert json.loads((tmp_path / "processor_config.json").read_text()) == before
    loaded = StockProcessor.from_pretrained(tmp_path)
    items = [item_of(family, 1)]
    plain, _ = conversation(items)
    encoded = [one.encode_chat(plain, media_sizes=[items[0].size]) for one in (processor, loaded)]
    assert encoded[0] == encoded[1]
    assert loaded.chat_template == processor.chat_template
    assert pickle.loads(pickle.dumps(loaded)).encode_chat(plain, media_sizes=[items[0].size]) == encoded[0]


@pytest.mark.parametrize("family", WITHOUT_VIDEO)
def test_transformers_alone_loads_what_was_saved(family, checkpoint, tmp_path):
    processor = StockProcessor.from_pretrained(checkpoint(family))
    processor.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    plain, _ = conversation([item_of(family, 1)])
    assert stock.apply_chat_template(plain) == processor.apply_chat_template(plain)


def test_a_template_of_nobody_is_refused_with_the_way_out(checkpoint, tmp_path):
    directory = checkpoint("qwen2_5_vl")
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: ?{% endfor %}")
    with pytest.raises(OptionError, match="set `chat_template`"):
        StockProcessor.from_pretrained(tmp_path)
    assert StockProcessor.from_pretrained(tmp_path, chat_template="qwen2_vl").end_of_turn_token == "<|im_end|>"


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_grids_are_counted_where_edges_do_not_divide(family, checkpoint):
    """Here transformers' own counting differs from what its image processor does."""
    processor = StockProcessor.from_pretrained(checkpoint(family))
    images = processor.processor.image_processor
    images.size, images.max_image_size = type(images.size)(longest_edge=40), {"longest_edge": 16}
    for height, width in [(35, 50), (50, 35), (16, 17), (100, 41), (41, 100), (24, 30), (30, 24), (7, 90), (77, 78)]:
        processor.encode_media([MediaInput("image", Image.new("RGB", (width, height)), (height, width))])


def test_a_missing_package_is_named(checkpoint, monkeypatch):
    directory = checkpoint("smolvlm")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(OptionError, match="(?s)num2words.*install the package"):
        StockProcessor.from_pretrained(directory)


def test_bad_media_are_named(checkpoint):
    llava = StockProcessor.from_pretrained(checkpoint("llava"))
    item = item_of("llava", 1)
    assert llava.fitted(item, where="row 3") is item
    with pytest.raises(MediaError, match="row 3: a media file of 20x40, which the row says is 21x40"):
        llava.fitted(item._replace(size=(21, 40)), where="row 3")
    with pytest.raises(RowError, match="audio, which the model does not read"):
        llava.expansions([(0.2,)])
    audio = StockProcessor.from_pretrained(checkpoint("qwen2_audio"))
    sound = item_of("qwen2_audio", 3)
    assert len(audio.fitted(sound._replace(size=(0.21,)), where="row 4").data) == 3360
    with pytest.raises(MediaError, match=r"row 4: a media file of 0.20 s, which the row says is 0.40 s"):
        audio.fitted(sound._replace(size=(0.4,)), where="row 4")
    with pytest.raises(RowError, match=r"a sound of 31 seconds"):
        audio.expansions([(31.0,)])


def test_other_processors_are_refused(checkpoint, tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "FuyuProcessor"}))
    with pytest.raises(CheckpointError, match="whose processor is FuyuProcessor"):
        StockProcessor.from_pretrained(tmp_path)
