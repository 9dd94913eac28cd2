"""Qwen2-Audio and Voxtral against transformers: arrays, waveforms, messages."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.messages import Audio, Message, Text  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_gradients, same_greedy, same_logits  # noqa: E402
from tests.parity.record import note  # noqa: E402

RATE = 16_000
MELS, FRAMES = 10, 100  # a window of one second
ENCODER = dict(num_mel_bins=MELS, max_source_positions=FRAMES // 2)
EXTRACTOR = dict(feature_size=MELS, chunk_length=1)
CASES = {
    "qwen2_audio": dict(each=25),
    "qwen2_audio-biases": dict(each=25, text=dict(tie_word_embeddings=True)),
    "voxtral": dict(each=25, text=dict(head_dim=16)),
    "voxtral-relu": dict(each=10, merge=5, act="relu"),
}


def build(case: str, directory, tokenizer=None):
    options = CASES[case]
    token = 96 if tokenizer is None else tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    text = theirs.TEXT | dict(max_position_embeddings=256) | options.get("text", {})
    if tokenizer is not None:
        text |= dict(vocab_size=len(tokenizer), eos_token_id=2)
    if case.startswith("qwen2"):
        kind, config = "Qwen2AudioForConditionalGeneration", transformers.Qwen2AudioConfig
        audio = transformers.Qwen2AudioEncoderConfig(
            **ENCODER, d_model=24, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=36
        )
        text, named = transformers.Qwen2Config(**text), dict(audio_token_index=token)
    else:
        kind, config = "VoxtralForConditionalGeneration", transformers.VoxtralConfig
        merge = options.get("merge", 2)
        audio = transformers.VoxtralEncoderConfig(
            **ENCODER,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16 * merge,
        )
        named = dict(audio_token_id=token, projector_hidden_act=options.get("act", "gelu"))
        text = transformers.LlamaConfig(**text)
    tied = dict(tie_word_embeddings=options.get("text", {}).get("tie_word_embeddings", False))
    return theirs.build(config(audio_config=audio, text_config=text, **named, **tied), directory, kind), kind


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    """A tone that grows louder, with noise."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    sound = np.sin(2 * np.pi * (200 + 150 * seed) * time) * time + 0.02 * random.normal(size=time.shape)
    return sound.astype(np.float32)


