"""What off-ramps read of packed states, in literal numbers and against one sequence at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from deebert.packing import SequenceLayout
from deebert.pooling import _weighted_by_run, _weighted_by_segment, attended_tokens, mean_of_tokens

LENGTHS = [3, 3, 1, 7, 7, 7, 2]


def states_of(lengths: list[int], seed: int = 0) -> torch.Tensor:
    return torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(seed))


def test_attention_is_the_mean_weighted_by_the_softmax_of_the_scores() -> None:
    states = torch.tensor([[0.0, 10.0], [1.0, 20.0], [5.0, 5.0]])
    query = torch.tensor([torch.tensor(3.0).log(), 0.0])  # scores 0 and ln 3: weights 1/4 and 3/4

    pooled = attended_tokens(states, query, SequenceLayout.of([2, 1]))

    torch.testing.assert_close(pooled, torch.tensor([[0.75, 17.5], [5.0, 5.0]]))


def test_a_query_of_zeros_gives_the_mean() -> None:
    states, layout = states_of(LENGTHS), SequenceLayout.of(LENGTHS)

    torch.testing.assert_close(
        attended_tokens(states, torch.zeros(5), layout), mean_of_tokens(states, layout)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_are_summed_in_float32(dtype: torch.dtype) -> None:
    layout = SequenceLayout.of([1, 3, 3, 4000])
    states = torch.rand(layout.total_tokens, 48, generator=torch.Generator().manual_seed(0)).to(dtype)

    pooled = mean_of_tokens(states, layout)

    exact = torch.stack([part.double().mean(0) for part in states.split(layout.lengths.tolist())])
    torch.testing.assert_close(pooled, exact.to(dtype))


@pytest.mark.parametrize("way", [_weighted_by_run, _weighted_by_segment])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # the second overflows float32 without a maximum
def test_no_sequence_reads_its_neighbours(way: object, scale: float) -> None:
    states, layout = states_of(LENGTHS), SequenceLayout.of(LENGTHS)
    scores = scale * torch.randn(len(states), generator=torch.Generator().manual_seed(1))

    pooled = way(states, scores, layout)  # type: ignore[operator]

    starts = layout.offsets.tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(starts)):
        alone = scores[start:stop].softmax(0) @ states[start:stop]
        torch.testing.assert_close(pooled[i], alone)


@pytest.mark.parametrize("way", [_weighted_by_run, _weighted_by_segment])
def test_it_stays_in_the_dtype_of_the_states(way: object) -> None:
    states, layout = states_of(LENGTHS).bfloat16(), SequenceLayout.of(LENGTHS)

    assert way(states, torch.zeros(len(states)), layout).dtype == torch.bfloat16  # type: ignore[operator]
