"""Stage 2, fast: all off-ramps at once, on cached states of the frozen backbone.

The frozen backbone sees each sample once, in the packed form, and what the off-ramps read of every layer is
kept; the off-ramps, which share nothing but maybe a pooler, then train together as one batched product. That is
the paper's stage 2 exactly, up to the dropout inside the frozen backbone (absent here), and takes minutes where epochs
through the backbone take hours. Of several processes each keeps the states of its share of the rows, and
gradients are summed: a step is the same step whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deebert.evaluation import LabelledSequences
from deebert.modeling import DeeBertForSequenceClassification, OffRamp
from deebert.precision import DTYPES
from deebert.problem import Problem
from deebert.training.cached_exit_head import CachedExitHead
from deebert.training.config import Distillation, EarlyStopping, OffRampStage
from deebert.training.frozen import collect_answers
from deebert.training.losses import distilled
from deebert.training.optimizer import scheduled_adamw
from deebert.training.processes import processes, summed
from deebert.training.stage import Clock, StageContext, StageReport


def train_cached_off_ramps(
    model: DeeBertForSequenceClassification,
    data: LabelledSequences,
    held_out: LabelledSequences | None,
    stage: OffRampStage,
    context: StageContext,
) -> StageReport:
    """Train the off-ramps, and the exit head if there is one, in place; the rest of the model stays bit for bit.

    Where early stopping gives off-ramps earlier weights back, the exit head keeps its last: it learned from all.

    Args:
        model: in eval mode, on the device to train on. Queries of attention pooling stay as they are: what is cached
            is what they read now.
        data: rows to train on.
        held_out: rows that tell when to stop; None trains to the end.
        stage: its hyper-parameters.
        context: where it logs; the stage has no checkpoints, it is begun again after a kill.

    Raises:
        RecipeError: losses or weights are no longer finite.
    """
    rows, judged = (_cache(model, part, stage, context) for part in (data, held_out))
    assert rows is not None
    # Same masks in no two processes: their rows differ.
    torch.manual_seed(context.recipe.seed + processes().process_index)
    stack = OffRampStack(model).to(model.device)
    training = _Training(model, stack, stage, data, context, context.begin(0))
    best = None if judged is None else _BestOffRamps(stack, judged, stage, context.recipe.early_stopping)
    for step, batch in training.steps():
        training.step(step, rows.batch(batch))
        if best is not None and training.is_to_be_judged:
            training.log_held_out(best.judge())
            if not best.may_improve:
                break
    if best is not None:
        best.restore()
    stack.write_back(model)
    return context.done(training.report(), model.parameters())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """This process's rows of one batch."""

    pooled: Tensor  # (R, n, W) float32
    final_pooled: Tensor | None  # (n, W) float32, where the exit head trains
    labels: Tensor  # n
    targets: Tensor | None  # (n, C)
    problem: Problem
    share: float
    """n over the rows of all processes: losses are means."""

    def losses(self, logits: Tensor, distillation: Distillation | None) -> Tensor:
        """(R, n, C) -> (R,): this process's part of each off-ramp's mean loss."""
        if not len(self.labels):
            return logits.sum((1, 2))
        return self.share * distilled(self.problem, logits, self.labels, self.targets, distillation)

    def teach(self, head: CachedExitHead, logits: Tensor) -> None:
        """Train the exit head on what the off-ramps, (R, n, C), and the final classifier said."""
        assert self.final_pooled is not None
        assert self.targets is not None
        pooled = torch.cat([self.pooled, self.final_pooled[None]])
        head.step(pooled, torch.cat([logits, self.targets[None]]), self.labels, self.share)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cache:
    """This process's share of the rows: row r lies with process r mod P, at place r div P."""

    states: Tensor  # (R, n, W)
    final_states: Tensor | None  # (n, W)
    targets: Tensor | None  # (n, C)
    labels: Tensor  # n
    problem: Problem
    num_rows: int
    """Of all processes."""
    device: torch.device

    def batch(self, rows: Tensor) -> _Batch:
        """The own ones among `rows`."""
        world = processes()
        own = rows[rows % world.num_processes == world.process_index] // world.num_processes
        return _Batch(
            pooled=self.states[:, own].to(self.device).float(),
            final_pooled=None
            if self.final_states is None
            else self.final_states[own].to(self.device).float(),
            labels=self.labels[own].to(self.device),
            targets=None if self.targets is None else self.targets[own].to(self.device),
            problem=self.problem,
            share=len(own) / len(rows),
        )


