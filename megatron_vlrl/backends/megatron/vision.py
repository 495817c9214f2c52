"""Qwen3-VL's vision tower on megatron-core layers: patches [Q, patch size] -> image tokens, and DeepStack features."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vlrl.backends.megatron.layers import vision_layer
from megatron_vlrl.models.qwen3_vl.config import VisionSpec
from megatron_vlrl.models.qwen3_vl.geometry import patch_coordinates, position_interpolation

Grid = tuple[int, int, int]


class PatchMerger(nn.Module):
    """merge x merge patches -> one image token of the language model's width."""

    def __init__(self, vision: VisionSpec, dtype: torch.dtype, *, norm_after_merge: bool) -> None:
        super().__init__()
        self.width = vision.hidden_size * vision.merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.width if norm_after_merge else vision.hidden_size, eps=1e-6, dtype=dtype)
        self.linear_fc1 = nn.Linear(self.width, self.width, dtype=dtype)
        self.linear_fc2 = nn.Linear(self.width, vision.out_size, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """[Q, Dv] -> [Q / merge^2, D]."""
        merged = self.norm(hidden.view(-1, self.width)) if self.norm_after_merge else self.norm(hidden)
        return self.linear_fc2(F.gelu(self.linear_fc1(merged.view(-1, self.width))))


def _run_layer(layer: nn.Module, rotary: Tensor, packed: PackedSeqParams, hidden: Tensor) -> Tensor:
    out, _context = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed)
    return out


class VisionTower(MegatronModule):
    """Tensor-parallel layers; patch embedding, positions and mergers are the same on every rank of the tensor group."""

    def __init__(self, vision: VisionSpec, config: TransformerConfig, process_groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        self.vision, self.process_groups = vision, process_groups
        self.recompute = config.recompute_granularity == "full"
        dtype = config.params_dtype
        # A convolution whose stride is its kernel is a linear map of the flattened patch.
        self.patch_embed = nn.Linear(vision.patch_dim, vision.hidden_size, dtype=dtype)
        self.pos_embed = nn.Embedding(vision.position_embeddings, vision.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            build_module(vision_layer(), config=config, layer_number=number, pg_collection=process_groups)
            for number in range(1, vision.depth + 1)
        )
        self.merger = PatchMerger(vision, dtype, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(vision, dtype, norm_after_merge=True) for _ in vision.deepstack_layers
        )

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, list[Tensor]]:
        """(image tokens [n, D], DeepStack features, one [n, D] for each listed layer)."""
        device = patches.device
        hidden = self.patch_embed(patches.to(self.patch_embed.weight.dtype)) + self._positions(grids, device)
        rotary = self._rotary(grids, device)
        frames = [height * width for frames, height, width in grids for _ in range(frames)]
        borders = F.pad(torch.tensor(frames, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
        hidden, features = hidden[:, None], []
        for index, layer in enumerate(self.layers):
            run = functools.partial(_run_layer, layer, rotary, packed)
            # Not megatron-core's own checkpoint: without a gradient of its input it forgets that of the parameters.
            hidden = checkpoint(run, hidden, use_reentrant=False) if self.recompute else run(hidden)
            if index in self.vision.deepstack_layers:
                merger = self.deepstack_merger_list[self.vision.deepstack_layers.index(index)]
                features.append(merger(hidden[:, 0]))
        return self.merger(hidden[:, 0]), features

    def _positions(self, grids: Sequence[Grid], device: torch.device) -> Tensor:
        """Learned positions interpolated to each grid, [Q, Dv]."""
        side = int(self.vision.position_embeddings**0.5)
        index, weight = position_interpolation(tuple(grids), side, self.vision.merge_size)
        table = self.pos_embed(torch.from_numpy(index).to(device))
        return (table * torch.from_numpy(weight).to(device, table.dtype)[..., None]).sum(1)

    def _rotary(self, grids: Sequence[Grid], device: torch.device) -> Tensor:
        """Angles of the two-dimensional rotary embedding, [Q, 1, 1, H]."""
        half = self.config.kv_channels // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32) / half
        frequencies = 1.0 / (self.vision.rope_theta**steps)
        coordinates = torch.from_numpy(patch_coordinates(tuple(grids), self.vision.merge_size))
        angles = (coordinates[..., None].float() * frequencies).flatten(1)
        return torch.cat((angles, angles), dim=-1)[:, None, None].to(device)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Shards for a checkpoint. megatron-core takes layers in a plain ModuleList for replicated and would save one
        rank's shard as the whole (transformer/utils.py:245), silently; so each child is asked by itself."""
        children = {
            f"{name}.{index}" if index is not None else name: child
            for name, module in self.named_children()
            for index, child in (module.named_children() if isinstance(module, nn.ModuleList) else [(None, module)])
        }
        state: dict[str, Any] = {}
        for name, child in children.items():
            state |= sharded_state_dict_default(
                child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.process_groups.tp
            )
        return state
