"""setup.py: its decisions one by one, and a wheel made from a copy of the sources."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.process import run_python

ROOT = Path(__file__).parents[1]
SUPPORTED = ("75", "80", "86", "90", "100", "120")
GIB = 1024**3


def load_setup():
    spec = importlib.util.spec_from_file_location("bda_fused_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def program(path, *lines):
    """An executable shell script at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


# The C++ compiler


def test_cxx_is_taken_as_it_is_named(tmp_path):
    assert setup.find_cxx({"CXX": "ccache g++", "PATH": str(tmp_path)}).command == "ccache g++"


def test_first_compiler_that_runs_is_found(tmp_path):
    program(tmp_path / "c++", "exit 1")
    gxx = program(tmp_path / "g++", "exit 0")
    program(tmp_path / "clang++", "exit 0")
    found = setup.find_cxx({"CXX": "", "PATH": str(tmp_path)})
    assert found == setup.Tool(str(gxx), f"g++ found at {gxx}")


def test_missing_compiler_has_its_reason(tmp_path):
    found = setup.find_cxx({"PATH": str(tmp_path)})
    assert found == setup.Tool(None, "no C++ compiler on PATH; install one, or name it in CXX, and install again")


# The CUDA compiler


@pytest.fixture
def places(tmp_path):
    """A PATH with an nvcc, one without, a CUDA_HOME with an nvcc, and one without."""
    program(tmp_path / "path" / "nvcc")
    program(tmp_path / "home" / "bin" / "nvcc")
    return {name: str(tmp_path / name) for name in ("path", "nothing", "home")}


@pytest.mark.parametrize("wish", [{}, {"BDA_FUSED_CUDA": "auto"}, {"BDA_FUSED_CUDA": "1"}])
def test_nvcc_of_cuda_home_comes_before_that_of_path(places, wish):
    found = setup.find_nvcc({"PATH": places["path"], "CUDA_HOME": places["home"], **wish}, "linux")
    assert found.command == f"{places['home']}/bin/nvcc"
    assert found.reason == f"nvcc found in CUDA_HOME={places['home']}"


@pytest.mark.parametrize("home", ["nothing", None])
def test_nvcc_of_path_is_found(places, home):
    environ = {"PATH": places["path"]} | ({"CUDA_HOME": places[home]} if home else {})
    found = setup.find_nvcc(environ, "linux")
    assert found == setup.Tool(f"{places['path']}/nvcc", f"nvcc found at {places['path']}/nvcc")


def test_zero_builds_no_cuda_where_there_is_an_nvcc(places):
    found = setup.find_nvcc({"BDA_FUSED_CUDA": "0", "PATH": places["path"]}, "linux")
    assert found.command is None
    assert found.reason.startswith("BDA_FUSED_CUDA=0 says not to")


@pytest.mark.parametrize(
    ("platform", "path", "reason"),
    [("linux", "nothing", "no nvcc in CUDA_HOME or on PATH"), ("darwin", "path", "Linux only, and this is darwin")],
)
def test_missing_nvcc_is_a_reason_in_auto_and_an_error_in_one(places, platform, path, reason):
    found = setup.find_nvcc({"PATH": places[path]}, platform)
    assert found.command is None
    assert reason in found.reason
    with pytest.raises(SystemExit, match=f"BDA_FUSED_CUDA=1 asks for the CUDA module, but .*{reason}"):
        setup.find_nvcc({"BDA_FUSED_CUDA": "1", "PATH": places[path]}, platform)


def test_other_wishes_are_refused():
    with pytest.raises(SystemExit, match="BDA_FUSED_CUDA must be auto, 0 or 1, got 'yes'"):
        setup.find_nvcc({"BDA_FUSED_CUDA": "yes"}, "linux")


# Architectures


@pytest.mark.parametrize(
    ("arch_list", "supported", "arches", "keep_ptx"),
    [
        (None, SUPPORTED, ["80", "90", "100", "120"], True),
        ("", SUPPORTED, ["80", "90", "100", "120"], True),
        (None, ("75", "80", "90"), ["80", "90"], True),
        ("8.0", SUPPORTED, ["80"], False),
        ("8.0+PTX;9.0", SUPPORTED, ["80", "90"], True),
        (" 8.6, 9.0a 10.0+PTX; ", SUPPORTED, ["86", "90", "100"], True),
        ("80 12.0", SUPPORTED, ["80", "120"], False),
        ("9.0;9.0a+PTX;9.0", SUPPORTED, ["90"], True),
        ("10.0f", SUPPORTED, ["100"], False),
        ("7.5 8.0 8.6 9.0+PTX", SUPPORTED, ["80", "86", "90"], True),
    ],
)
def test_architectures(arch_list, supported, arches, keep_ptx):
    assert setup.cuda_arches(arch_list, supported) == (arches, keep_ptx)


