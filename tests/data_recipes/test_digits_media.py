"""The digits world's videos and sounds: what their files show and play is what their rows say."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mllm.data.probe import probe_media
from mllm.data.schema import parse_row
from mllm.evaluation.digits import TASKS_OF, score
from mllm.processing.audio import audio_header, decode_audio
from mllm.processing.video import decode_video
from mllm.sizes.sampling import parse_sampling

ROOT = Path(__file__).parents[2]
RATE = 16_000
NUMBERS = {"videos": ["--videos", "24", "--lessons", "60", "--eval_videos", "16"]} | {
    "sounds": ["--sounds", "30", "--both", "12", "--lessons", "60", "--eval_sounds", "12"]
}


def run(program, *arguments):
    command = [sys.executable, ROOT / f"data_recipes/{program}.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "world"
    done = run("digits", "--out", out, "--seed", 0, "--scenes", 12, "--text_share", 0.001, "--eval_scenes", 12)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def media(world):
    """Directories of the two recipes, made beside the world."""
    made = {kind: world.parent / kind for kind in NUMBERS}
    for kind, out in made.items():
        done = run(f"digits_{kind}", "--world", world, "--out", out, "--seed", 0, *NUMBERS[kind])
        assert done.returncode == 0, done.stderr
    return made


def every_row(media):
    for out in media.values():
        for path in [*out.glob("*.jsonl"), *out.glob("eval/*.jsonl")]:
            if path.stem != "tracks":
                yield from ((path, row) for row in read_rows(path))


def asked(row):
    """All turns of a row, as pairs of question and answer."""
    texts = [[item["text"] for item in message["content"] if item["type"] == "text"] for message in row["messages"]]
    return [(question, answer) for (question,), (answer,) in zip(texts[::2], texts[1::2], strict=True)]


def test_rows_state_the_sizes_of_their_files(media):
    kinds = Counter()
    for path, fields in every_row(media):
        row = parse_row(fields, where=path.name, root=path.parent)
        assert [item.kind for item in row.media] == [
            item["type"] for message in row.messages for item in message["content"] if item["type"] != "text"
        ]
        for item in row.media:
            kinds[item.kind] += 1
            facts = probe_media(item.kind, item.path, where=row.name)
            assert (facts.height, facts.width, facts.frames) == (item.height, item.width, item.frames)
            assert facts.seconds == pytest.approx(item.seconds, abs=1e-3)
    assert set(kinds) == {"image", "audio", "video"}


def test_files_are_as_mixed_as_real_ones(media):
    headers = [audio_header(path) for path in (media["sounds"] / "sounds").iterdir()]
    assert {header.format for header in headers} == {"WAV", "FLAC"}
    assert {header.channels for header in headers} == {1, 2}
    assert {header.sampling_rate for header in headers} >= {8000, 44100}
    both = read_rows(media["sounds"] / "both.jsonl")
    assert {tuple(item["kind"] for item in row["media"]) for row in both} == {("image", "audio"), ("audio", "image")}


def test_no_scan_of_evaluation_is_seen_in_training(world, media):
    recipe = json.loads((world / "recipe.json").read_text(encoding="utf-8"))
    for path, row in every_row(media):
        scans = recipe["eval_scans"] if path.parent.name == "eval" else recipe["train_scans"]
        assert set(row["meta"].get("scans", [])) <= set(scans)


def test_digits_move_the_way_that_is_answered(media):
    """The brighter pixels' centre, of videos with one digit."""
    seen = Counter()
    for row in [*read_rows(media["videos"] / "videos.jsonl"), *read_rows(media["videos"] / "eval/motion.jsonl")]:
        if row["meta"]["task"] != "motion" or len(row["meta"]["digits"]) > 1:
            continue
        folder = media["videos"] / ("eval" if "answer" in row["meta"] else "")
        first, last = decode_video(folder / row["media"][0]["path"], sampling=parse_sampling("uniform:2")).frames
        down, right = centre(last) - centre(first)
        way = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
        (answer,) = (answer for _, answer in asked(row) if answer in ("left", "right", "up", "down"))
        assert answer == way and all(str(row["meta"]["digits"][0]) in question for question, _ in asked(row))
        seen[way] += 1
    assert len(seen) >= 3


