"""Sounds to the inputs of an audio encoder: windows of one length, filled up as the encoder is used to."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mllm.errors import MediaError, OptionError
from mllm.processing.media import MediaInput
from mllm.shapes import Float, Tensor
from mllm.sizes.audio import AudioTokenRule

AUDIO_TOLERANCE = 0.1
"""Seconds by which a sound may differ from what its header says; it is cut, or filled with silence."""
AST_FRAME = 400
"""Samples without which its spectrogram has no frame."""


def fitted_sound(item: MediaInput, sampling_rate: int, *, where: str) -> MediaInput:
    """A sound of the length that its tokens were counted by.

    Raises:
        MediaError: The row says another length than the file has.
    """
    wanted = round(item.size[0] * sampling_rate)
    missing = wanted - len(item.data)
    if abs(missing) > AUDIO_TOLERANCE * sampling_rate:
        raise MediaError(
            f"{where}: a sound of {len(item.data) / sampling_rate:.2f} s, which the row says is {item.size[0]:.2f} s",
            expected="the length that the file has: tokens are counted by it",
            do="correct the row's media, or leave the length out",
        )
    return MediaInput(item.kind, np.pad(item.data[:wanted], (0, max(missing, 0))), item.size, item.row)


def encode_sounds(items: Sequence[MediaInput], extractor: Any, rule: AudioTokenRule) -> dict[str, Tensor]:
    """The windows of all sounds as the encoder takes them, and each sound's number of samples.

    Raises:
        OptionError: A preprocessing that no audio encoder of ours has.
    """
    views = [view for item in items for view in split_windows(item.data, rule)]
    return {
        "input_features": encode_windows(views, extractor, rule),
        "audio_sizes": torch.tensor([len(item.data) for item in items]),
    }


def split_windows(samples: np.ndarray, rule: AudioTokenRule) -> list[np.ndarray]:
    """A sound's windows; one may be shorter than a window, and silence is not yet put behind it."""
    return [samples[start : start + rule.window] for start in rule.starts(len(samples))]


def encode_windows(windows: Sequence[np.ndarray], extractor: Any, rule: AudioTokenRule) -> Float[Tensor, "views ..."]:
    """Windows of sound as the encoder takes them, each by itself.

    Raises:
        OptionError: As `encode_sounds`.
    """
    check_extractor(extractor)
    return _ENCODED[type(extractor).__name__](list(windows), extractor, rule).float()


def check_extractor(extractor: Any) -> None:
    """Check that this is a preprocessing of sounds that we know how to call.

    Raises:
        OptionError: It is another.
    """
    if type(extractor).__name__ not in _ENCODED:
        raise OptionError(
            f"a {type(extractor).__name__} for sounds",
            expected=f"one of {', '.join(_ENCODED)}",
            do="use the preprocessing of the encoder's own checkpoint",
        )


def _whisper(windows: list[np.ndarray], extractor: Any, rule: AudioTokenRule) -> Tensor:
    """Silence behind a sound's end, then the spectrogram."""
    encoded = extractor(
        windows,
        sampling_rate=rule.sampling_rate,
        padding="max_length",
        max_length=rule.window,
        return_attention_mask=False,
        return_tensors="pt",
    )
    return encoded["input_features"]


def _ast(windows: list[np.ndarray], extractor: Any, rule: AudioTokenRule) -> Tensor:
    """The spectrogram, then zeros behind its end, as it was trained."""
    least = [np.pad(window, (0, max(AST_FRAME - len(window), 0))) for window in windows]
    return extractor(least, sampling_rate=rule.sampling_rate, return_tensors="pt")["input_values"]


def _wave(windows: list[np.ndarray], extractor: Any, rule: AudioTokenRule) -> Tensor:
    """The waveform itself, of mean 0 and variance 1 where the extractor says so; zeros behind its end."""
    waves = extractor(windows, sampling_rate=rule.sampling_rate)["input_values"]
    return torch.from_numpy(np.stack([np.pad(wave, (0, rule.window - len(wave))) for wave in waves]))


def _clap(windows: list[np.ndarray], extractor: Any, rule: AudioTokenRule) -> Tensor:
    """The spectrogram of the sound, repeated until it fills ten seconds.

    Extractors of the kind "fusion" give it four times, for longer sounds; the first is enough.
    """
    return extractor(windows, sampling_rate=rule.sampling_rate, return_tensors="pt")["input_features"][:, :1]


_ENCODED: dict[str, Callable[[list[np.ndarray], Any, AudioTokenRule], Tensor]] = {
    "WhisperFeatureExtractor": _whisper,
    "ASTFeatureExtractor": _ast,
    "Wav2Vec2FeatureExtractor": _wave,
    "ClapFeatureExtractor": _clap,
}
