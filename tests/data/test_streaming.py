"""Rows of shards: every row once over ranks and workers, in an order that only the seed decides, from any batch on."""

from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mllm.data.collate import LeavingOut, PaddingCollator
from mllm.data.examples import example_of
from mllm.data.indexing.index import open_index
from mllm.data.left_out import BAD, LeftOut, usable_batches
from mllm.data.schema import Row
from mllm.data.sources import Source
from mllm.data.stream_plan import batches_done, blocks_of, deal_units
from mllm.data.streaming import ShardStream, StreamedRow, StreamLoader
from mllm.data.writers import parquet_shards
from mllm.data.writers.shards import write_shards
from mllm.errors import CheckpointError, OptionError
from mllm.processing.images import decode_image
from mllm.testing import save_tiny_rows, tiny_model

NUM_ROWS = 41


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Row]:
    index = open_index(Source(save_tiny_rows(tmp_path_factory.mktemp("rows") / "rows", NUM_ROWS)))
    return [index[number] for number in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def shards(rows, tmp_path_factory) -> Path:
    """Two files, of row groups of 3 rows, the last of 2."""
    root = tmp_path_factory.mktemp("shards")
    (root / "all").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_shards, "GROUP_ROWS", 3)
        for number, part in enumerate((rows[:30], rows[30:])):
            write_shards(part, root / str(number), embed=True)
            (root / str(number) / "shard-00000.parquet").rename(root / "all" / f"shard-{number}.parquet")
    return root / "all"


def _id(row: StreamedRow) -> str:
    return row.row.id


def _stream(shards, **options) -> ShardStream:
    return ShardStream(shards, transform=_id, block_units=2, seed=7, **options)


def test_rows_come_whole_with_their_media(rows, shards):
    streamed = list(ShardStream(shards, shuffle=False))
    assert [one.row.id for one in streamed] == [row.id for row in rows]
    for one, row in zip(streamed, rows, strict=True):
        assert (one.row.messages, one.row.source, one.row.meta) == (row.messages, row.source, row.meta)
        assert [(item.height, item.width) for item in one.row.media] == [
            (item.height, item.width) for item in row.media
        ]
        assert [decode_image(data) for data in one.media] == [decode_image(item.path) for item in row.media]


def test_a_directory_that_only_fsspec_reaches(rows, shards, tmp_path):
    """In memory, with pictures beside the shards, too."""
    memory = fsspec.filesystem("memory")
    for file in shards.iterdir():
        memory.pipe_file(f"/stream/{file.name}", file.read_bytes())
    local = [list(_stream(shards, world_size=2, rank=rank)) for rank in range(2)]
    remote = [list(_stream("memory://stream", world_size=2, rank=rank)) for rank in range(2)]
    assert local == remote and sorted(chain(*local)) == sorted(row.id for row in rows)
    report = write_shards(rows[:3], tmp_path / "paths", embed=False, media_root=rows[1].media[0].path.parents[1])
    memory.pipe_file("/beside/shard.parquet", report.files[0].read_bytes())
    memory.pipe_file("/beside/images/1-0.png", rows[1].media[0].path.read_bytes())
    memory.pipe_file("/beside/images/2-0.png", rows[2].media[0].path.read_bytes())
    beside = list(ShardStream(["memory://beside/shard.parquet"], shuffle=False))
    assert [one.media for one in beside] == [tuple(item.path.read_bytes() for item in row.media) for row in rows[:3]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_once_over_two_ranks_and_their_workers(rows, shards, num_workers):
    loaders = _loaders(shards, num_workers=num_workers)
    orders = []
    for _ in range(2):  # epochs
        served = [list(loader) for loader in loaders]
        assert {len(batches) for batches in served} == {max(map(len, served))}
        orders.append(list(chain.from_iterable(chain(*served))))
        assert Counter(orders[-1]) == Counter(row.id for row in rows)
    assert orders[0] != orders[1]
    again = [list(loader) for loader in _loaders(shards, num_workers=num_workers)]
    assert list(chain.from_iterable(chain(*again))) == orders[0]


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 1), (0, 4), (2, 1), (2, 4)])
def test_killed_at_any_batch_the_same_rows_remain(shards, num_workers, batch_size):
    for rank in range(2):
        straight = _loaders(shards, num_workers=num_workers, batch_size=batch_size)[rank]
        served, states = [], [straight.state_dict()]
        for _ in range(2):
            for batch in straight:
                served.append(batch)
                states.append(straight.state_dict())
        epoch = len(served) // 2
        # Every batch in one process; starting workers takes its time.
        for step in range(2 * epoch) if num_workers == 0 else (1, epoch - 2 + rank, epoch + 2 + rank):
            resumed = _loaders(shards, num_workers=num_workers, batch_size=batch_size)[rank]
            resumed.load_state_dict(states[step])
            rest = list(resumed) + (list(resumed) if step < epoch else [])
            assert rest == served[step:]


