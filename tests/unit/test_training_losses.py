"""Losses equal values worked out by hand, and each reaches only what it should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deebert.problem import REGRESSION, SINGLE_LABEL
from deebert.training import Alternating, BackboneStage, Distillation, FinalOnly, Joint, OffRampStage, Teacher
from deebert.training.equilibrium import gradient_equilibrium, gradient_scales
from deebert.training.losses import (
    Answers,
    JointLoss,
    backbone_loss,
    certainty_losses,
    hidden_distance,
    off_ramp_loss,
)
from tests.conftest import ModelFactory

LN3 = math.log(3.0)
# softmax of (ln 3, 0) is (3/4, 1/4); of (0, 0) is (1/2, 1/2).
SURE, UNSURE = [LN3, 0.0], [0.0, 0.0]
CE_SURE_RIGHT, CE_SURE_WRONG, CE_UNSURE = math.log(4 / 3), math.log(4.0), math.log(2.0)


def answers(
    ramps: list[list[list[float]]], final: list[list[float]], labels: list[int], **more: Tensor
) -> Answers:
    return Answers(
        off_ramp_logits=torch.tensor(ramps, requires_grad=True),
        final_logits=torch.tensor(final, requires_grad=True),
        labels=torch.tensor(labels),
        **more,
    )


def close(loss: Tensor, value: float) -> bool:
    return loss.item() == pytest.approx(value, abs=1e-6)


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


TWO_RAMPS = answers([[SURE, SURE], [UNSURE, UNSURE]], [SURE, UNSURE], [0, 1])
"""Two off-ramps, two samples: the first ramp is sure of class 0 (right, wrong), the second unsure."""
RAMP_1, RAMP_2 = (CE_SURE_RIGHT + CE_SURE_WRONG) / 2, CE_UNSURE
FINAL = (CE_SURE_RIGHT + CE_UNSURE) / 2


class TestParts:
    def test_cross_entropy_of_each_classifier(self) -> None:
        losses = SINGLE_LABEL.losses(TWO_RAMPS.off_ramp_logits, TWO_RAMPS.labels).mean(-1)

        assert losses.tolist() == pytest.approx([RAMP_1, RAMP_2], abs=1e-6)

    def test_divergence_is_zero_between_equals_and_scaled_by_the_squared_temperature(self) -> None:
        logits = torch.tensor([[UNSURE], [[2 * LN3, 0.0]]])

        # At temperature 2 the targets (2 ln 3, 0) are (3/4, 1/4).
        losses = SINGLE_LABEL.divergences(logits, torch.tensor([[2 * LN3, 0.0]]), 2.0).mean(-1)

        assert losses.tolist() == pytest.approx([4 * kl((0.75, 0.25), (0.5, 0.5)), 0.0], abs=1e-6)

    def test_targets_get_no_gradient(self) -> None:
        logits, targets = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 4), (3, 4)))

        SINGLE_LABEL.divergences(logits, targets, 2.0).sum().backward()

        assert targets.grad is None
        assert logits.grad is not None

    def test_numbers_learn_nothing_from_how_sure_the_head_is(self) -> None:
        logits, certainties = (torch.rand(*shape, requires_grad=True) for shape in ((2, 4, 1), (2, 4)))

        certainty_losses(REGRESSION, certainties, logits, torch.zeros(4)).sum().backward()

        assert logits.grad is None
        assert certainties.grad is not None

    def test_hidden_distance_counts_real_tokens_only(self) -> None:
        states = [torch.zeros(1, 3, 2), torch.ones(1, 3, 2)]
        targets = [torch.full((1, 3, 2), 2.0), torch.tensor([[[1.0, 1.0], [1.0, 3.0], [9.0, 9.0]]])]

        # Layer 1: 4. Layer 2: one of four numbers is off by 2, so 1.
        distance = hidden_distance(states, targets, torch.tensor([[1, 1, 0]]))

        assert close(distance, (4 + 1) / 2)


class TestStage1:
    def test_final_only(self) -> None:
        loss = backbone_loss(BackboneStage(), [1, 2], 3)

        assert close(loss.at(0)(TWO_RAMPS), FINAL)

    @pytest.mark.parametrize(
        ("weighting", "weights"),
        [("linear", (1 / 4, 2 / 4)), ("uniform", (1, 1)), ("equilibrium", (1, 1))],
    )
    def test_joint(self, weighting: str, weights: tuple[float, float]) -> None:
        stage = BackboneStage(objective=Joint(weighting=weighting))  # type: ignore[arg-type]

        loss = backbone_loss(stage, [1, 2], 4).at(0)(TWO_RAMPS)

        assert close(loss, FINAL + weights[0] * RAMP_1 + weights[1] * RAMP_2)

    def test_off_ramps_that_skip_layers_weigh_by_their_layer(self) -> None:
        loss = backbone_loss(BackboneStage(objective=Joint()), [3, 6], 12).at(0)

        assert isinstance(loss, JointLoss)
        assert loss.weights == (3 / 12, 6 / 12)

    def test_joint_with_self_distillation(self) -> None:
        objective = Joint(weighting="uniform", self_distillation=Distillation(weight=0.25, temperature=1.0))

        loss = backbone_loss(BackboneStage(objective=objective), [1, 2], 3).at(0)(TWO_RAMPS)

        sure, unsure = (0.75, 0.25), (0.5, 0.5)
        soft_1 = (kl(sure, sure) + kl(unsure, sure)) / 2
        soft_2 = (kl(sure, unsure) + kl(unsure, unsure)) / 2
        assert close(loss, FINAL + 0.75 * (RAMP_1 + RAMP_2) + 0.25 * (soft_1 + soft_2))

    def test_the_final_classifier_does_not_feel_self_distillation(self) -> None:
        plain, distilled = (answers([[SURE, SURE]], [SURE, UNSURE], [0, 1]) for _ in range(2))

        for case, distillation in ((plain, None), (distilled, Distillation())):
            stage = BackboneStage(objective=Joint(self_distillation=distillation))
            backbone_loss(stage, [1], 2).at(0)(case).backward()

        assert torch.equal(plain.final_logits.grad, distilled.final_logits.grad)  # type: ignore[arg-type]
        assert not torch.equal(plain.off_ramp_logits.grad, distilled.off_ramp_logits.grad)  # type: ignore[arg-type]

    def test_alternating_takes_the_final_loss_first_and_all_losses_next(self) -> None:
        loss = backbone_loss(BackboneStage(objective=Alternating(weighting="uniform")), [1, 2], 3)

        values = [loss.at(step)(TWO_RAMPS).item() for step in range(4)]

        whole = FINAL + RAMP_1 + RAMP_2
        assert values == pytest.approx([FINAL, whole, FINAL, whole], abs=1e-6)
        assert close(loss.whole(TWO_RAMPS), whole)

    def test_a_teacher_adds_its_answers_and_its_states_to_the_final_loss(self) -> None:
        teacher = Teacher(folder="t", weight=0.5, temperature=1.0, hidden_weight=0.1)
        case = answers(
            [[SURE]],
            [UNSURE],
            [0],
            target_logits=torch.tensor([SURE]),
            hidden_distance=torch.tensor(3.0),
        )

        loss = backbone_loss(BackboneStage(objective=FinalOnly(), teacher=teacher), [1], 2).at(0)(case)

        assert close(loss, 0.5 * CE_UNSURE + 0.5 * kl((0.75, 0.25), (0.5, 0.5)) + 0.1 * 3.0)


class TestStage2:
    def test_the_sum_over_off_ramps_without_the_final_classifier(self) -> None:
        loss = off_ramp_loss(OffRampStage()).at(0)(TWO_RAMPS)

        assert close(loss, RAMP_1 + RAMP_2)

    def test_self_distillation_learns_from_the_targets_of_the_frozen_classifier(self) -> None:
        stage = OffRampStage(self_distillation=Distillation(weight=0.7, temperature=1.0))
        case = answers([[UNSURE]], [UNSURE], [0], target_logits=torch.tensor([SURE]))

        loss = off_ramp_loss(stage).at(0)(case)

        assert close(loss, 0.3 * CE_UNSURE + 0.7 * kl((0.75, 0.25), (0.5, 0.5)))


class TestEquilibrium:
    """Li et al., 2019: at each branch, the classifier's gradient by 1/(k-i+1), the one from above by (k-i)/(k-i+1)."""

    def test_scales_are_one_over_the_classifiers_that_a_layer_feeds(self, tiny_model: ModelFactory) -> None:
        scales = gradient_scales(tiny_model(num_layers=5, off_ramp_layers=[2, 3]))

        of_layer = {
            name.split("encoder.layer.")[1].split(".")[0]: scale
            for name, scale in scales.items()
            if "encoder" in name
        }
        assert of_layer == {"0": 1 / 3, "1": 1 / 3, "2": 1 / 2, "3": 1, "4": 1}
        assert {scale for name, scale in scales.items() if "embeddings" in name} == {1 / 3}
        assert all(name.startswith("backbone.") for name in scales)

    def test_every_gradient_is_the_papers_recursion(self, tiny_model: ModelFactory, family: str) -> None:
        model = tiny_model(family, num_layers=3)
        batch = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "labels": torch.tensor([1])}

        def losses() -> list[Tensor]:
            output = model(**batch)
            logits = [*output.off_ramp_logits, output.logits]
            return [torch.nn.functional.cross_entropy(one, batch["labels"]) for one in logits]

        def gradients(loss: Tensor) -> dict[str, Tensor]:
            model.zero_grad()
            loss.backward()
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        alone = [gradients(losses()[i]) for i in range(3)]
        with gradient_equilibrium(model):
            together = gradients(torch.stack(losses()).sum())
        after = gradients(torch.stack(losses()).sum())

        for name, found in together.items():
            if not name.startswith("backbone."):
                own = sum(g.get(name, torch.tensor(0.0)) for g in alone)
                torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-7)
                continue
            layer = int(name.split(".layer.")[1].split(".")[0]) if ".layer." in name else 0
            parts = [g[name] for g in alone[layer:]]
            # From the top: what a layer gets is (own classifier + (k - i) · what the layer above got) / (k - i + 1).
            expected = parts[-1]
            for place, part in enumerate(reversed(parts[:-1]), start=2):
                expected = (part + (place - 1) * expected) / place
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        plain = sum(g["backbone.embeddings.LayerNorm.weight"] for g in alone)
        torch.testing.assert_close(after["backbone.embeddings.LayerNorm.weight"], plain, rtol=1e-4, atol=1e-6)
