"""Spoken digits and colour words, by the espeak-ng library inside the wheel `espeakng-loader`."""

import _ctypes
import ctypes
import random
from dataclasses import dataclass

import numpy as np

from mm_jax.data.quickstart.paint import COLOURS
from mm_jax.data.quickstart.sample import SAMPLE_RATE, Clip, Mark, Sample, Turn, numpy_rng, pick, split_of

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*NUMBERS, *COLOURS)
TRAIN_VOICES = (
    "en", "en+m1", "en+m3", "en+m4", "en+m6", "en+f2", "en+f4", "en-us", "en-us+f3", "en-gb-scotland",
    "en-gb-x-rp", "en-gb-x-rp+f1",
)  # fmt: skip
NEW_VOICES = {  # never heard in training
    "train": (),
    "validation": ("en+m5", "en-us+f4"),
    "test": ("en+m2", "en+f5", "en-gb-x-gbcwmd", "en-us+m7"),
}
MAX_SECONDS = 1.5
SPEECH = ("what is said?", "write down the words.", "transcribe the speech.", "what do you hear?")
WHICH_NUMBER = ("which number was said?", "what digit do you hear?", "write the spoken number as a digit.")
WHICH_COLOUR = ("which colour was said?", "what colour do you hear?")

_PCM_MODE, _RATE, _PITCH, _CHARS_AUTO, _POSITION_CHARACTER = 2, 1, 3, 0, 1
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """An espeak voice: its name, words a minute, and pitch 0..99."""

    name: str
    rate: int
    pitch: int


class Synthesizer:
    """The library, loaded anew: a `with` block gives the same samples for the same calls in any process.

    espeak-ng keeps the phase of its oscillators and its random numbers in static variables that no call
    resets, so that a word depends on the words before it. Unloading the library (3 ms) does reset them.
    """

    def __enter__(self) -> "Synthesizer":
        import espeakng_loader

        self._library = library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate = library.espeak_Initialize(
            _PCM_MODE, 0, espeakng_loader.get_data_path().encode(), 0
        )
        if self.sample_rate <= 0:
            raise RuntimeError("espeak-ng did not start: its data folder is missing or damaged")
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_ng_SetRandSeed(1)
        unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
        library.espeak_Synth.argtypes = [
            pointer, ctypes.c_size_t, unsigned, ctypes.c_int, unsigned, unsigned, pointer, pointer
        ]  # fmt: skip
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._receive)  # kept: the library holds only its address
        library.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(self, *error: object) -> None:
        self._library.espeak_Terminate()
        _ctypes.dlclose(self._library._handle)

    def _receive(self, samples, number: int, events) -> int:
        if samples and number > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (number,)).copy())
        return 0

    def say(self, text: str, voice: Voice) -> np.ndarray:
        """float32 [T] in -1..1 at 16 kHz, silence at both ends cut off."""
        import soxr

        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice.name}")
        self._library.espeak_SetParameter(_RATE, voice.rate, 0)
        self._library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        self._chunks.clear()
        data = text.encode()
        self._library.espeak_Synth(
            data, len(data) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_AUTO | 1, None, None
        )
        self._library.espeak_Synchronize()
        wave = np.concatenate(self._chunks).astype(np.float32) / 32768
        wave = soxr.resample(wave, self.sample_rate, SAMPLE_RATE)
        loud = np.flatnonzero(np.abs(wave) > 0.01)
        return wave[loud[0] : loud[-1] + 1]


def choose_voice(rng: random.Random, split: str) -> Voice:
    """Training takes even pitches, the other splits odd ones: no clip of a seen voice is heard twice."""
    new = NEW_VOICES[split]
    name = rng.choice(new if new and rng.random() < 0.5 else TRAIN_VOICES)
    return Voice(name, rng.randint(140, 215), 2 * rng.randint(14, 36) + (split != "train"))


def say_words(rng: random.Random, words: list[str], voice: Voice) -> Clip:
    """The words with short gaps, at a random loudness, in white or brown noise 12..40 dB below."""
    with Synthesizer() as synthesizer:
        spoken = [synthesizer.say(word, voice) for word in words]
    parts, marks = [np.zeros(rng.randint(0, 1200), np.float32)], []
    for word, wave in zip(words, spoken, strict=True):
        start = sum(map(len, parts)) / SAMPLE_RATE
        marks.append(Mark(f"spoken_{word}", (start, start + len(wave) / SAMPLE_RATE)))
        parts += [wave, np.zeros(rng.randint(600, 2400), np.float32)]
    wave = np.concatenate(parts)[: int(MAX_SECONDS * SAMPLE_RATE)]
    seconds = len(wave) / SAMPLE_RATE
    marks = [Mark(m.label, (m.box[0], min(m.box[1], seconds))) for m in marks]
    noise = numpy_rng(rng).standard_normal(len(wave)).astype(np.float32)
    if rng.random() < 0.5:
        noise = np.cumsum(noise - noise.mean())
        noise -= np.convolve(noise, np.full(400, 1 / 400), "same")
    level = np.sqrt(np.mean(wave**2)) * 10 ** (-rng.uniform(12, 40) / 20)
    wave = wave + noise * (level / np.sqrt(np.mean(noise**2)))
    return Clip((wave * (rng.uniform(0.3, 0.95) / np.abs(wave).max())).astype(np.float32), tuple(marks))


def choose_words(rng: random.Random, split: str, index: int) -> list[str]:
    """One word (every word in turn), or a pair that no other split has."""
    if index % 5 < 3:
        return [WORDS[(index // 5 * 3 + index % 5) % len(WORDS)]]
    while True:
        pair = [rng.choice(WORDS), rng.choice(WORDS)]
        if split_of(f"spoken {pair}") == split:
            return pair


def speech(rng: random.Random, split: str, index: int) -> Sample:
    words = choose_words(rng, split, index)
    voice = choose_voice(rng, split)
    turns = [Turn("speech" if len(words) == 1 else "speech_pair", pick(rng, SPEECH), " ".join(words))]
    numbers = [word for word in words if word in NUMBERS]
    colours = [word for word in words if word in COLOURS]
    if len(numbers) == 1:
        turns.append(Turn("speech_number", pick(rng, WHICH_NUMBER), str(NUMBERS.index(numbers[0]))))
    if len(colours) == 1:
        turns.append(Turn("speech_colour", pick(rng, WHICH_COLOUR), colours[0]))
    if split == "train":
        rng.shuffle(turns)
    else:
        turns = [turns[index // 5 % len(turns)] if index % 2 else turns[0]]
    return Sample(tuple(turns), clips=(say_words(rng, words, voice),), note=voice.name)
