"""The same recipe with more pixels, wider parts and more steps: at most 90 minutes on two cores."""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from mm_jax.data.sources import SourceConfig
from mm_jax.train.config import RunConfig

STEPS = {"towers": 2500, "language": 600, "align": 400, "instruct": 4000, "prefer": 150}


def get_config() -> RunConfig:
    quick: RunConfig = run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    model, rules = quick.model, quick.processor
    return replace(
        quick,
        name="small",
        model=replace(
            model,
            vision=replace(model.vision, height=96, width=96, embed_dim=192, num_heads=6, mlp_dim=768),
            audio=replace(model.audio, num_layers=4),
            image_projector=replace(model.image_projector, merge=(2, 2), hidden_dim=512),
            decoder=replace(model.decoder, embed_dim=192, num_layers=6, num_heads=6, mlp_dim=512),
        ),
        processor=replace(
            rules,
            image=replace(rules.image, height=96, width=96, num_tokens=36),
            targets=replace(rules.targets, image_grid=(12, 12), image_block=(2, 2)),
        ),
        sources={kind: SourceConfig("tfds", f"mm_jax_quickstart/{kind}_large") for kind in quick.sources},
        stages={name: replace(stage, steps=STEPS[name]) for name, stage in quick.stages.items()},
    )
