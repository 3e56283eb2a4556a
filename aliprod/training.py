"""One round of training, as a generator of reports.

Everything random is a function of (seed, epoch, row) except the network's own generator, which is saved, so a
run resumed from a checkpoint ends with the weights of a run that was never stopped, bit for bit on a CPU.
"""

import hashlib
import threading
import time
import zipfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch._dynamo.exc import TorchDynamoException

from aliprod import InputError, metrics, optim
from aliprod.atomic import replacing
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
WITH_TRIPLETS = 0.5  # least share of the batches that must hold a triplet where a round asks for them


class Diverged(InputError):
    """A round whose loss or weights are no longer finite numbers."""


@dataclass(frozen=True)
class Report:
    """What happened since the last report: an epoch's end, or a checkpoint within one (then `val` is empty)."""

    epoch: int  # whole epochs done
    step: int  # updates done since the round began
    curve: list[dict[str, float]]  # step, loss and lr at some of the steps
    train: dict[str, float] = field(default_factory=dict)  # loss, gap, map, accuracy over the epoch as it was learnt
    val: dict[str, float] = field(default_factory=dict)  # as of metrics.summary
    best: bool = False  # whether val MAP is the highest so far
    seconds: float = field(default=0.0, compare=False)  # since the last report, in the process that made this one


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

    Checkpoints go to `folder` at each epoch's end, every `checkpoint_steps` updates and when `stop` is set, after
    which the generator ends early. With `resume` it continues from the newest one there, first yielding again what
    was reported before it. When the round is complete the model holds the weights of the epoch with the highest
    MAP on `val` (without val: of the last), the moving average of them if the round asks for one. `levels` are those of
    the classes in the product tree, for rounds that use it. Without a `folder` nothing is kept: for rounds that
    nobody resumes, without val. InputError where the round cannot learn what it asks for, and Diverged, at the end of
    the epoch, once its loss or its weights are not finite.
    """
    assert source.labels is not None
    assert folder or not val
    stop = stop or threading.Event()
    _refuse_without_triplets(row, source)
    torch.manual_seed(row.seed)
    course = _Course(_Learner(model, row, source, levels), row, source, val, Path(folder) if folder else None)

    if resume:
        course.restore()
        yield from (Report(**report) for report in course.state.reports)

    while course.state.epoch < row.epochs:
        through = yield from course.epoch(stop, checkpoint_steps)
        if not through:
            return
        yield course.close_epoch()
        if stop.is_set() and course.state.epoch < row.epochs:
            return

    model.load_state_dict(course.best())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a round in its folder that is whole, if there is any."""
    return next(filter(is_whole, sorted(folder.glob("step-*.pt"), reverse=True)), None)


def is_whole(file: Path) -> bool:
    """Whether all of what `torch.save` wrote can be read back and agrees with its checksums."""
    try:
        with zipfile.ZipFile(file) as parts:
            return parts.testzip() is None
    except Exception:  # whatever a damaged directory of parts leads the reader into
        return False


