"""The composed model: towers turn media into feature vectors, which stand in a language model's input.

One forward is five sentences: embed the text; encode the media; connect; check the counts and scatter; run the
language model. It reads as transformers' `LlavaForConditionalGeneration` does, and takes the same arguments.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from mllm.models.configuration import MllmConfig, MllmTowerConfig
from mllm.models.connectors import build_connector
from mllm.models.fusion import placeholder_mask, scatter_features
from mllm.models.loss import supervised_loss
from mllm.shapes import Float, MediaFeatures, Pixels, Tensor, TokenIds


@dataclass
class MllmOutput(ModelOutput):
    """What a forward returns: `loss` and `token_losses` with labels, `logits` [B, T or kept, vocabulary] without."""

    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def is_called_together(module: nn.Module, *, training: bool) -> bool:
    """Whether the ranks have to call a module equally often.

    Ranks that train or shard a module run its collectives together: one that skips it leaves the others waiting for
    ever (DeepSpeed issue 7170). What is whole and frozen on every rank has no collectives; what is whole has none
    outside of training.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    parameters = list(module.parameters())
    # Of ZeRO-3 and of FSDP2.
    is_sharded = any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in parameters)
    return is_sharded or (training and any(parameter.requires_grad for parameter in parameters))


class MllmPreTrainedModel(PreTrainedModel):
    """What all our model classes tell transformers about themselves."""

    config: MllmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class MllmTower(PreTrainedModel):
    """One modality's encoder and connector."""

    config: MllmTowerConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MllmTowerConfig):
        super().__init__(config)
        # In the type that is being loaded: transformers hands it on to our sub-configs, but not to theirs.
        self.encoder = AutoModel.from_config(config.encoder_config, dtype=torch.get_default_dtype())
        self.connector = build_connector(config)
        self.encoder_chunk: int | None = None
        self.post_init()

    @property
    def is_encoder_frozen(self) -> bool:
        """Whether no parameter of the encoder is trained."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "MllmTower":
        """Set training mode, except that a frozen encoder stays in eval mode: its dropout must not come alive."""
        super().train(mode)
        if mode and self.is_encoder_frozen:
            self.encoder.eval()
        return self

    def forward(self, pixel_values: Pixels) -> MediaFeatures:
        """Encode and connect a batch of media items of the encoder's native size."""
        return self.connector(self.select_features(self.encode(pixel_values)))

    def encode(self, pixel_values: Pixels) -> Float[Tensor, "N P D_encoder"]:
        """All tokens of the feature layer, in calls of at most `encoder_chunk` items where that is set.

        A frozen encoder leaves no graph behind. Where ranks call the encoder together, one with fewer items calls it
        as often as the others, on zeros that change nothing.
        """
        chunks = pixel_values.split(self.encoder_chunk or len(pixel_values))
        num_calls = self._calls_of_the_longest_rank(len(chunks))  # asked before the first, which may be collective
        hidden = [self._call_encoder(chunk) for chunk in chunks]
        encoded = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        for _ in range(num_calls - len(chunks)):
            encoded = encoded + (0.0 * self._call_encoder(self.native_zeros())).sum()
        return encoded

    def _call_encoder(self, pixel_values: Pixels) -> Float[Tensor, "N P D_encoder"]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_encoder_frozen):
            outputs = self.encoder(pixel_values.to(self.encoder.dtype), output_hidden_states=True)
        return outputs.hidden_states[self.config.feature_layer]

    def _calls_of_the_longest_rank(self, own: int) -> int:
        """How often the rank with most items calls the encoder in this forward. One call each needs no asking."""
        if self.encoder_chunk is None or not is_called_together(self.encoder, training=self.training):
            return own
        most = torch.tensor(own, device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most)

    def select_features(self, hidden: Float[Tensor, "N P D_encoder"]) -> Float[Tensor, "N V D_encoder"]:
        """Drop the class token where the configuration says so."""
        return hidden[:, 1:] if self.config.feature_select == "default" else hidden

    def connect(self, features: Float[Tensor, "N V D_encoder"]) -> MediaFeatures:
        """Lead the encoder's features, computed earlier, to the language model's width."""
        return self.connector(features.to(self.dtype))

    def native_zeros(self) -> Pixels:
        """One item of the encoder's native size, for ranks that have no media."""
        side, config = self.config.image_token_rule.image_size, self.config.encoder_config
        return torch.zeros(1, config.num_channels, side, side, device=self.device, dtype=self.encoder.dtype)


