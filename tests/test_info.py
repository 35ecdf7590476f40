"""What `python -m bda_fused.info` reports, and what an import of the package leaves alone."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bda_fused
from bda_fused import _native, backends, info
from tests.process import run_python

PACKAGE = Path(bda_fused.__file__).parent


@pytest.fixture
def lines():
    return dict(line.split(maxsplit=1) for line in info.report().splitlines() if not line.startswith("backend "))


def test_versions_are_those_that_run(lines):
    assert lines["bda_fused"] == bda_fused.__version__
    assert lines["python"].startswith(platform.python_version())
    assert lines["torch"] == torch.__version__


def test_cpu_module_is_reported_with_compiler_and_instruction_set(lines):
    assert _native.build_info()["_cpu"]["compiler"] in lines["_cpu"]
    assert lines["_cpu"].endswith(_native.module("_cpu").instruction_set())


def test_cuda_module_is_reported_with_architectures_and_driver_or_with_its_reason(lines):
    built = _native.build_info()["_cuda"]
    if not built["built"]:
        assert lines["_cuda"] == f"the extension module bda_fused._cuda was not built: {built['reason']}"
        return
    assert ", ".join(built["arches"] + built["ptx"]) in lines["_cuda"]
    assert built["toolkit"] in lines["_cuda"]
    major = built["toolkit"].split("release ")[1].split(".")[0]
    assert f"CUDA {major}." in lines["_cuda"]
    assert f"({ {'12': 'r525', '13': 'r580'}[major] } or newer)" in lines["_cuda"]


def test_missing_gpu_is_said(lines):
    assert (lines["GPU"] == "torch finds none") == (not torch.cuda.is_available())


def test_every_backend_has_its_reason():
    report = info.report().splitlines()
    for name, reason in backends.availability().items():
        (line,) = (line for line in report if line.split()[:2] == ["backend", name])
        assert line.endswith(f"  {reason or 'available'}")


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(info, "version", lambda name: (_ for _ in ()).throw(info.PackageNotFoundError(name)))
    assert any(line.split() == ["triton", "not", "installed"] for line in info.report().splitlines())


def test_module_of_another_cuda_is_reported(monkeypatch):
    """A toolkit whose driver is not in the table is reported by its CUDA version alone."""

    class Module:
        runtime_version = staticmethod(lambda: 14010)
        driver_version = staticmethod(lambda: 13020)

    built = {"built": True, "toolkit": "14.1", "arches": ["sm_90"], "ptx": []}
    monkeypatch.setattr(_native, "build_info", lambda: {"_cpu": _native_cpu, "_cuda": built})
    monkeypatch.setattr(_native, "status", lambda name: None)
    real = _native.module
    monkeypatch.setattr(_native, "module", lambda name: Module if name == "_cuda" else real(name))
    (line,) = (line for line in info.report().splitlines() if line.startswith("_cuda"))
    assert line.endswith("for sm_90; needs a driver for CUDA 14.1, found one for CUDA 13.2")


_native_cpu = _native.build_info().get("_cpu", {})


def test_command_prints_the_report(tmp_path):
    command = [sys.executable, "-m", "bda_fused.info"]
    process = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300)
    assert process.stdout == info.report() + "\n", process.stderr


def test_report_stands_where_nothing_was_built(tmp_path):
    copy = tmp_path / "bda_fused"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json"))
    process = run_python("from bda_fused import info; print(info.report())", path=tmp_path, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("was not built: the package was not installed by its setup.py") == 4


def test_import_loads_neither_cuda_nor_the_tools_of_other_parts(tmp_path):
    code = """
import json
import bda_fused, bda_fused.functional, bda_fused.modules, bda_fused.reference
unwanted = {"triton", "sklearn", "matplotlib", "safetensors", "typer", "bda_fused._cuda", "bda_fused._cpu"}
print(json.dumps(sorted(unwanted & set(sys.modules))))
bda_fused.functional.residual_attention(*(bda_fused.functional.torch.ones(1, 2, 3) for _ in range(3)))
print(json.dumps(sorted(unwanted & set(sys.modules))))
"""
    process = run_python(code, path=PACKAGE.parent, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    imported, called = (json.loads(line) for line in process.stdout.splitlines())
    assert imported == []
    assert "triton" not in called
