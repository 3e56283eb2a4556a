"""The registered models and who is champion: two names, one for going on training, one for serving, moved as one.

The alias `champion` of the extractor is the only truth. The tag `aliprod.over` of its version says whom it replaced;
`previous`, and both aliases of the classifier, follow from these two, and are set right by the next promotion or
rollback if a machine dies in between.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from aliprod import InputError
from aliprod.sharing import locked
from tracking.spool import insistent

EXTRACTOR = "aliprod-extractor"
CLASSIFIER = "aliprod-classifier"
USES = {
    EXTRACTOR: "Networks of the best embeddings, to start rounds from: `-P init=models:/aliprod-extractor@champion`",
    CLASSIFIER: "The same, to recognise products with: `mlflow models serve -m models:/aliprod-classifier@champion`",
}
CHAMPION = "champion"
PREVIOUS = "previous"
OVERTAKEN = "overtaken"  # the decision on a version that another one, of the same predecessor, came before
# No such model, no such alias; and what a server with logins says of a model that is not there.
NONE_SUCH = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
PATIENCE = 300_000  # milliseconds after which a claim that came to nothing is a dead machine's


def champion() -> ModelVersion | None:
    """The extractor's version that is champion today."""
    return _or_none(MlflowClient().get_model_version_by_alias, EXTRACTOR, CHAMPION)


def model_id(version: ModelVersion) -> str:
    """Id of the logged model that a version is of."""
    return version.tags.get("aliprod.model") or str(version.model_id)


def crown(model: str, over: ModelVersion | None, about: dict[str, Any], note: str, work: Path) -> ModelVersion | None:
    """Registers the logged model `model` under both names and makes it champion in the place of `over`.

    None, and nothing moved, if `over` is champion no more or another promotion over it came first. The versions of a
    registry are numbered in one order for all machines, so a version is also a claim to the title: of those not settled
    yet the lowest wins. `about` becomes the version's tags, `note` its description.
    """
    client = MlflowClient()
    with _locked(work):
        if _number(champion()) != _number(over):
            return None
        tags = about | {"over": _number(over), "model": model, "decision": "claimed"}
        claim = _register(EXTRACTOR, model, tags, note)
        rivals = [
            version
            for version in client.search_model_versions(f"name = '{EXTRACTOR}'")
            if version.tags.get("aliprod.decision") == "claimed"
            and _number(version) != _number(over)
            and int(version.version) < int(claim.version)
            and claim.creation_timestamp - version.creation_timestamp < PATIENCE
        ]
        if rivals or _number(champion()) != _number(over):
            client.set_model_version_tag(EXTRACTOR, claim.version, "aliprod.decision", OVERTAKEN)
            return None
        client.set_registered_model_alias(EXTRACTOR, CHAMPION, claim.version)
        follow()
        return claim


def rollback(work: Path) -> tuple[ModelVersion, ModelVersion]:
    """Makes `previous` the champion again, under both names: who left and who came back.

    `previous` is then whom that one once replaced. InputError where there is nobody to go back to.
    """
    client = MlflowClient()
    with _locked(work):
        left = champion()
        if left is None:
            raise InputError(f"rollback: {EXTRACTOR} has no {CHAMPION}; `promote` makes one")
        if not left.tags.get("aliprod.over"):
            raise InputError(f"rollback: version {left.version} of {EXTRACTOR} replaced none, there is no {PREVIOUS}")
        try:
            client.set_registered_model_alias(EXTRACTOR, CHAMPION, left.tags["aliprod.over"])
        except MlflowException as error:
            raise InputError(f"rollback: {str(error).splitlines()[0]}") from None
        client.set_model_version_tag(EXTRACTOR, left.version, "aliprod.decision", "rolled back")
        follow()
        back = champion()
        assert back
        return left, back


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
    """Registers the logged model `model` as the classifier's version after `source`, of the same extractor.

    Aliases at that extractor's classifier move to it. An extractor's versions are one line, or what one enrolled the
    next would lose: InputError if `source` is not the last of it; if it is no more when this one is registered, that is
    marked as overtaken. `about` becomes tags, with those of `source`.
    """
    extractor = source.tags.get("aliprod.extractor", "")
    given = (CLASSIFIER, model, source.tags | about | {"model": model}, source.description or "")
    if not extractor:
        return _register(*given)
    with _locked(work):
        _refuse_followed(source, _twins(extractor))
        made = _register(*given)
        try:
            _refuse_followed(source, [one for one in _twins(extractor) if int(one.version) < int(made.version)])
        except InputError:
            MlflowClient().set_model_version_tag(CLASSIFIER, made.version, "aliprod.decision", OVERTAKEN)
            raise
        finally:
            follow()  # even then: what came first may have taken this one, the newest of all, for its successor
        return made


