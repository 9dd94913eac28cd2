"""Loss curves as a picture."""

from pathlib import Path

from mm_jax.train.metrics import read_metrics


def loss_curves(run_dir: str | Path) -> Path | None:
    """Draws `loss.png` from `metrics.jsonl`: a panel a stage, the loss and its parts by source or term.

    Returns the path, or None when there is nothing to draw yet.
    """
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    if not lines:
        return None
    from matplotlib.figure import Figure  # half a second that a run only pays once, at its end

    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure = Figure(figsize=(4 * len(stages), 3.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        mine = [line for line in lines if line["stage"] == stage]
        names = dict.fromkeys(name for line in mine for name in line if name.startswith("loss/"))
        for name in names:
            points = [(line["step"], line[name]) for line in mine if name in line]
            axes.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.7, label=name.removeprefix("loss/"))
        axes.plot([x["step"] for x in mine], [x["loss"] for x in mine], color="black", label="loss")
        axes.set(title=stage, xlabel="step")
        if min(line["loss"] for line in mine) > 0:
            axes.set_yscale("log")
        axes.legend(fontsize=6)
    path = Path(run_dir) / "loss.png"
    figure.savefig(path, dpi=120)
    return path
