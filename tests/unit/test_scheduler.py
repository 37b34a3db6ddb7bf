"""Which layer runs next, and what a layer buffer gives it, on hand-made buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deebert import native
from deebert.packing import PackedTokens, SequenceLayout
from pipeline.engine.batch import Chosen, SampleBatch
from pipeline.engine.budget import most_held
from pipeline.engine.layer_buffer import LayerBuffer
from pipeline.engine.scheduler import next_layer

MICRO_BATCH_TOKENS = 10


def samples(*lengths: int, first_id: int = 0) -> SampleBatch:
    """Samples of these lengths; every token of a sample is its id."""
    ids = np.arange(first_id, first_id + len(lengths))
    tokens = PackedTokens.pack([[i] * n for i, n in zip(ids.tolist(), lengths, strict=True)])
    return SampleBatch.from_tokens(ids, tokens)


def buffer(*lengths: int) -> LayerBuffer:
    made = LayerBuffer(MICRO_BATCH_TOKENS)
    made.put(samples(*lengths))
    return made


def held_tokens(waiting: LayerBuffer) -> int:
    """Tokens whose states are kept in memory, those that were taken already among them."""
    storages = {rows.untyped_storage().data_ptr(): rows for c in waiting._chunks for rows in c.token_rows}
    return sum(rows.untyped_storage().nbytes() // rows.itemsize for rows in storages.values())


def one_by_one(batch: SampleBatch | Chosen) -> list[tuple[int, list[Tensor]]]:
    """Each sample and its rows."""
    whole, chosen = (batch.of, batch.samples) if isinstance(batch, Chosen) else (batch, np.arange(len(batch)))
    ends = whole.layout.lengths.cumsum()
    return [
        (int(whole.sample_ids[i]), [rows[end - length : end] for rows in whole.token_rows])
        for i in chosen.tolist()
        for end, length in [(ends[i], whole.layout.lengths[i])]
    ]


FULL, PARTLY, EMPTY = (5, 5), (5, 4), ()


class TestNextLayer:
    @pytest.mark.parametrize(
        ("waiting", "runs", "drains"),
        [
            ([EMPTY, EMPTY, EMPTY], None, None),
            ([PARTLY, EMPTY, EMPTY], None, 0),
            ([EMPTY, PARTLY, PARTLY], None, 1),
            ([EMPTY, EMPTY, PARTLY], None, 2),
            ([FULL, EMPTY, EMPTY], 0, 0),
            ([FULL, PARTLY, PARTLY], 0, 0),
            ([FULL, FULL, PARTLY], 1, 1),
            ([FULL, FULL, FULL], 2, 2),
            ([PARTLY, PARTLY, FULL], 2, 2),
            ([PARTLY, FULL, PARTLY], 1, 1),
        ],
    )
    def test_deepest_full_one_first_and_shallowest_first_when_draining(
        self, waiting: list[tuple[int, ...]], runs: int | None, drains: int | None
    ) -> None:
        buffers = {layer: buffer(*lengths) for layer, lengths in enumerate(waiting)}

        assert next_layer(buffers, drain=False) == runs
        assert next_layer(buffers, drain=True) == drains

    def test_layers_are_named_by_where_segments_begin(self) -> None:
        buffers = {0: buffer(*PARTLY), 3: buffer(*FULL), 7: buffer(*PARTLY)}

        assert next_layer(buffers, drain=False) == 3


class TestLayerBuffer:
    @pytest.mark.parametrize(("lengths", "full"), [((), False), ((9,), False), ((10,), True), ((5, 6), True)])
    def test_is_full_from_one_micro_batch_of_tokens_on(self, lengths: tuple[int, ...], full: bool) -> None:
        assert buffer(*lengths).is_full is full

    @pytest.mark.parametrize(("tokens", "full"), [(14, False), (15, True), (16, True)])
    def test_is_worth_running_from_15_16ths_of_a_micro_batch_on(self, tokens: int, full: bool) -> None:
        waiting = LayerBuffer(16)
        waiting.put(samples(tokens))
        assert waiting.is_full is full

    def test_a_bound_that_has_shrunk_never_rises(self) -> None:
        waiting = buffer(*[4] * 3)

        waiting.shrink(4)
        waiting.shrink(8)

        assert waiting.micro_batch_tokens == 4
        assert waiting.take().sample_ids.tolist() == [0]

    def test_counts_samples_and_tokens_and_remembers_the_peak(self) -> None:
        waiting = buffer(3, 4)
        waiting.put(samples(2, 6))
        assert (len(waiting), waiting.tokens, waiting.peak_tokens) == (4, 15, 15)

        waiting.take()

        assert (len(waiting), waiting.tokens, waiting.peak_tokens) == (1, 6, 15)

    def test_takes_the_oldest_that_fit_shortest_first(self) -> None:
        waiting = buffer(4, 1, 3)
        waiting.put(samples(2, 5, first_id=3))

        batch = waiting.take()

        assert batch.sample_ids.tolist() == [1, 3, 2, 0]
        assert batch.layout.lengths.tolist() == [1, 2, 3, 4]
        assert batch.token_rows[0].tolist() == [1, 3, 3, 2, 2, 2, 0, 0, 0, 0]
        assert waiting.take().sample_ids.tolist() == [4]

    def test_nobody_overtakes_a_sample_that_does_not_fit(self) -> None:
        waiting = buffer(4, 7, 1)

        assert waiting.take().sample_ids.tolist() == [0]
        assert waiting.take().sample_ids.tolist() == [2, 1]

    def test_splits_a_chunk_and_goes_on_where_it_stopped(self) -> None:
        waiting = buffer(*[4] * 5)

        assert [waiting.take().sample_ids.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4]]
        assert (len(waiting), waiting.tokens) == (0, 0)

    def test_what_is_put_back_is_taken_next_and_once(self) -> None:
        waiting = buffer(*[4] * 5)
        waiting.put(samples(4, first_id=5))
        taken = waiting.take()

        waiting.put_back(taken)

        assert (len(waiting), waiting.tokens) == (6, 24)
        assert [waiting.take().sample_ids.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        assert (len(waiting), waiting.tokens) == (0, 0)

    @pytest.mark.parametrize(("lengths", "then"), [((2, 6, 1), [[1], [2]]), ((6, 4, 1), [[1], [2]])])
    def test_a_sample_longer_than_a_bound_that_has_shrunk_is_taken_by_itself(
        self, lengths: tuple[int, ...], then: list[list[int]]
    ) -> None:
        waiting = LayerBuffer(lengths[0])
        waiting.put(samples(*lengths))
        assert waiting.take().sample_ids.tolist() == [0]

        waiting.shrink(3)

        assert [waiting.take().sample_ids.tolist() for _ in then] == then

    def test_a_chunk_is_kept_whole_until_the_last_of_it_is_taken(self) -> None:
        waiting = buffer(*[1] * 9)
        waiting.put(samples(*[1] * 10))
        assert len(waiting.take()) == 10

        waiting.put(samples(*[1] * 10))

        assert (waiting.tokens, held_tokens(waiting)) == (19, 20)
        assert len(waiting.take()) == 10
        assert (waiting.tokens, held_tokens(waiting)) == (9, 10)

    @given(
        chunks=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda c: sum(c) <= 10)),
        under_way=st.integers(1, 3),
    )
    def test_what_it_keeps_in_memory_is_a_micro_batch_more_than_what_waits(
        self, chunks: list[list[int]], under_way: int
    ) -> None:
        waiting = LayerBuffer(MICRO_BATCH_TOKENS)
        for first in range(0, len(chunks), under_way):
            while waiting.is_full:
                waiting.take()
            for lengths in chunks[first : first + under_way]:
                waiting.put(samples(*lengths))
            assert waiting.tokens < (under_way + 1) * MICRO_BATCH_TOKENS
            assert held_tokens(waiting) < most_held(under_way) * MICRO_BATCH_TOKENS

    def test_no_samples_change_nothing(self) -> None:
        waiting = buffer(3)
        waiting.put(samples())

        assert len(waiting) == 1
        assert waiting.take().sample_ids.tolist() == [0]


class TestSampleBatch:
    def test_token_ids_and_types_survive_the_round_trip(self) -> None:
        tokens = PackedTokens.pack([[1, 2], [3]], token_type_ids=[[0, 1], [0]])

        again = SampleBatch.from_tokens(np.array([7, 8]), tokens).to_tokens()

        assert again.input_ids.tolist() == [1, 2, 3]
        assert again.token_type_ids is not None
        assert again.token_type_ids.tolist() == [0, 1, 0]

    def test_a_copy_keeps_every_tensor_with_its_sample(self) -> None:
        states = torch.arange(12.0).view(6, 2)
        batch = SampleBatch(
            sample_ids=np.array([5, 6, 7]),
            layout=samples(1, 2, 3).layout,
            token_rows=(torch.arange(6), states),
        )

        taken = Chosen(of=batch, samples=np.array([2, 0])).copy()

        assert taken.sample_ids.tolist() == [7, 5]
        assert taken.layout.cu_seqlens.tolist() == [0, 3, 4]
        assert taken.token_rows[0].tolist() == [3, 4, 5, 0]
        assert torch.equal(taken.token_rows[1], states[[3, 4, 5, 0]])

    def test_slice_shares_memory(self) -> None:
        batch = samples(2, 3, 1)

        part = batch.slice(1, 3)

        assert part.sample_ids.tolist() == [1, 2]
        assert part.token_rows[0].tolist() == [1, 1, 1, 2]
        assert part.token_rows[0].data_ptr() == batch.token_rows[0][2:].data_ptr()

    def test_sorting_by_length_is_stable(self) -> None:
        assert SampleBatch.form([samples(2, 1, 2, 1)]).sample_ids.tolist() == [1, 3, 0, 2]

    def test_of_many_samples_as_well(self) -> None:
        order = SampleBatch.form([samples(*[2, 1] * 100)]).sample_ids.tolist()

        assert order == [*range(1, 200, 2), *range(0, 200, 2)]

    @pytest.mark.parametrize("kernels", [True, False])
    @given(data=st.data())
    def test_a_micro_batch_of_parts_has_their_samples_shortest_first(
        self, kernels: bool, data: st.DataObject
    ) -> None:
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        parts: list[SampleBatch | Chosen] = []
        for number in range(data.draw(st.integers(1, 4))):
            lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=30))
            rows = torch.randn(sum(lengths), 16).to(dtype)
            batch = SampleBatch(
                sample_ids=100 * number + np.arange(len(lengths)),
                layout=SequenceLayout.of(lengths),
                token_rows=(torch.arange(len(rows), dtype=torch.int32), rows),
            )
            chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True).map(sorted))
            parts.append(Chosen(of=batch, samples=np.array(chosen, np.int64)) if len(chosen) else batch)

        with pytest.MonkeyPatch.context() as without:
            if not kernels:
                without.setattr(native, "_library", lambda: None)
            formed = SampleBatch.form(parts)

        expected = [sample for part in parts for sample in one_by_one(part)]
        expected.sort(key=lambda sample: len(sample[1][0]))
        found = one_by_one(formed)
        assert [sample_id for sample_id, _ in found] == [sample_id for sample_id, _ in expected]
        for (_, rows), (_, expected_rows) in zip(found, expected, strict=True):
            assert all(map(torch.equal, rows, expected_rows))

    @pytest.mark.skipif(not native.is_available(), reason="the kernels are not built")
    def test_most_of_a_batch_stays_where_it_lies_and_less_is_copied(self) -> None:
        batch = samples(2, 2, 2)

        most, less = batch.keep(np.array([0, 2])), batch.keep(np.array([1]))

        assert isinstance(most, Chosen)
        assert isinstance(less, SampleBatch)
        assert SampleBatch.form([most]).sample_ids.tolist() == [0, 2]
        assert [len(most), len(most.slice(1, 2)), len(less)] == [2, 1, 1]

    def test_without_kernels_all_are_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "_library", lambda: None)

        assert isinstance(samples(2, 2, 2).keep(np.array([0, 2])), SampleBatch)

    def test_samples_that_lie_in_order_are_not_copied(self) -> None:
        ordered = samples(1, 2, 2, 3)

        assert SampleBatch.concat([ordered]) is ordered
        assert SampleBatch.form([ordered]) is ordered
        assert ordered.slice(0, 4) is ordered
