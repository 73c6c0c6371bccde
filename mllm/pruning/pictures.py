"""Which visual tokens of a text belong to one picture, of models that do not say so beside their pixels.

InternVL and SmolVLM read a picture in tiles, and give the vectors of each tile, or those of all pictures of a row, in
one piece. What is one picture stands in the text alone, between whose words the tiles are.
"""

from collections.abc import Callable

from mllm.shapes import Int, Tensor

Runs = list[tuple[int, int]]
"""Where the stretches of visual tokens of a row begin and end."""


def picture_lengths(model_type: str, input_ids: Int[Tensor, "B T"], token: int) -> list[int] | None:
    """How many tokens each picture of a batch has; None for models that say so in some other way.

    Args:
        model_type: transformers' name of the model.
        input_ids: With a placeholder for each token.
        token: The placeholder.
    """
    if model_type not in PICTURES:
        return None
    lengths: list[int] = []
    for row in input_ids.tolist():
        runs = _runs(row, token)
        ends = PICTURES[model_type](row, runs)
        starts = [0, *ends][: len(ends)]
        lengths += [
            sum(end - start for start, end in runs[one:other]) for one, other in zip(starts, ends, strict=True)
        ]
    return lengths


def _of_one_run(row: list[int], runs: Runs) -> list[int]:
    """InternVL: the tiles of a picture follow one another, and pictures are parted by their start and end tokens."""
    return list(range(1, len(runs) + 1))


def _until_the_whole(row: list[int], runs: Runs) -> list[int]:
    """SmolVLM: before each tile stands its place, and a picture's last tile shows the whole of it.

    So the token in front of a row's last stretch, `<global-img>`, stands in front of each picture's last one.
    """
    if not runs:
        return []
    before = [row[start - 1] if start else -1 for start, _ in runs]
    return [number for number, word in enumerate(before, 1) if word == before[-1]]


PICTURES: dict[str, Callable[[list[int], Runs], list[int]]] = {
    "internvl": _of_one_run,
    "smolvlm": _until_the_whole,
    "idefics3": _until_the_whole,
}
"""Behind which stretches of a row's visual tokens a picture ends, counted from 1."""


def _runs(row: list[int], token: int) -> Runs:
    edges = [one for one in range(len(row) + 1) if _is_at(row, one, token) != _is_at(row, one - 1, token)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _is_at(row: list[int], place: int, token: int) -> bool:
    return 0 <= place < len(row) and row[place] == token
