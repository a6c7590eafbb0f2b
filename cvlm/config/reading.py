"""Reading recipe files: strict YAML, overrides, and every problem of a file at once."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cvlm.config import data, models, phases, teachers
from cvlm.config.recipe import Recipe
from cvlm.errors import CvlmError


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `key.sub=value` overrides (values are YAML).

    Raises:
        CvlmError: the file is missing or not YAML, or any key or value is wrong; the text lists every problem.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise CvlmError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CvlmError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise CvlmError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would keep the last one and drop the other in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data; `source` names it in messages.

    Raises:
        CvlmError: with one line per problem: place, value, reason, nearest valid name.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        # A list whose items are wrong is called too short as well: pydantic counts the valid ones.
        places = [item["loc"] for item in error.errors() if item["type"] != "too_short"]
        items = [
            item
            for item in error.errors()
            if item["type"] != "too_short" or all(place[: len(item["loc"])] != item["loc"] for place in places)
        ]
        lines = [_explain(item) for item in items]
        raise CvlmError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  - {line}" for line in lines)) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in nested mappings and lists."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise CvlmError(f"override {override!r} must read key=value, for instance seeds=[0,1]")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CvlmError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    target: Any = raw
    for part in parents:
        step = _step(target, part, override)
        if isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
        target = target[step]
    if not isinstance(target, dict | list):
        raise CvlmError(f"override {override!r}: {'.'.join(parents)!r} holds {target!r}, which has no keys")
    target[_step(target, last, override)] = value


def _step(target: Any, part: str, override: str) -> Any:
    """Return the key or list index that `part` means in `target`."""
    if isinstance(target, list):
        if not part.isdecimal() or int(part) >= len(target):
            raise CvlmError(f"override {override!r}: {part!r} is no index into a list of {len(target)}")
        return int(part)
    if not isinstance(target, dict):
        raise CvlmError(f"override {override!r}: {part!r} is below a value that has no keys")
    return part


def _explain(item: Any) -> str:
    """Turn one pydantic error into `place: reason`, with the nearest known key where one was misspelt."""
    # Behind data and teacher pydantic adds the kind, which is no key of the file.
    tagged = item["loc"][:1] in (("data",), ("teacher",))
    tags = {1, 4} if item["loc"][2:3] == ("members",) else {1}
    place = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (tagged and i in tags))
    if item["type"] == "extra_forbidden":
        close = get_close_matches(str(item["loc"][-1]), _all_keys(), n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{place}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{place}: this key is required"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    shown = "" if isinstance(value, dict) or item["type"] == "value_error" else f" (got {value!r})"
    return f"{place}: {message}{shown}" if place else f"{message}{shown}"


def _all_keys() -> list[str]:
    """Every key that any specification knows."""
    named = [spec for module in (models, data, teachers, phases) for spec in vars(module).values()]
    specs = [spec for spec in [Recipe, *named] if isinstance(spec, type) and issubclass(spec, BaseModel)]
    return sorted({key for spec in specs for key in spec.model_fields})
