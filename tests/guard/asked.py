"""Notes what engines are asked for, in every process of a test.

A line with the reply's key goes to the file RECAP_TEST_ASKED.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODULE = "builder.captions.vllm"


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.abc.Loader) -> None:
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        put = module.Engine.put

        def noting(engine: Any, name: str, ready: Any) -> Any:
            refused = put(engine, name, ready)
            if refused is None:
                with open(os.environ["RECAP_TEST_ASKED"], "a") as file:
                    file.write(ready.key + "\n")
            return refused

        module.Engine.put = noting


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
