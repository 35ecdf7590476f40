"""Builds the extension modules: which ones is decided here, without torch, and written to bda_fused/_build_info.json.

Read from the environment: BDA_FUSED_CUDA=auto|0|1 (auto builds CUDA where an nvcc is found), CUDA_HOME,
TORCH_CUDA_ARCH_LIST and MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGES = ["bda_fused", "bda_fused.backends", "bda_fused.bench", "bda_fused.kernels", "bda_fused.zsl"]
DEFAULT_ARCHES = ("80", "90", "100", "120")
BYTES_PER_JOB = 2 * 1024**3  # what one nvcc may take


@dataclass(frozen=True)
class Cuda:
    """Whether the CUDA module is built, why, and with which compiler."""

    nvcc: str | None
    reason: str


def find_cuda(environ: Mapping[str, str], platform: str = sys.platform) -> Cuda:
    """The decision of BDA_FUSED_CUDA; SystemExit with one sentence where 1 cannot be met."""
    wish = environ.get("BDA_FUSED_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"BDA_FUSED_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return Cuda(None, "BDA_FUSED_CUDA=0 says not to; install again without it to build it")
    if platform != "linux":
        missing = f"it is built on Linux, and this is {platform}"
    else:
        home = environ.get("CUDA_HOME")
        candidate = Path(home) / "bin" / "nvcc" if home else None
        if candidate is not None and candidate.exists():
            return Cuda(str(candidate), f"nvcc found in CUDA_HOME={home}")
        found = shutil.which("nvcc", path=environ.get("PATH"))
        if found:
            return Cuda(found, f"nvcc found at {found}")
        missing = "no nvcc in CUDA_HOME or on PATH; install the CUDA toolkit, set CUDA_HOME, and install again"
    if wish == "1":
        raise SystemExit(f"BDA_FUSED_CUDA=1 asks for the CUDA module, but {missing}")
    return Cuda(None, missing)


def cuda_arches(arch_list: str | None, supported: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(compile for these, keep PTX of these), from TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") or the default.

    Of the default, what the compiler does not know is left out; what is asked for by name must be known.
    """
    if not arch_list:
        arches = [arch for arch in DEFAULT_ARCHES if arch in supported]
        if not arches:
            raise SystemExit(f"nvcc supports none of the architectures {', '.join(DEFAULT_ARCHES)}")
        return arches, arches[-1:]
    arches, ptx = [], []
    for item in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must look like 8.0;9.0+PTX, got {item!r}")
        arch = match[1] + match[2]
        if arch.rstrip("af") not in supported:
            raise SystemExit(f"nvcc does not support the architecture {item} of TORCH_CUDA_ARCH_LIST")
        if int(arch.rstrip("af")) < 80:
            raise SystemExit(f"the CUDA kernels need sm_80 or newer, got {item} in TORCH_CUDA_ARCH_LIST")
        arches.append(arch)
        if match[3]:
            ptx.append(arch)
    return arches, ptx