def test_streamed_rows_become_the_batches_of_rows_from_files(rows, shards, tmp_path):
    """Pixels come from the bytes that travelled with the row; what is damaged is told and left out."""
    processor = tiny_model(tmp_path)[1]
    collate = PaddingCollator(processor)
    broken = pq.read_table(shards / "shard-0.parquet").slice(0, 6).to_pylist()
    broken[4]["media"][0]["bytes"] = broken[4]["media"][0]["bytes"][:-100]
    schema = pq.read_schema(shards / "shard-0.parquet")
    pq.write_table(pa.Table.from_pylist(broken, schema), tmp_path / "shard.parquet")
    stream = ShardStream(
        tmp_path / "shard.parquet",
        transform=lambda one: example_of(one.row, processor, media=one.media),
        shuffle=False,
    )
    loader = StreamLoader(stream, batch_size=3, collate_fn=LeavingOut(collate), num_workers=1)
    told: list[LeftOut] = []
    batches = list(usable_batches(loader, told.append))
    for batch, kept in zip(batches, ([0, 1, 2], [3, 5]), strict=True):
        wanted = collate([example_of(rows[number], processor) for number in kept])
        assert batch.keys() == wanted.keys() and all(torch.equal(batch[key], wanted[key]) for key in batch)
    assert [(one.bad.id, one.reason) for one in told] == [("row-4", BAD)]


def test_rows_of_a_block_are_shuffled_and_units_are_not_kept_together(rows, shards):
    (ordered, shuffled) = (list(_stream(shards, shuffle=shuffle)) for shuffle in (False, True))
    assert ordered == [row.id for row in rows] and sorted(shuffled) == sorted(ordered)
    follows = sum(ordered.index(two) - ordered.index(one) == 1 for one, two in pairwise(shuffled))
    assert follows < NUM_ROWS / 2


def test_a_broken_row_is_told_and_the_others_come(rows, shards, tmp_path):
    table = pq.read_table(shards / "shard-0.parquet")
    messages = table["messages"].to_pylist()
    messages[4] = "{no JSON"
    table = table.set_column(table.schema.get_field_index("messages"), "messages", pa.array(messages))
    pq.write_table(table, tmp_path / "shard.parquet")
    streamed = list(_stream(tmp_path / "shard.parquet", shuffle=False))
    assert [row for row in streamed if isinstance(row, str)] == [row.id for n, row in enumerate(rows[:30]) if n != 4]
    (left_out,) = [row for row in streamed if isinstance(row, LeftOut)]
    assert (
        left_out.bad.id == "row-4" and "shard.parquet, row 4" in left_out.bad.where and "JSON" in left_out.bad.reason
    )


def test_what_cannot_be_streamed(shards, tmp_path):
    with pytest.raises(OptionError, match="is not there, or holds no shards"):
        ShardStream(tmp_path / "none")
    with pytest.raises(OptionError, match="is not there, or holds no shards"):
        ShardStream(tmp_path)
    state = _loaders(shards)[0].state_dict()
    with pytest.raises(CheckpointError, match="another num_workers, batch_size"):
        _loaders(shards, num_workers=3, batch_size=1)[0].load_state_dict(state)


def test_units_are_dealt_once_and_evenly():
    sizes = [5, 3, 8, 1, 1, 7, 4, 4, 6]
    for epoch in range(5):
        dealt = deal_units(sizes, num_readers=4, epoch=epoch, seed=0)
        assert sorted(chain(*dealt)) == list(range(9))
        loads = [sum(sizes[unit] for unit in units) for units in dealt]
        assert max(loads) - min(loads) <= max(sizes)
    assert deal_units(sizes, num_readers=12, epoch=0, seed=0).count([]) == 3
    blocks = blocks_of([4, 2, 7], sizes, block_units=2, epoch=0, seed=0)
    assert [block.units for block in blocks] == [(4, 2), (7,)]
    assert [sorted(block.order.tolist()) for block in blocks] == [list(range(9)), list(range(4))]


def test_turns_of_workers_that_end_early():
    assert batches_done([3, 1], 0) == ([0, 0], 0)
    assert batches_done([3, 1], 3) == ([2, 1], 1)
    assert batches_done([3, 0, 2], 4) == ([2, 0, 2], 0)
    assert batches_done([1, 1], 9) == ([1, 1], 0)
    assert np.sum(batches_done([4, 2, 3], 7)[0]) == 7


def _loaders(shards: Path, *, num_workers: int = 2, batch_size: int = 2) -> list[StreamLoader]:
    return [
        StreamLoader(
            _stream(shards, rank=rank, world_size=2), batch_size=batch_size, collate_fn=list, num_workers=num_workers
        )
        for rank in range(2)
    ]
