"""The composed model: towers turn media into feature vectors, which stand in a language model's input.

One forward is five sentences: embed the text; encode the media; connect; check the counts and scatter; run the
language model. It reads as transformers' `LlavaForConditionalGeneration` does, and takes the same arguments.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from mllm.models.audio_encoders import audio_features
from mllm.models.configuration import MllmConfig, MllmTowerConfig
from mllm.models.connectors import Layout, Question, build_connector
from mllm.models.connectors.base import Features
from mllm.models.encoders import build_encoder, native_shape
from mllm.models.fusion import placeholder_mask, scatter_features
from mllm.models.generation import MediaGenerationMixin
from mllm.models.log_probs import supervised_log_probs
from mllm.models.loss import supervised_loss
from mllm.models.media import (
    VALUES,
    Media,
    MediaSizes,
    at_places,
    media_layout,
    select_features,
    sounding_samples,
    take_media,
)
from mllm.models.ranks import is_called_together
from mllm.models.streams import split_streams
from mllm.shapes import Bool, EncoderFeatures, Float, MediaFeatures, MediaValues, MediaVectors, Tensor, TokenIds
from mllm.sizes import num_vectors
from mllm.sizes.audio import AudioTokenRule


@dataclass
class MllmOutput(ModelOutput):
    """What a forward returns: `loss` and `token_losses` with labels, `logits` [B, T or kept, vocabulary] without.

    With labels and `returns_log_probs`, in place of the loss, `log_probs` of the supervised tokens, and the
    `encoder_features` of frozen encoders, by the names under which a second forward takes them in place of media.
    """

    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    encoder_features: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MllmPreTrainedModel(PreTrainedModel):
    """What all our model classes tell transformers about themselves."""

    config: MllmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class MllmTower(PreTrainedModel):
    """One modality's encoder and connector. A video tower has no encoder: that of the image tower sees its frames."""

    config: MllmTowerConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MllmTowerConfig):
        super().__init__(config)
        self.encoder: PreTrainedModel | None = None
        if config.encoder_config is not None:
            self.encoder = build_encoder(config.encoder_config)
        self.connector = build_connector(config)
        self.rule = config.media_rule
        self.encoder_chunk: int | None = None
        self.post_init()

    @property
    def is_encoder_frozen(self) -> bool:
        """Whether no parameter of the encoder is trained."""
        return self.encoder is None or not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "MllmTower":
        """Set training mode, except that a frozen encoder stays in eval mode: its dropout must not come alive.

        Batch norms (of CLAP) stay in it always: else what a sound becomes would depend on its neighbours.
        """
        super().train(mode)
        if mode and self.encoder is not None:
            norms = [one for one in self.encoder.modules() if isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d)]
            for module in [self.encoder] if self.is_encoder_frozen else norms:
                module.eval()
        return self

    def forward(self, values: MediaValues, sizes: MediaSizes | None = None) -> MediaFeatures | list[MediaVectors]:
        """Encode and connect a batch of media items."""
        return self.connect(self.encode(values, sizes), sizes)

    def encode(self, values: MediaValues, sizes: MediaSizes | None = None) -> EncoderFeatures:
        """The features of all views, in calls of at most `encoder_chunk` views where that is set.

        Sizes are asked for by audio encoders that are told where a sound ends; None for whole views.

        A frozen encoder leaves no graph behind. Where ranks call the encoder together, one with fewer views calls it
        as often as the others, on zeros that change nothing.
        """
        chunks = values.split(self.encoder_chunk or len(values))
        num_calls = self._calls_of_the_longest_rank(len(chunks))  # asked before the first, which may be collective
        sounding = sounding_samples(self.rule, sizes, num_views=len(values)).split(self.encoder_chunk or len(values))
        features = [self._call_encoder(*pair) for pair in zip(chunks, sounding, strict=True)]
        encoded = features[0] if len(features) == 1 else torch.cat(features)
        for _ in range(num_calls - len(chunks)):
            encoded = encoded + (0.0 * self._call_encoder(self.native_zeros())).sum()
        return encoded

    def _call_encoder(self, values: MediaValues, samples: Tensor | None = None) -> EncoderFeatures:
        assert self.encoder is not None, "frames go to the image tower"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_encoder_frozen):
            if isinstance(self.rule, AudioTokenRule):
                return audio_features(self.encoder, values.to(self.encoder.dtype), rule=self.rule, samples=samples)
            outputs = self.encoder(values.to(self.encoder.dtype), output_hidden_states=True)
        return select_features(outputs.hidden_states[self.config.feature_layer], self.rule)

    def _calls_of_the_longest_rank(self, own: int) -> int:
        """How often the rank with most views calls the encoder in this forward. One call each needs no asking."""
        if self.encoder_chunk is None or not is_called_together(self.encoder, training=self.training):
            return own
        most = torch.tensor(own, device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most)

    def connect(
        self, features: EncoderFeatures, sizes: MediaSizes | None = None, question: Question | None = None
    ) -> MediaFeatures | list[MediaVectors]:
        """Lead the features of all views, computed now or earlier, to the language model's width.

        Args:
            features: Of all views of all items, in order.
            sizes: Of the items, see `media_layout`; None where each has one view, of which all features count.
            question: What each item is asked about, for connectors that read it.
        """
        layout = None if sizes is None else media_layout(self.rule, sizes, num_views=len(features))
        features = features.to(self.dtype)
        if lengths := self.config.feature_lengths:
            streams = split_streams(features, lengths=lengths, widths=self.config.feature_sizes)
            return self._connected(streams, layout, question)
        return self._connected(features, layout, question)

    def _connected(
        self, features: Features, layout: Layout | None, question: Question | None
    ) -> MediaFeatures | list[MediaVectors]:
        """The connector's vectors, parted here by item: one tensor leaves it, whatever the number of items."""
        if layout is None:
            return self.connector(features, None, question)
        vectors = self.connector(features, layout, question, as_one=True)
        items = zip(layout.views, layout.sizes, strict=True)
        return list(vectors.split([num_vectors(views, size, self.rule) for views, size in items]))

    def native_zeros(self) -> MediaValues:
        """One view of the encoder's native shape, for ranks that have no media."""
        shape = native_shape(self.config.encoder_config, self.rule)
        return torch.zeros(1, *shape, device=self.device, dtype=self.encoder.dtype)


