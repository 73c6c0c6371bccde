"""Measure the data layer on a generated LLaVA-style mixture, beside what `datasets` and a full decode cost.

    python scripts/benchmark_data.py --out benchmark_data.json
    python scripts/benchmark_data.py --out small.json --rows 20000 --images 1000

The data are made first, the same every time: a JSON array of about 1.5 kB a row as LLaVA publishes it (ids of two
types, rows without images, several turns), and JPEGs that the rows name in turn. Every measurement runs in a process
of its own. Keys of the result:

    index_seconds                       first `open_index`: parse, check, header of every image, text lengths
    index_peak_gb                       largest resident memory meanwhile
    warm_index_seconds                  second `open_index`
    header_probes_per_second_per_core   sizes of local JPEGs, read one after the other
    decodes_per_second_per_core         the same images decoded
    token_seconds                       exact token counts of all rows
    first_batch_seconds                 from the start of a process to the first batch of pixels and ids, index warm
    datasets_seconds, datasets_peak_gb  `datasets.load_dataset("json")` on a copy whose ids are all strings
    datasets_as_published_seconds       the same on the file as it is, to the end or to `datasets_error`
"""

import argparse
import io
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPImageProcessorPil

from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.indexing.index import open_index
from mllm.data.indexing.token_bounds import token_bounds
from mllm.data.indexing.token_counts import count_tokens
from mllm.data.mixture import Mixture
from mllm.data.probe import probe_media
from mllm.data.sources import Source
from mllm.processing import MllmProcessor
from mllm.processing.build import add_placeholder, build_processor
from mllm.processing.images import decode_image
from mllm.sizes import ImageTokenRule
from mllm.testing import tiny_tokenizer

WORDS = 40_000
SENTENCES = 60_000
BATCH_ROWS = 8
DECODED = 2_000


def main() -> None:
    """Make the data, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rows", type=int, default=665_000, help="rows of the mixture")
    parser.add_argument("--images", type=int, default=20_000, help="JPEG files")
    parser.add_argument("--dir", type=Path, help="where the data are made, and kept; a temporary directory by default")
    parser.add_argument("--workers", type=int, help="processes of the token pass; one a core by default")
    parser.add_argument("--only", nargs="*", choices=MEASURES, default=list(MEASURES), help="measure these alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        args.dir = args.dir or Path(temporary)
        path = make_data(args.dir, args.rows, args.images)
        figures: dict[str, Any] = {"rows": args.rows, "images": args.images, "file_gb": path.stat().st_size / 2**30}
        figures |= {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
        shutil.rmtree(args.dir / "cache", ignore_errors=True)
        for name in args.only:
            figures |= in_new_process(MEASURES[name], args)
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(figures, indent=1))


def in_new_process(measure: Callable[..., dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Run a measurement alone: its memory is its own, and its time may count from here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, time.time(), args).result()


def make_data(directory: Path, num_rows: int, num_images: int) -> Path:
    """Write the mixture, a copy in which all records have the same types, and the images, unless they are there."""
    path = mixture_path(directory, num_rows)
    if path.exists():
        return path
    random = np.random.default_rng(0)
    make_images(directory / "images", num_images, random)
    sentences = make_sentences(random)
    make_processor(directory / "processor", sentences)
    partial = path.with_suffix(".partial")
    with partial.open("w") as mixed, path.with_suffix(".same_types.json").open("w") as same:
        for number in range(num_rows):
            record = make_record(number, num_images, sentences, random)
            before = "[" if number == 0 else ",\n"
            mixed.write(before + json.dumps(record))
            same.write(before + json.dumps({"image": "", "model": ""} | record | {"id": str(record["id"])}))
        mixed.write("]")
        same.write("]")
    partial.rename(path)
    return path


def mixture_path(directory: Path, num_rows: int) -> Path:
    """Where the mixture lies."""
    return directory / f"mixture-{num_rows}.json"


def make_images(directory: Path, count: int, random: np.random.Generator) -> None:
    """Write JPEGs of photographs' sizes; a hundred different ones, each many times under other names."""
    directory.mkdir(parents=True, exist_ok=True)
    different = []
    for number in range(100):
        height, width = (int(side) for side in random.integers(300, 641, 2))
        colours = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if number % 10 == 0 else 1
        buffer = io.BytesIO()
        colours.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90, exif=exif)
        different.append(buffer.getvalue())
    for number in range(count):
        (directory / f"{number:06d}.jpg").write_bytes(different[number % len(different)])


def make_sentences(random: np.random.Generator) -> list[str]:
    """Sentences of invented words, used as often as Zipf's law has it."""
    syllables = [
        first + vowel + last for first in "bdfghklmnprstvw" for vowel in "aeiou" for last in ("", "n", "r", "s")
    ]
    words = ["".join(random.choice(syllables, size)) for size in random.integers(1, 5, WORDS)]
    places = np.minimum(random.zipf(1.2, SENTENCES * 14) - 1, WORDS - 1).reshape(SENTENCES, 14)
    return [" ".join(words[place] for place in row).capitalize() + "." for row in places]