def load_weights(model: Recogniser, checkpoint: Path) -> None:
    """Gives `model` the weights it had at a checkpoint. InputError where they are of other classes."""
    weights = torch.load(checkpoint, map_location=model.device, weights_only=True)["parts"]["model"]
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"resume: {checkpoint} belongs to other data: the classes have changed since") from None


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
        self.labels = hashlib.sha256(source.labels.tobytes()).hexdigest()  # of all rows: what a checkpoint belongs to
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
            # The decay rises to the round's as steps go by, or a short round would keep the weights it began with.
            # Statistics of batches are averages already: averaged again they lag behind, which costs short rounds most.
            self.parts["average"] = ModelEmaV3(
                model, row.ema_decay, use_warmup=True, foreach=True, exclude_buffers=True
            )
            self.kept = self.parts["average"].module

    def step(self, inputs: torch.Tensor, labels: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One update at rate `lr`: logits (B, C) and loss (), both detached."""
        optim.set_rate(self.optimizer, lr)
        with autocast(self.model.device, self.row.precision):
            try:
                embeddings = self.embed(self.model, inputs)
            except TorchDynamoException as error:  # at the first step, where nothing compiled lies in torch's cache
                reason = str(error).partition("\n")[0]
                raise InputError(f"compile true: nothing can be compiled here, {reason}; must be false") from None
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
        return logits.detach(), loss.detach()

    def average(self, step: int) -> None:
        """Takes the weights after update number `step`, from 1, into their average, if the round asks for one."""
        if self.row.ema_decay:
            self.parts["average"].update(self.model, step)

    def refuse_what_diverged(self, loss: torch.Tensor, epoch: int) -> None:
        """Diverged if the epoch's loss (), a weight, a statistic or a moment of the optimizer is not finite."""
        moments = [moment for state in self.optimizer.state.values() for moment in state.values()]
        self.refuse_unless_finite("loss is", [loss], epoch)
        self.refuse_unless_finite("weights are", self.model.state_dict().values(), epoch)
        self.refuse_unless_finite("optimizer's moments are", moments, epoch)

    def refuse_unless_finite(self, what: str, values: Iterable[Any], epoch: int) -> None:
        """Diverged if one of the values that are tensors is not finite; the device is waited for once."""
        finite = [value.isfinite().all() for value in values if torch.is_tensor(value)]
        if finite and not torch.stack(finite).all():
            wider = ", or precision bf16 or fp32," if self.scaler.is_enabled() else ""
            raise Diverged(
                f"round {self.row.name}: in epoch {epoch} its {what} no longer finite; "
                f"a lower lr than {self.row.lr:g}{wider} may help"
            )


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


class _Course:
    """A round on its way: what learns, where it is, what it has reported, and its folder, if anything is kept."""

    def __init__(
        self,
        learner: _Learner,
        row: Round,
        source: Images | Features,
        val: Images | Features | None,
        folder: Path | None,
    ):
        assert source.labels is not None
        self.learner, self.row, self.source, self.val, self.folder = learner, row, source, val, folder
        self.labels = source.labels
        self.state, self.sums = _State(), _EpochSums(len(source.labels), learner.model.device)
        self.curve: list[dict[str, float]] = []
        self.began = time.monotonic()  # since the last report

    def epoch(self, stop: threading.Event, checkpoint_steps: int) -> Generator[Report, None, bool]:
        """Takes the steps that are left of this epoch, yielding a report at each checkpoint; False if stopped."""
        state, learner = self.state, self.learner
        learner.model.train()
        batches = _order(self.source.rows, self.labels, self.row, state.epoch)
        every = max(1, len(batches) // POINTS)
        todo = batches[state.batch :]

        with progress(total=len(batches), initial=state.batch, desc=f"epoch {state.epoch + 1}", unit="step") as bar:
            for inputs, rows in self.source.batches(todo, state.epoch):
                lr = optim.rate(self.row, state.epoch + state.batch / len(batches), 1 / len(batches))
                state.batch += 1
                bar.update()
                if len(rows) < 2:
                    continue  # of its images none can be read, or one, which batch norm cannot do with

                device = learner.model.device
                labels = torch.from_numpy(self.labels[rows]).to(device, non_blocking=True)  # (B,)
                logits, loss = learner.step(inputs.to(device, non_blocking=True), labels, lr)
                self.sums.add(logits, labels, loss)
                state.step += 1
                learner.average(state.step)
                if state.batch % every == 0:
                    self.curve.append({"step": state.step, "loss": loss.item(), "lr": lr})

                stopped = stop.is_set()
                if state.batch < len(batches) and (stopped or state.step % checkpoint_steps == 0):
                    yield self.report()
                    if stopped:
                        return False

        if not self.sums.count:
            raise InputError(
                f"epoch {state.epoch + 1}: no batch of its {len(batches)} has two photographs that can be read"
            )
        return True

    def close_epoch(self) -> Report:
        """Scores the epoch, and keeps its weights if none were better. Diverged where they are not finite."""
        state, learner = self.state, self.learner
        state.epoch, state.batch = state.epoch + 1, 0
        learner.refuse_what_diverged(self.sums.loss, state.epoch)
        scores = metrics.summary(predict(learner.kept, self.val, self.row.precision)) if self.val else {}
        learner.refuse_unless_finite("loss on val is", [torch.tensor(scores.get("loss", 0.0))], state.epoch)

        better = not scores or scores["map"] > state.best
        if better:
            state.best = scores.get("map", state.best)
            if self.folder:
                _write(self.folder / "best.pt", learner.kept.state_dict())

        learnt = self.sums.scores()
        self.sums.clear()
        return self.report(train=learnt, val=scores, best=better)

    def report(self, **scores: Any) -> Report:
        """What happened since the last report, which a checkpoint then holds too."""
        state, now = self.state, time.monotonic()
        report = Report(epoch=state.epoch, step=state.step, curve=self.curve, seconds=now - self.began, **scores)
        self.curve, self.began = [], now
        state.reports.append(asdict(report))
        if self.folder:
            _save(self.folder, self.learner, self.sums, self.row, state)
        return report

    def restore(self) -> None:
        """Goes back to the newest whole checkpoint."""
        self.state = _restore(self.folder, self.learner, self.sums, self.row)

    def best(self) -> dict[str, torch.Tensor]:
        """The weights of the best epoch; the last ones, where nothing is kept."""
        kept = self.learner.kept
        if not self.folder:
            return kept.state_dict()
        weights: dict[str, torch.Tensor] = torch.load(
            self.folder / "best.pt", map_location=self.learner.model.device, weights_only=True
        )
        return weights


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


def _refuse_without_triplets(row: Round, source: Images | Features) -> None:
    """InputError if the round asks for triplets and most batches, as the first epoch orders them, hold none."""
    if row.loss != "triplet" and not row.triplet_weight:
        return
    assert source.labels is not None
    batches = _order(source.rows, source.labels, row, epoch=0)
    counts = [np.unique(source.labels[batch], return_counts=True)[1] for batch in batches]
    usable = sum(len(count) > 1 and count.max() > 1 for count in counts)
    if usable < WITH_TRIPLETS * len(batches):
        raise InputError(
            f"round {row.name}: {usable} of the {len(batches)} batches of its first epoch hold a triplet, two "
            "photographs of a class and one of another; at least half must: take classes of two photographs or more, "
            f"and an images_per_class from 2 (it is {row.images_per_class}) to below batch_size ({row.batch_size})"
        )


def _save(folder: Path, learner: _Learner, sums: _EpochSums, row: Round, state: _State) -> None:
    checkpoint = {
        "round": row.model_dump_json(),
        "labels": learner.labels,
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
    if folder is None or newest is None:
        raise InputError(f"resume: {folder} holds no checkpoint that is whole")
    checkpoint = torch.load(newest, map_location=learner.model.device, weights_only=True)
    before, now = Round.model_validate_json(checkpoint["round"]).model_dump(), row.model_dump()
    names = [name for name in now if before[name] != now[name]]
    if names:
        changed = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
        raise InputError(f"resume: {newest} belongs to another round: {changed}")
    if checkpoint.get("labels", learner.labels) != learner.labels:
        raise InputError(f"resume: {newest} belongs to other data: photographs or classes have changed since")
    checkpoint["parts"].get("average", {}).pop("n_averaged", None)  # earlier versions averaged by a fixed decay
    for name, part in learner.parts.items():
        part.load_state_dict(checkpoint["parts"][name])
    vars(sums).update(checkpoint["sums"])
    torch.set_rng_state(checkpoint["generator"].cpu())
    if checkpoint["cuda_generators"]:
        torch.cuda.set_rng_state_all([generator.cpu() for generator in checkpoint["cuda_generators"]])
    state = _State(**checkpoint["state"])
    if any(report["best"] for report in state.reports) and not is_whole(folder / "best.pt"):
        _write(folder / "best.pt", learner.kept.state_dict())  # the best there is until the next epoch's end
        state.best = -1.0
    return state


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        torch.save(value, beside)
