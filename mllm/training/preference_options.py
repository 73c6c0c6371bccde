"""The options of preference training: those of supervised fine-tuning, and what is preferred to what."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mllm.data.contrasts import BLANK, CONTRASTS, CROP, NONE, RETRIEVED, Contrast
from mllm.errors import OptionError
from mllm.training.options import CHOICES, OWN, SftArguments
from mllm.training.preference_loss import LossOptions, text_terms

PRESETS: dict[str, dict[str, Any]] = {
    "dpo": {"contrast": NONE, "visual_weight": 0.0, "anchor_weight": 0.0, "guidance": 0.0},
    "mdpo": {"contrast": CROP, "visual_weight": 1.0, "anchor_weight": 1.0, "guidance": 0.0},
    "rdpo": {"contrast": RETRIEVED, "visual_weight": 1.0, "anchor_weight": 0.0, "guidance": 0.0},
    "vdpo": {"contrast": NONE, "visual_weight": 0.0, "anchor_weight": 0.0, "guidance": 0.5},
}
"""What each method compares. Any of it can be set by itself, too."""

CROP_SCALE = [0.01, 0.2]
"""mDPO's."""

LIMITS = {"beta": (0.0, math.inf, "above 0"), "label_smoothing": (None, 0.5, "from 0 to below 0.5")}
"""Of numbers that are more than 0 or more: what they must not be, what they are below, and that in words."""

PREFERENCE = (
    "preset", "beta", "loss_type", "loss_weights", "label_smoothing", "contrast", "crop_scale", "visual_weight",
    "anchor_weight", "guidance", "released_log_probs", "disable_dropout", "reference", "precompute_ref_log_probs",
    "reference_cache",
)  # fmt: skip

EXAMPLE = """
example of a --config file, which starts from a model that was fine-tuned before:

  model: runs/mine/sft/final
  preset: rdpo                        # or dpo, mdpo, vdpo
  parts:
    text: {mode: lora, rank: 128, alpha: 256}
  data:                               # rows with chosen, rejected and, for rdpo, contrast
    - {path: pref_data.json, format: re_align, media_root: train2014}
  learning_rate: 1.0e-5
  per_device_train_batch_size: 8      # pairs
  num_train_epochs: 1
  output_dir: runs/mine/rdpo

Run it:   accelerate launch train/rdpo.py --config mine.yaml
All options of train/sft.py may stand in the file, too.
"""


@dataclass
class PreferenceArguments(SftArguments):
    """Options of `train/rdpo.py`."""

    program: ClassVar[str] = "train/rdpo.py"
    about: ClassVar[str] = "Preference training: of answers, and of the picture that an answer belongs to."
    example: ClassVar[str] = EXAMPLE

    preset: str = field(
        default="rdpo",
        metadata={
            "help": "What is preferred to what: dpo (the chosen answer to the rejected one), rdpo (also the picture "
            "to a retrieved one, as in Re-Align; not TRL's `robust` loss), mdpo (also the picture to a small crop of "
            "it, and an anchor), vdpo (dpo that counts once more what an answer owes to the picture)."
        },
    )
    beta: float = field(default=0.1, metadata={"help": "How closely to stay to the reference."})
    loss_type: Any = field(
        default=None,
        metadata={
            "help": "The text preference, by TRL's names: sigmoid (the default), hinge, ipo, robust, apo_zero, "
            "bco_pair, sft, or a list of some (MPO: [sigmoid, bco_pair, sft])."
        },
    )
    loss_weights: Any = field(
        default=None, metadata={"help": "A weight for each of `loss_type` (MPO: [0.8, 0.2, 1])."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Of robust: how often a preference is the wrong way round."}
    )
    contrast: str | None = field(
        default=None,
        metadata={"help": "What the picture is preferred to: none, retrieved, crop or blank; null for the preset's."},
    )
    crop_scale: Any = field(
        default_factory=CROP_SCALE.copy, metadata={"help": "Of crop: least and largest share of the area."}
    )
    visual_weight: float | None = field(
        default=None, metadata={"help": "Of the visual preference; null for the preset's."}
    )
    anchor_weight: float | None = field(
        default=None,
        metadata={"help": "Of the term that keeps the chosen answer from losing; null for the preset's."},
    )
    guidance: float | None = field(
        default=None, metadata={"help": "Of vdpo: `gamma - 1` of its authors' code; null for the preset's."}
    )
    released_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute rdpo as Re-Align's released trainer does, which is not the paper's formula: in place of "
            "the tokens of the rejected answer and of the contrast it takes each model's own likeliest ones. Only to "
            "compare with its checkpoints."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether policy and reference see the same: no dropout anywhere."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint that the policy is compared with; null for the model that the run starts from (with "
            "LoRA the very same weights without adapters, else a second copy of them)."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Let the reference see all pairs once, before the first step, and keep what it said."},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Directory for that, shared by runs; relative to output_dir. Default: reference_log_probs."},
    )

    @classmethod
    def own(cls) -> tuple[str, ...]:
        """The names of our options."""
        return OWN + PREFERENCE

    @classmethod
    def choices(cls) -> dict[str, tuple[Any, ...]]:
        """What our options that are words can be."""
        return CHOICES | {"preset": tuple(PRESETS), "contrast": (None, *CONTRASTS)}

    def check(self, where: str) -> None:
        """Raise an OptionError for values that an option cannot have, or options that contradict each other."""
        check_preference(self, where)

    def preferred(self, name: str) -> Any:
        """An option that is the preset's where it is not given."""
        own = getattr(self, name)
        return PRESETS[self.preset][name] if own is None else own

    @property
    def loss(self) -> LossOptions:
        """What is compared, and how strongly."""
        return LossOptions(
            beta=self.beta,
            text=text_terms("sigmoid" if self.loss_type is None else self.loss_type, self.loss_weights),
            visual_weight=self.preferred("visual_weight"),
            anchor_weight=self.preferred("anchor_weight"),
            label_smoothing=self.label_smoothing,
            guidance=self.preferred("guidance"),
        )

    @property
    def sides(self) -> Contrast:
        """Which sides a pair has."""
        low, high = self.crop_scale
        return Contrast(
            media=self.preferred("contrast"),
            crop_scale=(float(low), float(high)),
            seed=self.seed,
            is_unseen_needed=bool(self.preferred("guidance")),
        )


