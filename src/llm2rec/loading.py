"""Recipe files and `--set` overrides -> a validated `Recipe`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from llm2rec.config import CSFT_BUDGETS, ORIGINS, TINY_RANDOM, Recipe, Section
from llm2rec.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
MODEL_FILES = ("config.json", "modules.json")  # of a language model, of a SentenceTransformer


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str | Path) -> Path:
    """The file behind a shipped name or a path.

    Raises:
        ConfigError: there is neither.
    """
    shipped = RECIPES / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(recipe)
    if path.is_file():
        return path
    raise ConfigError(f"recipe {str(recipe)!r} is neither a file nor one of: {', '.join(recipe_names())}")


def load_recipe(
    recipe: str | Path,
    overrides: tuple[str, ...] | list[str] = (),
    base: Path | None = None,
    here: Path | None = None,
) -> Recipe:
    """The validated recipe of a shipped name or a path, with `KEY=VALUE` overrides applied.

    Paths inside a recipe file are relative to its folder (or `base`), those in overrides to the working directory
    (or `here`); environment variables (`${NAME}`) are filled in.

    Raises:
        ConfigError: unknown recipe, key or row; a value of the wrong type; an undefined variable.
    """
    path = recipe_path(recipe)
    try:
        content = _unshared(yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    _anchor_paths(content, base or path.parent)
    for override in sorted(overrides, key=_names_no_origin):  # first what would put columns aside
        apply_override(content, override, here or Path.cwd())
    return parse_recipe(content, str(path))


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML whose mappings name no key twice: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key.value!r} stands twice; keep one")
        return super().construct_mapping(node, deep)


def _unshared(content: Any) -> Any:
    """The same content, in which what a YAML alias repeats is there once for each place."""
    if isinstance(content, dict):
        return {key: _unshared(value) for key, value in content.items()}
    return [_unshared(value) for value in content] if isinstance(content, list) else content


def parse_recipe(content: dict[str, Any], origin: str) -> Recipe:
    """Validates a nested mapping; `origin` names it in the error.

    Raises:
        ConfigError: naming each offending key, the value got and what is allowed.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{origin}:\n  " + "\n  ".join(lines)) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key; allowed here: {', '.join(_siblings(problem['loc']))}"
    if problem["type"] == "missing":
        return f"{key}: required, but missing"
    if problem["type"] == "model_type":
        return f"{key}: a section with keys of its own (got {problem['input']!r})"
    if problem["type"] == "tuple_type":
        return f"{key}: a list, for example [{problem['input']}] (got {problem['input']!r})"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{key}: {message}" + ("" if problem["type"] == "value_error" else f" (got {problem['input']!r})")


def _siblings(location: tuple[Any, ...]) -> list[str]:
    """The keys that there are beside an unknown one."""
    section: Any = Recipe
    parts = list(location[:-1])
    while parts:
        within = list(_types_in(section.model_fields[parts.pop(0)].annotation))
        section = next(one for one in within if isinstance(one, type) and issubclass(one, Section))
        if any(get_origin(one) is dict for one in within):
            parts.pop(0)  # the name of one of several
    return list(section.model_fields)


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def apply_override(content: dict[str, Any], override: str, here: Path) -> None:
    """Sets one `dotted.key=value` in a nested mapping; the value is read as YAML, paths in it start from `here`.

    Raises:
        ConfigError: no `=`, or the key goes through something that is not a section.
    """
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set takes KEY=VALUE, for example csft.max_tokens=140000; got {override!r}")
    section = content
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {part!r} is a value, not a section")
    try:
        parsed = _unshared(yaml.safe_load(value))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML ({error})") from error
    section[parts[-1]] = _anchored_value(parts, _number(parsed), here)
    if parts[0] == "csft" and parts[-1] in CSFT_BUDGETS:  # one budget replaces the other
        for other in CSFT_BUDGETS - {parts[-1]}:
            section.pop(other, None)
    if parts[0] in ("data", "domains") and parts[-1] in ORIGINS:
        _replace_origin(section, parts[-1], parsed, here)


def _anchored_value(parts: list[str], value: Any, here: Path) -> Any:
    """The value of one key; paths in it are relative to `here`."""
    content = value
    for part in reversed(parts):
        content = {part: content}
    _anchor_extended(content, here)
    _anchor_models(content, here)
    _anchor_origins(content, here)
    for part in parts:
        content = content[part]
    return content


def key_of(override: str) -> str:
    """The dotted key of `KEY=VALUE`."""
    return override.partition("=")[0].strip()


def _names_no_origin(override: str) -> bool:
    return key_of(override).rpartition(".")[2] not in ORIGINS


def _replace_origin(section: dict[str, Any], key: str, value: Any, here: Path) -> None:
    """Another origin takes the place of the recipe's; one of another kind, of what is said of its files too."""
    together = {"interactions", "items"} if key in ("interactions", "items") else {key}
    others = set(ORIGINS) - together
    if any(section.get(other) is not None for other in others):
        others |= {"layout", "columns", "categories", "text"}
    for other in others:
        section.pop(other, None)
    if key != "source":
        section[key] = _expand("" if value is None else str(value), here)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _anchor_paths(content: dict[str, Any], base: Path) -> None:
    _convert_numbers(content)
    _anchor_extended(content, base)
    _anchor_models(content, base)
    _anchor_origins(content, base)


def _anchor_origins(content: dict[str, Any], base: Path) -> None:
    """Makes the files and folders that data come from absolute paths."""
    domains = content.get("domains")
    sections = [content.get("data"), *(domains.values() if isinstance(domains, dict) else ())]
    for section in sections:
        for key in set(ORIGINS) - {"source"}:
            if isinstance(section, dict) and isinstance(section.get(key), str):
                section[key] = _expand(section[key], base)


def _anchor_extended(content: dict[str, Any], base: Path) -> None:
    """Makes the run that CSFT extends an absolute path; one that is absolute stays as it is."""
    section = content.get("csft")
    if isinstance(section, dict) and isinstance(section.get("extends"), str):
        section["extends"] = _expand(section["extends"], base)


def _anchor_models(content: dict[str, Any], base: Path) -> None:
    """Makes models that are files or folders absolute paths; what is none may be a name or a hub id."""
    model, encode = content.get("model"), content.get("encode")
    encoders = encode.get("text_encoders") if isinstance(encode, dict) else None
    if isinstance(model, dict) and "source" in model:
        model["source"] = _anchored_model(model["source"], base)
    if isinstance(encoders, dict):
        encoders.update({name: _anchored_model(value, base) for name, value in encoders.items()})


def _anchored_model(value: Any, base: Path) -> Any:
    if not isinstance(value, str) or not value.strip() or "\0" in value or value == TINY_RANDOM:
        return value
    like_a_path = "/" in value or value[:1] in (".", "~", "$")
    path = Path(_expand(value, base) if like_a_path else base / value)
    is_model = path.is_file() or any((path / name).exists() for name in MODEL_FILES)
    return str(path.resolve()) if is_model or (like_a_path and path.exists()) else value


def _convert_numbers(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            _convert_numbers(value)
        elif key not in ORIGINS:
            section[key] = _number(value)


def _expand(text: str, base: Path) -> str:
    if not text.strip() or "\0" in text:
        raise ConfigError(f"{text!r} is no path; name a file or folder, or leave the key out")
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise ConfigError(f"{text}: the environment variable is not set; set it to the folder of your data")
    return str((base / expanded).resolve())
