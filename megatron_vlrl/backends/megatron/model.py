"""Qwen3-VL on megatron-core's own GPTModel and schedules: one pipeline stage of it, fed with packed rows."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_vlrl.backends.megatron.layers import PackedRowParams, RMSNorm, decoder_layer
from megatron_vlrl.backends.megatron.vision import VisionTower
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec
from megatron_vlrl.packing import Microbatch, plan_attention


class InterleavedMRoPE(nn.Module):
    """Qwen3-VL's rotary angles: time everywhere, height at 1, 4, 7 ..., width at 2, 5, 8 ... up to their sections.

    megatron-core's MultimodalRotaryEmbedding lays the sections out in blocks, as Qwen2-VL does.
    """

    def __init__(self, head_dim: int, theta: float, section: tuple[int, int, int]) -> None:
        super().__init__()
        self.section = section
        self.frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def forward(self, positions: Tensor, *_: Any, **__: Any) -> Tensor:
        """positions int64[3, 1, T] -> angles float32[T, 1, 1, H]."""
        angles = positions[..., None].float() * self.frequencies.to(positions.device)
        mixed = angles[0].clone()
        for axis in (1, 2):
            places = slice(axis, self.section[axis] * 3, 3)
            mixed[..., places] = angles[axis, ..., places]
        return torch.cat((mixed, mixed), dim=-1)[:, :, None].transpose(0, 1).contiguous()


class PackedRowGPT(GPTModel):
    """GPTModel that ends with the hidden rows that predict a response token: the head belongs to the log-prob."""

    def _postprocess(self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedRowParams, **__: Any) -> Tensor:
        """[T(/tp), 1, D] -> hidden rows [U, 1, D] on the last stage, whole on each tensor rank; else as they are."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The log-prob's backward has already summed over the tensor group: here each rank only keeps its part.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        assert packed_seq_params.logit_rows is not None, "a packed row says which of its rows need logits"
        return hidden_states.index_select(0, packed_seq_params.logit_rows)

    def head_weight(self) -> Tensor:
        """[V/tp, D], this rank's rows of the language model's head; last stage only."""
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
            return weight
        return self.output_layer.weight


class Qwen3VLStage(MegatronModule):
    """One pipeline stage: all layers of a rank, or one of its chunks. The first also holds the vision tower.

    DeepStack features that later layers need travel to the next stage joined to the hidden states' last dimension.
    """

    def __init__(
        self,
        spec: Qwen3VLSpec,
        text: TransformerConfig,
        vision: TransformerConfig,
        process_groups: ProcessGroupCollection,
        *,
        chunk: int = 0,
    ) -> None:
        """chunk: which of this rank's virtual pipeline stages."""
        super().__init__(text)
        ranks, rank = process_groups.pp.size(), process_groups.pp.rank()
        chunks = text.virtual_pipeline_model_parallel_size or 1
        first, last = (chunk, rank) == (0, 0), (chunk, rank) == (chunks - 1, ranks - 1)
        vp_stage = chunk if chunks > 1 else None
        self.vp_stage = vp_stage
        self.spec, self.pre_process, self.post_process = spec, first, last
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = spec.tied_embeddings
        start = get_transformer_layer_offset(text, vp_stage, rank)
        count = get_num_layers_to_build(text, vp_stage, rank)
        layers = [decoder_layer(mixture=spec.text.is_mixture(start + index)) for index in range(count)]
        self.vision_model = VisionTower(spec.vision, vision, process_groups) if first else None
        self.language_model = PackedRowGPT(
            text,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            vocab_size=spec.text.vocab_size,
            max_sequence_length=spec.text.max_positions,
            pre_process=first,
            post_process=last,
            position_embedding_type="mrope",
            share_embeddings_and_output_weights=spec.tied_embeddings,
            scatter_embedding_sequence_parallel=False,  # images are set in before the scatter
            pg_collection=process_groups,
            vp_stage=vp_stage,
        )
        self.language_model.rotary_pos_emb = InterleavedMRoPE(
            spec.text.head_dim, spec.text.rope_theta, spec.text.mrope_section
        )
        decoder = self.language_model.decoder.layers
        self.first_layer, self.last_layer = decoder[0].layer_number - 1, decoder[-1].layer_number - 1
        for layer in decoder:
            layer.first_feature = self.first_layer
            if spec.text.is_mixture(layer.layer_number - 1):
                for parameter in layer.mlp.experts.parameters():
                    # Experts have an optimizer of their own, at degree 1 too: a checkpoint fits any degree.
                    parameter.allreduce = False
        self._features: Tensor | None = None

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied table; megatron-core sums its gradient over the first and last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the previous stage sent: hidden states and the DeepStack features that are still to be used."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self._features = None
        if received is not None and not self.pre_process:
            width = self.config.hidden_size
            if received.size(-1) > width:
                self._features = torch.stack(received[..., width:].split(width, dim=-1))
                received = received[..., :width].contiguous()
        self.language_model.set_input_tensor(received)

    def forward(self, batch: Microbatch) -> Tensor:
        """Hidden rows [U, 1, D] that need logits on the last stage; what the next stage needs elsewhere."""
        embedded, features = self._embed(batch) if self.pre_process else (None, self._features)
        length = len(batch.input_ids)
        border = torch.tensor(
            [0, length], dtype=torch.int32
        )  # on the host: the rotary embedding reads it twice a layer
        params = PackedRowParams(
            qkv_format="thd",
            cu_seqlens_q=border,
            cu_seqlens_kv=border,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            plan=plan_attention(batch.segments),
            logit_rows=batch.logit_rows,
        )
        out = self.language_model(
            batch.input_ids[None],
            batch.positions[:, None],
            None,
            decoder_input=embedded,
            packed_seq_params=params,
            extra_block_kwargs={"context": features},
        )
        unused = 0 if features is None else features.size(0) - (self.last_layer - self.first_layer + 1)
        if not self.post_process and features is not None and unused > 0:
            out = torch.cat([out, *features[-unused:]], dim=-1)
        return out

    def _embed(self, batch: Microbatch) -> tuple[Tensor, Tensor | None]:
        """(embeddings [T(/tp), 1, D] with images set in, DeepStack features [K, T(/tp), 1, D] or None)."""
        assert self.vision_model is not None
        embedded = self.language_model.embedding(batch.input_ids[None], None)
        features = None
        if batch.grids:
            is_image, is_video = (batch.input_ids == i for i in (self.spec.image_token_id, self.spec.video_token_id))
            places = (is_image | is_video).nonzero()[:, 0]
            image, deep = self.vision_model(batch.patches, batch.grids)
            embedded = embedded.index_copy(0, places, image.to(embedded.dtype)[:, None])
            zeros = torch.zeros_like(embedded)
            features = torch.stack([zeros.index_copy(0, places, feature.to(zeros.dtype)[:, None]) for feature in deep])
        if self.config.sequence_parallel:
            embedded = tensor_parallel.scatter_to_sequence_parallel_region(embedded)
            if features is not None:
                features = torch.stack([tensor_parallel.scatter_to_sequence_parallel_region(f) for f in features])
        return embedded, features
