"""The same training steps in torch and transformers: a program of its own, so that neither is ever imported here.

python -m mm_jax.bench_torch SPEC.json writes {"seconds": [...], "memory": bytes} to standard output. The spec has
`vision` and `text`, fields of CLIPVisionConfig and LlamaConfig, `rows`, `length`, `images`, `image_tokens`, `steps`,
`dtype`, and the fields of AdamW.
"""

import json
import sys
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mm_jax.resident import peak_resident


def main(path: str) -> None:
    with open(path) as file:
        spec = json.load(file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**spec["vision"]),
        text_config=LlamaConfig(**spec["text"]),
        vision_feature_layer=-1,
        image_token_index=0,
        attn_implementation="sdpa",
    )
    model = LlavaForConditionalGeneration(config).to(device).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **spec["optimizer"])
    rows, length, media = spec["rows"], spec["length"], spec["images"] * spec["image_tokens"]
    ids = torch.randint(1, spec["text"]["vocab_size"], (rows, length), device=device)
    ids[:, :media] = 0
    labels = ids.clone()
    labels[:, :media] = -100
    size = spec["vision"]["image_size"]
    pixels = torch.randn(rows * spec["images"], 3, size, size, device=device)
    half = torch.autocast(device, torch.bfloat16, enabled=spec["dtype"] == "bfloat16")
    seconds = []
    for _ in range(spec["steps"]):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with half:
            loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
        optimizer.step()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    print(
        json.dumps(
            {"seconds": seconds, "memory": memory, "parameters": sum(p.numel() for p in model.parameters())}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
