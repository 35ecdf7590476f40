"""The `bda-fused` command: train, eval, explain, bench and info.

A request that cannot be met is refused in one sentence on stderr with exit code 2, before anything is written. Work
that is begun and comes to nothing ends in one sentence too, and leaves nothing behind: training that diverges and work
that the memory does not hold with exit code 1, Ctrl-C and SIGTERM with the codes of shells.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

_EXTRA_MODULES = {"matplotlib", "safetensors", "sklearn", "tqdm", "typer", "yaml"}
_INSTALL_EXTRA = "the module {} is missing; install the [zsl] extra: pip install 'bda_fused[zsl]'"

try:
    import typer
except ModuleNotFoundError as error:
    print(f"bda-fused: {_INSTALL_EXTRA.format(error.name)}", file=sys.stderr)
    raise SystemExit(2) from error

_INTERRUPTED = 130  # what typer makes of Ctrl-C, as shells do
_TERMINATED = 128 + signal.SIGTERM

app = typer.Typer(
    help="Bi-directional attention for zero-shot learning: train, evaluate, explain, measure.",
    add_completion=False,
    rich_markup_mode=None,
)

Run = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `bda-fused train` wrote.")]
Backend = Annotated[str | None, typer.Option(help="Attention backend: auto, cuda, triton, cpu or eager.")]
Device = Annotated[str | None, typer.Option(help="Torch device, such as cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's own choice.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]


class Refusal(typer.TyperException):
    """A request that cannot be met, with the sentence that says why."""

    exit_code = 2


class Failure(typer.TyperException):
    """Work that came to nothing, with the sentence that says why."""

    exit_code = 1


class _Terminated(BaseException):
    """SIGTERM, raised wherever the command is; no Exception, so that nothing but cleaning up stops it."""


_INPUT_ERRORS = (ValueError, TypeError, OSError)


@contextmanager
def _refusing(kinds: type[Exception] | tuple[type[Exception], ...] = _INPUT_ERRORS) -> Iterator[None]:
    """Turn what is wrong with the user's input into a refusal; anything else is a defect and keeps its traceback.

    The kinds are all that wrong input leads to; a block that does more than check its input names fewer.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_MODULES:
            raise
        raise Refusal(_INSTALL_EXTRA.format(error.name)) from error
    except kinds as error:
        raise Refusal(str(error)) from error


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import bda_fused

        print(f"bda_fused {bda_fused.__version__}")
    elif context.invoked_subcommand is None:
        raise Refusal("a command is needed: train, eval, explain, bench or info (see bda-fused --help)")


