"""Three ways to complete an answer under another image: forced, instructed, and at an endpoint."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from mllm.errors import EndpointError, MediaError, OptionError
from mllm.inference import Chat
from mllm.load import load_model, load_processor
from mllm.preference_data.completer import (
    COMPLETE_PROMPT,
    EndpointCompleter,
    ForcedCompleter,
    InstructedCompleter,
    instruction,
)
from mllm.preference_data.endpoint import Endpoint
from mllm.preference_data.masker import RuleMasker
from mllm.preference_data.phrases import BAD_REPLY, MASK, NO_PHRASE, NO_ROOM, Completion, Masked, Task
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_media import write_tiny_video

ANSWERS = (
    "There is a red 5 in the top left and an orange 0 in the bottom right.",
    "two dogs",
    'Yes, there is a small cat next to the door. It looks at\n\n- a bird, and\n- "old" shoes (brown).',
    "The picture shows a 5.",
)


def _picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 18, 3), dtype=np.uint8))


def _task(answer: str, number: int = 0) -> Task:
    [(_, masked)] = RuleMasker().mask([answer])
    content = [{"type": "image", "image": _picture(number)}, {"type": "text", "text": "What is in the picture?"}]
    return Task(masked, [{"role": "user", "content": content}])


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [_task(answer, number) for number, answer in enumerate(ANSWERS)]


@pytest.fixture(scope="module", params=["ours", "llava", "qwen2_5_vl"])
def writer(request, talker, tmp_path_factory):
    """A model of ours, or a stock one."""
    if request.param == "ours":
        return talker
    path = save_stock_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    model = load_model(path)
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    return model.eval(), load_processor(path)


def test_forced_keeps_the_unmasked_words(writer, tasks):
    completions = dict(ForcedCompleter(*writer, batch_size=3).complete(tasks))
    assert sorted(completions) == list(range(len(tasks)))
    for index, task in enumerate(tasks):
        assert not completions[index].reason
        _check_kept(task.masked, completions[index].text)
    changed = [completions[index].text != task.masked.text for index, task in enumerate(tasks)]
    assert all(changed)


def test_forced_does_not_depend_on_the_batch(writer, tasks):
    alone = dict(ForcedCompleter(*writer, batch_size=1).complete(tasks))
    assert dict(ForcedCompleter(*writer, batch_size=3).complete(tasks)) == alone
    assert dict(ForcedCompleter(*writer, batch_size=1).complete(tasks[:1])) == {0: alone[0]}


def test_forced_looks_at_the_image(talker):
    tasks = [_task(ANSWERS[0], number) for number in range(6)]
    completions = dict(ForcedCompleter(*talker).complete(tasks))
    assert len({completion.text for completion in completions.values()}) > 2


def test_forced_writes_greedily(talker, monkeypatch):
    """Each token of a gap behind its first word's first is the model's likeliest after all before it."""
    model, processor = talker
    generate, calls = model.generate, []

    def watched(**inputs):
        calls.append((inputs, generate(**inputs)))
        return calls[-1][1]

    monkeypatch.setattr(model, "generate", watched)
    num_checked = 0
    for number in range(4):
        list(ForcedCompleter(model, processor).complete([_task("There is a red 5", number)]))
        inputs, ids = calls.pop()
        config = inputs.pop("generation_config")
        del inputs["logits_processor"]
        prompt = inputs["input_ids"].shape[1]
        assert processor.tokenizer.decode(inputs["input_ids"][0]).endswith("There is")  # where the gap begins
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
        logits[:, config.suppress_tokens or []] = -torch.inf
        said = [processor.tokenizer.decode(ids[0, prompt : prompt + count]).strip() for count in range(9)]
        begun = prompt + next(count for count, text in enumerate(said) if text)
        assert torch.equal(logits[begun - 1 : -2].argmax(-1), ids[0, begun:-1])
        num_checked += len(ids[0, begun:-1])
    assert num_checked > 8


def test_forced_under_an_adapter_is_the_adapters(talker):
    model, processor = talker
    tasks = [_task(answer) for answer in ANSWERS[:2]]
    plain = dict(ForcedCompleter(model, processor).complete(tasks))
    names = [name for name, module in model.named_modules() if name.endswith("q_proj") and "language_model" in name]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    try:
        with adapted.disable_adapter():
            assert dict(ForcedCompleter(adapted, processor).complete(tasks)) == plain
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                parameter.data *= 30 if "lora_B" in name else 1
        assert dict(ForcedCompleter(adapted, processor).complete(tasks)) != plain
    finally:
        adapted.unload()


def test_without_a_phrase_or_room_there_is_no_completion(talker):
    whole, long = _task("It is not so, what would we do?"), _task("a red cup and " * 60 + "a dog")
    tasks = [whole, _task(ANSWERS[1]), long]
    for completer in (ForcedCompleter(*talker), InstructedCompleter(*talker, max_new_tokens=8)):
        completions = dict(completer.complete(tasks))
        assert [completions[index].reason for index in range(3)] == [NO_PHRASE, "", NO_ROOM]


def test_the_model_is_as_before(talker):
    model, processor = talker
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    list(ForcedCompleter(model, processor).complete([_task(ANSWERS[0])]))
    assert model.training
    model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_an_end_of_turn_is_refused(talker):
    model, processor = talker
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with pytest.raises(OptionError, match="eos_token_id"):
            ForcedCompleter(model, processor)
    finally:
        model.generation_config.eos_token_id = ends


def test_instructed_asks_what_chat_would_be_asked(talker):
    tasks = [_task(answer, number) for number, answer in enumerate(ANSWERS)]
    prompt = "Fill it in."
    for keeps_question in (True, False):
        completer = InstructedCompleter(
            *talker, max_new_tokens=9, prompt=prompt, keeps_question=keeps_question, batch_size=3
        )
        completions = dict(completer.complete(tasks))
        chat = Chat(*talker, max_new_tokens=9)
        for index, task in enumerate(tasks):
            image, question = task.messages[0]["content"]
            asked = f"{prompt}\n\n{task.masked.masked_text}"
            asked = (
                [question, {"type": "text", "text": f"\n\n{asked}"}]
                if keeps_question
                else [{"type": "text", "text": asked}]
            )
            expected = chat.reply([{"role": "user", "content": [image, *asked]}])
            assert completions[index] == Completion(expected.strip())


def test_the_prompt_stands_behind_the_question_or_behind_the_image_alone():
    task = _task("two dogs", 3)
    image, question = task.messages[0]["content"]
    earlier = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "A picture."}]
    task = replace(task, messages=[*earlier, {"role": "user", "content": "How many?"}])
    asked = f"Fill in.\n\n{MASK}"
    text = {"type": "text", "text": asked}
    assert instruction(task, "Fill in.", keeps_question=False) == [{"role": "user", "content": [image, text]}]
    last = [{"type": "text", "text": "How many?"}, {"type": "text", "text": f"\n\n{asked}"}]
    assert instruction(task, "Fill in.", keeps_question=True) == [*earlier, {"role": "user", "content": last}]


def test_an_endpoint_sees_the_image_and_the_masked_text(serve, tmp_path):
    server = serve(
        lambda body, number: body["messages"][-1]["content"][-1]["text"].split("\n\n")[-1].replace(MASK, "x")
    )
    task = _task(ANSWERS[0])
    large = tmp_path / "large.jpg"
    Image.new("RGB", (900, 300), "red").save(large)
    png = io.BytesIO()
    _picture(0).save(png, "PNG", compress_level=0)
    others = [_with_image(task, large), _with_image(task, str(large)), _with_image(task, png.getvalue())]
    completer = EndpointCompleter(Endpoint(server.url, model="m", concurrency=1), longest_side=400)
    completions = dict(completer.complete([task, *others]))
    assert {completion.text for completion in completions.values()} == {task.masked.masked_text.replace(MASK, "x")}
    shown = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2]))) for url in shown]
    assert [picture.size for picture in pictures] == [(18, 20), (400, 133), (400, 133), (18, 20)]
    assert [url.partition(";")[0] for url in shown] == [f"data:image/{form}" for form in ("png", "png", "png", "png")]
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(_picture(0)))
    assert base64.b64decode(shown[3].partition(",")[2]) == png.getvalue()  # untouched
    assert all(COMPLETE_PROMPT in body["messages"][0]["content"][-1]["text"] for body in server.bodies)


def test_an_endpoint_on_a_bad_day(serve):
    """Time-outs and junk are asked again; a reply that never fills the masks is counted."""
    replies = {0: {"manner": "hang"}, 1: {"body": b"<html>"}, 2: f"A {MASK} cup", 3: 500}
    server = serve(lambda body, number: replies.get(number, f"A {MASK}" if number > 4 else "A blue cup."))
    endpoint = Endpoint(server.url, model="m", timeout=0.5, pause=0.001, tries=6, concurrency=1)
    whole = replace(_task("no phrase"), masked=Masked("It is.", ()))
    completions = dict(EndpointCompleter(endpoint).complete([_task("A red cup."), whole, _task("A red cat.")]))
    assert completions == {0: Completion("A blue cup."), 1: Completion("", NO_PHRASE), 2: Completion("", BAD_REPLY)}
    assert [endpoint.counts[it] for it in ("time-outs", "unreadable replies", "status 500")] == [1, 1, 1]
    assert endpoint.counts["useless replies"] == 1 + 6


def test_what_an_endpoint_gave_before_its_end_is_not_lost(serve):
    server = serve(lambda body, number: "A blue cup." if number < 2 else 403)
    completer = EndpointCompleter(Endpoint(server.url, model="m", concurrency=1))
    completions = {}
    with pytest.raises(EndpointError, match="403"):
        for index, completion in completer.complete([_task("A red cup.")] * 5):
            completions[index] = completion
    assert completions == {0: Completion("A blue cup."), 1: Completion("A blue cup.")} and len(server.bodies) == 3


def test_an_endpoint_takes_images_alone(serve, tmp_path):
    write_tiny_video(tmp_path / "v.mp4", frames=2)
    video = [{"type": "video", "video": str(tmp_path / "v.mp4")}]
    missing = [{"type": "image", "image": tmp_path / "none.png"}]
    server = serve(lambda body, number: "A blue cup.")
    completer = EndpointCompleter(Endpoint(server.url, model="m"))
    for content, error in ((video, OptionError), (missing, MediaError)):
        task = replace(_task("A red cup."), messages=[{"role": "user", "content": content}])
        with pytest.raises(error, match="video" if error is OptionError else "none.png"):
            list(completer.complete([task]))
    assert not server.bodies


def _with_image(task: Task, source) -> Task:
    _, question = task.messages[0]["content"]
    return replace(task, messages=[{"role": "user", "content": [{"type": "image", "image": source}, question]}])


def _check_kept(masked: Masked, text: str) -> None:
    """The kept pieces stand in the text in order, from its beginning to its end, with something between them."""
    first, *others = masked.kept
    assert text.startswith(first)
    place = len(first)
    for piece in others[:-1]:
        place = text.index(piece, place + 1) + len(piece)
    assert text.endswith(others[-1]) and place + 1 <= len(text) - len(others[-1])
