"""One round of training, as a generator of reports.

Everything random is a function of (seed, epoch, row) except the network's own generator, which is saved, so a
run resumed from a checkpoint ends with the weights of a run that was never stopped, bit for bit on a CPU.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from aliprod import InputError, metrics, optim
from aliprod.features import Features
from aliprod.heads import Cosine
from aliprod.hierarchy import Tree
from aliprod.images import Images
from aliprod.losses import Criterion
from aliprod.model import Recogniser, autocast, half
from aliprod.prediction import predict
from aliprod.progress import progress
from aliprod.recipe import Round
from aliprod.taxonomy import Levels

KEEP = 2  # newest checkpoints
POINTS = 100  # of the loss curve an epoch


@dataclass(frozen=True)
class Report:
    """What happened since the last report: an epoch's end, or a checkpoint within one (then `val` is empty)."""

    epoch: int  # whole epochs done
    step: int  # updates done since the round began
    curve: list[dict[str, float]]  # step, loss and lr at some of the steps
    train: dict[str, float] = field(default_factory=dict)  # loss, gap, map, accuracy over the epoch as it was learnt
    val: dict[str, float] = field(default_factory=dict)  # as of metrics.summary
    best: bool = False  # whether val MAP is the highest so far


@dataclass
class _State:
    """Where a round is: all that a checkpoint holds beside tensors."""

    epoch: int = 0
    batch: int = 0  # of the epoch
    step: int = 0
    best: float = -1.0
    reports: list[dict[str, Any]] = field(default_factory=list)


