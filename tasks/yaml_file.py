"""YAML files: keys and values that a person wrote, read strictly, and settings laid over them."""

from pathlib import Path
from typing import Any

import yaml

from tasks.errors import SettingsError


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a mapping that holds a key twice, of which YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values in `file`.

    Raises:
        SettingsError: It cannot be read, or holds something else.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _EachKeyOnce)  # noqa: S506 - it is safe
    except FileNotFoundError:
        raise SettingsError(f"There is no config file at {file}.") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is not UTF-8 text: {error.reason}.") from None
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold keys and values, such as `name: docs`.")
    return values


def lay_over(values: dict[str, Any], setting: str) -> None:
    """Set the one value that `setting` ("a.b=c") names; c is read as YAML.

    Raises:
        SettingsError: It names no value, or c is not valid YAML.
    """
    path, equals, text = setting.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise SettingsError(f"{setting!r} is no setting; write it as `key=value`, say `name=docs`.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"The value in {setting!r} is not valid YAML.") from None
    if isinstance(value, bool) and text.strip().lower() not in {"true", "false"}:
        value = text.strip()  # YAML 1.1 takes `no` and `on` for switches, a path is none
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{setting!r}: {key!r} has no keys of its own.")
        values = inner
    values[keys[-1]] = value
