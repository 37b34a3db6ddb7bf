"""Which rows are tried together after their shard has killed its replica, on rows and deaths by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.board import History, Span
from pipeline.narrowing import Piece, pieces, why_hopeless

PIECE = 32


def cut(rows: list[int], *deadly: Span) -> list[Piece]:
    return list(pieces(np.array(rows, np.int64), deadly))


def spans(found: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.start, piece.stop) for piece in found]


def left_out(found: list[Piece]) -> list[int]:
    return [piece.start for piece in found if piece.is_deadly]


def one_by_one(start: int, stop: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(start, stop)]


class TestPieces:
    @pytest.mark.parametrize(
        ("count", "expected"),
        [
            (0, []),
            (1, [(0, 1)]),
            (32, [(0, 32)]),
            (33, [(0, 32), (32, 33)]),
            (70, [(0, 32), (32, 64), (64, 70)]),
        ],
    )
    def test_unsuspected_rows_are_tried_32_at_a_time(
        self, count: int, expected: list[tuple[int, int]]
    ) -> None:
        found = cut(list(range(count)))

        assert spans(found) == expected
        assert left_out(found) == []

    def test_the_rows_of_a_piece_that_killed_are_tried_one_by_one_and_the_others_together(self) -> None:
        found = cut(list(range(100)), (32, 63))

        assert spans(found) == [(0, 32), *one_by_one(32, 64), (64, 96), (96, 100)]
        assert left_out(found) == []

    @pytest.mark.parametrize("row", [32, 47, 63])
    def test_a_row_that_killed_on_its_own_once_is_tried_again_and_after_twice_left_out(
        self, row: int
    ) -> None:
        piece = (32, 63)
        once, twice = (
            cut(list(range(96)), piece, (row, row)),
            cut(list(range(96)), piece, (row, row), (row, row)),
        )

        assert spans(once) == spans(twice) == [(0, 32), *one_by_one(32, 64), (64, 96)]
        assert left_out(once) == []
        assert left_out(twice) == [row]

    def test_a_piece_that_killed_twice_proves_nothing_of_its_rows(self) -> None:
        assert left_out(cut(list(range(96)), (32, 63), (32, 63), (32, 63))) == []

    def test_all_that_killed_is_remembered_not_only_the_last(self) -> None:
        found = cut(list(range(96)), (0, 31), (3, 3), (3, 3), (64, 95), (70, 70), (70, 70))

        assert spans(found) == [*one_by_one(0, 32), (32, 64), *one_by_one(64, 96)]
        assert left_out(found) == [3, 70]

    def test_rows_are_known_by_their_number_in_the_file_not_by_their_place(self) -> None:
        """Bad rows are missing, and a shard begins anywhere in its file."""
        rows = [1000 + 2 * i for i in range(64)]

        found = cut(rows, (1064, 1126), (1068, 1068), (1068, 1068), (34, 34), (34, 34))

        assert spans(found) == [(0, 32), *one_by_one(32, 64)]
        assert left_out(found) == [34]

    def test_what_killed_elsewhere_in_the_shard_is_no_suspicion_here(self) -> None:
        assert spans(cut(list(range(100, 132)), (68, 99), (132, 163))) == [(0, 32)]


def history(blind: int, deadly: int) -> History:
    return History(deaths=blind + deadly, deadly=((7, 7),) * deadly, has_ended=False)


class TestWhyHopeless:
    @pytest.mark.parametrize(("blind", "deadly"), [(0, 0), (3, 0), (3, 5), (2, 63), (0, 63)])
    def test_is_nothing_while_trying_makes_sense(self, blind: int, deadly: int) -> None:
        assert why_hopeless(history(blind, deadly)) is None

    @pytest.mark.parametrize("deadly", [0, 3])
    def test_is_four_deaths_for_which_no_row_can_be_blamed(self, deadly: int) -> None:
        assert why_hopeless(history(4, deadly)) == (
            f"quarantined: its replica died in each of {4 + deadly} attempts, and no row can be blamed"
        )

    def test_is_sixty_four_deaths_for_which_rows_can(self) -> None:
        assert why_hopeless(history(2, 64)) == (
            "quarantined: its replica died in each of 66 attempts, too many rows to blame"
        )