def _cache(
    model: DeeBertForSequenceClassification,
    data: LabelledSequences | None,
    stage: OffRampStage,
    context: StageContext,
) -> _Cache | None:
    if data is None:
        return None
    world, recipe = processes(), context.recipe
    own = data.take(np.arange(world.process_index, len(data), world.num_processes))
    config, learns_to_exit = model.config, model.exit_head is not None
    ramps = len(config.off_ramp_layers)
    answers = collect_answers(
        model,
        own,
        DTYPES[recipe.precision],
        recipe.micro_batch_tokens,
        layers=[*config.off_ramp_layers, *([config.num_hidden_layers] if learns_to_exit else [])],
        final=learns_to_exit or stage.self_distillation is not None,
        show_progress=context.show_progress,
    )
    return _Cache(
        states=answers.states[:ramps],
        final_states=answers.states[ramps] if learns_to_exit else None,
        targets=answers.final_logits,
        labels=own.labels,
        problem=config.problem,
        num_rows=len(data),
        device=model.device,
    )


class _Training:
    """The optimizer's side of the stage."""

    def __init__(
        self,
        model: DeeBertForSequenceClassification,
        stack: OffRampStack,
        stage: OffRampStage,
        data: LabelledSequences,
        context: StageContext,
        clock: Clock,
    ) -> None:
        self._stack, self._stage, self._context, self._clock = stack, stage, context, clock
        self._layers = model.config.off_ramp_layers
        self._num_rows = len(data)
        self._steps_per_epoch = -(-self._num_rows // stage.batch_size)
        self._num_steps = max(1, round(stage.epochs * self._steps_per_epoch))
        self._optimizer, self._schedule = scheduled_adamw(stack, stage, stage.learning_rate, self._num_steps)
        self._exit_head, problem = None, model.config.problem
        if model.exit_head is not None:
            scale = problem.label_scale(data.labels)
            self._exit_head = CachedExitHead(model.exit_head, problem, stage, self._num_steps, scale)
        self._meter = _Meter(len(self._layers), model.device)
        self._done, self._loss = 0, float("nan")

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """(step, row numbers of its batch): a fresh shuffle each epoch."""
        generator = torch.Generator().manual_seed(self._context.recipe.seed)
        bar = tqdm(
            range(self._num_steps), desc="off-ramps", disable=None if self._context.show_progress else True
        )
        order, position = torch.empty(0), 0
        for step in bar:
            if position >= len(order):
                order, position = torch.randperm(self._num_rows, generator=generator), 0
            yield step, order[position : position + self._stage.batch_size]
            position += self._stage.batch_size

    @property
    def is_to_be_judged(self) -> bool:
        """After an epoch, and at the end: the best weights may be the last ones."""
        return self._done % self._steps_per_epoch == 0 or self._done == self._num_steps

    def step(self, step: int, batch: _Batch) -> None:
        """One optimizer step."""
        logits = self._stack(batch.pooled)
        # They share no weight: the sum of their losses gives each its own gradient. A shared pooler gets the sum of
        # their gradients, and one norm over all is cut, both as through the backbone.
        losses = batch.losses(logits, self._stage.self_distillation)
        self._optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        summed([p.grad for p in self._stack.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self._stack.parameters(), self._stage.max_grad_norm)
        rate = self._schedule.get_last_lr()[0]
        self._optimizer.step()
        self._schedule.step()
        self._meter.add(losses.detach(), batch.losses(logits.detach(), None))
        if self._exit_head is not None:
            batch.teach(self._exit_head, logits.detach())
        self._done = step + 1
        if self._done % self._context.log_every(self._num_steps) == 0 or self._done == self._num_steps:
            self._log(rate)

    def _log(self, rate: float) -> None:
        self._loss, by_ramp = self._meter.drain()
        self._context.write(
            step=self._done,
            epoch=round(self._done / self._steps_per_epoch, 4),
            loss=self._loss,
            losses=dict(zip(map(str, self._layers), by_ramp, strict=True)),
            **({} if self._exit_head is None else {"certainty_loss": self._exit_head.drain()}),
            learning_rate=rate,
            seconds=self._clock.seconds,
        )

    def log_held_out(self, losses: list[float]) -> None:
        """Write what the off-ramps lose on held-out rows."""
        self._context.write(
            step=self._done,
            epoch=round(self._done / self._steps_per_epoch, 4),
            held_out_loss=sum(losses),
            held_out_losses=dict(zip(map(str, self._layers), losses, strict=True)),
        )

    def report(self) -> StageReport:
        """What it took."""
        return StageReport(
            number=self._context.number, seconds=self._clock.seconds, steps=self._done, loss=self._loss
        )


class _Meter:
    """Means over steps, on the device: nobody waits for a number that is not shown."""

    def __init__(self, num_ramps: int, device: torch.device) -> None:
        self._sums = torch.zeros(num_ramps + 1, device=device)
        self._steps = 0

    def add(self, losses: Tensor, of_labels: Tensor) -> None:
        """One step's loss of each off-ramp, as it trains and against the labels alone, (R,) each."""
        self._sums += torch.cat([losses.sum()[None], of_labels])
        self._steps += 1

    def drain(self) -> tuple[float, list[float]]:
        """(mean loss, mean loss of each off-ramp against the labels) since the last time."""
        summed([self._sums])
        total, *by_ramp = (self._sums / self._steps).tolist()
        self._sums.zero_()
        self._steps = 0
        return total, by_ramp


class _BestOffRamps:
    """Each off-ramp's weights where its own loss on held-out rows was lowest: none feels another's loss.

    With a shared pooler each does: the weights of all where the sum of their losses was lowest.
    """

    def __init__(
        self, stack: OffRampStack, held_out: _Cache, stage: OffRampStage, stopping: EarlyStopping | None
    ) -> None:
        assert stopping is not None
        self._stack, self._held_out, self._stage = stack, held_out, stage
        self._patience = stopping.patience
        self._waited = 0
        self._lowest = torch.full((stack.num_ramps,), torch.inf, device=stack.dense.device)
        self._weights = [p.detach().clone() for p in stack.parameters()]

    @torch.no_grad()
    def judge(self) -> list[float]:
        """Loss of each off-ramp as it is; where it is the lowest so far, its weights are kept."""
        losses = self._losses()
        better = losses < self._lowest
        if self._stack.shares_pooler:
            better = (losses.sum() < self._lowest.sum()).expand(len(losses))
        self._lowest = torch.where(better, losses, self._lowest)
        for kept, now in zip(self._weights, self._stack.parameters(), strict=True):
            chosen = better[: len(kept)]  # a shared pooler is one for all
            kept[chosen] = now[chosen]
        self._waited = 0 if bool(better.any()) else self._waited + 1
        return [float(x) for x in losses]

    @property
    def may_improve(self) -> bool:
        """False once none got better for as long as patience lasts."""
        return self._waited < self._patience

    @torch.no_grad()
    def restore(self) -> None:
        """Give every off-ramp its best weights back."""
        for kept, now in zip(self._weights, self._stack.parameters(), strict=True):
            now.copy_(kept)

    def _losses(self) -> Tensor:
        self._stack.eval()
        total = torch.zeros_like(self._lowest)
        for rows in torch.arange(self._held_out.num_rows).split(4096):
            batch = self._held_out.batch(rows)
            total += batch.losses(self._stack(batch.pooled), self._stage.self_distillation) * len(rows)
        self._stack.train()
        summed([total])
        return total / self._held_out.num_rows


class OffRampStack(nn.Module):
    """All off-ramps as one module: R poolers and classifiers in two batched products."""

    def __init__(self, model: DeeBertForSequenceClassification) -> None:
        super().__init__()
        ramps, poolers = cast(list[OffRamp], list(model.off_ramps)), _poolers(model)
        self.num_ramps, self.shares_pooler = len(ramps), model.off_ramp_pooler is not None
        self.activation, self.dropout = ramps[0].activation, nn.Dropout(ramps[0].dropout.p)
        # (P, W, H) and (P, 1, H): P is R, or 1 where the pooler is shared
        self.dense = nn.Parameter(torch.stack([p.weight.detach().T for p in poolers]))
        self.dense_bias = nn.Parameter(torch.stack([p.bias.detach()[None] for p in poolers]))
        self.classifier = nn.Parameter(torch.stack([r.classifier.weight.detach().T for r in ramps]))
        self.classifier_bias = nn.Parameter(torch.stack([r.classifier.bias.detach()[None] for r in ramps]))

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, N, W) -> (R, N, C)."""
        dense = self.dense.expand(self.num_ramps, -1, -1)
        inner = self.dropout(self.activation(torch.baddbmm(self.dense_bias, pooled, dense)))
        return torch.baddbmm(self.classifier_bias, inner, self.classifier)

    @torch.no_grad()
    def write_back(self, model: DeeBertForSequenceClassification) -> None:
        """Copy the trained weights into the model's off-ramps."""
        for i, pooler in enumerate(_poolers(model)):
            pooler.weight.copy_(self.dense[i].T)
            pooler.bias.copy_(self.dense_bias[i, 0])
        for i, ramp in enumerate(cast(list[OffRamp], list(model.off_ramps))):
            ramp.classifier.weight.copy_(self.classifier[i].T)
            ramp.classifier.bias.copy_(self.classifier_bias[i, 0])


def _poolers(model: DeeBertForSequenceClassification) -> list[nn.Linear]:
    """One for each off-ramp, or the one that they share."""
    if model.off_ramp_pooler is not None:
        return [model.off_ramp_pooler]
    return [ramp.dense for ramp in cast(list[OffRamp], list(model.off_ramps)) if ramp.dense is not None]