def parallel_jobs(environ: Mapping[str, str], cpus: int, free_bytes: int) -> int:
    """MAX_JOBS, or as many as there are processors and memory for."""
    if "MAX_JOBS" in environ:
        try:
            return max(1, int(environ["MAX_JOBS"]))
        except ValueError:
            raise SystemExit(f"MAX_JOBS must be a number, got {environ['MAX_JOBS']!r}") from None
    return max(1, min(cpus, free_bytes // BYTES_PER_JOB))


def free_memory() -> int:
    """Bytes that a build may use, from the kernel where it says so."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return 2 * BYTES_PER_JOB
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    return int(match[1]) * 1024 if match else 2 * BYTES_PER_JOB


def ninja_file(modules: list[dict[str, str]], objects: list[dict[str, str]]) -> str:
    """The build as ninja reads it: every object by its rule, then every module from its objects."""
    lines = ["ninja_required_version = 1.8"]
    for rule, command in (
        ("compile", "$compiler -MMD -MF $out.d -c $in -o $out"),
        ("link", "$linker $in -o $out"),
    ):
        lines += [f"rule {rule}", f"  command = {command}", f"  description = {rule} $out"]
        if rule == "compile":
            lines += ["  depfile = $out.d", "  deps = gcc"]
    for item in objects:
        lines += [f"build {item['out']}: compile {item['source']}", f"  compiler = {item['compiler']}"]
    for item in modules:
        lines += [f"build {item['out']}: link {item['objects']}", f"  linker = {item['linker']}"]
    return "\n".join(lines) + "\n"


def stable_copy(source: Path, target: Path, version: str) -> Path:
    """Headers under a path that is the same in every isolated build, so that nothing is rebuilt for its sake."""
    stamp = target.with_suffix(".version")
    if not stamp.exists() or stamp.read_text() != version:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        stamp.write_text(version)
    return target


class BuildNative(build_ext):
    """Builds through ninja where the compiler is GCC or Clang, and as setuptools does elsewhere."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cuda = find_cuda(os.environ)

    def build_extensions(self) -> None:
        import pybind11

        info: dict[str, dict[str, object]] = {"_cpu": {"built": True}}
        if self.compiler.compiler_type == "msvc":
            (cpu,) = self.extensions
            cpu.include_dirs.append(pybind11.get_include())
            cpu.extra_compile_args = ["/std:c++17", "/O2", "/openmp"]
            super().build_extensions()
            info["_cuda"] = {"built": False, "reason": self.cuda.reason}
        else:
            build = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            headers = stable_copy(Path(pybind11.get_include()), build / "include", pybind11.__version__)
            info |= self._build_with_ninja(build, headers)
        for folder in self._folders():
            partial = folder / "_build_info.partial"
            partial.write_text(json.dumps(info, indent=2) + "\n")
            partial.replace(folder / "_build_info.json")

    def _build_with_ninja(self, build: Path, headers: Path) -> dict[str, dict[str, object]]:
        import ninja

        include = f"-I{headers} -I{sysconfig.get_paths()['include']}"
        openmp = "-fopenmp" if sys.platform == "linux" else ""
        cxx = os.environ.get("CXX") or " ".join(getattr(self.compiler, "compiler_cxx", ["c++"])[:1])
        flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra {openmp} {include}"
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        objects, modules = [], []

        def add(module: str, sources: dict[str, str], linker: str) -> None:
            outs = []
            for source, compiler in sources.items():
                out = str(build / (source.replace("/", "_") + ".o"))
                objects.append({"out": out, "source": str(ROOT / source), "compiler": compiler})
                outs.append(out)
            modules.append({"out": str(build / f"{module}.so"), "objects": " ".join(outs), "linker": linker})

        add(
            "_cpu",
            {"csrc/cpu/bindings.cpp": f"{cxx} {flags}", "csrc/cpu/batch_sum.cpp": f"{cxx} {flags}"},
            f"{cxx} {shared} {openmp}",
        )
        info: dict[str, dict[str, object]] = {"_cpu": {"built": True, "compiler": _version(cxx)}}
        nvcc = self.cuda.nvcc
        if nvcc is None:
            info["_cuda"] = {"built": False, "reason": self.cuda.reason}
            print(f"bda_fused: the CUDA module is not built: {self.cuda.reason}")
        else:
            supported = tuple(re.findall(r"compute_(\d+)", _run(nvcc, "--list-gpu-arch")))
            arches, ptx = cuda_arches(os.environ.get("TORCH_CUDA_ARCH_LIST"), supported)
            gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in arches]
            gencode += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx]
            cu_flags = f"-std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden {' '.join(gencode)}"
            add(
                "_cuda",
                {
                    "csrc/cuda/bindings.cpp": f"{cxx} {flags}",
                    "csrc/cuda/batch_sum.cu": f"{nvcc} -ccbin {cxx} {cu_flags}",
                },
                f"{nvcc} -ccbin {cxx} -shared -cudart static {' '.join(gencode)}",
            )
            info["_cuda"] = {
                "built": True,
                "reason": self.cuda.reason,
                "toolkit": _version(nvcc),
                "arches": [f"sm_{arch}" for arch in arches],
                "ptx": [f"compute_{arch}" for arch in ptx],
            }
            print(f"bda_fused: the CUDA module is built for {', '.join(arches)}: {self.cuda.reason}")
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(modules, objects))
        jobs = parallel_jobs(os.environ, os.cpu_count() or 1, free_memory())
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), "-j", str(jobs)]
        if subprocess.call(command) != 0:
            raise SystemExit("the extension modules of bda_fused did not compile, see the compiler's messages above")
        self._place(build, nvcc is not None)
        return info

    def _folders(self) -> list[Path]:
        """Where modules go: the package that a wheel is made of, and in an editable install the source tree's own."""
        folders = [Path(self.get_ext_fullpath("bda_fused._cpu")).parent]
        if self.inplace or self.editable_mode:
            folders.append(ROOT / "bda_fused")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return folders

    def _place(self, build: Path, with_cuda: bool) -> None:
        """Copies the modules to their folders, and takes away one of an earlier, other build."""
        for module, wanted in (("_cpu", True), ("_cuda", with_cuda)):
            name = Path(self.get_ext_filename(f"bda_fused.{module}")).name
            for folder in self._folders():
                if wanted:
                    shutil.copy2(build / f"{module}.so", folder / f"{name}.partial")
                    (folder / f"{name}.partial").replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _version(compiler: str) -> str:
    """The line of ``--version`` that holds the number: nvcc's comes after its name."""
    lines = [line for line in _run(*compiler.split(), "--version").splitlines() if re.search(r"\d+\.\d+", line)]
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


if __name__ == "__main__":
    setup(
        packages=PACKAGES,
        package_dir={"bda_fused.kernels": "kernels"},
        package_data={"bda_fused": ["py.typed"]},
        ext_modules=[
            Extension("bda_fused._cpu", ["csrc/cpu/bindings.cpp", "csrc/cpu/batch_sum.cpp"]),
        ],
        cmdclass={"build_ext": BuildNative},
    )
