"""Rotary settings of a config.json, in every spelling that transformers has written.

transformers 4 writes ``rope_theta`` and ``rope_scaling`` (its kind under ``type``, later ``rope_type``). transformers 5
writes one object ``rope_parameters`` that holds ``rope_theta`` too, or one such object per layer type. A wrong angle
gives another model without any error, so nothing has a default here: what is missing, contradictory or not implemented
is refused by its key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mstar_mega.models.sizes import DynamicNTK, LongRope

_FACTORS = ("short_factor", "long_factor")
_ALWAYS = ("rope_theta", "partial_rotary_factor")
_KEYS = {
    "default": (),
    "dynamic": ("factor",),
    "longrope": (*_FACTORS, "factor", "attention_factor", "original_max_position_embeddings"),
}
"""What each implemented kind may have besides ``_ALWAYS``."""
_OLD_NAMES = {"su": "longrope"}


@dataclass(frozen=True)
class RotarySettings:
    """What a config says of its rotary positions."""

    theta: float
    kind: str
    """default (no scaling), dynamic, longrope"""
    values: dict[str, Any]
    """The scaling's own keys."""
    where: str
    """Config and key, for messages."""


def rotary_settings(config: dict[str, Any], where: str, *kinds: str) -> RotarySettings:
    """The rotary settings of a language model's config; ``kinds`` are those that the family implements beside plain
    RoPE. Raises ValueError naming the key that is missing, contradicts another, or is not supported."""
    if config.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"{where}: partial_rotary_factor is {config['partial_rotary_factor']!r}, but only 1 is supported"
        )
    spelt = {
        f"{where}, {key}": _object(config[key], f"{where}, {key}", config)
        for key in ("rope_scaling", "rope_parameters")
        if config.get(key)
    }
    found = [_read(values, place, kinds) for place, values in spelt.items()]
    given = dict.fromkeys(
        float(_positive(values["rope_theta"], f"{place}: rope_theta"))
        for place, values in [(where, config), *spelt.items()]
        if values.get("rope_theta") is not None
    )
    if not given:
        raise ValueError(
            f"{where}: rope_theta is missing, also from rope_parameters; copy it from the original model's config.json"
        )
    if len(given) > 1:
        shown = " and ".join(f"{theta:g}" for theta in given)
        raise ValueError(f"{where}: rope_theta is given as {shown}; keep the one that the weights were trained with")
    if len(found) == 2 and not _agree(*found):
        raise ValueError(
            f"{where}: rope_scaling and rope_parameters contradict each other; keep what the weights were trained with"
        )
    (theta,) = given
    if not found:
        return RotarySettings(theta, "default", {}, where)
    return RotarySettings(theta, found[-1].kind, {**found[0].values, **found[-1].values}, found[-1].where)


def dynamic_ntk(rotary: RotarySettings, limit: Any) -> DynamicNTK | None:
    """The scaling of settings of that kind, with the base growing beyond ``limit`` tokens; None for plain RoPE."""
    if rotary.kind == "default":
        return None
    limit = _positive(limit, f"{rotary.where}: max_position_embeddings")
    return DynamicNTK(float(_required(rotary, "factor")), int(limit))


def longrope(rotary: RotarySettings, config: dict[str, Any], where: str, head_dim: int) -> LongRope | None:
    """The scaling of settings of that kind; None for plain RoPE.

    The scale of cos and sin is the config's ``attention_factor``, or follows from ``factor``, or, as in the original,
    from both limits. Raises ValueError naming what is missing or has another length than the head.
    """
    if rotary.kind == "default":
        return None
    original = config.get("original_max_position_embeddings")
    if original is None:
        raise ValueError(f"{where}: original_max_position_embeddings is missing, which {rotary.kind} needs")
    inner = rotary.values.get("original_max_position_embeddings")
    if inner not in (None, original):
        place = rotary.where.rpartition(", ")[2]
        raise ValueError(f"{where}: original_max_position_embeddings is {original}, and {inner} in {place}")
    original = int(_positive(original, f"{where}: original_max_position_embeddings"))
    short, long = (_factors(rotary, key, head_dim // 2) for key in _FACTORS)
    factor = rotary.values.get("factor")
    if factor is None:
        most = config.get("max_position_embeddings")
        factor = _positive(most, f"{where}: max_position_embeddings") / original
    scale = rotary.values.get("attention_factor")
    if scale is None:
        ratio = float(_positive(factor, f"{rotary.where}: factor"))
        scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return LongRope(short, long, original, float(_positive(scale, f"{rotary.where}: attention_factor")))


def _read(values: dict[str, Any], where: str, kinds: tuple[str, ...]) -> RotarySettings:
    """One object's kind and values; its theta is compared elsewhere."""
    names = [values[key] for key in ("rope_type", "type") if values.get(key) is not None] or ["default"]
    spelt = dict.fromkeys(_OLD_NAMES.get(str(name), str(name)) for name in names)
    if len(spelt) > 1:
        raise ValueError(f"{where}: rope_type is {names[0]!r} and type is {names[1]!r}: which one is meant?")
    (kind,) = spelt
    if kind not in ("default", *kinds):
        shown = " or ".join(repr(each) for each in ("default", *kinds))
        raise ValueError(f"{where}: rope_type is {names[0]!r}, but only {shown} is supported")
    own = {key: value for key, value in values.items() if value is not None and key not in ("rope_type", "type")}
    unknown = [key for key in own if key not in (*_ALWAYS, *_KEYS[kind])]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]} is not a key that rope_type {kind!r} knows; is another kind meant?")
    if own.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where}: partial_rotary_factor is {own['partial_rotary_factor']!r}, but only 1 is supported")
    return RotarySettings(0.0, kind, {key: own[key] for key in own if key not in _ALWAYS}, where)


def _agree(one: RotarySettings, other: RotarySettings) -> bool:
    both = set(one.values) & set(other.values)
    return one.kind == other.kind and all(one.values[key] == other.values[key] for key in both)


def _object(value: Any, where: str, config: dict[str, Any]) -> dict[str, Any]:
    """The one object of settings; several by layer type must say the same."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, not an object")
    if not any(isinstance(each, dict) for each in value.values()):
        return value
    used = config.get("layer_types") or list(value)
    absent = [name for name in used if not isinstance(value.get(name), dict)]
    if absent:
        raise ValueError(f"{where}: {absent[0]} has no settings of its own, so these layers have no rotary positions")
    first, *others = dict.fromkeys(used)
    differing = [name for name in others if value[name] != value[first]]
    if differing:
        raise ValueError(f"{where}: {first} and {differing[0]} layers differ, but all must have one rotary setting")
    return dict(value[first])


def _required(rotary: RotarySettings, key: str) -> Any:
    if key not in rotary.values:
        raise ValueError(f"{rotary.where}: {key} is missing")
    return _positive(rotary.values[key], f"{rotary.where}: {key}")


def _factors(rotary: RotarySettings, key: str, count: int) -> tuple[float, ...]:
    values = rotary.values.get(key)
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = f"has {len(values)} values" if isinstance(values, (list, tuple)) else "is missing or no list"
        raise ValueError(f"{rotary.where}: {key} {found}, expected {count}")
    return tuple(float(_positive(value, f"{rotary.where}: {key}")) for value in values)


def _positive(value: Any, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where} is {value!r}, not a positive number")
    return value
