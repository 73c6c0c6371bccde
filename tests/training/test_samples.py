"""Answers to validation rows while a model is trained."""

import json

import pytest

from mllm import load_model, load_processor
from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.inference import generate_answers
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training.samples import LONGEST_ANSWER, SampleAnswers, last_answer


@pytest.fixture(scope="module", params=["composed", "stock"])
def checkpoint(request, assembled, tmp_path_factory):
    if request.param == "composed":
        return assembled
    return save_stock_checkpoint(tmp_path_factory.mktemp("stock") / "checkpoint", "llava")


@pytest.fixture(scope="module")
def samples(checkpoint, rows):
    processor = load_processor(checkpoint)
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    return SampleAnswers(examples, PaddingCollator(processor), every=2, all_ranks=False)


def test_rows_come_in_turn_with_their_own_answers(samples, checkpoint):
    model = load_model(checkpoint).train()
    found = [samples.sample(model, number) for number in (0, 1, 2, 12)]
    assert [sample["id"] for sample in found] == ["row-0", "row-1", "row-2", "row-0"]
    assert [sample["question"] for sample in found[:2]] == ["What is number 0?", "<image> What is number 1?"]
    assert [sample["reference"] for sample in found[:3]] == [
        "a red 3", "a red 3 and a 7", "a red 3 and a 7 and a 7",
    ]  # fmt: skip
    assert model.training


def test_the_prompt_ends_where_the_answer_begins(samples):
    """What is asked is what a conversation is asked with: nothing of the answer, and all in front of it."""
    processor = samples.collate.processor
    for example in samples.examples:
        start, end = last_answer(example)
        asked = processor.encode_chat(
            example.row.messages[:-1],
            media_sizes=[(item.height, item.width) for item in example.row.media],
            add_generation_prompt=True,
        )
        assert example.input_ids[:start].tolist() == asked.input_ids
        assert (example.labels[start:end] == example.input_ids[start:end]).all()


def test_answers_are_those_of_a_conversation(assembled, rows):
    model, processor = load_model(assembled), load_processor(assembled)
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    samples = SampleAnswers(examples, PaddingCollator(processor), every=1, all_ranks=False)
    row = examples[1].row
    content = [{"type": "image", "image": row.media[0].path}, row.messages[0]["content"][1]]
    messages = [{"role": "user", "content": content}]
    answers = generate_answers(model, processor, [messages], batch_size=1, max_new_tokens=LONGEST_ANSWER)
    assert [samples.sample(model, 1)["answer"]] == answers


def test_they_stand_in_the_log(train, rows, tmp_path):
    run = train(
        tmp_path, parts={"text": "full"}, eval_data=[str(rows)], eval_sample_steps=2, learning_rate=1e-2, max_steps=4
    )
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    found = {line["step"]: line["sample"] for line in lines if "sample" in line}
    assert {step: sample["id"] for step, sample in found.items()} == {2: "row-0", 4: "row-1"}
    assert all(set(sample) == {"id", "question", "reference", "answer"} for sample in found.values())


def test_a_row_that_ends_with_a_question_is_not_asked(samples):
    example = samples.examples[0]
    example.row.messages.append({"role": "user", "content": [{"type": "text", "text": "and now?"}]})
    try:
        assert last_answer(example) is None
    finally:
        example.row.messages.pop()
