"""What a model knows by example: a prototype a class, those of products photographed after training among them.

Embeddings are compared where classes look round: whitened by their spread within the trained classes, as in linear
discriminant analysis, then normalised. The nearest class mean is right more often there, and, unlike the head's
weights, the mean of a few photographs is enough for a new class.

Beside a saved model: gallery.safetensors, enrolled.csv (class_id, name, path, sha256, file, run; a row a photograph of
those enrolled) and, where there are very many prototypes, gallery.faiss. No pickles.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from aliprod import InputError, csvfile

if TYPE_CHECKING:
    from aliprod.model import Saved

EXACT = 100_000  # prototypes up to which all are compared; FAISS finds the nearest among more
NEAREST = 256  # of them, those that take part in the softmax then
PROBES = 64  # cells that FAISS looks into, of about 4 sqrt(prototypes)
Fuse = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # embeddings (B, D), logits (B, C) -> (B, C + E)
USES = ("head", "gallery", "both")
ENROLLED = ["class_id", "name", "path", "sha256", "file", "run"]  # columns of enrolled.csv


class Index:
    """The nearest of `vectors` (M, D) by inner product, on any device: all are compared up to `exact` of them, beyond
    FAISS (on the processor) looks only where they are likely to be. One interface for both."""

    def __init__(self, vectors: torch.Tensor, exact: int = EXACT, path: Path | None = None):
        """`path`: where FAISS's index was written by `save`, if it was; else it is built now."""
        self.vectors, self.num = vectors, len(vectors)
        self.faiss: Any = None
        if self.num > exact:
            import faiss  # takes a while: only those who need it wait for it

            if path and path.exists():
                self.faiss = faiss.read_index(str(path))
            else:
                cells = min(round(4 * self.num**0.5), self.num)
                self.faiss = faiss.index_factory(vectors.shape[1], f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
                self.faiss.cp.max_points_per_centroid = 40
                self.faiss.train(vectors.numpy())
                self.faiss.add(vectors.numpy())
            self.faiss.nprobe = PROBES

    def save(self, path: Path) -> None:
        """Writes what took long to build, if anything did."""
        if self.faiss:
            import faiss

            faiss.write_index(self.faiss, str(path))

    def search(self, vectors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """vectors (B, D) -> similarities (B, k) and rows (B, k) of the nearest, nearest first, at most all of them.

        A place that FAISS could not fill has -inf and the row after the last.
        """
        k = min(k, self.num)
        if not self.faiss:
            return tuple((vectors @ self.vectors.T).topk(k))  # type: ignore[return-value]
        similarities, rows = map(torch.from_numpy, self.faiss.search(vectors.float().cpu().numpy(), k))
        found = rows >= 0
        similarities = torch.where(found, similarities, -torch.inf).to(vectors.device)
        return similarities, torch.where(found, rows, self.num).to(vectors.device)

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """vectors (B, D) -> similarities (B, M); those that are not among FAISS's NEAREST are -inf."""
        if not self.faiss:
            return vectors @ self.vectors.T
        similarities, rows = self.search(vectors, NEAREST)
        return similarities.new_full((len(vectors), self.num + 1), -torch.inf).scatter_(1, rows, similarities)[:, :-1]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Prototypes of the classes trained on and of those enrolled since.

    An embedding's place (D,) is its direction less `center` (D,), times `whitening` (D, D). Kept are the mean places
    `means` (C, D) float16 of the photographs `counts` (C,) of the C trained classes, whose class_id, name and path are
    `trained`; and, of every enrolled photograph, its row in `enrolled` (P rows; columns ENROLLED) and its place
    (P, D) float16, in the order of class_id and sha256, so that it does not matter when each came. `noise` is the
    variance of places within classes over that between them; probabilities are the softmax of `scale` times
    similarities.
    """

    center: torch.Tensor
    whitening: torch.Tensor
    means: torch.Tensor
    counts: torch.Tensor
    places: torch.Tensor
    noise: float
    scale: float
    trained: pd.DataFrame
    enrolled: pd.DataFrame
    folder: Path | None = None
    exact: int = EXACT

    @cached_property
    def new(self) -> pd.DataFrame:
        """The enrolled classes that were not trained on: class_id, name, path."""
        classes = self.enrolled.drop_duplicates("class_id")
        classes = classes[~classes["class_id"].isin(self.trained["class_id"])]
        return classes[["class_id", "name", "path"]].reset_index(drop=True)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """All classes, the trained ones first: class_id, name, path; the row is that of `prototypes`."""
        return pd.concat([self.trained[["class_id", "name", "path"]], self.new], ignore_index=True)

    @cached_property
    def prototypes(self) -> torch.Tensor:
        """The classes' vectors (C + E, D) float32; 0 for a trained class without photographs.

        Each is the direction of a class's mean, times sqrt(1 + noise / n) for n photographs. The mean of n is longer
        than the true one by that factor, and its direction the further off: a photograph's expected cosine with the
        means of its own or any class is smaller by it. Without the factor a class of one photograph would hardly ever
        win against those of many.
        """
        rows = torch.from_numpy(pd.Index(self.classes["class_id"]).get_indexer(self.enrolled["class_id"]))
        counts = torch.cat([self.counts, torch.zeros(len(self.new), dtype=torch.int64)])
        sums = torch.cat([self.means.float() * self.counts[:, None], torch.zeros(len(self.new), self.means.shape[1])])
        sums.index_add_(0, rows, self.places.float())
        counts.index_add_(0, rows, torch.ones_like(rows))
        return normalize(sums) * (1 + self.noise / counts.clamp_min(1)).sqrt()[:, None]

    def index(self, device: torch.device) -> Index:
        """The index of `prototypes`, made once for a device."""
        key = f"index on {device}"
        if key not in self.__dict__:
            path = self.folder / "gallery.faiss" if self.folder else None
            vectors = self.prototypes if len(self.classes) > self.exact else self.prototypes.to(device)
            self.__dict__[key] = Index(vectors, self.exact, path)
        return self.__dict__[key]

    def place(self, embeddings: torch.Tensor) -> torch.Tensor:
        """embeddings (B, D) -> places (B, D), not normalised: the mean of some is the place of their mean."""
        center, whitening = self.center.to(embeddings.device), self.whitening.to(embeddings.device)
        return (normalize(embeddings.float()) - center) @ whitening

    def search(self, embeddings: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """embeddings (B, D) -> similarities (B, k) and rows of `classes` (B, k), nearest first."""
        return self.index(embeddings.device).search(normalize(self.place(embeddings)), k)

    def similarities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """embeddings (B, D) -> (B, C + E), as of Index.scores."""
        return self.index(embeddings.device).scores(normalize(self.place(embeddings)))

    def alone(self, embeddings: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, C + E) from the gallery, whatever the head says.

        Among very many classes the softmax is over the NEAREST that FAISS finds. What that neglects is at most
        (M - NEAREST) times the probability of the last of these.
        """
        return (self.scale * self.similarities(embeddings)).log_softmax(dim=1)

    def fused(self, embeddings: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, C + E): the gallery says how likely the enrolled classes are, the head shares the rest.

        p(enrolled c) = p_gallery(c), p(trained c) = p_gallery(any trained) * p_head(c), which sum to 1. logits (B, C)
        are the head's, already divided by their temperature.
        """
        gallery = self.alone(embeddings, logits)
        trained = gallery[:, : len(self.trained)].logsumexp(dim=1, keepdim=True)
        return torch.cat([trained + logits.log_softmax(dim=1), gallery[:, len(self.trained) :]], dim=1)

    def replace(self, enrolled: pd.DataFrame, places: torch.Tensor) -> "Gallery":
        """The same trained classes with these enrolled photographs, put in their order."""
        table = enrolled.reset_index(drop=True).sort_values(["class_id", "sha256"])
        order = torch.tensor(table.index.to_numpy(copy=True))
        return dataclasses.replace(
            self, enrolled=table.reset_index(drop=True), places=places[order].half(), folder=None
        )

    def save(self, folder: str | Path) -> None:
        """Writes the gallery into the folder of a saved model, in the place of the one there."""
        folder = Path(folder)
        numbers = {"noise": torch.tensor(self.noise), "scale": torch.tensor(self.scale)}
        tensors = {name: getattr(self, name) for name in ("center", "whitening", "means", "counts", "places")}
        save_file(tensors | numbers, folder / "gallery.safetensors")
        csvfile.write(self.enrolled, folder / "enrolled.csv")
        (folder / "gallery.faiss").unlink(missing_ok=True)
        if len(self.classes) > self.exact:
            self.index(torch.device("cpu")).save(folder / "gallery.faiss")

    @staticmethod
    def load(folder: Path, trained: pd.DataFrame) -> "Gallery | None":
        """The gallery in the folder of a saved model of these classes, None where there is none."""
        if not (folder / "gallery.safetensors").exists():
            return None
        tensors: dict[str, Any] = load_file(folder / "gallery.safetensors")
        tensors |= {name: tensors[name].item() for name in ("noise", "scale")}
        enrolled = csvfile.read(folder / "enrolled.csv", ENROLLED)
        return Gallery(**tensors, trained=trained, enrolled=enrolled, folder=folder)


def answering(saved: "Saved", using: str) -> tuple["Saved", Fuse | None]:
    """Whose classes and tree the answers are of, and prediction.predict's `fuse`, when answering by `using`.

    "head": the classes trained on; "gallery": all, by similarity alone; "both": all, fused, which is the head where
    there are no others. InputError if it is none of these, or the model has no gallery to answer from.
    """
    if using not in USES:
        raise InputError(f"using {using!r}: must be {', '.join(USES)}")
    if using == "gallery" and not saved.gallery:
        raise InputError("using 'gallery': the model was saved without one; train its round again")
    if using == "head" or not saved.gallery or (using == "both" and saved.gallery.new.empty):
        return saved, None
    return saved.extended, saved.gallery.alone if using == "gallery" else saved.gallery.fused