def centre(frame):
    pixels = np.asarray(frame).max(axis=2).astype(float)
    ink = np.argwhere(pixels > (pixels.max() + np.median(pixels)) / 2)
    return ink.mean(axis=0)


def test_digits_appear_one_after_another(media):
    """Between frames that a model sees: so it sees which is first, and which last."""
    rows = [row for row in read_rows(media["videos"] / "videos.jsonl") if row["meta"]["task"] == "order"]
    assert rows
    for row in rows:
        path = media["videos"] / row["media"][0]["path"]
        frames = decode_video(path, sampling=parse_sampling("uniform:3")).frames
        inked = [ink_of(frame, frames[-1]) for frame in frames]
        assert inked == sorted(inked) and len(set(inked)) >= len(row["meta"]["digits"])


def ink_of(frame, last):
    """How much of what stands in the last frame stands in this one, coarsely: compression leaves its traces."""
    pixels, end = (np.asarray(image).max(axis=2).astype(float) for image in (frame, last))
    ink = end > (end.max() + np.median(end)) / 2
    return round(float((pixels[ink] > (end.max() + np.median(end)) / 2).mean()), 1)


def test_answers_about_written_out_videos_follow_from_their_words(media):
    for row in read_rows(media["videos"] / "lessons.jsonl"):
        turns = asked(row)
        words, turns[0] = turns[0][0].split("\n")[0].split(), (turns[0][0].split("\n")[1], turns[0][1])
        frames = [words[start : start + 9] for start in range(0, 27, 9)]
        assert len(words) == 27
        for question, answer in turns:
            assert answer == read_answer(frames, question), (words, question)


def read_answer(frames, question):
    if "appear" in question:
        shown = [{word[-1] for word in frame if word != "-"} for frame in frames]
        if "first" in question:
            (digit,) = next(digits for digits in shown if digits)
        else:
            (digit,) = next(b - a for a, b in reversed(list(zip([set(), *shown], shown, strict=False))) if b - a)
        return digit
    digit = next(sign for sign in question if sign.isdigit())
    start, end = (next(n for n, word in enumerate(frames[at]) if word.endswith(digit)) for at in (0, 2))
    if start // 3 == end // 3:
        return "right" if end > start else "left"
    return "down" if end > start else "up"


def test_sounds_are_what_is_answered(media):
    """Heard by loudness and by the strongest frequency, which is all that the answers are about."""
    out = media["sounds"]
    rows = [(out, row) for row in read_rows(out / "sounds.jsonl")]
    for task in ("beeps", "glide", "tones"):
        rows += [(out / "eval", row) for row in read_rows(out / f"eval/{task}.jsonl")]
    for folder, row in rows:
        samples, _ = decode_audio(folder / row["media"][0]["path"], sampling_rate=RATE)
        ((question, answer),) = asked(row)
        assert answer == hear(samples, row["meta"]["task"]) == row["meta"]["answer"], (row["id"], question)


