"""pydantic's validation errors → problems that a user can act on: dotted key, value, rule in plain words, remedy."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from temper.config.schema import JobConfig
from temper.errors import Problem

Sections = dict[str, type[BaseModel]]


@dataclass(frozen=True)
class _Place:
    """Where an error's location leads: the path as a user writes it, the section that holds its last key, and what the
    schema allows at the path itself. `root` is the section that the whole path begins in."""

    root: type[BaseModel]
    path: tuple[str | int, ...]
    parent: type[BaseModel]
    annotation: Any

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def kinds(self) -> Sections:
        """The sections that may stand here, by `kind`; none where something plainer may, too."""
        return {} if _is_mixed(self.annotation) else sections_of(self.annotation)


@dataclass(frozen=True)
class _Broken:
    """One of pydantic's errors at its place."""

    type: str
    place: _Place
    context: Mapping[str, Any]
    value: Any
    message: str


def explain(error: ValidationError, raw: Any, root: type[BaseModel] = JobConfig) -> list[Problem]:
    """One problem for each broken key, in the schema's order. `raw` are the values that were validated, as a `root`."""
    by_key: dict[str, list[_Broken]] = {}
    for detail in error.errors(include_url=False):
        place = _locate(detail["loc"], raw, root)
        if place is not None:
            broken = _Broken(detail["type"], place, detail.get("ctx") or {}, detail["input"], detail["msg"])
            by_key.setdefault(place.key, []).append(broken)
    return [_problem(group[0]) if len(group) == 1 else _problem_of_union(group) for group in by_key.values()]


def suggest(name: Any, known: Iterable[Any], limit: int = 12) -> str:
    """The remedy for a misspelt name: the nearest known one, else all of them."""
    names = [str(candidate) for candidate in known]
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
    return f"use one of {shown}" if len(names) > 1 else f"use {shown}"


# ---------------------------------------------------------------------------------------------- from loc to schema


def _locate(loc: Sequence[str | int], raw: Any, root: type[BaseModel]) -> _Place | None:
    """Walk pydantic's location through the schema and the values, dropping what it adds of its own (tags and members
    of unions, and the word that a mapping's key is wrong). None where the error is of a member that was not meant."""
    annotation: Any = root
    parent: type[BaseModel] = root
    value = raw
    path: list[str | int] = []
    for element in loc:
        if element == "[key]":
            break
        sections = sections_of(annotation)
        if _is_mixed(annotation):
            annotation = _meant(annotation, str(element), value)
            if annotation is None:
                return None
        elif len(sections) > 1:
            annotation = sections.get(str(element), Any)
        elif sections:
            (parent,) = sections.values()
            path.append(element)
            field = parent.model_fields.get(str(element))
            annotation, value = (field.annotation if field else Any), _entry(value, element)
        elif (item := _item_of(annotation)) is not None:
            path.append(element)
            annotation, value = item, _entry(value, element)
    return _Place(root, tuple(path), parent, annotation)


