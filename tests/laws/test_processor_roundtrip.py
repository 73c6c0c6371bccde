"""A processor saved and loaded gives the same output, whatever modalities it has, offline and without a word."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    BaseVideoProcessor,
    CLIPImageProcessorPil,
    ProcessorMixin,
    WhisperFeatureExtractor,
)

from mllm.processing import MllmProcessor
from mllm.processing.build import add_placeholder, build_processor
from mllm.processing.geometry import GEOMETRIES
from mllm.sizes import ImageTokenRule
from mllm.testing import tiny_tokenizer

EXTRAS = ("image_processor", "feature_extractor", "video_processor")
SUBSETS = [subset for size in range(len(EXTRAS) + 1) for subset in itertools.combinations(EXTRAS, size)]
RULE = ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8))


def _processor(subset, **options) -> MllmProcessor:
    tokenizer = tiny_tokenizer("qwen")
    images = CLIPImageProcessorPil() if "image_processor" in subset else None
    if images is not None:
        add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    processor = build_processor(tokenizer, images, rule=None if images is None else RULE, **options)
    if "feature_extractor" in subset:
        processor.feature_extractor = WhisperFeatureExtractor(feature_size=4, n_fft=64, hop_length=32)
    if "video_processor" in subset:
        processor.video_processor = _video_processor()
    return processor


def _video_processor() -> BaseVideoProcessor:
    pytest.importorskip("torchvision", reason="transformers has no video processor without torchvision")
    from transformers import LlavaOnevisionVideoProcessor

    return LlavaOnevisionVideoProcessor()


def _conversation(processor) -> list[dict]:
    content = [{"type": "text", "text": "Is there a <image> or 5?"}]
    if processor.image_token is not None:
        content.insert(0, {"type": "image"})
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]


def _outputs(processor) -> list:
    sizes = [(20, 33)] if processor.image_token is not None else []
    pixels = processor.encode_images([PICTURE]).tolist() if sizes else None
    stock_call = processor(text=["a 3 <image>" if sizes else "a 3"], images=[PICTURE] if sizes else None)
    return [processor.encode_chat(_conversation(processor), media_sizes=sizes), pixels, stock_call["input_ids"]]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "text")
def test_loaded_is_saved(subset, tmp_path, caplog, recwarn):
    saved = _processor(subset)
    saved.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    assert {name for name in EXTRAS if name in fields} == set(subset)
    for load in (MllmProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is MllmProcessor
        assert loaded.get_attributes() == ["tokenizer", *(name for name in EXTRAS if name in subset)]
        assert _outputs(loaded) == _outputs(saved)
        assert loaded.to_dict() == saved.to_dict()
        assert repr(loaded) == repr(saved).replace("name_or_path=''", f"name_or_path={str(tmp_path)!r}")
        assert loaded.image_token_rule == saved.image_token_rule
    assert [record.getMessage() for record in caplog.records] == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry_is_recorded(geometry, tmp_path):
    saved = _processor(("image_processor",), geometry=geometry)
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_geometry"] == geometry
    loaded = MllmProcessor.from_pretrained(tmp_path)
    assert loaded.image_geometry == geometry
    assert torch.equal(loaded.encode_images([PICTURE]), saved.encode_images([PICTURE]))


def test_saving_twice_writes_the_same_files(tmp_path):
    _processor(("image_processor",)).save_pretrained(tmp_path / "once")
    MllmProcessor.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_fresh_process_prints_nothing(tmp_path):
    """Also without torchvision, which is not there in our own environments."""
    _processor(("image_processor",)).save_pretrained(tmp_path)
    code = (
        "import sys\n"
        "from PIL import Image\n"
        "from mllm.processing import MllmProcessor\n"
        "processor = MllmProcessor.from_pretrained(sys.argv[1])\n"
        "processor.encode_images([Image.new('RGB', (4, 9))])\n"
        "processor.encode_chat([{'role': 'user', 'content': [{'type': 'image'}]}], media_sizes=[(9, 4)])\n"
        "processor.save_pretrained(sys.argv[1] + '/again')\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    # bitsandbytes, where it is installed, misses an optional package of its own when peft imports it.
    said = [line for line in done.stderr.splitlines() if "gemm_4bit_forward" not in line]
    assert (done.returncode, done.stdout, said) == (0, "", [])


def test_why_absence_is_ours_to_handle():
    """Stock ProcessorMixin wants every component. When this fails, our override can go."""

    class Stock(ProcessorMixin):
        def __init__(self, tokenizer=None, image_processor=None, **kwargs):
            super().__init__(tokenizer, image_processor, **kwargs)

    with pytest.raises(TypeError, match="NoneType for argument image_processor"):
        Stock(tiny_tokenizer("qwen"))