def make_record(number: int, num_images: int, sentences: list[str], random: np.random.Generator) -> dict[str, Any]:
    """One record in the published form: every seventh has an id of another type, every sixteenth no image."""
    picks = iter(random.integers(0, SENTENCES, 40).tolist())
    turns: list[dict[str, str]] = []
    for turn in range(int(random.integers(1, 6))):
        question = sentences[next(picks)]
        answer = " ".join(sentences[next(picks)] for _ in range(1 + number % 7))
        opening = "<image>\n" if turn == 0 and number % 16 else ""
        turns += [{"from": "human", "value": opening + question}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {"id": number if number % 7 == 0 else f"{number:012d}"}
    if number % 16:
        return record | {"image": f"images/{number % num_images:06d}.jpg", "conversations": turns}
    return record | {"model": "", "conversations": turns}


# --- measurements: functions of the time the process was asked for, the directory, and the options -------------------


def measure_index(asked: float, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    index = open_index(source_of(args), cache_dir=args.dir / "cache")
    seconds = time.perf_counter() - start
    assert len(index) == args.rows, (len(index), index.num_bad)
    return {"index_seconds": seconds, "index_peak_gb": peak_gb()}


def measure_warm_index(asked: float, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    index = open_index(source_of(args), cache_dir=args.dir / "cache")
    index[len(index) - 1], index.char_lengths.sum()
    return {"warm_index_seconds": time.perf_counter() - start}


def measure_media(asked: float, args: argparse.Namespace) -> dict[str, Any]:
    paths = sorted((args.dir / "images").iterdir())[: args.images]
    start = time.process_time()
    for path in paths:
        probe_media("image", path)
    probing = time.process_time() - start
    start = time.process_time()
    for path in paths[:DECODED]:
        decode_image(path)
    decoding = time.process_time() - start
    return {
        "header_probes_per_second_per_core": len(paths) / probing,
        "decodes_per_second_per_core": len(paths[:DECODED]) / decoding,
    }


def measure_tokens(asked: float, args: argparse.Namespace) -> dict[str, Any]:
    index = open_index(source_of(args), cache_dir=args.dir / "cache")
    processor = MllmProcessor.from_pretrained(args.dir / "processor")
    start = time.perf_counter()
    counts = count_tokens(index, processor, workers=args.workers)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    bounds = token_bounds(index, processor)
    return {
        "token_seconds": seconds,
        "token_bounds_seconds": time.perf_counter() - start,
        "tokens": int(counts.sum()),
        "tokens_bound": int(bounds.sum()),
    }


def measure_first_batch(asked: float, args: argparse.Namespace) -> dict[str, Any]:
    index = open_index(source_of(args), cache_dir=args.dir / "cache")
    mixture = Mixture([index])
    processor = MllmProcessor.from_pretrained(args.dir / "processor")
    examples = Examples(mixture, processor)
    order = mixture.epoch_order(0, 0)
    PaddingCollator(processor)([examples[int(position)] for position in order[:BATCH_ROWS]])
    return {"first_batch_seconds": time.time() - asked}


def measure_datasets(asked: float, args: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset  # nothing else needs it, and it takes seconds to import

    path = mixture_path(args.dir, args.rows)
    start = time.perf_counter()
    same = load_dataset("json", data_files=str(path.with_suffix(".same_types.json")), cache_dir=args.dir / "hf")
    figures = {"datasets_seconds": time.perf_counter() - start, "datasets_peak_gb": peak_gb()}
    assert len(same["train"]) == args.rows
    start = time.perf_counter()
    try:
        load_dataset("json", data_files=str(path), cache_dir=args.dir / "hf")
        error = ""
    except Exception as failure:  # noqa: BLE001 - whatever it says is the finding
        error = f"{type(failure).__name__}: {failure.__cause__ or failure}"[:300]
    return figures | {"datasets_as_published_seconds": time.perf_counter() - start, "datasets_error": error}


MEASURES = {
    "index": measure_index,
    "warm_index": measure_warm_index,
    "media": measure_media,
    "tokens": measure_tokens,
    "first_batch": measure_first_batch,
    "datasets": measure_datasets,
}


def source_of(args: argparse.Namespace) -> Source:
    """The mixture as an entry of `data:`; its form is found out."""
    return Source(mixture_path(args.dir, args.rows))


def make_processor(directory: Path, sentences: list[str]) -> None:
    """Save a processor as of a 7B model: CLIP at 336 px, and a tokenizer of Qwen's construction with 32,000 tokens."""
    tokenizer = tiny_tokenizer("qwen")
    trainer = BpeTrainer(vocab_size=32_000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.backend_tokenizer.train_from_iterator(sentences, trainer)
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    rule = ImageTokenRule(image_size=336, patch_size=14, num_prefix_tokens=1, feature_select="default")
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    build_processor(tokenizer, images, rules={"image": rule}, chat_template="chatml").save_pretrained(directory)


def peak_gb() -> float:
    """The largest resident memory of this process so far; `ru_maxrss` would count its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


if __name__ == "__main__":
    main()