def check_preference(arguments: PreferenceArguments, where: str) -> None:
    """What `HfArgumentParser` does not check of the options of preferences.

    Raises:
        OptionError: A value that the option cannot have, or options that contradict each other.
    """
    for name in ("beta", "label_smoothing", "visual_weight", "anchor_weight", "guidance"):
        _check_number(arguments, name, where)
    terms = text_terms("sigmoid" if arguments.loss_type is None else arguments.loss_type, arguments.loss_weights)
    for name in ("released_log_probs", "disable_dropout", "precompute_ref_log_probs"):
        if type(getattr(arguments, name)) is not bool:
            raise OptionError(
                f"{name} = {getattr(arguments, name)!r} in {where}", expected="true or false", do="correct it"
            )
    _check_smoothing(arguments, where)
    contrast, visual = arguments.preferred("contrast"), arguments.preferred("visual_weight")
    if (contrast == NONE) != (visual == 0):
        raise OptionError(
            f"contrast = {contrast!r} and visual_weight = {visual:g} in {where}",
            expected="both, or neither: the picture is preferred to something, with a weight",
            do="set the other one, too, or remove both for the preset's",
        )
    _check_crop(arguments.crop_scale, where, is_used=contrast == CROP)
    if not (visual or arguments.preferred("anchor_weight") or any(weight for _, weight in terms)):
        raise OptionError(
            f"loss_weights = {arguments.loss_weights!r} in {where}, and no other term",
            expected="a loss with at least one weight above 0",
            do="give a loss type a weight, or choose a preset with a visual preference",
        )
    if arguments.feature_cache is not None and (contrast in (CROP, BLANK) or arguments.preferred("guidance")):
        raise OptionError(
            f"feature_cache in {where}, and pictures that are cropped or blanked for the loss",
            expected="pictures as they lie on disk",
            do="remove `feature_cache`",
        )
    if arguments.reference_cache is not None and not arguments.precompute_ref_log_probs:
        raise OptionError(
            f"reference_cache = {arguments.reference_cache!r} in {where}, and nothing to keep there",
            expected="`precompute_ref_log_probs: true` with it",
            do="set that, too, or remove `reference_cache`",
        )
    if arguments.released_log_probs and arguments.preset != "rdpo":
        raise OptionError(
            f"released_log_probs and preset = {arguments.preset!r} in {where}", expected="preset: rdpo", do="remove it"
        )


def _check_number(arguments: PreferenceArguments, name: str, where: str) -> None:
    """An option is a number within its limits; one that YAML reads as a word, such as 1e-1, becomes it."""
    value = getattr(arguments, name)
    if value is None and name in PRESETS["dpo"]:
        return
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    above, below, limits = LIMITS.get(name, (None, math.inf, "0 or more"))
    if not 0 <= number < below or number == above:
        raise OptionError(f"{name} = {value!r} in {where}", expected=f"a number, {limits}", do="correct it")
    setattr(arguments, name, number)


def _check_crop(scale: Any, where: str, *, is_used: bool) -> None:
    numbers = scale if isinstance(scale, list | tuple) and len(scale) == 2 else (0, 0)
    if not all(isinstance(one, int | float) and 0 < one <= 1 for one in numbers) or numbers[0] > numbers[1]:
        raise OptionError(
            f"crop_scale = {scale!r} in {where}",
            expected="two shares above 0, the smaller first",
            do="write, e.g., [0.01, 0.2]",
        )
    if not is_used and list(numbers) != CROP_SCALE:
        raise OptionError(
            f"crop_scale = {scale!r} in {where}, where nothing is cropped",
            expected="`contrast: crop`, or the preset mdpo, which has it",
            do="remove `crop_scale`, or choose the contrast",
        )


def _check_smoothing(arguments: PreferenceArguments, where: str) -> None:
    if arguments.label_smoothing and "robust" not in dict(arguments.loss.text):
        raise OptionError(
            f"label_smoothing = {arguments.label_smoothing} in {where}, and loss_type = {arguments.loss_type!r}",
            expected="loss_type: robust, which is the only one that uses it",
            do="set it, or remove `label_smoothing`",
        )
