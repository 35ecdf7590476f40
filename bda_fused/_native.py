"""The extension modules: loaded when first asked for, and never silently missing."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).parent


class NativeModuleError(RuntimeError):
    """An extension module was not built, or does not load."""


@lru_cache
def build_info() -> dict[str, Any]:
    """What setup.py decided and found when the package was installed; empty where it never ran."""
    path = _PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


@lru_cache
def status(name: str) -> str | None:
    """None if ``_cpu`` or ``_cuda`` loads, else one sentence that says why not."""
    try:
        module(name)
    except NativeModuleError as error:
        return str(error)
    return None


def module(name: str) -> ModuleType:
    """The extension module ``_cpu`` or ``_cuda``; NativeModuleError where it was not built or is broken."""
    files = [_PACKAGE / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        reason = build_info().get(name, {}).get("reason", "the package was not installed by its setup.py")
        raise NativeModuleError(f"the extension module bda_fused.{name} was not built: {reason}")
    try:
        return import_module(f"bda_fused.{name}")
    except ImportError as error:
        raise NativeModuleError(f"the extension module {file.name} was built but does not load: {error}") from error
