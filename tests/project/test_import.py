"""`import mllm` is quiet, needs no optional package, and changes nothing but adding our own classes."""

import json
import subprocess
import sys

import pytest

OPTIONAL = ["av", "beartype", "bitsandbytes", "datasets", "deepspeed", "gradio", "matplotlib", "playwright", "pytest"]
OPTIONAL += ["sklearn", "soundfile", "soxr", "torchcodec", "trl"]

# Everything below runs in a fresh interpreter where those packages do not exist. It prints one line of JSON.
PROBE = """
import collections, contextlib, importlib, io, json, pkgutil, sys, warnings

for name in OPTIONAL:
    sys.modules[name] = None

from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers import Trainer, modeling_utils, masking_utils
from transformers.models.auto import configuration_auto, feature_extraction_auto, image_processing_auto, modeling_auto
from transformers.models.auto import processing_auto, tokenization_auto, video_processing_auto

AUTO = [configuration_auto, feature_extraction_auto, image_processing_auto, modeling_auto, processing_auto,
        tokenization_auto, video_processing_auto]
PLAIN = (dict, collections.OrderedDict)  # not the lazy tables, which would import every model
CLASSES = [GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer]


def tables():
    found = {c.__name__: dict(vars(c)) for c in CLASSES}
    for module in AUTO:
        for name, value in vars(module).items():
            for table in ("_extra_content", "_model_mapping", "_config_mapping"):
                if type(getattr(value, table, None)) in PLAIN:
                    found[f"{name}.{table}"] = dict(getattr(value, table))
            if type(value) in PLAIN and name.isupper():
                found[name] = dict(value)
    found["attention"] = dict(modeling_utils.ALL_ATTENTION_FUNCTIONS)
    found["masks"] = dict(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    return found


def is_ours(entry):
    return "mllm" in repr(entry)


before, changes = tables(), []
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import mllm
for name, table in tables().items():
    old = before[name]
    changes += [f"{name}: {key!r} removed" for key in old.keys() - table.keys()]
    changes += [f"{name}: {key!r} added" for key in table.keys() - old.keys() if not is_ours((key, table[key]))]
    changes += [f"{name}: {key!r} replaced" for key in table.keys() & old.keys() if table[key] is not old[key]]

failures = {}
for module in pkgutil.walk_packages(mllm.__path__, "mllm."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failures[module.name] = str(error)
print(json.dumps({
    "changes": changes, "failures": failures, "num_tables": len(before),
    "printed": out.getvalue() + "".join(str(w.message) for w in warned if "mllm" in w.filename),
}))
"""


@pytest.fixture(scope="module")
def probe() -> dict:
    run = subprocess.run(
        [sys.executable, "-c", f"OPTIONAL = {OPTIONAL}\n{PROBE}"], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]) | {"stderr": run.stderr}


def test_import_changes_nothing_else_in_transformers(probe):
    assert probe["num_tables"] > 20, "the probe no longer finds transformers' tables"
    assert probe["changes"] == []


def test_import_is_quiet(probe):
    assert probe["printed"] == ""
    assert probe["stderr"] == ""


def test_every_module_imports_without_optional_packages(probe):
    assert probe["failures"] == {}
