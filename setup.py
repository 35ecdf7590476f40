"""Decides which extension modules to build, without torch; the decision is kept in bda_fused/_build_info.json.

Read from the environment: BDA_FUSED_CUDA=auto|0|1, CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).parent.resolve()
PACKAGES = ["bda_fused", "bda_fused.backends", "bda_fused.bench", "bda_fused.kernels", "bda_fused.zsl"]
CPU_SOURCES = ("csrc/cpu/bindings.cpp", "csrc/cpu/batch_sum.cpp")
CUDA_SOURCES = (
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/residual_attention_forward.cu",  # the longest first: they compile side by side
    "csrc/cuda/residual_attention_backward.cu",
    "csrc/cuda/summed_product.cu",
    "csrc/cuda/pack_rows.cu",
    "csrc/cuda/ordered_sum.cu",
    "csrc/cuda/batch_sum.cu",
    "csrc/cuda/launch.cu",
    "csrc/cuda/versions.cu",
)
DEFAULT_ARCHES = ("80", "90", "100", "120")
OLDEST_ARCH = 80  # its PTX, made once, is what the code of every architecture is assembled from
BYTES_PER_JOB = 2 * 1024**3  # what one nvcc may take
CXX_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
NVCC_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")


@dataclass(frozen=True)
class Tool:
    """A compiler, or why there is none."""

    command: str | None
    reason: str


def find_cxx(environ: Mapping[str, str]) -> Tool:
    """The C++ compiler: CXX, else the first usual name on PATH that runs (on macOS `c++` may be an empty shell)."""
    if environ.get("CXX"):
        return Tool(environ["CXX"], f"CXX={environ['CXX']}")
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name, path=environ.get("PATH"))
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return Tool(found, f"{name} found at {found}")
    return Tool(None, "no C++ compiler on PATH; install one, or name it in CXX, and install again")


def find_nvcc(environ: Mapping[str, str], platform: str = sys.platform) -> Tool:
    """The CUDA compiler that BDA_FUSED_CUDA allows; SystemExit with one sentence where 1 cannot be met."""
    wish = environ.get("BDA_FUSED_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"BDA_FUSED_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return Tool(None, "BDA_FUSED_CUDA=0 says not to; install again without it")
    if platform != "linux":
        missing = f"it is built on Linux only, and this is {platform}"
    else:
        home = environ.get("CUDA_HOME")
        if home and (nvcc := Path(home) / "bin" / "nvcc").exists():
            return Tool(str(nvcc), f"nvcc found in CUDA_HOME={home}")
        found = shutil.which("nvcc", path=environ.get("PATH"))
        if found:
            return Tool(found, f"nvcc found at {found}")
        missing = "no nvcc in CUDA_HOME or on PATH; install the CUDA toolkit, set CUDA_HOME, and install again"
    if wish == "1":
        raise SystemExit(f"BDA_FUSED_CUDA=1 asks for the CUDA module, but {missing}")
    return Tool(None, missing)


def cuda_arches(arch_list: str | None, supported: Sequence[str]) -> tuple[list[str], bool]:
    """(assemble for these, whether to keep the PTX), from TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "80 90") or the default.

    Of the default, what the compiler does not know is left out; what is asked for by name must be known. Of a list for
    all of a machine's packages, what is older than 8.0 is left out. "9.0a" and "10.0f" are taken as 9.0 and 10.0: the
    kernels use nothing that only these have.
    """
    if not arch_list:
        known = [arch for arch in DEFAULT_ARCHES if arch in supported]
        if not known:
            raise SystemExit(f"this nvcc knows none of the architectures {', '.join(DEFAULT_ARCHES)}")
        return known, True
    arches: dict[str, None] = {}  # keys in order: an architecture that is named twice is compiled once
    keep_ptx = False
    for item in re.split(r"[;,\s]+", arch_list.strip(";, \t\n")):
        match = re.fullmatch(r"(\d+)\.?(\d)[af]?(\+PTX)?", item)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must look like 8.0;9.0+PTX, got {item!r}")
        number = match[1] + match[2]
        if int(number) < OLDEST_ARCH:
            continue
        if number not in supported:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST asks for {item}, but this nvcc knows {', '.join(supported)}")
        arches[number] = None
        keep_ptx = keep_ptx or match[3] is not None
    if not arches:
        raise SystemExit(
            f"the CUDA kernels need 8.0 or newer, got only older ones in TORCH_CUDA_ARCH_LIST: {arch_list}"
        )
    return list(arches), keep_ptx


def parallel_jobs(environ: Mapping[str, str], cpus: int, free_bytes: int) -> int:
    """MAX_JOBS, or as many as there are processors and memory for."""
    if "MAX_JOBS" not in environ:
        return max(1, min(cpus, free_bytes // BYTES_PER_JOB))
    if not re.fullmatch(r"[1-9]\d*", environ["MAX_JOBS"]):
        raise SystemExit(f"MAX_JOBS must be a number from 1 up, got {environ['MAX_JOBS']!r}")
    return int(environ["MAX_JOBS"])


def free_memory() -> int:
    """Bytes that a build may use, from the kernel where it says so."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else 2 * BYTES_PER_JOB


