"""Audio encoders against transformers."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import came_back, same_features  # noqa: E402

WHISPER = dict(
    d_model=24, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=36, num_mel_bins=10,
    max_source_positions=16, decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=36, vocab_size=20,
    max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
WAV2VEC2 = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36, conv_dim=(8, 12, 16),
    conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2), conv_depthwise_kernel_size=5, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, layer_norm_eps=1e-3, mask_time_prob=0.0,
)  # fmt: skip
PARAKEET = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36, num_mel_bins=16,
    subsampling_factor=4, subsampling_conv_channels=6, conv_kernel_size=5,
)  # fmt: skip
CASES = {
    "whisper": ("Whisper", "WhisperModel", WHISPER),
    "whisper-generation": (
        "Whisper", "WhisperForConditionalGeneration", WHISPER | dict(activation_function="relu", scale_embedding=True),
    ),
    "wav2vec2-conformer": ("Wav2Vec2Conformer", "Wav2Vec2ConformerModel", WAV2VEC2),
    "wav2vec2-conformer-rotary": (
        "Wav2Vec2Conformer",
        "Wav2Vec2ConformerForCTC",
        WAV2VEC2
        | dict(position_embeddings_type="rotary", rotary_embedding_base=50, feat_extract_norm="layer", conv_bias=True,
               hidden_act="relu", vocab_size=11),
    ),
    "wav2vec2-conformer-no-positions": (
        "Wav2Vec2Conformer",
        "Wav2Vec2ConformerModel",
        WAV2VEC2 | dict(position_embeddings_type=None, feat_extract_norm="layer", feat_extract_activation="relu"),
    ),
    "parakeet": ("ParakeetEncoder", "ParakeetEncoder", PARAKEET),
    "parakeet-options": (
        "ParakeetEncoder",
        "ParakeetEncoder",
        PARAKEET
        | dict(attention_bias=False, convolution_bias=False, scale_input=False, subsampling_conv_kernel_size=5,
               subsampling_factor=8, hidden_act="gelu"),
    ),
    "parakeet-ctc": ("ParakeetCTC", "ParakeetForCTC", dict(encoder_config=PARAKEET, vocab_size=9, pad_token_id=8)),
}  # fmt: skip


def build(case: str, directory):
    config, kind, options = CASES[case]
    return theirs.build(getattr(transformers, f"{config}Config")(**options), directory, kind)


def clips(case: str, lengths=(33, 20), seed: int = 0) -> dict[str, np.ndarray]:
    """Clips of different lengths, as the reference's feature extractors pad them."""
    random = np.random.default_rng(seed)
    if case.startswith("whisper"):
        return {"input_features": random.normal(size=(2, 10, 32)).astype(np.float32)}
    waveform = case.startswith("wav2vec2")
    lengths = [30 * length for length in lengths] if waveform else lengths
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    shape = mask.shape if waveform else (*mask.shape, 16)
    values = random.normal(size=shape).astype(np.float32)
    values *= mask if waveform else mask[..., None]
    return {"input_values" if waveform else "input_features": values, "attention_mask": mask}


def encode(model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The reference's features."""
    base = getattr(model, model.base_model_prefix, model)
    base = base.get_encoder() if "Whisper" in type(model).__name__ else getattr(model, "encoder", base)
    if "Wav2Vec2" in type(model).__name__:
        base = getattr(model, "wav2vec2_conformer", model)
    with torch.no_grad():
        return base(**{k: torch.from_numpy(v) for k, v in arrays.items()}).last_hidden_state.numpy()


def alone(arrays: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """One clip without padding."""
    if "attention_mask" not in arrays:
        return {key: value[row : row + 1] for key, value in arrays.items()}
    length = arrays["attention_mask"][row].sum()
    return {key: value[row : row + 1, :length] for key, value in arrays.items()}


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """Each clip of a padded batch gives what the reference gives for it alone, and files come back the same.

    The reference's batches agree with that only for Parakeet: in wav2vec2-Conformer a clip's last positions depend on
    how far it is padded, because its convolutions see the padding.
    """
    model = build(case, tmp_path / "in")
    tower = mm_jax.load(tmp_path / "in")
    arrays = clips(case)
    batch = tower.batch(**arrays)
    ours = np.asarray(jax.jit(tower.apply)(tower.params, batch))
    expected = encode(model, arrays)
    assert ours.shape == expected.shape
    assert 0.1 < expected.std() < 10
    for row in range(2):
        one = encode(model, alone(arrays, row))[0]
        assert tower.config.positions_of(int(batch["audio_frames"][row])) == len(one)
        same_features(tower, ours[row, : len(one)], one)
        if not case.startswith("wav2vec2"):
            assert np.abs(expected[row, : len(one)] - one).max() <= 1e-4
    came_back(tower, model, tmp_path / "out")
