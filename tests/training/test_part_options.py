"""What is asked of a part in a configuration file, and of optimizers that other packages bring."""

import importlib.util

import pytest
import yaml

from mllm.errors import OptionError
from mllm.models.parts import PartOptions, check_options
from mllm.training import start
from mllm.training.argument_checks import read_parts
from mllm.training.arguments import build_arguments

NAMES = ("image.encoder", "image.connector", "text")


def test_every_option_of_a_part_is_read():
    written = """
    image.encoder: {mode: full, layers: "12:", learning_rate: 2e-6, checkpointing: true}
    image.connector: full
    text: {mode: lora, rank: 8, alpha: 16, dropout: 0.1, dora: true, quantize: 4bit, layers: null}
    """
    parts = read_parts(yaml.safe_load(written))
    assert parts == {
        "image.encoder": PartOptions("full", layers="12:", learning_rate=2e-6, checkpointing=True),
        "image.connector": PartOptions("full"),
        "text": PartOptions("lora", rank=8, alpha=16.0, dropout=0.1, dora=True, quantize="4bit"),
    }
    check_options(NAMES, parts)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("text: {mode: lora, dora: 'no'}", "text: dora = 'no'"),
        ("text: {mode: lora, checkpointing: 1}", "text: checkpointing = 1"),
        ("text: {mode: lora, layers: 12:16}", "layers = '736'(.|\n)*in quotes"),
        ("text: {mode: lora, layers: last}", "layers = 'last'"),
        ("text: {mode: lora, layers: 'last:0'}", "layers = 'last:0'"),
        ("text: {mode: lora, layers: ':'}", "layers = ':'"),
        ("text: {mode: full, quantize: 4bit}", "text = full, and its weights are quantized"),
        ("text: {mode: lora, quantize: 3bit}", "expected: 4bit or null"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(written, message):
    with pytest.raises(OptionError, match=message):
        check_options(NAMES, read_parts(yaml.safe_load(written)))


def test_an_optimizer_of_a_package_that_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(OptionError, match="optim = 'adamw_8bit'(.|\n)*extra `bnb`"):
        _build(optim="adamw_8bit")
    assert _build(optim="adamw_torch").optim == "adamw_torch"


def test_an_optimizer_with_groups_of_its_own():
    with pytest.raises(OptionError, match="optim = 'galore_adamw'(.|\n)*learning rate for each part"):
        _build(optim="galore_adamw")


def test_weights_of_4_bits_are_not_sharded(monkeypatch, tmp_path):
    monkeypatch.setattr(start, "is_deepspeed_zero3_enabled", lambda: True)
    arguments = _build(parts={"text": {"mode": "lora", "quantize": "4bit"}})
    with pytest.raises(OptionError, match="text in 4 bits, under ZeRO-3"):
        start.load_base(arguments, tmp_path)


def _build(**options):
    needed = {"model": "m", "data": ["rows.jsonl"], "output_dir": "out", "use_cpu": True, "report_to": "none"}
    return build_arguments(needed | options, where="the test")
