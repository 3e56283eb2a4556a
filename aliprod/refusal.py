"""What pydantic finds wrong with a table, in one line for the person who wrote it."""

from typing import Any

from pydantic import BaseModel, ValidationError

from aliprod import InputError


def validated(
    model: type[BaseModel], table: dict[str, Any], source: str, parts: dict[str, type[BaseModel]] | None = None
) -> Any:
    """A `model` of the table's fields; `parts` are the models of the tables in it, by name.

    InputError, beginning with `source` (if not ""), names field, value, what is allowed and what the field is.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        explained = _explained(error.errors(), model, parts or {})
        raise InputError(": ".join(filter(None, [source, explained]))) from None


def _explained(errors: list[Any], model: type[BaseModel], parts: dict[str, type[BaseModel]]) -> str:
    """One line on the first wrong field: table, field, value, what is allowed and what the field is."""
    first, place = errors[0], errors[0]["loc"]
    number = ""
    if len(place) > 1 and place[0] in parts:
        model = parts[place[0]]
        number, place = f"{place[0]} {place[1] + 1}", place[2:]
    known = {
        field.alias or name: " ".join((field.description or "").split()) for name, field in model.model_fields.items()
    }
    field = str(place[0]) if place else ""
    value = "" if not field or isinstance(first["input"], dict) else f" {first['input']!r}"
    # A field of several types has an error for each: they start at the same place.
    until = len(first["loc"]) - len(place) + 1
    alike = [error["msg"] for error in errors if error["loc"][:until] == first["loc"][:until]]
    allowed = ", or ".join(dict.fromkeys(text.removeprefix("Value error, ") for text in alike))
    if first["type"] == "extra_forbidden":
        allowed = f"no such field; there are {', '.join(known)}"
    meaning = f" ({known[field].rstrip('.')})" if known.get(field) else ""
    return ": ".join(filter(None, [number, field + value, allowed.replace("Input should be", "must be") + meaning]))