@pytest.mark.parametrize(
    ("arch_list", "supported", "sentence"),
    [
        (None, ("70", "75"), "this nvcc knows none of the architectures 80, 90, 100, 120"),
        ("Hopper", SUPPORTED, r"must look like 8.0;9.0\+PTX, got 'Hopper'"),
        ("9.0+SASS", SUPPORTED, r"must look like 8.0;9.0\+PTX, got '9.0\+SASS'"),
        ("7.0;7.5+PTX", SUPPORTED, r"need 8.0 or newer, got only older ones in TORCH_CUDA_ARCH_LIST: 7.0;7.5\+PTX"),
        ("13.0", SUPPORTED, "asks for 13.0, but this nvcc knows 75, 80, 86, 90, 100, 120"),
    ],
)
def test_refused_architectures(arch_list, supported, sentence):
    with pytest.raises(SystemExit, match=sentence):
        setup.cuda_arches(arch_list, supported)


# Jobs, versions, ninja's file


@pytest.mark.parametrize(
    ("environ", "cpus", "gib", "jobs"),
    [({}, 16, 128, 16), ({}, 16, 7, 3), ({}, 16, 1, 1), ({}, 1, 64, 1), ({"MAX_JOBS": "5"}, 1, 1, 5)],
)
def test_parallel_jobs(environ, cpus, gib, jobs):
    assert setup.parallel_jobs(environ, cpus, gib * GIB) == jobs


@pytest.mark.parametrize("value", ["", "0", "-1", "many", "2.5"])
def test_refused_max_jobs(value):
    with pytest.raises(SystemExit, match="MAX_JOBS must be a number from 1 up"):
        setup.parallel_jobs({"MAX_JOBS": value}, 1, GIB)


def test_free_memory_is_part_of_the_machine():
    assert 0 < setup.free_memory() < 2**50


def test_version_is_the_line_with_the_release(tmp_path):
    nvcc = program(tmp_path / "nvcc", "echo nvcc: a compiler", "echo built in 2.5 hours", "echo tools, release 13.0")
    assert setup.version_of(str(nvcc)) == "tools, release 13.0"
    assert setup.version_of(str(program(tmp_path / "c++", "echo name", "echo c++ 12.2.0"))) == "c++ 12.2.0"
    assert setup.version_of(str(program(tmp_path / "cc", "echo name"))) == "of unknown version"


def test_compiler_that_does_not_run_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"c\+\+ --version does not run"):
        setup.version_of(str(program(tmp_path / "c++", "exit 3")))


def test_ninja_file():
    file = setup.NinjaFile()
    file.add_module("_m", ("csrc/a.cpp", "csrc/b.cu"), {".cpp": "g++ -c", ".cu": "nvcc -c"}, "nvcc -shared")
    assert file.lines[-6:] == [
        "build csrc_a.cpp.o: compile ../../csrc/a.cpp",
        "  compiler = g++ -c",
        "build csrc_b.cu.o: compile ../../csrc/b.cu",
        "  compiler = nvcc -c",
        "build _m.so: link csrc_a.cpp.o csrc_b.cu.o",
        "  linker = nvcc -shared",
    ]


def test_mirror_touches_only_what_differs(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name, text in (("same.h", "1"), ("deep/other.h", "2"), ("deep/new.h", "3")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    shutil.copytree(source, target)
    (target / "deep/other.h").write_text("old")
    (target / "deep/new.h").unlink()
    for file in target.rglob("*.h"):
        os.utime(file, (1, 1))
    setup._mirror(source, target)
    assert (target / "same.h").stat().st_mtime == 1
    assert [(target / name).read_text() for name in ("same.h", "deep/other.h", "deep/new.h")] == ["1", "2", "3"]


# What is listed by name


def test_every_package_of_the_tree_is_listed():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "bda_fused").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"bda_fused.kernels"}
    assert sorted(packages) == sorted(setup.PACKAGES)


def test_every_source_is_listed():
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert sources == {*setup.CPU_SOURCES, *setup.CUDA_SOURCES}


# A whole build, from a copy of the sources