def prompts(case: str, clips=((0.4,), (0.95, 0.05)), pad_left: bool = False, seed: int = 0):
    """Rows of different lengths with clips of so many seconds, features by the reference."""
    random = np.random.default_rng(seed)
    extract = transformers.WhisperFeatureExtractor(**EXTRACTOR)
    waves = [wave(s, k) for k, s in enumerate(s for row in clips for s in row)]
    qwen, each = case.startswith("qwen2"), CASES[case]["each"]
    features = (
        extract(waves, sampling_rate=RATE, return_attention_mask=True, return_tensors="np") if waves else {}
    )
    texts, at = [], 0
    for row, seconds in enumerate(clips):
        ids = random.integers(3, 96, 6 + 3 * row).tolist()
        for place in range(len(seconds)):
            count = (int(features["attention_mask"][at].sum()) - 1) // 2 + 1 if qwen else 0
            ids[2 + place : 2 + place] = [96] * ((count - 2) // 2 + 1 if qwen else each)
            at += 1
        texts.append(ids)
    size = max(map(len, texts))
    ids, mask = np.zeros((len(texts), size), np.int64), np.zeros((len(texts), size), np.int64)
    for row, text in enumerate(texts):
        part = slice(size - len(text), size) if pad_left else slice(0, len(text))
        ids[row, part], mask[row, part] = text, 1
    arrays = {"input_ids": ids, "attention_mask": mask}
    if waves:
        arrays["input_features"] = features["input_features"]
    if waves and qwen:
        arrays["feature_attention_mask"] = features["attention_mask"].astype(np.int64)
    return arrays


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """Clips of different lengths in a batch, several in a row, padding on either side, no clip; answers; gradients."""
    model, kind = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.config.audio_tokens == CASES[case]["each"]
    right, left = prompts(case), prompts(case, pad_left=True)
    same_logits(model, lm, right)
    same_logits(model, lm, left)
    same_logits(model, lm, prompts(case, ((), ())))
    if "-" not in case:
        same_logits(model, lm, prompts(case, ((), (0.3, 0.7)), seed=1))
        same_greedy(model, lm, left)
        same_gradients(model, lm, right, tmp_path / "gradients")
    same_after_saving(model, lm, right, tmp_path / "out", kind)


@pytest.mark.parametrize("case", ["qwen2_audio", "voxtral"])
def test_features_of_waveforms(case, tmp_path):
    """Clips from one sample to over a window. Ours is computed in float64, the reference in float32, and the logarithm
    of what is a hundred million times quieter than the loudest band shows that: hence 5e-4 of a scale of 1."""
    build(case, tmp_path)
    extract = transformers.WhisperFeatureExtractor(**EXTRACTOR)
    extract.save_pretrained(tmp_path)
    lm = mm_jax.load(tmp_path)
    waves = [wave(s, k) for k, s in enumerate((0.4, 1.0, 0.013, 1 / RATE, 1.7))]
    ours = lm.checkpoint.rule.audio(waves)
    options = dict(sampling_rate=RATE, return_tensors="np")
    if case == "qwen2_audio":
        expected = extract(waves, return_attention_mask=True, **options)
        assert np.array_equal(ours["feature_attention_mask"], expected["attention_mask"])
        expected = expected["input_features"]
    else:  # VoxtralProcessor._retrieve_input_features
        whole = dict(padding=True, truncation=False, pad_to_multiple_of=RATE)
        found = [extract(samples, **whole, **options)["input_features"] for samples in waves]
        expected = np.concatenate([f.reshape(MELS, -1, FRAMES).transpose(1, 0, 2) for f in found])
        assert ours["windows_of_clips"].tolist() == [1, 1, 1, 1, 2]
    assert ours["input_features"].dtype == np.float32
    assert ours["input_features"].shape == expected.shape
    error = np.abs(ours["input_features"] - expected)
    assert error.max() <= 5e-4 and error.mean() <= 1e-6, (error.max(), error.mean())
    note(lm.family, "preprocessing", float(error.max()))


def test_messages(tmp_path):
    """Tokens, placeholders and the text of an answer from messages with clips."""
    tokenizer = hosts.byte_level("<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    model, _ = build("qwen2_audio", tmp_path, tokenizer)
    extract = transformers.WhisperFeatureExtractor(**EXTRACTOR)
    processor = transformers.Qwen2AudioProcessor(extract, tokenizer)
    processor.save_pretrained(tmp_path)
    lm = mm_jax.load(tmp_path)
    question, compared = "what is in the picture?", 0
    for seconds in ((0.5,), (0.8, 0.21), ()):
        waves = [wave(s, k) for k, s in enumerate(seconds)]
        content = [*({"type": "audio", "audio": w} for w in waves), {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        arrays = dict(
            processor(text=text, audio=waves or None, sampling_rate=RATE, return_tensors="np", padding=True)
        )
        ours = Message("user", (*(Audio(w, RATE) for w in waves), Text(question)))
        batch, given = lm.batch(messages=[ours]), lm.batch(**arrays)
        real = batch["segment_ids"][0] > 0
        assert batch["tokens"][0][real].tolist() == arrays["input_ids"][0].tolist()
        assert np.array_equal(batch["media_index"][0][real], given["media_index"][0])
        ids, margins = theirs.generate(model, arrays, 8)
        close = np.flatnonzero(margins[0] < 0.02)
        length = int(close[0]) if len(close) else 8
        said = lm.generate(batch, 8, ignore_eos=True)[0]
        assert said[:length].tolist() == ids[0][:length].tolist()
        compared += length
    assert compared, "the reference's choices are too close to compare"
