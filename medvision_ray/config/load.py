"""Read a job's YAML, apply `--set a.b=c`, refuse what is wrong with the key, the value and the fix."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from medvision_ray.config.sections import Section
from medvision_ray.errors import ConfigError

JobT = TypeVar("JobT", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML without the timestamp type (`2026-11-24` stays text); `1e-3` is a number, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# PyYAML reads an exponent without point or sign (`1e-3`, `1.0e5`) as text: yaml/pyyaml#173.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_job(model: type[JobT], path: str | None = None, overrides: Iterable[str] = ()) -> JobT:
    """Build a job's configuration from a YAML file and overrides.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: `key.path=value` items; the value is read as YAML. They win over the file.

    Raises:
        ConfigError: the file is not there or not YAML, or a key or value is refused. The message
            names each key, its value, what was expected and the nearest known name.
    """
    data = read_yaml(path) if path else {}
    for item in overrides:
        _apply_override(data, item)
    return build_job(model, data, source=path or "the command line")


def build_job(model: type[JobT], data: dict[str, Any], source: str) -> JobT:
    """Validate a plain mapping as a job's configuration; `source` names it in errors."""
    try:
        return model.model_validate_json(json.dumps(data, allow_nan=False), strict=True)
    except ValidationError as error:
        problems = _explain_all(model, error.errors())
        lines = "".join(f"\n  - {problem.line}" for problem in problems)
        raise ConfigError(
            f"The configuration from {source} is refused:{lines}", tuple((x.key, x.expected) for x in problems)
        ) from None
    except (TypeError, ValueError):
        raise ConfigError(
            f"The configuration from {source} holds a value that is no text, finite number, list or mapping."
        ) from None


def show_job(model: type[Section], job: Section | None = None) -> str:
    """The full effective configuration as YAML, each option under its documentation."""
    lines: list[str] = []
    _show(model, job.model_dump(mode="json") if job is not None else None, 0, lines)
    return "\n".join(lines) + "\n"


def _show(model: type[Section], values: dict[str, Any] | None, depth: int, lines: list[str]) -> None:
    pad = "  " * depth
    for name, field in model.model_fields.items():
        lines.append(f"{pad}# {field.description}")
        inner = _section_in(field.annotation)
        absent = (values[name] if values is not None else field.get_default(call_default_factory=True)) is None
        if inner is not None and not absent:
            lines.append(f"{pad}{name}:")
            _show(inner, values[name] if values is not None else None, depth + 1, lines)
            continue
        if values is not None:
            value = values[name]
        elif field.is_required():
            lines.append(f"{pad}# {name}: (required)")
            continue
        else:
            value = json.loads(json.dumps(_plain(field.get_default(call_default_factory=True))))
        lines.append(f"{pad}{name}: {_one_line(value)}")
        if inner is not None:
            _show_commented(inner, depth + 1, lines)


def _show_commented(model: type[Section], depth: int, lines: list[str]) -> None:
    """The options of a section that is off, commented out."""
    inside: list[str] = []
    _show(model, None, 0, inside)
    lines.extend(f"{'  ' * depth}# {line}" for line in inside)


def _one_line(value: Any) -> str:
    """A value as YAML on one line: a line break in text is escaped, since a second line would lose its indent."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    return json.dumps(value) if "\n" in text else text


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, nothing of it checked.

    Raises:
        ConfigError: the file is not there, or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"Expected a readable YAML file at {path}, but {error.strerror or 'it cannot be read'}."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"Expected UTF-8 text in {path}, but byte {error.start} is none.") from None
    try:
        data = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a scalar such as `0x_` that its own type refuses
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"Expected YAML in {path}, but it cannot be parsed{where}{f': {problem}' if problem else ''}."
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"Expected a mapping of options in {path}, but got {type(data).__name__}.")
    return data


def _apply_override(data: dict[str, Any], item: str) -> None:
    key, sign, text = item.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"Expected --set KEY.PATH=VALUE, but got {item!r}.")
    try:
        value = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"Expected the value of --set {key} to be YAML, but got {text!r}.") from None
    *parents, last = key.strip().split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: `{parent}` is {child!r} and has no options below it.")
        node = child
    node[last] = value


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping of options",
    "model_attributes_type": "a mapping of options",
    "missing": "a value",
}


@dataclass(frozen=True)
class _Problem:
    """A refused option: the line about it, and for machines its name and what it should be."""

    line: str
    key: str
    expected: str


def _explain_all(model: type[Section], errors: list[Any]) -> list[_Problem]:
    """One problem per refused key; what the members of a union expect is joined with `or`."""
    expected: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    problems: list[_Problem] = []
    for error in errors:
        location = _option_path(model, error["loc"], keep_last=error["type"] == "extra_forbidden")
        key = ".".join(location) or "(the whole)"
        line = _explain(model, key, location, error)
        if line is not None:
            problems.append(_Problem(line, key, _RULES[error["type"]]))
            continue
        text = json.dumps(error.get("input"), default=str)
        got.setdefault(key, text if len(text) <= 120 else text[:117] + "...")
        expected.setdefault(key, []).append(_expected(error))
    for key, wanted in expected.items():
        text = " or ".join(wanted)
        problems.append(_Problem(f"`{key}`: expected {text}, but got {got[key]}.", key, text))
    return problems


_RULES = {"extra_forbidden": "a known option", "missing": "a value", "value_error": "options that agree"}


def _explain(model: type[Section], key: str, location: list[str], error: Any) -> str | None:
    """The line of an error that is not about a value's type or range; None for those."""
    if error["type"] == "extra_forbidden":
        known = _known_names(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{'.'.join([*location[:-1], near[0]])}`?" if near else f"known here: {', '.join(known)}."
        return f"`{key}` is not an option; {hint}"
    if error["type"] == "missing":
        return f"`{key}` is required, but was not given."
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        return f"`{key}`: {reason}." if location else f"{reason}."
    return None


def _expected(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "too_long":
        return f"at most {context['max_length']} values"
    return _EXPECTED.get(kind) or str(error["msg"]).removeprefix("Input should be ")


def _option_path(model: type[Section], location: tuple[str | int, ...], *, keep_last: bool) -> list[str]:
    """The location without the names of union members (`use_gpu.bool`) that pydantic puts into it."""
    path: list[str] = []
    section: type[Section] | None = model
    for place, part in enumerate(location):
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is not None:
            section = _section_in(field.annotation)
        elif isinstance(part, str) and not (keep_last and place == len(location) - 1):
            continue
        path.append(str(part))
    return path


def _known_names(model: type[Section], location: list[str]) -> list[str]:
    for part in location:
        field = model.model_fields.get(part)
        inner = _section_in(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