def copy_sources(target):
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "*.partial")
    for folder in ("bda_fused", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy2(ROOT / file, target)
    return target


def run(command, cwd, **environ):
    environ = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0", **environ}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=600)


def make_wheel(sources, target, **environ):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-v"]
    return run([*command, "--wheel-dir", str(target), str(sources)], cwd=sources, **environ)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sources, the wheel that pip made of them)."""
    folder = tmp_path_factory.mktemp("build")
    sources = copy_sources(folder / "sources")
    process = make_wheel(sources, folder)
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = folder.glob("*.whl")
    return sources, wheel


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(built[1]).extractall(folder)
    return folder


def build_again(sources):
    """Builds once more and returns the files of the build folder that this wrote."""
    (build,) = (path.parent for path in sources.glob("build/*/build.ninja"))
    files = [*build.glob("*.o"), *build.glob("*.so")]
    before = {file: file.stat().st_mtime_ns for file in files}
    process = run([sys.executable, "setup.py", "build_ext"], cwd=sources)
    assert process.returncode == 0, process.stdout + process.stderr
    return {file.name for file in files if file.stat().st_mtime_ns != before[file]}


def test_wheel_holds_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    suffix = setup.sysconfig.get_config_var("EXT_SUFFIX")
    expected = {"__init__.py", "kernels/__init__.py", "backends/__init__.py", "zsl/__init__.py", "bench/__init__.py"}
    expected |= {"py.typed", "_build_info.json", f"_cpu{suffix}"}
    if setup.find_nvcc(os.environ).command is not None:
        expected.add(f"_cuda{suffix}")
    assert {f"bda_fused/{name}" for name in expected} <= names
    assert len([name for name in names if name.endswith(".so")]) == len([x for x in expected if x.endswith(".so")])
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bda_fused"}
    modules = {f"bda_fused/{p.relative_to(ROOT / 'bda_fused')}" for p in (ROOT / "bda_fused").rglob("*.py")}
    assert modules <= names


def test_wheel_works_away_from_the_checkout(unpacked, tmp_path):
    code = """
import torch
import bda_fused, bda_fused.kernels
from bda_fused import _native
from bda_fused.backends.batch_sum import batch_sum
print(bda_fused.__file__, bda_fused.kernels.__file__, _native.module("_cpu").__file__, sep="\\n")
assert torch.equal(batch_sum(torch.ones(3, 5)), torch.full((5,), 3.0))
x = torch.randn(2, 3, 4)
y = bda_fused.functional.residual_attention(x, x, x)
torch.testing.assert_close(y, torch.nn.functional.scaled_dot_product_attention(x, x, x))
print(_native.status("_cuda") is None)
"""
    process = run_python(code, path=unpacked, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    *files, cuda = process.stdout.splitlines()
    assert all(Path(file).is_relative_to(unpacked) for file in files), files
    assert cuda == str(setup.find_nvcc(os.environ).command is not None)


def test_build_info_says_what_was_built(unpacked):
    info = json.loads((unpacked / "bda_fused" / "_build_info.json").read_text())
    nvcc = setup.find_nvcc(os.environ)
    assert info["_cpu"]["built"] is True
    assert info["_cpu"]["compiler"] == setup.version_of(setup.find_cxx(os.environ).command)
    assert info["_cuda"]["built"] is (nvcc.command is not None)
    assert info["_cuda"]["reason"] == nvcc.reason
    if nvcc.command is not None:
        assert (info["_cuda"]["arches"], info["_cuda"]["ptx"]) == (["sm_90"], [])
        assert info["_cuda"]["toolkit"] == setup.version_of(nvcc.command)


def test_second_build_compiles_nothing(built):
    assert build_again(built[0]) == set()


def test_one_changed_source_recompiles_one_object(built):
    (built[0] / "csrc/cpu/batch_sum.cpp").touch()
    assert build_again(built[0]) == {"csrc_cpu_batch_sum.cpp.o", "_cpu.so"}


def test_changed_header_recompiles_what_includes_it(built):
    (built[0] / "csrc/cpu/batch_sum.h").touch()
    assert build_again(built[0]) == {"csrc_cpu_batch_sum.cpp.o", "csrc_cpu_bindings.cpp.o", "_cpu.so"}


def test_source_distribution_holds_what_a_build_needs(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    command = [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"]
    process = run(command, cwd=sources)
    assert process.returncode == 0, process.stderr
    (archive,) = sources.glob("dist/*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    needed = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "kernels/__init__.py", "bda_fused/py.typed"}
    assert needed <= names


def test_demanded_cuda_without_nvcc_fails_in_one_sentence(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    command = [sys.executable, "setup.py", "build_ext"]
    process = run(command, cwd=sources, BDA_FUSED_CUDA="1", PATH=str(nothing), CUDA_HOME=str(nothing))
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("BDA_FUSED_CUDA=1 asks for the CUDA module, but no nvcc")
    assert "Traceback" not in process.stderr + process.stdout


def test_without_a_compiler_the_package_installs_and_says_why(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    environ = {"BDA_FUSED_CUDA": "auto", "PATH": str(nothing), "CUDA_HOME": str(nothing), "CXX": ""}
    process = make_wheel(sources, tmp_path, **environ)
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from bda_fused import _native; print(_native.status('_cpu'))"
    process = run_python(code, path=tmp_path / "site", cwd=tmp_path)
    assert process.stdout.startswith("the extension module bda_fused._cpu was not built: no C++ compiler on PATH;")


def test_failing_compiler_fails_the_build(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    compiler = program(tmp_path / "cxx", '[ "$1" = --version ] && echo cxx 1.0 && exit 0', "echo no such flag; exit 1")
    process = run([sys.executable, "setup.py", "build_ext"], cwd=sources, CXX=str(compiler), BDA_FUSED_CUDA="0")
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("the extension modules of bda_fused do not compile")
    assert "Traceback" not in process.stderr
    assert not list(sources.glob("**/_build_info.json"))
