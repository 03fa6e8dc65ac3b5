"""YAML text ↔ plain values, by YAML 1.2's core schema and nothing beyond it.

PyYAML follows YAML 1.1, where `5e-4` is a string, `no` is false and `1:30` is ninety. Here a float is what looks like
one, only `true` and `false` are booleans, and a value is null, a boolean, an integer, a finite float, a string, a
list or a mapping with string keys: no tag reaches further. A duplicate key is an error. Aliases may not blow a small
text up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from temper.errors import JobError, Problem

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 50_000
MAX_DIGITS = 40

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("null", _NULL, "~nN\0"),
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)


def _resolver_table(base: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """PyYAML's table: first character of a plain scalar → (tag, pattern), the first that matches wins."""
    table: dict[str, list[Any]] = {}
    for name, pattern, first in _RESOLVERS:
        for character in first:
            table.setdefault("" if character == "\0" else character, []).append((_TAG + name, pattern))
    for character, entries in base.items():
        table.setdefault(character, []).extend(entries)
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolver_table({})


class _Dumper(yaml.SafeDumper):
    # YAML 1.1's patterns too, so that a string like `no` is quoted and stays one for every reader.
    yaml_implicit_resolvers = _resolver_table(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _LineDumper(_Dumper):
    """Writes line breaks and what cannot be seen as escapes."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_LineDumper.add_representer(str, _represent_text)


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` holds. `source` names the text in problems. Raises JobError, never another exception."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise JobError([_syntax_problem(error, source)]) from None
    except (ValueError, OverflowError):
        # PyYAML passes an impossible `\U` escape on to chr().
        raise JobError([Problem(source, None, "has an escape that is not a character")]) from None
    except RecursionError:
        raise JobError([_too_deep(source)]) from None
    if node is None:
        return None
    _check_size(node, source)
    reader = _Reader(source)
    value = reader.read(node, "")
    if reader.problems:
        raise JobError(reader.problems)
    return value


def format_yaml(value: dict[str, Any]) -> str:
    """YAML text that :func:`parse_yaml` reads back as the same value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def format_value(value: Any) -> str:
    """One line of YAML that :func:`parse_yaml` reads back as the same value."""
    # Within a list, so that no mark of a document's end follows it.
    listed = yaml.dump(
        [value], Dumper=_LineDumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=True
    )
    return listed.strip().removeprefix("[").removesuffix("]")


def _syntax_problem(error: yaml.YAMLError, source: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    context = getattr(error, "context", None)
    rule = f"is not valid YAML: {place}{reason}" + (f" {context}" if context else "")
    if "'\\t'" in reason:
        return Problem(source, None, rule, "indent with spaces, not with tabs")
    return Problem(source, None, rule)


def _too_deep(source: str) -> Problem:
    return Problem(source, None, f"is nested more than {MAX_DEPTH} levels deep")


def _check_size(root: yaml.Node, source: str) -> None:
    """Refuses what is nested too deeply and what its aliases expand to too much, without expanding it."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:  # a mapping that holds itself through an alias ends here, too
            raise JobError([_too_deep(source)])
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in _children(node))
        return sizes[id(node)]

    if size(root, 0) > MAX_NODES:
        raise JobError([Problem(source, None, f"holds more than {MAX_NODES} values once its aliases are expanded")])


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


class _Reader:
    """Nodes → values, noting each problem under its dotted key."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []

    def read(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(child, _join(key, str(index))) for index, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, key)
        return self._refuse(node, key, f"has the tag {_plain_tag(node.tag)}, and a job holds only plain values")

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = self._key(key_node, key)
            if name is None:
                continue
            line = key_node.start_mark.line + 1
            value = self.read(value_node, _join(key, name))
            if name in values:
                rule = f"is written twice, in lines {first_lines[name]} and {line}"
                self.problems.append(Problem(_join(key, name), None, rule, "keep one of them"))
            values[name] = value
            first_lines[name] = line
        return values

    def _key(self, node: yaml.Node, key: str) -> str | None:
        if not isinstance(node, yaml.ScalarNode) or node.tag != _TAG + "str":
            shown = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            self._refuse(node, _join(key, shown), "is not a key", "write it as a string, in quotes")
            return None
        name = self._scalar(node, key)
        return name if isinstance(name, str) else None

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        try:
            value = _SCALARS[node.tag](node.value)
        except (ValueError, KeyError):  # an explicit tag on a text that is not of its type, e.g. `!!int x`
            return self._refuse(node, key, f"is not a value of the type {_plain_tag(node.tag)}")
        if isinstance(value, str) and not _is_plain_text(value):
            return self._refuse(node, key, "holds a character that no text can carry (NUL or a lone surrogate)")
        if isinstance(value, float) and not abs(value) < float("inf"):
            return self._refuse(node, key, "must be a finite number", value=node.value)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_DIGITS:
            return self._refuse(node, key, f"is an integer of more than {MAX_DIGITS} digits")
        return value

    def _refuse(self, node: yaml.Node, key: str, rule: str, remedy: str = "", value: Any = None) -> None:
        mark = node.start_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        self.problems.append(Problem(key or self.source, value, rule + place, remedy))


def _integer(text: str) -> int:
    digits = text.lower()
    if len(digits) > MAX_DIGITS + 2:
        return 10**MAX_DIGITS  # refused by the caller; int() itself raises beyond some thousand digits
    base = 8 if digits.startswith("0o") else 16 if digits.startswith("0x") else 10
    return int(digits, base)


def _float(text: str) -> float:
    lowered = text.lower()
    return float(lowered.replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": _integer,
    _TAG + "float": _float,
    _TAG + "str": str,
}


def _plain_tag(tag: str) -> str:
    return "!!" + tag[len(_TAG) :] if tag.startswith(_TAG) else tag


def _is_plain_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
