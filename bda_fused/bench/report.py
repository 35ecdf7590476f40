"""Tables and plots of benchmark results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bda_fused.bench.run import Result

TITLES = {"natural": "natural", "sdpa": "SDPA", "compiled": "torch.compile", "algebra": "our algebra in torch ops"}


def heading(env: dict[str, Any], rounds: str) -> str:
    """What the numbers belong to; ``rounds`` says how many and how, such as "7 interleaved rounds"."""
    machine = env["gpu"] or f"{env['processor']} ({env['cpu_capability']}), {env['threads']} thread(s)"
    return (
        f"SSA + VSA, float32, backend {env['backend']}, medians of {rounds} on {machine}, "
        f"torch {env['torch']}, bda_fused {env['bda_fused']}."
    )


def line(result: Result) -> str:
    """One case in one line, as it comes."""
    rivals = "  ".join(f"{name} {_cell(result, name)}" for name in result.seconds if name != "ours")
    return f"{result.case.name}: ours {1e3 * result.seconds['ours']:.2f} ms  {rivals}"


def table(results: list[Result]) -> str:
    """Markdown: our milliseconds, then for each rival its time over ours and, in brackets, its FLOPs over ours.

    A cell below 1, where the rival is faster, is bold.
    """
    rivals = [name for name in results[0].seconds if name != "ours"] if results else []
    lines = [
        "| case | ours, ms | " + " | ".join(TITLES[name] for name in rivals) + " | peak MB, ours (natural) |",
        "| --- | ---: |" + " ---: |" * len(rivals) + " ---: |",
    ]
    for result in results:
        cells = [_cell(result, name) for name in rivals]
        peak = f"{result.peak_bytes['ours'] / 1e6:.1f} ({result.peak_bytes['natural'] / 1e6:.1f})"
        lines.append(
            f"| {result.case.name} | {1e3 * result.seconds['ours']:.2f} | " + " | ".join(cells) + f" | {peak} |"
        )
    return "\n".join(lines)


def _cell(result: Result, rival: str) -> str:
    ratio = f"{result.ratio(rival):.2f}x"
    return f"{f'**{ratio}**' if result.ratio(rival) < 1 else ratio} ({result.flop_ratio(rival):.2f})"


def summary(results: list[Result]) -> str:
    """One line a rival: the range of time ratios and the worst share of the FLOP ratio that became speed."""
    lines = []
    for name in (name for name in results[0].seconds if name not in ("ours",)):
        ratios = [result.ratio(name) for result in results]
        shares = [(result.ratio(name) / result.flop_ratio(name), result) for result in results]
        share, worst = min(shares, key=lambda pair: pair[0])
        below = sum(s < 0.8 for s, _ in shares)
        lines.append(
            f"{TITLES[name]}: {min(ratios):.2f}x to {max(ratios):.2f}x our time; losing cells "
            f"{sum(r < 1 for r in ratios)} of {len(ratios)}; "
            f"least share of the FLOP ratio {share:.2f} ({worst.case.name}), below 0.8 in {below}"
        )
    return "\n".join(lines)


def plot(results: list[Result], path: Path, env: dict[str, Any]) -> None:
    """Bars of every rival's time over ours, a panel for each pass; a mark shows the ratio of FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(result.case.passes for result in results))
    rivals = [name for name in results[0].seconds if name != "ours"]
    height = 1 + 0.28 * max(sum(r.case.passes == p for r in results) for p in passes) * max(1, len(rivals) / 2)
    figure, axes = plt.subplots(1, len(passes), figsize=(6 * len(passes), height), squeeze=False, layout="constrained")
    width = 0.8 / len(rivals)
    for axis, direction in zip(axes[0], passes, strict=True):
        rows = [result for result in results if result.case.passes == direction]
        for index, name in enumerate(rivals):
            positions = [row + (index - (len(rivals) - 1) / 2) * width for row in range(len(rows))]
            axis.barh(positions, [result.ratio(name) for result in rows], height=width, label=TITLES[name])
            axis.plot([result.flop_ratio(name) for result in rows], positions, "k|", markersize=5)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(rows)), [result.case.name.removesuffix(f" {direction}") for result in rows])
        axis.invert_yaxis()
        axis.set_xlabel("time over ours; | FLOPs over ours")
        axis.set_title(direction)
    axes[0][-1].legend(loc="lower right", fontsize="small")
    figure.suptitle(f"SSA + VSA, {env['gpu'] or env['processor']}, {env['threads']} thread(s), torch {env['torch']}")
    partial = path.with_name(path.stem + ".partial" + path.suffix)
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    partial.replace(path)
