"""mm_jax: multimodal large language models in JAX."""
