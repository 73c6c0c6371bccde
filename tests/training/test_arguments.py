import dataclasses

import pytest
import yaml

from mllm.data.sources import Source
from mllm.errors import OptionError
from mllm.models.parts import PartOptions
from mllm.training.arguments import UNSUPPORTED, SftArguments, build_arguments, parse_arguments, read_config

BASE = {"model": "runs/a", "data": ["rows.jsonl"], "output_dir": "runs/b", "use_cpu": True}


def _build(**options) -> SftArguments:
    return build_arguments(BASE | options, where="my.yaml")


def test_yaml_and_command_line(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text(
        yaml.safe_dump(BASE | {"parts": {"text": {"mode": "lora", "rank": 4}}, "max_steps": 7, "max_length": None})
        + "learning_rate: 1e-3\n"  # which YAML reads as a word
    )
    arguments = parse_arguments(["--config", str(config), "--max_steps", "9", "--parts", "{image.connector: full}"])
    assert (arguments.learning_rate, arguments.max_steps, arguments.max_length) == (1e-3, 9, None)
    assert arguments.parts == {"image.connector": PartOptions("full")}
    assert arguments.data.sources == (Source(tmp_path / "rows.jsonl"),)
    assert (
        parse_arguments(["--config", str(config), "--data_root", "/d"]).data.sources[0].path.as_posix()
        == "/d/rows.jsonl"
    )


def test_values_of_many_kinds():
    arguments = _build(
        max_steps=-1, bf16="false", gradient_checkpointing=True, report_to=["none"], warmup_steps=0.1,
        lr_scheduler_kwargs={"num_cycles": 2}, data=[{"path": "/a.jsonl", "first": 3}], logging_steps=None,
    )  # fmt: skip
    assert arguments.max_steps == -1 and arguments.bf16 is False and arguments.warmup_steps == 0.1
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2} and arguments.report_to == []
    assert arguments.data.sources[0].take == "first:3" and arguments.logging_steps == 10


def test_parts_in_both_forms():
    parts = {"image.encoder": "frozen", "text": {"mode": "lora", "rank": "8", "alpha": 16, "learning_rate": "1e-4"}}
    assert _build(parts=parts).parts == {
        "image.encoder": PartOptions("frozen"),
        "text": PartOptions("lora", rank=8, alpha=16.0, learning_rate=1e-4),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1}, "unknown option 'learning_rat' in my.yaml(.|\n)*write `learning_rate`"),
        ({"zzz": 1}, "unknown option 'zzz'(.|\n)*remove it"),
        ({"model": None}, "no `model` in my.yaml"),
        ({"data": []}, "no `data`"),
        ({"output_dir": ""}, "no `output_dir`"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"bf16": "perhaps"}, "perhaps"),
        ({"save_strategy": "often"}, "often"),
        ({"max_length": "long"}, "max_length = 'long'"),
        ({"max_length": 0}, "max_length = 0"),
        ({"overlong": "cut"}, "overlong = 'cut'"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
        ({"parts": ["text"]}, r"parts = \['text'\]"),
        ({"parts": {"text": None}}, "parts: text = None"),
        ({"parts": {"text": {"mode": "lora", "rnk": 3}}}, "unknown key 'rnk'"),
        ({"parts": {"text": {"mode": "lora", "rank": "four"}}}, "rank = 'four'"),
        ({"parts": {"text": {"mode": "lora", "rank": 0}}}, "rank at least 1"),
        ({"data": "rows.jsonl"}, "data = 'rows.jsonl'"),
        ({"data": [3]}, "data: 3"),
        ({"data": [{"path": "a", "wieght": 2}]}, "data: a: unknown key 'wieght'"),
        ({"data": [{"path": "a", "first": 0}]}, "data: a: first = 0"),
        ({"on_bad": "ignore"}, "on_bad = 'ignore'"),
        ({"max_bad_rate": 2}, "max_bad_rate = 2"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "no `eval_data`"),
        ({"eval_sample_steps": 5}, "eval_sample_steps.* no `eval_data`"),
        ({"eval_data": ["rows.jsonl"]}, "when to validate"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end"),
        ({"resume_from_checkpoint": "runs/x"}, "resume_from_checkpoint"),
        ({"dataloader_drop_last": True}, "every row is used exactly once"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(OptionError, match=message):
        _build(**options)


def test_what_becomes_of_bad_rows_holds_for_sources_that_do_not_say():
    data = ["a.jsonl", {"path": "b.jsonl", "on_bad": "error", "max_bad_rate": 0.3}]
    sources = _build(data=data, on_bad="quarantine", max_bad_rate=0).data.sources
    assert [(source.on_bad, source.max_bad_rate) for source in sources] == [("quarantine", 0.0), ("error", 0.3)]


def test_what_is_refused_is_an_option_somewhere():
    known = {option.name for option in dataclasses.fields(SftArguments)}
    assert len(set(UNSUPPORTED) - known) <= 1  # logging_dir is gone from the newest release


def test_wrong_files(tmp_path):
    with pytest.raises(OptionError, match="none.yaml is not there"):
        read_config(tmp_path / "none.yaml")
    for text, message in (("- a", "holds list"), ("a: b: c", "mapping values"), ("", "holds NoneType")):
        (tmp_path / "my.yaml").write_text(text)
        with pytest.raises(OptionError, match=message):
            read_config(tmp_path / "my.yaml")
    with pytest.raises(OptionError, match="--parts"):
        parse_arguments(["--parts", "{a: b: c}"])


def test_one_stage_of_a_plan(tmp_path):
    plan = {"model": "m", "seed": 3, "stages": [{"name": "align", "max_steps": 1}, {"name": "sft", "seed": 4}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    align = read_config(tmp_path / "plan.yaml", stage="align")
    assert align == {"model": "m", "seed": 3, "max_steps": 1, "output_dir": "runs/plan/align"}
    assert read_config(tmp_path / "plan.yaml", stage="sft")["seed"] == 4
    for stage in (None, "eval"):
        with pytest.raises(OptionError, match="one of align, sft"):
            read_config(tmp_path / "plan.yaml", stage=stage)


def test_help_shows_ours_first(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    order = [shown.index(f"  {name} ") for name in ("--model", "--parts", "--max_length", "--output_dir", "--bf16")]
    assert order == sorted(order)
    assert "--adam_beta1" not in shown and "example of a --config file" in shown
    assert len(shown.splitlines()) < 180