class MllmModel(MllmPreTrainedModel):
    """Towers and the language model's body, without its head."""

    def __init__(self, config: MllmConfig):
        super().__init__(config)
        if config.image_config is not None:
            self.image_tower = MllmTower(config.image_config)
        if config.audio_config is not None:
            self.audio_tower = MllmTower(config.audio_config)
        if config.video_config is not None:
            self.video_tower = MllmTower(config.video_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @property
    def towers(self) -> dict[str, MllmTower]:
        """The towers there are, by modality; a view, never a stored container."""
        return {modality: getattr(self, f"{modality}_tower") for modality in self.config.tower_configs}

    def set_encoder_chunk(self, items: int | None) -> None:
        """Let each call of an encoder read at most that many views; None for all of a batch in one call."""
        for tower in self.towers.values():
            tower.encoder_chunk = items

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: MediaValues, image_sizes: MediaSizes | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode images; as in stock models the connected features are the output's `pooler_output`.

        Args:
            pixel_values: Of all views.
            image_sizes: Of the items, see `mllm.models.media`.
            **kwargs: Questions, by the names that `Media` has them under.
        """
        return self._features_of("image", pixel_values, {"image_sizes": image_sizes, **kwargs})

    def get_video_features(
        self, pixel_values_videos: MediaValues, video_sizes: MediaSizes | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode videos, of which all frames follow one another; see `get_image_features`."""
        return self._features_of("video", pixel_values_videos, {"video_sizes": video_sizes, **kwargs})

    def get_audio_features(
        self, input_features: MediaValues, audio_sizes: MediaSizes | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode sounds; see `get_image_features`."""
        return self._features_of("audio", input_features, {"audio_sizes": audio_sizes, **kwargs})

    def forward(
        self,
        input_ids: TokenIds | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> ModelOutput:
        """Run the composed model up to its last hidden states.

        Args:
            input_ids: Token ids with one placeholder for every feature vector.
            attention_mask: 1 for tokens, 0 for padding; absent for packed rows.
            position_ids: Given for packed rows only.
            past_key_values: Cache of earlier steps.
            inputs_embeds: Embedded input in place of `input_ids`, media already in it.
            mm_encoder_outputs: Encoded media by modality, in place of their values.
            **kwargs: The batch's media, as `Media` lists them; the rest is passed on to the language model.

        Raises:
            RowError: Placeholders and feature vectors differ in number.
        """
        media = [take_media(modality, kwargs) for modality in self.towers]
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        given = {modality: outputs.pooler_output for modality, outputs in (mm_encoder_outputs or {}).items()}
        # A step with a cache comes after one that has joined the others, or is one of `generate`, which has.
        encoded, nothing = self.encode_media(media, given=given, joins_ranks=past_key_values is None)
        connected = given | encoded
        if nothing is not None:
            inputs_embeds = inputs_embeds + nothing
        if input_ids is not None and (connected or past_key_values is None):
            inputs_embeds = self._scatter(input_ids, inputs_embeds, connected)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def encode_media(
        self, media: list[Media], *, given: Collection[str] = (), joins_ranks: bool = False
    ) -> tuple[dict[str, MediaFeatures | list[MediaVectors]], Float[Tensor, ""] | None]:
        """What the media of a batch become for the language model, and a zero in which other ranks' media meet.

        Args:
            media: Of each modality, some of them empty.
            given: Modalities that are encoded already.
            joins_ranks: Whether a rank that lacks a modality does as if it had one item of it, where others may call
                its tower: the ranks call each module equally often. It is encoded together with real media, since
                ZeRO-3 compares the modules that each rank has called, one by one. It changes no number, but its zero
                has to reach the loss: so the modules get their gradients on every rank.
        """
        missing = {one.modality for one in media if one.is_empty and one.modality not in given}
        if joins_ranks:
            media = [self._filled(one) if one.modality in missing else one for one in media]
        connected = self._connect_all([one for one in media if not one.is_empty])
        filled = [one.modality for one in media if one.modality in missing and one.modality in connected]
        # Not the sum: a pruner marks vectors as no numbers.
        zeros = [0.0 * sum(item.nansum() for item in connected.pop(modality)) for modality in filled]
        return connected, sum(zeros[1:], zeros[0]) if zeros else None

    @torch.no_grad()
    def encode_frozen(self, inputs: dict[str, Any]) -> dict[str, EncoderFeatures]:
        """What frozen encoders give for the media of a batch, by the names that a forward takes them under.

        Nothing of modalities whose encoder is trained, or whose features are given. Ranks join as in a forward.
        """
        media = [take_media(modality, dict(inputs)) for modality in self.towers]
        frozen = [one for one in media if self.towers[self._encoder_tower(one.modality)].is_encoder_frozen]
        wanted = [one for one in frozen if one.features is None]
        filled = {one.modality: self._filled(one) if one.is_empty else one for one in wanted}
        features = self._encode([one for one in filled.values() if not one.is_empty])
        return {
            f"{one.modality}_features": features[one.modality][:0] if one.is_empty else features[one.modality]
            for one in wanted
            if one.modality in features
        }

    def _features_of(self, modality: str, values: MediaValues, inputs: dict[str, Any]) -> BaseModelOutputWithPooling:
        media = take_media(modality, {**inputs, VALUES[modality]: values})
        return BaseModelOutputWithPooling(pooler_output=self.encode_media([media])[0][modality])

    def _encode(self, media: list[Media]) -> dict[str, EncoderFeatures]:
        """Each encoder is called once: frames join the images."""
        features: dict[str, EncoderFeatures] = {}
        for encoder, group in self._by_encoder(media).items():
            sizes = group[0].sizes if len(group) == 1 else None  # images and frames are whole views
            values = [one.values for one in group if one.values is not None]
            parts = self.towers[encoder].encode(torch.cat(values), sizes).split([len(one) for one in values])
            features |= {one.modality: part for one, part in zip(group, parts, strict=True)}
        return features

    def _connect_all(self, media: list[Media]) -> dict[str, MediaFeatures | list[MediaVectors]]:
        """Encode what is not encoded yet. Then each modality is connected, in one order."""
        features = {one.modality: one.features for one in media if one.features is not None}
        features |= self._encode([one for one in media if one.features is None])
        connected = {one.modality: self.connect_media(one, features[one.modality]) for one in media}
        for one in media:
            if one.places is not None:
                connected[one.modality] = at_places(connected[one.modality], one.places)
        return connected

    def connect_media(self, media: Media, features: EncoderFeatures) -> MediaFeatures | list[MediaVectors]:
        tower, question = self.towers[media.modality], media.question
        if tower.config.through_image_connector:
            # Each frame as an image of one view, asked about what its video is asked about.
            counts = [1] * len(features) if media.sizes is None else media.sizes.tolist()
            of_frames = None if question is None else question.repeated(counts)
            features = self.towers["image"].connect(features, None, of_frames)
        return tower.connect(features, media.sizes, question)

    def _by_encoder(self, media: list[Media]) -> dict[str, list[Media]]:
        """The media that one encoder reads, by the tower that has it."""
        groups: dict[str, list[Media]] = {}
        for one in media:
            groups.setdefault(self._encoder_tower(one.modality), []).append(one)
        return groups

    def _encoder_tower(self, modality: str) -> str:
        return modality if self.towers[modality].encoder is not None else "image"

    def check_placeholders(self, input_ids: TokenIds, connected: Mapping[str, Any]) -> dict[str, Bool[Tensor, "B T"]]:
        """Where the vectors of each modality go, of which there must be as many as placeholders.

        Raises:
            RowError: They are more or fewer.
        """
        masks = {}
        for modality, config in self.config.tower_configs.items():
            num_features = sum(len(item) for item in connected.get(modality, ()))
            masks[modality] = placeholder_mask(input_ids, config.placeholder_token_id, num_features=num_features)
        return masks

    def _scatter(self, input_ids: TokenIds, embeds: Tensor, connected: dict[str, Any]) -> Tensor:
        """Put each modality's vectors in place of its placeholders."""
        masks = self.check_placeholders(input_ids, connected)
        for modality, items in connected.items():
            embeds = scatter_features(embeds, masks[modality], torch.cat(list(items)))
        return embeds

    def _filled(self, media: Media) -> Media:
        """One item of zeros, if other ranks may call this tower now, through what they call.

        With features at hand that is the connector alone.
        """
        modules: list[nn.Module] = [self.towers[media.modality]]
        if media.features is None:
            modules.append(self.towers[self._encoder_tower(media.modality)].encoder)
        if not any(is_called_together(module, training=self.training) for module in modules):
            return media
        # About which nothing is asked: what reads questions has to be called with one.
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        question = {"question_ids": nothing, "question_mask": nothing}
        if media.features is not None:
            return Media(media.modality, features=media.features.new_zeros(1, *media.features.shape[1:]), **question)
        return Media(media.modality, self.towers[self._encoder_tower(media.modality)].native_zeros(), **question)


class MllmForConditionalGeneration(MllmPreTrainedModel, MediaGenerationMixin):
    """The composed model with the language model's head: trains on labels, generates text about media."""

    def __init__(self, config: MllmConfig):
        super().__init__(config)
        self.model = MllmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._tied_weights_keys = {"lm_head.weight": f"{self._embedding_name()}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = value

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images; see `MllmModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """Encode videos; see `MllmModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """Encode sounds; see `MllmModel.get_audio_features`."""
        return self.model.get_audio_features(*args, **kwargs)

    def forward(
        self,
        input_ids: TokenIds | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: TokenIds | None = None,
        loss_weights: Float[Tensor, "B T"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        returns_log_probs: bool = False,
        own_tokens: Bool[Tensor, "B T"] | None = None,
        **kwargs,
    ) -> MllmOutput:
        """Loss with labels, logits without.

        Args:
            input_ids: Token ids with one placeholder for every feature vector.
            attention_mask: 1 for tokens, 0 for padding.
            position_ids: Given for packed rows, and by `generate`, which counts from a prompt's first token.
            mm_encoder_outputs: Encoded media by modality, in place of their values; `generate` encodes once, before it
                starts.
            labels: Ids to be learned, -100 elsewhere. With them no logits are made, except at those positions.
            loss_weights: A factor for each label.
            num_items_in_batch: Divisor of the loss; the batch's own supervised tokens where absent.
            logits_to_keep: How many last positions get logits, 0 for all.
            returns_log_probs: Whether `log_probs` of the labels are wanted in place of the loss.
            own_tokens: See `supervised_log_probs`.
            **kwargs: The batch's media, and what else `MllmModel.forward` takes.
        """
        # `generate` passes position_ids and mm_encoder_outputs only to a forward that names them; without the first,
        # padding on the left would shift the positions.
        features = self.model.encode_frozen(kwargs) if returns_log_probs else {}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **{**kwargs, **features},
        )
        hidden = outputs.last_hidden_state
        loss = token_losses = logits = log_probs = None
        if labels is not None and returns_log_probs:
            log_probs = supervised_log_probs(hidden, labels, self.lm_head, own_tokens=own_tokens)
        elif labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        else:
            loss, token_losses = supervised_loss(
                hidden, labels, self.lm_head, loss_weights=loss_weights, num_items=num_items_in_batch
            )
        return MllmOutput(
            loss=loss,
            token_losses=token_losses,
            log_probs=log_probs,
            encoder_features=features or None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embedding_name(self) -> str:
        """Full name of the input embedding; families call it embed_tokens, wte, embed_in, word_embeddings."""
        embedding = self.model.get_input_embeddings()
        return next(name for name, module in self.named_modules() if module is embedding)
