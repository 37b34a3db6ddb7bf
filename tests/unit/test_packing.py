"""Packed tokens: where sequences lie, and that taking, slicing and joining keep them whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deebert.packing import (
    PackedTokens,
    SequenceLayout,
    _count_here,
    _count_there,
    new_rows,
    rows_of_few_shapes,
    with_rows_behind,
)

THREE = PackedTokens.pack([[1, 2], [3], [4, 5, 6]], token_type_ids=[[0, 1], [0], [0, 0, 1]])


def sequences(packed: PackedTokens) -> list[list[int]]:
    return [packed.sequence(i).input_ids.tolist() for i in range(len(packed))]


def types(packed: PackedTokens) -> list[list[int]]:
    assert packed.token_type_ids is not None
    return [packed.sequence(i).token_type_ids.tolist() for i in range(len(packed))]  # type: ignore[union-attr]


def test_pack_lays_sequences_end_to_end() -> None:
    assert THREE.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert THREE.input_ids.dtype == torch.int32
    assert THREE.token_type_ids is not None
    assert THREE.token_type_ids.tolist() == [0, 1, 0, 0, 0, 1]
    assert THREE.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert THREE.cu_seqlens.dtype == torch.int32
    assert THREE.max_seqlen == 3
    assert len(THREE) == 3


def test_layout_counts_tokens_and_squares() -> None:
    layout = SequenceLayout.of([2, 1, 3])

    assert layout.lengths.tolist() == [2, 1, 3]
    assert layout.offsets.tolist() == [0, 2, 3, 6]
    assert layout.total_tokens == 6
    assert layout.squared_tokens == 4 + 1 + 9
    assert layout.max_seqlen == 3


def test_an_empty_layout_has_no_tokens_and_no_runs() -> None:
    layout = SequenceLayout.of([])

    assert len(layout) == 0
    assert layout.cu_seqlens.tolist() == [0]
    assert (layout.total_tokens, layout.squared_tokens, layout.max_seqlen) == (0, 0, 0)
    assert layout.runs == ()


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([4], ((0, 1, 4),)),
        ([2, 2, 2], ((0, 3, 2),)),
        ([1, 1, 3, 2, 2], ((0, 2, 1), (2, 1, 3), (3, 2, 2))),
        ([5, 1, 5], ((0, 1, 5), (1, 1, 1), (2, 1, 5))),
    ],
)
def test_runs_group_neighbours_of_equal_length(
    lengths: list[int], runs: tuple[tuple[int, int, int], ...]
) -> None:
    assert SequenceLayout.of(lengths).runs == runs


def test_token_index_names_rows_in_the_order_asked() -> None:
    layout = SequenceLayout.of([2, 1, 3])

    assert layout.token_index(np.array([2, 0])).tolist() == [3, 4, 5, 0, 1]
    assert layout.token_index(np.array([1])).tolist() == [2]
    assert layout.token_index(np.array([], dtype=np.int64)).tolist() == []


@given(sequences=st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 9))))
def test_a_gpu_counts_tokens_as_the_host_does(sequences: list[tuple[int, int]]) -> None:
    shift, lengths = np.array(sequences, dtype=np.int64).reshape(-1, 2).T

    here, there = (count(shift, lengths, torch.device("cpu")) for count in (_count_here, _count_there))

    assert here.dtype == there.dtype == torch.int64
    assert here.tolist() == there.tolist()


def test_take_reorders_repeats_and_drops() -> None:
    taken = THREE.take([2, 0, 2])

    assert sequences(taken) == [[4, 5, 6], [1, 2], [4, 5, 6]]
    assert types(taken) == [[0, 0, 1], [0, 1], [0, 0, 1]]
    assert taken.cu_seqlens.tolist() == [0, 3, 5, 8]


def test_take_nothing_is_empty() -> None:
    taken = THREE.take([])

    assert len(taken) == 0
    assert taken.input_ids.tolist() == []
    assert taken.cu_seqlens.tolist() == [0]


def test_slice_shares_memory_and_starts_its_offsets_at_zero() -> None:
    part = THREE.slice(1, 3)

    assert sequences(part) == [[3], [4, 5, 6]]
    assert part.cu_seqlens.tolist() == [0, 1, 4]
    assert part.input_ids.data_ptr() == THREE.input_ids[2:].data_ptr()


def test_concat_undoes_slicing() -> None:
    joined = PackedTokens.concat([THREE.slice(0, 1), THREE.slice(1, 1), THREE.slice(1, 3)])

    assert sequences(joined) == sequences(THREE)
    assert types(joined) == types(THREE)
    assert joined.cu_seqlens.tolist() == [0, 2, 3, 6]


def test_concat_of_one_part_is_that_part() -> None:
    assert PackedTokens.concat([THREE]) is THREE


def test_parts_with_and_without_token_types_do_not_mix() -> None:
    with pytest.raises(ValueError, match="some parts have token_type_ids and others have none"):
        PackedTokens.concat([THREE, PackedTokens.pack([[7]])])


def test_packing_no_sequences_gives_no_tokens() -> None:
    packed = PackedTokens.pack([])

    assert len(packed) == 0
    assert packed.input_ids.dtype == torch.int32
    assert packed.token_type_ids is None


def test_to_keeps_everything() -> None:
    moved = THREE.to("cpu")

    assert sequences(moved) == sequences(THREE)
    assert types(moved) == types(THREE)


@given(rows=st.integers(0, 1 << 18))
def test_rows_of_few_shapes_are_hardly_more(rows: int) -> None:
    rounded = rows_of_few_shapes(rows)

    assert rows <= rounded <= rows + min(rows // 32, 63)
    assert rows_of_few_shapes(rounded) == rounded


def test_rows_of_few_shapes_are_few() -> None:
    assert len({rows_of_few_shapes(rows) for rows in range(4_097)}) <= 320
    assert len({rows_of_few_shapes(rows) for rows in range(3_840, 4_097)}) == 5


class TestRowsBehind:
    def test_new_rows_have_room_for_them(self) -> None:
        states = new_rows(torch.empty(0, 4), 130)

        extended = with_rows_behind(states, 132)

        assert (len(states), len(extended)) == (130, 132)
        assert extended.data_ptr() == states.data_ptr()

    def test_a_slice_has_its_neighbours(self) -> None:
        everything = torch.arange(600.0).view(150, 4)

        extended = with_rows_behind(everything[3:133], 132)

        assert torch.equal(extended, everything[3:135])
        assert extended.data_ptr() == everything[3:].data_ptr()

    @pytest.mark.parametrize(
        "states",
        [torch.rand(130, 4), torch.rand(150, 4)[20:], torch.rand(4, 150).t()[3:133]],
        ids=["none behind", "none behind a slice", "columns"],
    )
    def test_where_there_are_none_it_is_a_copy(self, states: torch.Tensor) -> None:
        extended = with_rows_behind(states, 132)

        assert extended.shape == (132, 4)
        assert torch.equal(extended[:130], states)
        assert extended.data_ptr() != states.data_ptr()

    def test_nothing_is_copied_where_none_are_asked_for(self) -> None:
        states = torch.rand(128, 4)

        assert with_rows_behind(states, 128).data_ptr() == states.data_ptr()
