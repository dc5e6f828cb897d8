"""Command lines of browsers: how two lists of arguments become one.

This module must not know which arguments there are, except those that hold lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Chromium reads only the last of several of these, so their values are merged.
_SEPARATORS = {
    "--enable-features": ",",
    "--disable-features": ",",
    "--enable-blink-features": ",",
    "--disable-blink-features": ",",
    "--enable-dawn-features": ",",
    "--disable-dawn-features": ",",
    "--js-flags": " ",
}


def merge_arguments(base: tuple[str, ...], extra: tuple[str, ...]) -> tuple[str, ...]:
    """`base` and `extra` as one command line without repetitions.

    Lists (features, V8 flags) are joined; a feature that was switched off and then on, or the
    other way round, is as the later one says. The later value of any other `--name=value` wins.
    An argument and its value must be one word.
    """
    merged: dict[str, str] = {}
    for argument in (*base, *extra):
        name, _, value = argument.partition("=")
        if name not in _SEPARATORS:
            merged[name if name.startswith("--") else argument] = argument
            continue
        items = _items(name, value)
        _put(merged, name, (_items(name, _value(merged, name)) | items).values())
        opposite = _opposite(name)
        if opposite in merged:
            left = _items(opposite, _value(merged, opposite))
            _put(merged, opposite, (left[key] for key in left if key not in items))
    return tuple(merged.values())


def _items(name: str, value: str) -> dict[str, str]:
    """The items of a list by what each is about: `A` of `A:b/1`, `opt` of `--no-opt`."""
    items = (item for item in value.split(_SEPARATORS[name]) if item)
    if name != "--js-flags":
        return {item.partition(":")[0].partition("<")[0]: item for item in items}
    return {
        item.partition("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-"): item
        for item in items
    }


def _value(merged: Mapping[str, str], name: str) -> str:
    return merged.get(name, "").partition("=")[2]


def _put(merged: dict[str, str], name: str, items: Iterable[str]) -> None:
    value = _SEPARATORS[name].join(items)
    if value:
        merged[name] = f"{name}={value}"
    else:
        merged.pop(name, None)


def _opposite(name: str) -> str:
    if name.startswith("--enable-"):
        return name.replace("--enable-", "--disable-", 1)
    if name.startswith("--disable-"):
        return name.replace("--disable-", "--enable-", 1)
    return ""
