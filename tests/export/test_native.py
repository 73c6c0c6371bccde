"""A written export: what is in it, what is refused, and that nothing is left of one that failed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, GenerationConfig, LlavaProcessor

from mllm import load_model, load_processor
from mllm.assemble import assemble, assemble_checkpoint
from mllm.checkpoints import is_complete
from mllm.errors import CheckpointError, ExportError, OptionError
from mllm.export import export, native, read_report
from mllm.export.mappings import find_target
from mllm.export.native import load_trained, write_stock
from mllm.export.probes import probes_from_rows, synthetic_probes
from mllm.export.verify import compare
from mllm.load import base_model_path
from mllm.testing import save_tiny_parts, tiny_model
from mllm.testing_checkpoints import save_stock_checkpoint

LORA = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}


@pytest.fixture(scope="module")
def exported(assembled, tmp_path_factory) -> Path:
    """An export of the tiny model."""
    out = tmp_path_factory.mktemp("exports") / "tiny"
    export(assembled, out)
    return out


def test_report_tells_what_was_found(exported):
    report = read_report(exported)
    assert is_complete(exported, kind="export")
    assert (report.architecture, report.dtype, report.trained_dtype) == (
        "LlavaForConditionalGeneration",
        "float32",
        "float32",
    )
    assert (report.num_probes, report.max_abs_diff, report.tolerance, report.same_tokens) == (4, 0.0, 0.0, True)
    assert report.merge_max_abs_diff is report.rounding_max_abs_diff is None
    assert {"config.json", "model.safetensors", "processor_config.json", "probes/probes.json"} <= report.files.keys()


def test_probes_of_the_user_are_not_kept(assembled, rows, tmp_path, monkeypatch):
    """They may be somebody's data, and the directory may be pushed."""
    monkeypatch.setattr(
        native, "verify", lambda directory, expected, *, dtype: compare(expected, expected, dtype=dtype)
    )
    report = export(assembled, tmp_path / "out", probes=probes_from_rows(rows, limit=2))
    assert report.num_probes == 2
    assert not list((tmp_path / "out").rglob("*.png")) + list((tmp_path / "out").rglob("probes*"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "on 2 conversations of its user's" in card


def test_no_file_names_a_class_of_ours(exported, assembled):
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"):
        text = (exported / name).read_text(encoding="utf-8").lower()
        assert "mllm" not in text, name
        assert str(assembled.parent).lower() not in text, name
    assert json.loads((exported / "config.json").read_text())["model_type"] == "llava"
    assert not list(exported.rglob("*.bin")) + list(exported.rglob("*.py"))


def test_control_tokens_are_suppressed_and_all_ends_kept(exported, assembled):
    ours, stock = load_model(assembled).generation_config, GenerationConfig.from_pretrained(exported)
    processor = load_processor(assembled)
    placeholder, start, end = processor.tokenizer.convert_tokens_to_ids(["<image>", "<|im_start|>", "<|im_end|>"])
    assert {placeholder, start} <= set(stock.suppress_tokens)
    assert end in stock.eos_token_id and stock.eos_token_id == ours.eos_token_id
    assert stock.suppress_tokens == sorted(ours.suppress_tokens)
    assert stock.pad_token_id == ours.pad_token_id


def test_several_end_tokens_are_kept(tmp_path):
    model, processor = tiny_model(tmp_path / "tiny")
    model.generation_config.eos_token_id = [7, 3]
    (tmp_path / "out").mkdir()
    write_stock(model, processor, tmp_path / "out", target=find_target(model, processor))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [7, 3]


def test_chat_template_renders_the_same_text(exported, assembled):
    ours, stock = load_processor(assembled), AutoProcessor.from_pretrained(exported)
    assert type(stock) is LlavaProcessor
    for probe in synthetic_probes(16):
        expected = ours.apply_chat_template(probe.messages, add_generation_prompt=True, tokenize=False)
        assert stock.apply_chat_template(probe.messages, add_generation_prompt=True, tokenize=False) == expected


def test_adapter_is_merged_in_float32_and_rounded_once(train, tmp_path):
    run = train(tmp_path / "run", parts=LORA)
    report = export(run / "final", tmp_path / "out", dtype="bfloat16")
    assert (report.dtype, report.trained_dtype) == ("bfloat16", "float32")
    assert 0 < report.merge_max_abs_diff <= 1e-5
    assert 0 < report.rounding_max_abs_diff < 0.1
    assert report.max_abs_diff <= report.tolerance
    merged = load_model(run / "final").merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(written[name], merged["model.image_tower.connector.linear_1.weight"].to(torch.bfloat16))


def test_merging_may_round_large_logits_by_more(train, tmp_path, monkeypatch):
    final = train(tmp_path / "run", parts=LORA, model=save_tiny_parts(tmp_path / "tiny")) / "final"
    processor = load_processor(final)
    weights = base_model_path(final) / "model.safetensors"
    state = load_file(weights)
    (head,) = (name for name in state if name.endswith("lm_head.weight"))
    state[head] *= 1e5
    save_file(state, weights, metadata={"format": "pt"})
    _, origin = load_trained(final, processor, synthetic_probes(16))
    assert origin.merge_max_abs_diff > native.MERGE_TOLERANCE
    monkeypatch.setattr(native, "MERGE_TOLERANCE", 1e-12)
    with pytest.raises(ExportError, match="after merging, the logits"):
        load_trained(final, processor, synthetic_probes(16))


def test_tampered_weights_are_found_and_nothing_is_left(assembled, tmp_path, monkeypatch):
    def write_and_tamper(model, processor, directory, *, target):
        count = write_stock(model, processor, directory, target=target)
        state = load_file(directory / "model.safetensors")
        state["multi_modal_projector.linear_2.bias"][0] += 0.01
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return count

    monkeypatch.setattr(native, "write_stock", write_and_tamper)
    with pytest.raises(ExportError, match="answers otherwise than the model it was made from: logits differ by up to"):
        export(assembled, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_refused(assembled, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export(assembled, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_unfinished_checkpoint_is_refused(assembled, tmp_path):
    shutil.copytree(assembled, tmp_path / "model.partial-1")
    for name in ("model.partial-1", "nothing"):
        with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
            export(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_without_such_a_value(assembled, tmp_path):
    with pytest.raises(OptionError, match="dtype = 'float8'"):
        export(assembled, tmp_path / "out", dtype="float8")
    with pytest.raises(ExportError, match="export target 'blip'"):
        export(assembled, tmp_path / "out", target="blip")
    assert list(tmp_path.iterdir()) == []


def test_linear_connector_is_refused_with_a_remedy(tmp_path):
    parts = save_tiny_parts(tmp_path / "tiny", image={"connector": "linear"})
    assemble_checkpoint(tmp_path / "model", **parts)
    with pytest.raises(ExportError, match="not llava: its connector is 'linear'") as caught:
        export(tmp_path / "model", tmp_path / "out")
    assert "connector: mlp" in caught.value.do and "import mllm" in caught.value.do
    assert not (tmp_path / "out").exists()


def test_tied_head_under_another_name_is_refused(tmp_path):
    model, processor = tiny_model(tmp_path, llm="gpt2", tied=True)
    with pytest.raises(ExportError, match=r"its tied embedding is not called embed_tokens \('gpt2'\)") as caught:
        find_target(model, processor)
    assert "untie" in caught.value.do


def test_head_that_scales_is_refused(tmp_path):
    """`assemble` refuses such a model; one made otherwise must not pass either."""
    model, processor = assemble(**save_tiny_parts(tmp_path, llm="granite", logits_scaling=1.0))
    find_target(model, processor)
    model.config.text_config.logits_scaling = 4.0
    with pytest.raises(ExportError, match=r"\(granite\) composed gives other logits on text than alone") as caught:
        find_target(model, processor)
    assert "another family" in caught.value.do


def test_every_obstacle_is_named(tmp_path):
    model, processor = assemble(**save_tiny_parts(tmp_path, image={"connector": "linear"}))
    model.config.image_config.encoder_config.model_type = "siglip2_vision_model"
    with pytest.raises(ExportError, match="'linear'.*'siglip2_vision_model'"):
        find_target(model, processor)


def test_head_and_embedding_trained_apart_are_not_tied_silently(tmp_path):
    model, processor = tiny_model(tmp_path / "tiny", tied=True)
    (tmp_path / "out").mkdir()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ExportError, match="two tensors, and the configuration says that they are one"):
        write_stock(model, processor, tmp_path / "out", target=find_target(model, processor))


def test_a_stock_model_has_nothing_to_be_exported_to(tmp_path):
    save_stock_checkpoint(tmp_path / "stock", "llava")
    with pytest.raises(ExportError, match="a stock checkpoint already"):
        export(tmp_path / "stock", tmp_path / "out")
    assert not (tmp_path / "out").exists()
