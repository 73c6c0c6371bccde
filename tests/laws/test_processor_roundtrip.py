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
from transformers import AutoProcessor, CLIPImageProcessorPil, ProcessorMixin, WhisperFeatureExtractor

from mllm.processing import MllmProcessor
from mllm.processing.build import add_placeholder, build_processor
from mllm.processing.geometry import GEOMETRIES
from mllm.processing.media import MediaInput
from mllm.sizes import ImageTokenRule
from mllm.sizes.audio import AudioTokenRule
from mllm.sizes.video import VideoTokenRule
from mllm.testing import tiny_tokenizer

RULES = {
    "image": ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default"),
    "audio": AudioTokenRule(sampling_rate=16_000, window=1600, samples_per_step=64),
    "video": VideoTokenRule("uniform:3", features=4, has_timestamps=True),
}
SUBSETS = [subset for size in range(len(RULES) + 1) for subset in itertools.combinations(RULES, size)]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8))
SOUND = np.random.default_rng(1).normal(size=2000).astype(np.float32)
MEDIA = {
    "image": MediaInput("image", PICTURE, (20, 33)),
    "audio": MediaInput("audio", SOUND, (2000 / 16_000,)),
    "video": MediaInput("video", [PICTURE, PICTURE.rotate(90), PICTURE], (20, 33, 10, 2.0)),
}


def _processor(subset, **options) -> MllmProcessor:
    tokenizer = tiny_tokenizer("qwen")
    for number, kind in enumerate(subset, start=1):
        add_placeholder(tokenizer, f"<{kind}>", num_rows=len(tokenizer) + number)
    pixels, sounds = CLIPImageProcessorPil(), WhisperFeatureExtractor(feature_size=4, n_fft=64, hop_length=32)
    return build_processor(
        tokenizer,
        pixels if "image_processor" in _components(subset) else None,
        sounds if "feature_extractor" in _components(subset) else None,
        rules={kind: RULES[kind] for kind in subset},
        **options,
    )


def _components(subset) -> list[str]:
    has_pixels = "image" in subset or "video" in subset
    return ["image_processor"] * has_pixels + ["feature_extractor"] * ("audio" in subset)


def _conversation(subset) -> list[dict]:
    content = [{"type": kind} for kind in subset]
    content.append({"type": "text", "text": "Is there a <image> or 5?"})
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "No."}]


def _outputs(processor, subset) -> list:
    media = [MEDIA[kind] for kind in subset]
    tensors = {name: tensor.tolist() for name, tensor in processor.encode_media(media).items()}
    image = "image" in subset
    stock_call = processor(text=["a 3 <image>" if image else "a 3"], images=[PICTURE] if image else None)
    chat = processor.encode_chat(_conversation(subset), media_sizes=[item.size for item in media])
    return [chat, tensors, stock_call["input_ids"]]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "text")
def test_loaded_is_saved(subset, tmp_path, caplog, recwarn):
    saved = _processor(subset)
    saved.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    assert [name for name in ("image_processor", "feature_extractor") if name in fields] == _components(subset)
    for load in (MllmProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is MllmProcessor
        assert loaded.get_attributes() == ["tokenizer", *_components(subset)]
        assert _outputs(loaded, subset) == _outputs(saved, subset)
        assert loaded.to_dict() == saved.to_dict()
        assert repr(loaded) == repr(saved).replace("name_or_path=''", f"name_or_path={str(tmp_path)!r}")
        assert [loaded.rule(kind) for kind in subset] == [RULES[kind] for kind in subset]
    assert [record.getMessage() for record in caplog.records] == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry_is_recorded(geometry, tmp_path):
    saved = _processor(("image",), geometry=geometry)
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["image_geometry"] == geometry
    loaded = MllmProcessor.from_pretrained(tmp_path)
    assert loaded.image_geometry == geometry
    assert torch.equal(loaded.encode_images([PICTURE]), saved.encode_images([PICTURE]))


def test_saving_twice_writes_the_same_files(tmp_path):
    _processor(("image",)).save_pretrained(tmp_path / "once")
    MllmProcessor.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_fresh_process_prints_nothing(tmp_path):
    """Also without torchvision, which is not there in our own environments."""
    _processor(("image",)).save_pretrained(tmp_path)
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