class MllmModel(MllmPreTrainedModel):
    """Towers and the language model's body, without its head."""

    def __init__(self, config: MllmConfig):
        super().__init__(config)
        if config.image_config is not None:
            self.image_tower = MllmTower(config.image_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @property
    def towers(self) -> dict[str, MllmTower]:
        """The towers there are, by modality; a view, never a stored container."""
        return {"image": self.image_tower} if self.config.image_config is not None else {}

    def set_encoder_chunk(self, items: int | None) -> None:
        """Let each call of an encoder read at most that many media items; None for all of a batch in one call."""
        for tower in self.towers.values():
            tower.encoder_chunk = items

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Pixels, return_dict: bool = True) -> BaseModelOutputWithPooling:
        """Encode images; as in stock models the connected features are the output's `pooler_output` [N, V, D].

        `generate` calls this once before the first step, by this name.
        """
        hidden = self.image_tower.encode(pixel_values)
        features = self.image_tower.connector(self.image_tower.select_features(hidden))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)

    def forward(
        self,
        input_ids: TokenIds | None = None,
        pixel_values: Pixels | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_features: Float[Tensor, "N V D_encoder"] | None = None,
        **kwargs,
    ) -> ModelOutput:
        """Run the composed model up to its last hidden states.

        Args:
            input_ids: Token ids with one placeholder for every feature vector.
            pixel_values: The batch's images in order of appearance; None when it has none.
            attention_mask: 1 for tokens, 0 for padding; absent for packed rows.
            position_ids: Given for packed rows only.
            past_key_values: Cache of earlier steps.
            inputs_embeds: Embedded input in place of `input_ids`, media already in it.
            mm_encoder_outputs: Encoded media ("image"), in place of `pixel_values`.
            image_features: What the encoder gave for the images when it read them before, in place of `pixel_values`;
                with no items where the batch has none. Every batch of a run has them, or none.
            **kwargs: Passed on to the language model.

        Raises:
            RowError: Placeholders and feature vectors differ in number.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and len(pixel_values):
            encoded = self.get_image_features(pixel_values)
        if image_features is not None and len(image_features):
            encoded = BaseModelOutputWithPooling(pooler_output=self.image_tower.connect(image_features))
        if encoded is not None:
            inputs_embeds = self._scatter_images(input_ids, inputs_embeds, encoded.pooler_output)
        elif input_ids is not None and past_key_values is None and "image" in self.towers:
            placeholder_mask(input_ids, self.config.image_config.placeholder_token_id, num_features=0)
        if encoded is None and past_key_values is None and self._must_join_other_ranks():
            # By the way of real images: ZeRO-3 compares the modules that each rank has called, one by one.
            inputs_embeds = inputs_embeds + 0.0 * self._features_of_nothing(image_features).sum()
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _features_of_nothing(self, image_features: Float[Tensor, "N V D_encoder"] | None) -> Float[Tensor, "1 V D"]:
        """One item of zeros, through what the other ranks call: with features at hand the connector alone."""
        if image_features is not None:
            return self.image_tower.connect(image_features.new_zeros(1, *image_features.shape[1:]))
        return self.get_image_features(self.image_tower.native_zeros()).pooler_output

    def _scatter_images(self, input_ids: TokenIds, embeds: Tensor, features: MediaFeatures) -> Tensor:
        num_features = sum(len(item) for item in features)
        mask = placeholder_mask(input_ids, self.config.image_config.placeholder_token_id, num_features=num_features)
        if isinstance(features, list):
            features = torch.stack(features)
        return scatter_features(embeds, mask, features)

    def _must_join_other_ranks(self) -> bool:
        """Whether a forward without media has to call the tower all the same."""
        return "image" in self.towers and is_called_together(self.image_tower, training=self.training)


class MllmForConditionalGeneration(MllmPreTrainedModel, GenerationMixin):
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

    def get_image_features(self, pixel_values: Pixels, return_dict: bool = True) -> BaseModelOutputWithPooling:
        """Encode images; see `MllmModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, return_dict=return_dict)

    def forward(
        self,
        input_ids: TokenIds | None = None,
        pixel_values: Pixels | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: TokenIds | None = None,
        loss_weights: Float[Tensor, "B T"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MllmOutput:
        """Loss with labels, logits without.

        Args:
            input_ids: Token ids with one placeholder for every feature vector.
            pixel_values: The batch's images in order of appearance.
            attention_mask: 1 for tokens, 0 for padding.
            position_ids: Given for packed rows, and by `generate`, which counts from a prompt's first token.
            mm_encoder_outputs: Encoded media in place of `pixel_values`; `generate` encodes once, before it starts.
            labels: Ids to be learned, -100 elsewhere. With them no logits are made, except at those positions.
            loss_weights: A factor for each label.
            num_items_in_batch: Divisor of the loss; the batch's own supervised tokens where absent.
            logits_to_keep: How many last positions get logits, 0 for all.
            **kwargs: Passed to `MllmModel.forward`.
        """
        # `generate` passes position_ids and mm_encoder_outputs only to a forward that names them; without the first,
        # padding on the left would shift the positions.
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = token_losses = logits = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        else:
            loss, token_losses = supervised_loss(
                hidden, labels, self.lm_head, loss_weights=loss_weights, num_items=num_items_in_batch
            )
        return MllmOutput(
            loss=loss,
            token_losses=token_losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embedding_name(self) -> str:
        """Full name of the input embedding; families call it embed_tokens, wte, embed_in, word_embeddings."""
        embedding = self.model.get_input_embeddings()
        return next(name for name, module in self.named_modules() if module is embedding)
