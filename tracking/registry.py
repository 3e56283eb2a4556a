"""The registered models: two names, two questions, each with a champion of its own.

The alias `champion` of a name is the only truth about it. The tag `aliprod.over` of its version says whom it replaced.
Versions with enrolments follow one another in the line of the version that was promoted, and the aliases stand at the
last of a line. Whatever follows from these is set right by the next command if a machine dies in between.
"""

import contextlib
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from aliprod import InputError, first_line
from aliprod.sharing import locked
from tracking.spool import insistent

EXTRACTOR = "aliprod-extractor"
CLASSIFIER = "aliprod-classifier"
NAMES = (EXTRACTOR, CLASSIFIER)
USES = {
    EXTRACTOR: "Networks of the best embeddings, to start rounds from: `-P init=models:/aliprod-extractor@champion`",
    CLASSIFIER: "Networks of the best answers, to serve: `mlflow models serve -m models:/aliprod-classifier@champion`",
}
CHAMPION = "champion"
PREVIOUS = "previous"

# The decisions on a version, kept in its tag.
CLAIMED = "claimed"  # it asks for the title, and may be a dead machine's
PROMOTED = "promoted"
OVERTAKEN = "overtaken"  # another version, of the same predecessor, came before
LEAVING = "being rolled back"
LEFT = "rolled back"

# No such model, no such alias; and what a server with logins says of a model that is not there.
NONE_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
PATIENCE = 300_000  # milliseconds after which another machine's claim that came to nothing is a dead machine's


def champion(name: str) -> ModelVersion | None:
    """The version of the registered model `name` that is champion today."""
    return _or_none(MlflowClient().get_model_version_by_alias, name, CHAMPION)


def model_id(version: ModelVersion) -> str:
    """Id of the logged model that a version is of."""
    return version.tags.get("aliprod.model") or str(version.model_id)


def line(version: ModelVersion) -> list[ModelVersion]:
    """The versions of one promoted model, oldest first: that of its round, then those with enrolments."""
    return [
        other
        for other in _versions(version.name)
        if _line(other) == _line(version) and _decision(other) != OVERTAKEN
    ] or [version]  # fmt: skip


def crown(
    name: str, model: str, over: ModelVersion | None, about: dict[str, Any], note: str, work: Path
) -> ModelVersion | None:
    """Registers the logged model `model` as a version of `name` and makes it champion in the place of `over`.

    None, and nothing moved, if `over` is champion no more or another promotion over it came first. The versions of a
    name are numbered in one order for all machines, so a version is also a claim to the title: of those not settled
    yet the lowest wins. `about` becomes the version's tags, `note` its description.
    """
    client = MlflowClient()
    with _locked(work) as claimant:
        if _number(champion(name)) != _number(over):
            return None

        tags = about | {"over": _number(over), "model": model, "decision": CLAIMED, "claimant": claimant}
        claim = _register(name, model, tags, note)
        earlier = [
            version
            for version in _versions(name)
            if _decision(version) == CLAIMED
            and _number(version) != _number(over)
            and int(version.version) < int(claim.version)
        ]
        # The lock is ours: who claimed under it before, and has not settled it, has died.
        dead = [version for version in earlier if version.tags.get("aliprod.claimant") == claimant]
        for version in dead:
            _decide(version, OVERTAKEN)

        rivals = [
            version
            for version in earlier
            if version not in dead and claim.creation_timestamp - version.creation_timestamp < PATIENCE
        ]
        if rivals or _number(champion(name)) != _number(over):
            _decide(claim, OVERTAKEN)
            return None

        if over and _decision(over) == LEAVING:
            _decide(over, PROMOTED)  # that rollback died before it had moved anything
        client.set_registered_model_alias(name, CHAMPION, claim.version)
        _decide(claim, PROMOTED)
        _follow(name, claim)
        return claim