def sections_of(annotation: Any) -> Sections:
    """The sections that a value of this annotation may be, by `kind`; {"": section} where there is only one."""
    sections = [member for member in _members(annotation) if _is_section(member)]
    if len(sections) == 1:
        return {"": sections[0]}
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def _members(annotation: Any) -> Iterable[Any]:
    """The types of a union, or the one type that it is, null and constraints left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif annotation is not types.NoneType:
        yield annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_mixed(annotation: Any) -> bool:
    """Whether this is a union that no `kind` tells apart, only the form of what is written."""
    members = list(_members(annotation))
    return len(members) > 1 and not all(map(_is_section, members))


def _meant(annotation: Any, label: str, value: Any) -> Any:
    """The member of a mixed union that pydantic calls `label`; None if `value` has the form of another member.

    A value that is neither a mapping nor a list, or one that no member takes, stays with the union itself: all that
    its members say is then about the same key.
    """
    forms = {dict if _is_section(member) else get_origin(member): member for member in _members(annotation)}
    meant = forms.get(type(value))
    if meant is None:
        return annotation
    # pydantic's label is the name of a section's class, `list[…]` or `dict[…]`.
    return meant if label.split("[")[0] == (get_origin(meant) or meant).__name__ else None


def _entry(holder: Any, key: str | int) -> Any:
    """What stands under a key or an index, None where it is missing."""
    if isinstance(holder, list) and isinstance(key, int):
        return holder[key]
    return holder.get(key) if isinstance(holder, dict) else None


def _item_of(annotation: Any) -> Any:
    """What a list or mapping of this annotation holds, None if it is neither."""
    items = (get_args(member)[-1] for member in _members(annotation) if get_origin(member) in (list, dict))
    return next(items, None)


def _paths_of(name: str, root: type[BaseModel]) -> list[str]:
    """The dotted paths at which the schema `root` has a key of this name, those in lists left out."""

    def walk(section: type[BaseModel], prefix: str) -> Iterable[str]:
        for key, field in section.model_fields.items():
            if key == name:
                yield prefix + key
            for child in sections_of(field.annotation).values():
                yield from walk(child, f"{prefix}{key}.")

    return list(dict.fromkeys(walk(root, "")))


# ------------------------------------------------------------------------------------------------ rules in words


def _problem(broken: _Broken) -> Problem:
    special = _SPECIAL.get(broken.type)
    if special is not None:
        return special(broken)
    rule, remedy = _rule(broken)
    return Problem(broken.place.key, broken.value, rule, remedy)


def _problem_of_union(group: Sequence[_Broken]) -> Problem:
    # One that says more than that the form is wrong is of the type that was meant.
    meant = [broken for broken in group if not broken.type.endswith("_type") and broken.type != "literal_error"]
    if len(meant) == 1:
        return _problem(meant[0])
    place, value = group[0].place, group[0].value
    wanted = list(dict.fromkeys(map(_wanted, group)))
    remedy = _literal_remedy(group[0]) or next(filter(None, map(_type_remedy, group)), "")
    return Problem(place.key, value, f"must be {' or '.join(wanted)}{_instead(value)}", remedy)


def _rule(broken: _Broken) -> tuple[str, str]:
    wanted = _wanted(broken)
    if broken.type in _TYPES:
        return f"must be {wanted}{_instead(broken.value)}", _type_remedy(broken)
    if broken.type == "literal_error":
        return f"must be {wanted}", _literal_remedy(broken)
    return f"must be {wanted}", ""


def _wanted(broken: _Broken) -> str:
    """What must stand there, as in "must be …"."""
    if broken.type in _TYPES:
        return _TYPES[broken.type]
    if broken.type in _LIMITS:
        words, key = _LIMITS[broken.type]
        return f"{words} {broken.context[key]:g}"
    if broken.type == "literal_error":
        expected = str(broken.context["expected"])
        return f"one of {expected}" if " or " in expected else expected
    if broken.type == "string_pattern_mismatch":
        return next(words for part, words in _PATTERNS.items() if part in broken.context["pattern"])
    if broken.type in ("too_short", "too_long"):
        least = broken.type == "too_short"
        number = broken.context["min_length" if least else "max_length"]
        return f"of at {'least' if least else 'most'} {number} {'entry' if number == 1 else 'entries'}"
    return broken.message[:1].lower() + broken.message[1:]


_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
# By what tells a pattern of the schema from those after it.
_PATTERNS = {
    "channels": "'weights', 'channels' or 'N:M', e.g. '2:4'",
    "=": "a dotted key, e.g. optimizer.lr",
    "+-": "1 to 50 letters, digits, '.', '_', '+' or '-', beginning with a letter or a digit",
    ":": "'module:function', e.g. my_package.nets:build",
    "": "1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or a digit",
}
_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}


def _instead(value: Any) -> str:
    return "" if value == "" else f", not {_kind_of(value)}"


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    return _KINDS.get(type(value), type(value).__name__)


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a fraction",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def _type_remedy(broken: _Broken) -> str:
    value = broken.value
    if broken.type.startswith("int") and isinstance(value, float) and value.is_integer():
        return f"use {value:.0f}"
    if broken.type in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return "leave the quotes out"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _literal_remedy(broken: _Broken) -> str:
    values = [str(value) for value in _literals_of(broken.place.annotation)]
    close = difflib.get_close_matches(str(broken.value).lower(), values, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def _literals_of(annotation: Any) -> list[Any]:
    """The values that literals among the types of this annotation allow."""
    return [value for member in _members(annotation) if get_origin(member) is Literal for value in get_args(member)]


def _missing(broken: _Broken) -> Problem:
    place = broken.place
    field = place.parent.model_fields[str(place.path[-1])]
    if len(place.kinds) > 1:
        remedy = f"add the section, with kind: one of {', '.join(place.kinds)}"
    elif place.kinds:
        remedy = f"add the section, with {', '.join(_required(place.kinds['']) or place.kinds[''].model_fields)}"
    else:
        remedy = "add it" + (f": {field.description}" if field.description else "")
    return Problem(place.key, None, "is missing", remedy)


def _required(section: type[BaseModel]) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()]


def _unknown(broken: _Broken) -> Problem:
    name = str(broken.place.path[-1])
    holder = ".".join(map(str, broken.place.path[:-1]))
    rule = f"is not a key of {holder}" if holder else f"is not a key of a {_noun_of(broken.place.root)}"
    known = list(broken.place.parent.model_fields)
    elsewhere = _paths_of(name, broken.place.root)
    if ".".join(element for element in broken.place.path if isinstance(element, str)) in elsewhere:
        kind = get_args(broken.place.parent.model_fields["kind"].annotation)[0]
        return Problem(broken.place.key, broken.value, f"{rule} of kind {kind}", "leave it out, or choose another kind")
    if difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6) or not elsewhere:
        return Problem(broken.place.key, broken.value, rule, suggest(name, known))
    return Problem(broken.place.key, broken.value, rule, f"did you mean '{elsewhere[0]}'?")


def _unknown_kind(broken: _Broken) -> Problem:
    kinds = broken.place.kinds
    tag = broken.value.get("kind") if isinstance(broken.value, Mapping) else broken.context.get("tag")
    return Problem(f"{broken.place.key}.kind", tag, f"is not a kind of {_noun(broken.place)}", suggest(tag, kinds))


def _missing_kind(broken: _Broken) -> Problem:
    remedy = f"add it: one of {', '.join(broken.place.kinds)}"
    if isinstance(broken.value, Mapping):
        close = difflib.get_close_matches("kind", [str(key) for key in broken.value], n=1, cutoff=0.6)
        if close:
            remedy = f"'{close[0]}' is perhaps meant for it; use one of {', '.join(broken.place.kinds)}"
    return Problem(f"{broken.place.key}.kind", None, "is missing", remedy)


def _noun(place: _Place) -> str:
    named = (str(element) for element in reversed(place.path) if isinstance(element, str))
    return next(named, _noun_of(place.root))


def _noun_of(root: type[BaseModel]) -> str:
    """`job` for JobConfig."""
    return root.__name__.removesuffix("Config").lower()


_SPECIAL: dict[str, Callable[[_Broken], Problem]] = {
    "missing": _missing,
    "extra_forbidden": _unknown,
    "union_tag_invalid": _unknown_kind,
    "union_tag_not_found": _missing_kind,
}