def train(
    model: Recogniser,
    row: Round,
    source: Images | Features,
    val: Images | Features | None,
    folder: str | Path | None,
    *,
    resume: bool = False,
    stop: threading.Event | None = None,
    checkpoint_steps: int = 1000,
    levels: Levels | None = None,
) -> Iterator[Report]:
    """Trains `model` by `row` on `source`, yielding a report an epoch and one at each checkpoint within it.

    Without a `folder`, for rounds without val that nobody resumes, nothing is kept.

    Checkpoints go to `folder` at each epoch's end, every `checkpoint_steps` updates and when `stop` is set, after
    which the generator ends early. With `resume` it continues from the newest one there, first yielding again what
    was reported before it. When the round is complete the model holds the weights of the epoch with the highest
    MAP on `val` (without val: of the last), the moving average of them if the round asks for one. `levels` are those of
    the classes in the product tree, for rounds that use it.
    """
    assert source.labels is not None
    assert folder or not val
    folder = Path(folder) if folder else None
    stop = stop or threading.Event()
    torch.manual_seed(row.seed)
    learner = _Learner(model, row, source, levels)
    state, sums = _State(), _EpochSums(len(source.rows), model.device)
    if resume:
        state = _restore(folder, learner, sums, row)
        yield from (Report(**report) for report in state.reports)
    curve: list[dict[str, float]] = []

    def saved(**scores: Any) -> Report:
        report = Report(epoch=state.epoch, step=state.step, curve=list(curve), **scores)
        curve.clear()
        state.reports.append(asdict(report))
        _save(folder, learner, sums, row, state)
        return report

    while state.epoch < row.epochs:
        model.train()
        batches = _order(source.rows, source.labels, row, state.epoch)
        every = max(1, len(batches) // POINTS)
        todo = batches[state.batch :]
        with progress(total=len(batches), initial=state.batch, desc=f"epoch {state.epoch + 1}", unit="step") as bar:
            for inputs, rows in source.batches(todo, state.epoch):
                lr = optim.rate(row, state.epoch + state.batch / len(batches), 1 / len(batches))
                state.batch += 1
                bar.update()
                if len(rows) == 0:
                    continue  # none of its images can be read
                labels = torch.from_numpy(source.labels[rows]).to(model.device, non_blocking=True)  # (B,)
                logits, loss = learner.step(inputs.to(model.device, non_blocking=True), labels, lr)
                sums.add(logits, labels, loss)
                state.step += 1
                if state.batch % every == 0:
                    curve.append({"step": state.step, "loss": loss.item(), "lr": lr})
                stopped = stop.is_set()
                if state.batch < len(batches) and (stopped or state.step % checkpoint_steps == 0):
                    yield saved()
                    if stopped:
                        return
        state.epoch, state.batch = state.epoch + 1, 0
        scores = metrics.summary(predict(learner.kept, val, row.precision)) if val else {}
        better = not scores or scores["map"] > state.best
        if better:
            state.best = scores.get("map", state.best)
            _keep_best(folder, learner)
        learnt = sums.scores()
        sums.clear()
        yield saved(train=learnt, val=scores, best=better)
        if stop.is_set() and state.epoch < row.epochs:
            return
    model.load_state_dict(_best(folder, learner))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a round in its folder, if there is any."""
    return max(folder.glob("step-*.pt"), default=None)


def load_weights(model: Recogniser, checkpoint: Path) -> None:
    """Gives `model` the weights it had at a checkpoint."""
    model.load_state_dict(torch.load(checkpoint, map_location=model.device, weights_only=True)["parts"]["model"])


class _Learner:
    """What one step changes: the model, its optimizer, the gradients' scale, the weights' average."""

    def __init__(self, model: Recogniser, row: Round, source: Images | Features, levels: Levels | None):
        model.freeze(row.freeze)
        if row.compile:
            model.backbone.compile()
        self.row = row
        self.model = model
        self.embed = source.embed
        assert source.labels is not None
        counts = np.bincount(source.labels[source.rows], minlength=model.num_classes).clip(1)
        self.counts = torch.from_numpy(counts).to(model.device)  # (C,)
        self.criterion = Criterion(row, self.counts, Tree(levels, model.device) if levels else None)
        self.follower: Cosine | None = None  # the head, where it follows the embeddings instead of learning
        if row.loss == "triplet":
            assert isinstance(model.head, Cosine), "the recipe refuses others"
            self.follower = model.head
            torch.nn.init.zeros_(self.follower.weight)
        self.optimizer = optim.optimizer(model, row)
        scaled = half(model.device, row.precision) is torch.float16
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=scaled)
        self.parts: dict[str, Any] = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.kept = model  # whose weights are evaluated and kept
        if row.ema_decay:
            averaging = get_ema_multi_avg_fn(row.ema_decay)
            self.parts["average"] = AveragedModel(model, multi_avg_fn=averaging, use_buffers=True)
            self.kept = self.parts["average"].module

    def step(self, inputs: torch.Tensor, labels: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One update at rate `lr`: logits (B, C) and loss (), both detached."""
        optim.set_rate(self.optimizer, lr)
        with autocast(self.model.device, self.row.precision):
            embeddings = self.embed(self.model, inputs)
            with torch.set_grad_enabled(self.follower is None):
                logits = self.model.head(embeddings)
            branches = self.model.branches(embeddings) if self.model.branches else None
        loss = self.criterion(logits, labels, embeddings, branches)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.follower:
            self.follower.follow(embeddings, labels, self.counts)
        if self.row.ema_decay:
            self.parts["average"].update_parameters(self.model)
        return logits.detach(), loss.detach()


class _EpochSums:
    """Answers of one epoch kept on the device as they come; scored once, at its end."""

    def __init__(self, size: int, device: torch.device):
        self.labels = torch.zeros(size, dtype=torch.int64, device=device)
        self.preds = torch.zeros(size, dtype=torch.int64, device=device)
        self.confidences = torch.zeros(size, device=device)
        self.loss = torch.zeros((), device=device)
        self.count = 0

    def clear(self) -> None:
        """Begins the next epoch."""
        self.loss.zero_()
        self.count = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """logits (B, C), labels (B,), loss () their mean."""
        logits = logits.float()
        values, preds = logits.max(dim=1)
        place = slice(self.count, self.count + len(labels))
        self.labels[place], self.preds[place] = labels, preds
        self.confidences[place] = (values - logits.logsumexp(dim=1)).exp()
        self.loss += loss * len(labels)
        self.count += len(labels)

    def scores(self) -> dict[str, float]:
        """loss, gap, map and accuracy of the epoch."""
        labels, preds, confidences = (
            values[: self.count].cpu().numpy() for values in (self.labels, self.preds, self.confidences)
        )
        return {
            "loss": self.loss.item() / max(1, self.count),
            "gap": metrics.gap(labels == preds, confidences),
            "map": metrics.mean_class_accuracy(labels, preds),
            "accuracy": float((labels == preds).mean()),
        }


def _order(rows: np.ndarray, labels: np.ndarray, row: Round, epoch: int) -> list[np.ndarray]:
    """The epoch's batches; a last, smaller one is left to chance, as batch norm and the rate assume full ones."""
    rng = np.random.default_rng([row.seed, epoch])
    shuffled = rng.permutation(rows)
    if row.images_per_class > 1:  # groups of so many of a class, the groups in random order
        shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
        sorted_labels = labels[shuffled]
        place = np.arange(len(rows)) - np.searchsorted(sorted_labels, sorted_labels)  # within its class
        starts = place % row.images_per_class == 0
        shuffled = shuffled[np.argsort(rng.permutation(starts.sum())[np.cumsum(starts) - 1], kind="stable")]
    whole = max(1, len(rows) // row.batch_size)
    return [shuffled[at * row.batch_size : (at + 1) * row.batch_size] for at in range(whole)]


def _save(folder: Path | None, learner: _Learner, sums: _EpochSums, row: Round, state: _State) -> None:
    if not folder:
        return
    checkpoint = {
        "round": row.model_dump_json(),
        "state": asdict(state),
        "sums": vars(sums),
        "parts": {name: part.state_dict() for name, part in learner.parts.items()},
        "generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    _write(folder / f"step-{state.step:09d}.pt", checkpoint)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def _restore(folder: Path | None, learner: _Learner, sums: _EpochSums, row: Round) -> _State:
    newest = newest_checkpoint(folder) if folder else None
    if newest is None:
        raise InputError(f"resume: {folder} holds no checkpoint")
    checkpoint = torch.load(newest, map_location=learner.model.device, weights_only=True)
    if checkpoint["round"] != row.model_dump_json():
        before, now = Round.model_validate_json(checkpoint["round"]).model_dump(), row.model_dump()
        names = [name for name in now if before[name] != now[name]]
        changed = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
        raise InputError(f"resume: {newest} belongs to another round: {changed}")
    for name, part in learner.parts.items():
        part.load_state_dict(checkpoint["parts"][name])
    vars(sums).update(checkpoint["sums"])
    torch.set_rng_state(checkpoint["generator"].cpu())
    if checkpoint["cuda_generators"]:
        torch.cuda.set_rng_state_all([generator.cpu() for generator in checkpoint["cuda_generators"]])
    return _State(**checkpoint["state"])


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(value, beside)
    beside.replace(path)


def _keep_best(folder: Path | None, learner: _Learner) -> None:
    if folder:
        _write(folder / "best.pt", learner.kept.state_dict())


def _best(folder: Path | None, learner: _Learner) -> dict[str, torch.Tensor]:
    """The weights that were kept; the last ones, where none were."""
    if not folder:
        return learner.kept.state_dict()
    weights: dict[str, torch.Tensor] = torch.load(
        folder / "best.pt", map_location=learner.model.device, weights_only=True
    )
    return weights
