"""Stage 2 of BLIP-2 with OPT-2.7B (Li et al. 2023, arXiv 2301.12597): the Q-Former learns to speak to a frozen OPT.

Sources: [paper] section 3.4, "Pre-training settings", [lavis] lavis/models/blip2_models/blip2_opt.py of
https://github.com/salesforce/LAVIS. The checkpoint is Salesforce/blip2-opt-2.7b; only the last map of the projector
starts at random, as there is no directory of transformers with the Q-Former of stage 1.

Different here: no random crops and flips of pictures; the token in front of a caption is not learnt.
"""

from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import MultimodalConfig
from mm_jax.train.config import InitConfig, OptimizerConfig, RunConfig, Stage

# [lavis] queries, the token that begins a text, the caption, a line break, which ends an answer
TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}{% endfor %}"
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text(message['content']) + '\n' }}{% endgeneration %}"
    "{% else %}{{ text(message['content']) + ' ' if text(message['content']) }}{% endif %}{% endfor %}"
)


def get_config() -> RunConfig:
    speak = Stage(
        steps=80_000,  # [paper]
        mixture={"captions": 1.0},
        trainable=("image_projector", "vision/norm"),  # [lavis] ln_vision, queries, Q-Former, opt_proj
        answer_weight="token",
        # [paper] 1920 captions, of at most 32 tokens ([lavis] max_txt_len) behind 32 queries
        batch=BatchConfig(rows=240, length=512, images=8),
        optimizer=OptimizerConfig(
            kind="adamw",
            learning_rate=1e-4,  # [paper] peak of a cosine
            warmup_steps=2000,
            final_fraction=0.5,  # [paper] down to 5e-5
            weight_decay=0.05,
            beta1=0.9,
            beta2=0.98,
        ),
    )
    return RunConfig(
        name="blip2_opt_2_7b",
        init=InitConfig(
            checkpoint="checkpoints/blip2-opt-2.7b", fresh=("image_projector/out",), template=TEMPLATE
        ),
        model=MultimodalConfig(None, None, dtype="bfloat16"),  # [paper] half precision for the frozen parts
        processor=None,
        sources={"captions": SourceConfig("chat", "data/captions.jsonl")},
        stages={"speak": speak},
    )