def version_of(command: str) -> str:
    """The line of ``--version`` with the number in it: nvcc's is the one that says "release"."""
    lines = [line for line in _output(command, "--version").splitlines() if re.search(r"\d+\.\d+", line)]
    return next((line for line in lines if "release" in line), lines[0] if lines else "of unknown version")


def _output(command: str, *arguments: str) -> str:
    try:
        return subprocess.run([*shlex.split(command), *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{command} {' '.join(arguments)} does not run: {error}") from error


@dataclass
class NinjaFile:
    """The build as ninja reads it; all paths are relative to the build folder, so that no path is in an object."""

    lines: list[str] = field(
        default_factory=lambda: [
            "ninja_required_version = 1.8",
            "rule compile",
            "  command = $compiler -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $linker $in -o $out",
        ]
    )

    def add_module(self, name: str, sources: Sequence[str], compilers: Mapping[str, str], linker: str) -> None:
        """One module: its sources, each by the compiler of its suffix, and how they are linked."""
        objects = []
        for source in sources:
            objects.append(source.replace("/", "_") + ".o")
            self.lines += [
                f"build {objects[-1]}: compile ../../{source}",
                f"  compiler = {compilers[Path(source).suffix]}",
            ]
        self.lines += [f"build {name}.so: link {' '.join(objects)}", f"  linker = {linker}"]


class BuildNative(build_ext):
    """Builds through ninja where the compiler is GCC or Clang, and as setuptools does with Microsoft's."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.nvcc = find_nvcc(os.environ)

    def build_extensions(self) -> None:
        import pybind11

        msvc = self.compiler.compiler_type == "msvc"
        info = self._build_with_msvc() if msvc else self._build_with_ninja(Path(pybind11.get_include()))
        for name, module in info.items():
            outcome = "built" if module["built"] else "not built"
            print(f"bda_fused: the extension module {name} is {outcome}: {module['reason']}")
        info["pybind11"] = pybind11.__version__
        target = self._target("_cpu").with_name("_build_info.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(info, indent=2) + "\n")

    def _build_with_msvc(self) -> dict[str, Any]:
        import pybind11

        (cpu,) = self.extensions
        cpu.include_dirs.append(pybind11.get_include())
        cpu.extra_compile_args = flags = ["/std:c++17", "/O2", "/EHsc", "/openmp"]
        cuda = {"built": False, "reason": self.nvcc.reason}
        try:
            super().build_extensions()
        except PlatformError as error:  # what setuptools raises where the compiler is not installed
            return {"_cpu": {"built": False, "reason": str(error)}, "_cuda": cuda}
        return {"_cpu": {"built": True, "reason": "MSVC found", "compiler": "MSVC", "flags": flags}, "_cuda": cuda}

    def _build_with_ninja(self, pybind11_headers: Path) -> dict[str, Any]:
        import ninja

        cxx = find_cxx(os.environ)
        if cxx.command is None:
            if os.environ.get("BDA_FUSED_CUDA") == "1":
                raise SystemExit(f"BDA_FUSED_CUDA=1 asks for the CUDA module, but {cxx.reason}")
            return self._placed({name: {"built": False, "reason": cxx.reason} for name in ("_cpu", "_cuda")})

        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # Build isolation puts pybind11 under another path each time, and that alone would rebuild everything.
        if pybind11_headers.resolve() != (build / "include").resolve():
            _mirror(pybind11_headers, build / "include")

        include = f"-Iinclude -I{shlex.quote(sysconfig.get_paths()['include'])}"
        openmp = ["-fopenmp"] if sys.platform == "linux" else []  # Apple's clang has none: one thread there
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        cpu_flags = [*CXX_FLAGS, *openmp]
        compile_cpp = f"{cxx.command} {' '.join(cpu_flags)} {include}"
        file = NinjaFile()
        file.add_module("_cpu", CPU_SOURCES, {".cpp": compile_cpp}, " ".join([cxx.command, shared, *openmp]))
        info: dict[str, Any] = {
            "_cpu": {
                "built": True,
                "reason": cxx.reason,
                "compiler": version_of(cxx.command),
                "flags": cpu_flags,
            },
            "_cuda": {"built": False, "reason": self.nvcc.reason},
        }
        if self.nvcc.command is not None:
            info["_cuda"] = self._add_cuda(file, self.nvcc.command, compile_cpp)
        (build / "build.ninja").write_text("\n".join(file.lines) + "\n")
        jobs = parallel_jobs(os.environ, os.cpu_count() or 1, free_memory())
        if subprocess.call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "-j", str(jobs)]) != 0:
            raise SystemExit(
                "the extension modules of bda_fused do not compile; the compiler's messages stand above "
                "(BDA_FUSED_CUDA=0 leaves out the CUDA module)"
            )
        return self._placed(info, build)

    def _add_cuda(self, file: NinjaFile, nvcc: str, compile_cpp: str) -> dict[str, Any]:
        arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
        supported = re.findall(r"compute_(\d+)", _output(shlex.quote(nvcc), "--list-gpu-arch"))
        arches, keep_ptx = cuda_arches(arch_list, supported)
        left_out = [] if arch_list else [arch for arch in DEFAULT_ARCHES if arch not in arches]
        if left_out:
            print(f"bda_fused: this nvcc does not know, and the CUDA module leaves out: {', '.join(left_out)}")
        source = f"compute_{min(int(arch) for arch in supported if int(arch) >= OLDEST_ARCH)}"
        ptx = [source] if keep_ptx else []
        gencode = [f"-gencode=arch={source},code={code}" for code in [f"sm_{arch}" for arch in arches] + ptx]
        host = [f"-ccbin={shlex.quote(os.environ['CXX'])}"] if os.environ.get("CXX") else []
        command = " ".join([shlex.quote(nvcc), *host, *gencode])
        compilers = {".cpp": compile_cpp, ".cu": " ".join([command, *NVCC_FLAGS])}
        file.add_module("_cuda", CUDA_SOURCES, compilers, f"{command} -shared -cudart static")
        return {
            "built": True,
            "reason": self.nvcc.reason,
            "toolkit": version_of(shlex.quote(nvcc)),
            "arches": [f"sm_{arch}" for arch in arches],
            "ptx": ptx,
            "flags": list(NVCC_FLAGS),
        }

    def _placed(self, info: dict[str, Any], build: Path | None = None) -> dict[str, Any]:
        """Puts the modules that were built into the wheel, and takes out those of an earlier, other build."""
        for name, module in info.items():
            _replace(build / f"{name}.so" if module["built"] and build else None, self._target(name))
        return info

    def copy_extensions_to_source(self) -> None:
        """Editable installs: what lies in the wheel's folder, and nothing else, goes beside the sources."""
        for name in ("_cpu", "_cuda"):
            built = self._target(name)
            _replace(built if built.exists() else None, ROOT / "bda_fused" / built.name)
        info = self._target("_cpu").with_name("_build_info.json")
        _replace(info, ROOT / "bda_fused" / info.name)

    def _target(self, name: str) -> Path:
        return Path(self.build_lib) / self.get_ext_filename(f"bda_fused.{name}")


def _replace(source: Path | None, target: Path) -> None:
    """Copies beside the target and renames: a running process keeps the old file. No source: no target."""
    if source is None:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    shutil.copy2(source, partial)
    partial.replace(target)


def _mirror(source: Path, target: Path) -> None:
    """Makes target's files equal to source's, and leaves the dates of those that already are."""
    for file in source.rglob("*"):
        copy = target / file.relative_to(source)
        if file.is_file() and not (copy.exists() and copy.read_bytes() == file.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_dir={"bda_fused.kernels": "kernels"},
        package_data={"bda_fused": ["py.typed"]},
        ext_modules=[Extension("bda_fused._cpu", list(CPU_SOURCES))],
        cmdclass={"build_ext": BuildNative},
    )
