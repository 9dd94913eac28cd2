"""LLaVA-1.5-7B (Liu et al. 2023, arXiv 2310.03744): CLIP ViT-L/14 at 336, an MLP, Vicuna-7B v1.5; its two stages.

Sources of the numbers: [table] the table of hyper-parameters in the appendix of the paper, [pretrain], [finetune]
scripts/v1_5/pretrain.sh and finetune.sh of https://github.com/haotian-liu/LLaVA, [hf] what transformers' Trainer does
where the scripts say nothing. The frame (tokenizer, settings of pictures, names of tensors) is that of
llava-hf/llava-1.5-7b-hf, so `python -m mm_jax convert RUN DST` writes a directory of that kind. The weights of lmsys/
vicuna-7b-v1.5 are pickled on the hub: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)` turns them into
safetensors.

Different here: conversations are packed, so a row holds several; rows x pictures make the batches of the paper. A
conversation that is longer than a row is left out and counted, where the scripts cut it. [finetune] pads pictures to
squares; set "do_pad": true in the directory's preprocessor_config.json for that.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import MultimodalConfig, ProjectorConfig, ViTConfig
from mm_jax.train.config import InitConfig, OptimizerConfig, RunConfig, Stage

PARTS = (
    "{% macro images(content, after) %}{% if content is not string %}"
    "{% for part in content if part['type'] == 'image' %}{{ '<image>' + after }}{% endfor %}{% endif %}{% endmacro %}"
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}{% endmacro %}"
)
# [pretrain] --version plain: the picture, the caption, a line break; of the text the caption alone is read and learnt
CAPTIONS = PARTS + (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text(message['content']) + '\n' }}{% endgeneration %}"
    "{% else %}{{ images(message['content'], '') }}{% endif %}{% endfor %}"
)
# [finetune] --version v1: Vicuna's, with its system message, and </s> behind answers
DIALOGUES = PARTS + (
    '{{ "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    "detailed, and polite answers to the user's questions. \" }}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' }}{% generation %}{{ text(message['content']) + '</s>' }}{% endgeneration %}"
    "{% else %}{{ 'USER: ' + images(message['content'], '\n') + text(message['content']) | trim + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def get_config() -> RunConfig:
    llama = run_path(str(Path(__file__).with_name("llama2_7b.py")))["get_config"]()
    # the sizes of llava-hf/llava-1.5-7b-hf, for `compile` on a machine that does not have it
    vision = ViTConfig(
        height=336, width=336, patch_size=14, embed_dim=1024, num_layers=23, num_heads=16, mlp_dim=4096,
        activation="quick_gelu", norm_eps=1e-5, class_token="drop", patch_bias=False, pre_norm=True, post_norm=False,
    )  # fmt: skip
    projector = ProjectorConfig("mlp", hidden_dim=4096, activation="gelu", norm=False)
    decoder = replace(llama.model.decoder, vocab_size=32_064)
    model = MultimodalConfig(
        vision, None, image_projector=projector, decoder=decoder, dtype="bfloat16"
    )  # --bf16
    optimizer = OptimizerConfig(
        kind="adamw",  # [table]
        learning_rate=1e-3,  # [table], [pretrain]
        warmup_steps=66,  # [table] 3 % of the steps
        final_fraction=0.0,  # [table] cosine, to 0
        weight_decay=0.0,  # [table]
        clip_norm=1.0,  # [hf] max_grad_norm
        beta1=0.9,
        beta2=0.999,  # [hf] adam_beta1, adam_beta2
    )
    align = Stage(
        steps=2181,  # [table] once through 558,128 captions
        mixture={"captions": 1.0},
        trainable=("image_projector",),  # [pretrain] --tune_mm_mlp_adapter
        template=CAPTIONS,
        answer_weight="token",
        # [table] 256 captions: four pictures of 576 tokens with their captions in each of 64 rows
        batch=BatchConfig(rows=64, length=2560, images=4),
        optimizer=optimizer,
    )
    instruct = replace(
        align,
        steps=5198,  # [table] once through 665,298 conversations
        mixture={"instructions": 1.0},
        trainable=("image_projector", "decoder"),
        template="",
        # [table] 128 conversations, which are half as long as [finetune] --model_max_length on average
        batch=BatchConfig(rows=64, length=2048, images=2),
        optimizer=replace(optimizer, learning_rate=2e-5, warmup_steps=156),  # [table]
    )
    return RunConfig(
        name="llava_1_5_7b",
        init=InitConfig(
            checkpoint="checkpoints/llava-1.5-7b-hf",  # its CLIP tower is the original one
            decoder="checkpoints/vicuna-7b-v1.5",
            fresh=("image_projector",),
            template=DIALOGUES,
        ),
        model=model,
        processor=None,
        sources={
            "captions": SourceConfig("llava", "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"),
            "instructions": SourceConfig("llava", "data/llava_v1_5_mix665k.json"),
        },
        stages={"align": align, "instruct": instruct},
        remat="full",  # --gradient_checkpointing
    )