def rollback(names: Sequence[str], work: Path) -> list[tuple[ModelVersion, ModelVersion]]:
    """Makes `previous` the champion again, of each name: who left and who came back.

    Without `names` it is those that the last promotion made a champion of in the place of another. `previous` is then
    whom that one once replaced. InputError where there is nobody to go back to. If a rollback died half-way, it is
    brought to its end, and that is all.
    """
    with _locked(work):
        halfway = [version for name in NAMES for version in _versions(name) if _decision(version) == LEAVING]
        moved = any(_number(champion(version.name)) != _number(version) for version in halfway)
        leaving = halfway if moved else _last_promoted() if not names else [_reigning(name) for name in names]
        steps = [(left, _predecessor(left)) for left in leaving]

        for left, _ in steps:
            _decide(left, LEAVING)
        for left, back in steps:
            if _number(champion(left.name)) == _number(left):
                MlflowClient().set_registered_model_alias(left.name, CHAMPION, back.version)
            _follow(left.name)
        for left, _ in steps:
            _decide(left, LEFT)
        return steps


def classifier(name: str) -> ModelVersion | None:
    """The classifier's version that a URI names by number or alias, None if it names something else."""
    named = re.fullmatch(rf"models:/{CLASSIFIER}(?:/(\d+)|@([\w-]+))", name)
    if not named:
        return None
    client = MlflowClient()
    if named[1]:
        return _or_none(client.get_model_version, CLASSIFIER, named[1])
    return _or_none(client.get_model_version_by_alias, CLASSIFIER, named[2])


def succeed(source: ModelVersion, model: str, about: dict[str, Any], work: Path) -> ModelVersion:
    """Registers the logged model `model` as the classifier's version after `source`, in the same line.

    Aliases at that line move to it. Versions with enrolments are one line, or what one enrolled the next would lose:
    InputError if `source` is not the last of it; if it is no more when this one is registered, that is marked as
    overtaken. `about` becomes tags, with those of `source`.
    """
    tags = {key: value for key, value in source.tags.items() if key != "aliprod.decision"}
    tags |= about | {"model": model, "line": _line(source)}
    with _locked(work):
        settled = {_number(version) for version in _versions(CLASSIFIER) if _decision(version) != CLAIMED}
        _refuse_followed(source, line(source))
        successor = _register(CLASSIFIER, model, tags, source.description or "")
        try:
            earlier = [version for version in line(source) if int(version.version) < int(successor.version)]
            _refuse_followed(source, earlier)
        except InputError:
            _decide(successor, OVERTAKEN)
            raise
        finally:
            _follow(CLASSIFIER)  # even then: what came first may have taken this one, the newest, for its successor

        # A promotion from another machine may have come between reading the alias and moving it.
        own = {_number(version) for version in line(source)}
        for version in _versions(CLASSIFIER):
            replaced_ours = version.tags.get("aliprod.over") in own and _number(version) not in own | settled
            if replaced_ours and _decision(version) == PROMOTED:
                _follow(CLASSIFIER, version)
        return successor


def repair(work: Path) -> None:
    """Sets right what commands that died have left: aliases that do not stand at the last of a line, open claims."""
    with _locked(work):
        for name in NAMES:
            _follow(name)


@insistent
def _follow(name: str, lead: ModelVersion | None = None) -> None:
    """Sets all that follows from the champion of a name, or from `lead`, which is to be it."""
    lead = lead or champion(name)
    if not lead:
        return
    if _decision(lead) == CLAIMED:
        _decide(lead, PROMOTED)
    last, before = line(lead)[-1], _before(lead)
    _point(name, CHAMPION, last)
    if before:
        _point(name, PREVIOUS, before[-1])
    elif _or_none(MlflowClient().get_model_version_by_alias, name, PREVIOUS):
        _point(name, PREVIOUS, last)  # back at the first: not everybody may delete what says `previous`


def _point(name: str, alias: str, version: ModelVersion) -> None:
    client = MlflowClient()
    if _number(_or_none(client.get_model_version_by_alias, name, alias)) != _number(version):
        client.set_registered_model_alias(name, alias, version.version)


def _reigning(name: str) -> ModelVersion:
    version = champion(name)
    if not version:
        raise InputError(f"rollback: {name} has no {CHAMPION}; `promote` makes one")
    return version