@insistent
def follow() -> None:
    """Sets all that follows from the extractor's champion: its tag, and the other aliases."""
    client = MlflowClient()
    lead = champion()
    over = lead.tags.get("aliprod.over") if lead else None
    if lead and lead.tags.get("aliprod.decision") == "claimed":
        client.set_model_version_tag(EXTRACTOR, lead.version, "aliprod.decision", "promoted")
    before = _or_none(client.get_model_version, EXTRACTOR, over) if over else None
    for name in (EXTRACTOR, CLASSIFIER):
        for alias, version in ((CHAMPION, lead), (PREVIOUS, before)):
            now = _or_none(client.get_model_version_by_alias, name, alias)
            meant = version or (now and lead)  # back at the first: not everybody may delete what says `previous`
            found = _twin(meant) if meant and name == CLASSIFIER else meant
            if found and _number(found) != _number(now):
                client.set_registered_model_alias(name, alias, found.version)


def _twin(version: ModelVersion) -> ModelVersion:
    """The newest of the classifier's versions of this extractor, the first registered if there is none."""
    if twins := _twins(version.version):
        return twins[-1]
    tags = {key: value for key, value in version.tags.items() if key not in ("aliprod.over", "aliprod.decision")}
    return _register(CLASSIFIER, model_id(version), tags | {"extractor": version.version}, version.description or "")


def _twins(extractor: str | int) -> list[ModelVersion]:
    """The classifier's versions of an extractor, oldest first: that of its own round, then those with enrolments."""
    found = MlflowClient().search_model_versions(f"name = '{CLASSIFIER}'")
    twins = [
        version
        for version in found
        if version.tags.get("aliprod.extractor") == str(extractor) and version.tags.get("aliprod.decision") != OVERTAKEN
    ]
    return sorted(twins, key=lambda version: int(version.version))


def _refuse_followed(source: ModelVersion, line: list[ModelVersion]) -> None:
    """InputError if `source` is not the last of these versions, those of its extractor."""
    if _number(line[-1]) != _number(source):
        raise InputError(
            f"version {source.version} of {CLASSIFIER} was followed by {line[-1].version}, with enrolments of its own;"
            f" go on from models:/{CLASSIFIER}/{line[-1].version}"
        )


def _register(name: str, model: str, tags: dict[str, Any], note: str) -> ModelVersion:
    named = {key if "." in key else f"aliprod.{key}": str(value) for key, value in tags.items()}
    made = mlflow.register_model(f"models:/{model}", name, tags=named)
    MlflowClient().update_model_version(name, made.version, note)
    MlflowClient().update_registered_model(name, USES[name])
    return made


def _or_none(find: Callable[..., ModelVersion], *names: str) -> ModelVersion | None:
    try:
        return find(*names)
    except MlflowException as error:
        if error.error_code in NONE_SUCH:
            return None
        raise


def _number(version: ModelVersion | None) -> str:
    return str(version.version) if version else ""


def _locked(work: Path) -> AbstractContextManager[None]:
    """One promotion or rollback at a time among the processes of a machine."""
    work.mkdir(parents=True, exist_ok=True)
    return locked(work / "registry.lock", "the registry")
