"""Training and evaluation of a BDA model on a zero-shot set."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from bda_fused.modules import BDA, frozen
from bda_fused.zsl.data import Split, TwoDigits
from bda_fused.zsl.metrics import NotFiniteError, ZeroShotMetrics, zero_shot_metrics
from bda_fused.zsl.settings import Settings

LOSS_NAMES = ("total", "sce", "cal", "reg", "vce")
_EVALUATION_BATCH = 200
_WARM_UP = 0.15  # share of the steps in which the learning rate rises


class DivergedError(RuntimeError):
    """Training that left the finite numbers."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch left behind.

    Attributes:
        epoch: 1 for the first.
        losses: mean over the epoch's batches of every entry of `LOSS_NAMES`, the parts unweighted.
        metrics: on the test splits after the epoch; reported, never used to choose anything.
        seconds: since training began.
    """

    epoch: int
    losses: dict[str, float]
    metrics: ZeroShotMetrics
    seconds: float


def train(
    model: BDA,
    dataset: TwoDigits,
    settings: Settings,
    *,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    progress: bool = True,
) -> list[EpochRecord]:
    """Train in place with AdamW under a one-cycle learning rate; the last epoch's model is the result.

    Batches and dropout follow `settings.seed`; torch's global generator is left as it was. On the CPU the same seed and
    thread count give the same parameters bit for bit.

    Args:
        model: a BDA model on the device it is to be trained on.
        dataset: the set to train and test on.
        settings: epochs, batch size, learning rate, weight decay, seed.
        on_epoch: called after every epoch with its record.
        progress: show a progress bar on stderr.

    Returns:
        One record per epoch.

    Raises:
        ValueError: a batch is larger than the training split.
        DivergedError: a loss, or a class score after an epoch, is not finite.
    """
    if settings.batch_size > len(dataset.train):
        raise ValueError(
            f"batch_size must be at most the {len(dataset.train)} training images, got {settings.batch_size}"
        )
    device = next(model.parameters()).device
    images, labels = dataset.train.images.to(device), dataset.train.labels.to(device)
    steps_per_epoch = len(labels) // settings.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.epochs * steps_per_epoch, pct_start=_WARM_UP
    )
    history: list[EpochRecord] = []
    start = time.perf_counter()
    with (
        torch.random.fork_rng(),
        tqdm(total=settings.epochs * steps_per_epoch, unit="step", disable=not progress) as bar,
    ):
        torch.manual_seed(settings.seed)
        for epoch in range(1, settings.epochs + 1):
            model.train()
            sums = torch.zeros(len(LOSS_NAMES))
            for batch in torch.randperm(len(labels)).to(device).split(settings.batch_size)[:steps_per_epoch]:
                losses = model.losses(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                losses["total"].backward()
                optimizer.step()
                schedule.step()
                values = torch.stack([losses[name].detach() for name in LOSS_NAMES]).cpu()
                if not values.isfinite().all():
                    raise DivergedError(f"training diverged in epoch {epoch}: {_report(values)}")
                sums += values
                bar.update()
            try:
                metrics = evaluate(model, dataset)
            except NotFiniteError as error:
                raise DivergedError(f"training diverged in epoch {epoch}: {error}") from error
            record = EpochRecord(
                epoch=epoch,
                losses=dict(zip(LOSS_NAMES, (sums / steps_per_epoch).tolist(), strict=True)),
                metrics=metrics,
                seconds=time.perf_counter() - start,
            )
            history.append(record)
            on_epoch(record)
            bar.set_postfix(loss=f"{record.losses['total']:.3f}", H=f"{record.metrics.H:.1f}")
    return history


def _report(values: Tensor) -> str:
    losses = ", ".join(f"{name} {value:.3g}" for name, value in zip(LOSS_NAMES, values.tolist(), strict=True))
    return f"losses must be finite, got {losses}"


def evaluate(model: BDA, dataset: TwoDigits) -> ZeroShotMetrics:
    """T1, U, S and H on the test splits, in evaluation mode."""
    return zero_shot_metrics(
        class_scores(model, dataset.test_seen),
        dataset.test_seen.labels,
        class_scores(model, dataset.test_unseen),
        dataset.test_unseen.labels,
        seen=dataset.seen,
        unseen=dataset.unseen,
    )


def class_scores(model: BDA, split: Split) -> Tensor:
    """(N, K) calibrated class scores of a split, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode(), frozen(model):
        batches = split.images.split(_EVALUATION_BATCH)
        return torch.cat([model(images.to(device)).class_scores.cpu() for images in batches])