def hear(samples, task):
    pieces = pieces_of(samples)
    if task == "beeps":
        return str(len(pieces))
    if task == "tones":
        first, second = map(pitch, pieces)
        return "first" if first > second else "second"
    (tone,) = pieces
    return "rising" if pitch(tone[-len(tone) // 4 :]) > pitch(tone[: len(tone) // 4]) else "falling"


def pieces_of(samples):
    """Stretches that are louder than a third of the loudest, of 20 ms at least and 40 ms apart."""
    step = RATE // 100
    loud = np.abs(samples[: len(samples) // step * step]).reshape(-1, step).std(axis=1)
    is_on, pieces, start = np.append(loud > 0.3 * loud.max(), [False] * 4), [], None
    for place in range(len(is_on) - 3):
        if start is None and is_on[place]:
            start = place
        elif start is not None and not is_on[place : place + 4].any():
            pieces.append(samples[start * step : place * step])
            start = None
    return pieces


def pitch(tone):
    spectrum = np.abs(np.fft.rfft(tone * np.hanning(len(tone)), n=1 << 16))
    return int(spectrum.argmax())


def test_pictures_and_beeps_are_compared(world, media):
    scenes = {row["media"][0]["path"]: row["meta"]["digits"] for row in read_rows(world / "caption.jsonl")}
    unseen = {row["media"][0]["path"]: row["meta"]["digits"] for row in read_rows(world / "eval/caption.jsonl")}
    for folder, known, name in ((media["sounds"], scenes, "both"), (media["sounds"] / "eval", unseen, "match")):
        answers = []
        for row in read_rows(folder / f"{name}.jsonl"):
            items = {item["kind"]: item for item in row["media"]}
            samples, _ = decode_audio(folder / items["audio"]["path"], sampling_rate=RATE)
            digits = known[items["image"]["path"]]
            original = world / folder.relative_to(media["sounds"]) / items["image"]["path"]
            assert same_bytes(folder / items["image"]["path"], original)
            ((_, answer),) = asked(row)
            assert answer == ("yes" if len(pieces_of(samples)) == len(digits) else "no")
            answers.append(answer)
        assert set(answers) == {"yes", "no"}


def test_answers_about_written_out_sounds_follow_from_their_words(media):
    tasks = Counter()
    for row in read_rows(media["sounds"] / "lessons.jsonl"):
        ((text, answer),) = asked(row)
        *parts, question = text.split("\n")
        sounds = next(part.split() for part in parts if part.startswith("Sound"))
        cells = [part.split() for part in parts if not part.startswith("Sound")]
        (task,) = row["meta"]["tasks"]
        expected = {
            "beeps": str(len(sounds)),
            "glide": sounds[0].removeprefix("Sound1").lower(),
            "tones": "second" if sounds[-1] == "Sound2Up" else "first",
            "match": "yes" if cells and sum(word != "-" for word in cells[0]) == len(sounds) else "no",
        }
        assert answer == expected[task], text
        tasks[task] += 1
    assert set(tasks) == set(TASKS_OF["audio"])


@pytest.mark.parametrize("task", [*TASKS_OF["video"], *TASKS_OF["audio"]])
def test_reference_answers_score_one(media, task):
    (path,) = (out / f"eval/{task}.jsonl" for out in media.values() if (out / f"eval/{task}.jsonl").is_file())
    rows = read_rows(path)
    assert set(score(task, [asked(row)[-1][1] for row in rows], rows).values()) == {1.0}


@pytest.mark.parametrize("kind", NUMBERS)
def test_same_seed_same_files(world, media, kind):
    made = {}
    for name, seed in (("again", 0), ("other", 1)):
        out = world.parent / f"{kind}_{name}"
        assert run(f"digits_{kind}", "--world", world, "--out", out, "--seed", seed, *NUMBERS[kind]).returncode == 0
        made[name] = contents(out)
    first = contents(media[kind])
    assert made["again"] == first
    drawn = [{data for path, data in files.items() if path.suffix != ".png"} for files in (made["other"], first)]
    assert not drawn[0] & drawn[1]  # but the world's pictures are what they were


def same_bytes(one, other):
    return one.read_bytes() == other.read_bytes()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", NUMBERS)
def test_refuses_what_it_cannot_use(world, media, tmp_path, kind):
    before = sorted(media[kind].iterdir())
    done = run(f"digits_{kind}", "--world", world, "--out", media[kind], "--seed", 0)
    assert done.returncode == 2 and "already holds files" in done.stderr
    assert sorted(media[kind].iterdir()) == before
    done = run(f"digits_{kind}", "--world", tmp_path, "--out", tmp_path / "out", "--seed", 0)
    assert done.returncode == 2 and "run data_recipes/digits.py" in done.stderr
    assert not (tmp_path / "out").exists()