def _last_promoted() -> list[ModelVersion]:
    """The champions that the last promotion made, but for those that replaced none, if another did."""
    champions = [version for name in NAMES if (version := champion(name))]
    if not champions:
        raise InputError(f"rollback: {' and '.join(NAMES)} have no {CHAMPION}; `promote` makes one")
    newest = max(champions, key=lambda version: int(line(version)[0].creation_timestamp))
    together = [
        version
        for version in champions
        if version.tags.get("aliprod.promotion") == newest.tags.get("aliprod.promotion")
    ]
    return [version for version in together if _before(version)] or together


def _predecessor(left: ModelVersion) -> ModelVersion:
    if before := _before(left):
        return before[-1]
    try:
        if over := left.tags.get("aliprod.over"):
            MlflowClient().get_model_version(left.name, over)
    except MlflowException as error:
        raise InputError(f"rollback: {first_line(error)}") from None
    raise InputError(f"rollback: version {left.version} of {left.name} replaced none, there is no {PREVIOUS}")


def _before(version: ModelVersion) -> list[ModelVersion]:
    """The line that a version's replaced, oldest first; empty where it replaced none, or that is gone."""
    over = version.tags.get("aliprod.over")
    if over is None and (extractor := version.tags.get("aliprod.extractor")):
        # A classifier from when both names moved as one: it replaced that of the extractor that its own replaced.
        own = _or_none(MlflowClient().get_model_version, EXTRACTOR, extractor)
        before = own.tags.get("aliprod.over") if own else None
        return [other for other in _versions(CLASSIFIER) if before and other.tags.get("aliprod.extractor") == before]
    replaced = _or_none(MlflowClient().get_model_version, version.name, over) if over else None
    return line(replaced) if replaced else []


def _line(version: ModelVersion) -> str:
    """What the versions of a line have in common: the number of the first; of versions from when both names moved as
    one, that of their extractor."""
    if extractor := version.tags.get("aliprod.extractor"):
        return f"extractor {extractor}"
    return version.tags.get("aliprod.line", _number(version))


def _versions(name: str) -> list[ModelVersion]:
    """All versions of a name, oldest first."""
    versions = MlflowClient().search_model_versions(f"name = '{name}'")
    return sorted(versions, key=lambda version: int(version.version))


def _refuse_followed(source: ModelVersion, versions: list[ModelVersion]) -> None:
    """InputError if `source` is not the last of these versions, those of its line."""
    if _number(versions[-1]) != _number(source):
        raise InputError(
            f"version {source.version} of {CLASSIFIER} was followed by {versions[-1].version}, with enrolments of its"
            f" own; go on from models:/{CLASSIFIER}/{versions[-1].version}"
        )


def _register(name: str, model: str, tags: dict[str, Any], note: str) -> ModelVersion:
    named = {key if "." in key else f"aliprod.{key}": str(value) for key, value in tags.items()}
    version = mlflow.register_model(f"models:/{model}", name, tags=named)
    MlflowClient().update_model_version(name, version.version, note)
    MlflowClient().update_registered_model(name, USES[name])
    return version


def _decision(version: ModelVersion) -> str:
    return version.tags.get("aliprod.decision", "")


def _decide(version: ModelVersion, decision: str) -> None:
    MlflowClient().set_model_version_tag(version.name, version.version, "aliprod.decision", decision)


def _or_none(find: Callable[..., ModelVersion], *names: str) -> ModelVersion | None:
    try:
        return find(*names)
    except MlflowException as error:
        if error.error_code in NONE_SUCH:
            return None
        raise


def _number(version: ModelVersion | None) -> str:
    return str(version.version) if version else ""


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[str]:
    """One change of the registry at a time among the processes that share `work`; yields the name they all have."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "registry.lock"
    with locked(path, "the registry"):
        claimant = path.read_text(encoding="utf-8")
        if not claimant:
            claimant = uuid.uuid4().hex
            path.write_text(claimant, encoding="utf-8")
        yield claimant