@app.command()
def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run goes; must be new or empty.")],
    model: Annotated[
        Literal["demo", "full"] | None,
        typer.Option(help="demo: the small model of the README. full: every block of the released model."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides data, initial weights, batches, dropout; default 0.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak of the one-cycle learning rate.")] = None,
    order: Annotated[
        Literal["ssa-vsa", "vsa-ssa"] | None,
        typer.Option(help="Which attention runs first; default ssa-vsa."),
    ] = None,
    no_ssa: Annotated[bool, typer.Option("--no-ssa", help="Leave out semantic synthesis attention.")] = False,
    validation: Annotated[
        bool,
        typer.Option("--validation", help="Train and measure on a split of the seen classes, to choose settings."),
    ] = False,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON or YAML with any of these settings; options win over it."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train on two-digit numbers with seen and unseen classes; write the model, metrics and pictures to DIR."""
    given = _given(
        model=model,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        order=order,
        ssa=False if no_ssa else None,
        validation=True if validation else None,
        backend=backend,
        device=device,
        threads=threads,
    )
    with _refusing():
        from bda_fused.zsl.output import OutputError
        from bda_fused.zsl.settings import make_settings

        settings = make_settings(given, config)
        from bda_fused.zsl.models import running_backend
        from bda_fused.zsl.run import train_run
        from bda_fused.zsl.training import DivergedError

        running_backend(settings)
    try:
        with _refusing(OutputError):
            metrics = train_run(settings, out, overwrite=overwrite)
    except DivergedError as error:
        raise Failure(str(error)) from error
    print(_summary(metrics))
    print(f"{out}: model, metrics and pictures, made in {metrics['wall_seconds']:.1f} s")


@app.command("eval")
def evaluate(
    run: Run,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Recompute the metrics of a run from its checkpoint; exit code 1 if they are not those of its metrics.json."""
    with _refusing():
        from bda_fused import backends
        from bda_fused.zsl.metrics import NotFiniteError
        from bda_fused.zsl.run import load_run
        from bda_fused.zsl.training import evaluate

        loaded = load_run(run, **_given(backend=backend, device=device, threads=threads))
    with backends.use(loaded.settings.backend), _refusing(NotFiniteError):
        metrics = vars(evaluate(loaded.model, loaded.dataset))
    print(_summary(metrics))
    stored = {name: loaded.metrics.get(name) for name in metrics}
    if metrics != stored:
        print(f"bda-fused: {run} says otherwise: {stored}", file=sys.stderr)
        raise typer.Exit(1)
    print(f"equal to the metrics stored in {run}")


@app.command()
def explain(
    run: Run,
    images: Annotated[
        str | None,
        typer.Option(metavar="I,J,...", help="Test images by index: seen classes first, then unseen."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="NN,NN,...", help="The first test image of each of these classes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the maps go; default DIR/explain.")] = None,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the attention maps of chosen test images as a picture and as an array; default: six unseen classes."""
    target = run / "explain" if out is None else out
    with _refusing():
        indices = () if images is None else _numbers("images", images)
        names = () if classes is None else _names("classes", classes)
        from bda_fused import backends
        from bda_fused.zsl.explain import choose_images
        from bda_fused.zsl.output import OutputError, check_output
        from bda_fused.zsl.run import MAPS, explain_run, load_run

        check_output(target, overwrite=overwrite, marker=MAPS)
        loaded = load_run(run, **_given(backend=backend, device=device, threads=threads))
        chosen = choose_images(loaded.dataset, indices, names)
    with backends.use(loaded.settings.backend), _refusing(OutputError):
        explain_run(loaded, chosen, target, overwrite=overwrite)
    print(f"{target}: maps of {len(chosen)} test images")


@app.command()
def bench(
    datasets: Annotated[
        str, typer.Option(metavar="NAME,...", help="Numbers of attributes to measure.")
    ] = "AWA2,SUN,CUB",
    dims: Annotated[str, typer.Option(metavar="C,...", help="Widths.")] = "350,512",
    regions: Annotated[str, typer.Option(metavar="HW,...", help="Regions per image.")] = "49,196",
    images: Annotated[str, typer.Option(metavar="B,...", help="Batch sizes.")] = "8,32",
    passes: Annotated[str, typer.Option(metavar="NAME,...", help="Passes.")] = "forward,forward+backward",
    rivals: Annotated[
        str, typer.Option(metavar="NAME,...", help="Whom to measure beside natural and ours.")
    ] = "sdpa,compiled,algebra",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where table, data and plot go.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure the attention core against what one would write without this package; ratios of one run."""
    with _refusing():
        from bda_fused.bench import command

        text = command.bench(
            datasets=_names("datasets", datasets),
            dims=_numbers("dims", dims),
            regions=_numbers("regions", regions),
            images=_numbers("images", images),
            passes=_names("passes", passes),
            rivals=_split(rivals),
            rounds=rounds,
            threads=threads,
            device=device,
            out=out,
            overwrite=overwrite,
        )
    print(text)


@app.command()
def info() -> None:
    """Versions, what was built, and every backend with the reason why it would or would not run."""
    from bda_fused import info

    print(info.report())


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _names(option: str, text: str) -> tuple[str, ...]:
    names = _split(text)
    if not names:
        raise ValueError(f"--{option} must name at least one, got {text!r}")
    return names


def _numbers(option: str, text: str) -> tuple[int, ...]:
    names = _names(option, text)
    try:
        return tuple(int(name) for name in names)
    except ValueError:
        raise ValueError(f"--{option} must be whole numbers separated by commas, got {text!r}") from None


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def _summary(metrics: dict[str, Any]) -> str:
    return "  ".join(f"{name} {metrics[name]:.1f} %" for name in ("T1", "U", "S", "H"))


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _missing_memory(error: Exception) -> str | None:
    """What memory torch, numpy or Python asked for in vain, by their own words; None for another error."""
    found = re.search(r"(?:tried|unable) to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    if found:
        return f"another {found[1]}"
    return "this" if isinstance(error, MemoryError) else None


def main() -> None:
    """Entry point of `bda-fused`."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)  # None, or what typer.Exit carries
    except typer.TyperException as error:
        print(f"bda-fused: {error.format_message()}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (RuntimeError, MemoryError) as error:
        memory = _missing_memory(error)
        if memory is None:
            raise
        print(f"bda-fused: there is not enough memory for {memory}", file=sys.stderr)
        raise SystemExit(Failure.exit_code) from None
    except _Terminated:
        print("bda-fused: terminated, nothing was written", file=sys.stderr)
        raise SystemExit(_TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == _INTERRUPTED:
        print("bda-fused: interrupted, nothing was written", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
