"""What a packed row keeps for its backward pass, in bytes of one rank; torch-free.

In: the model, the degrees and the lengths of a row. Out: bytes that autograd holds on a pipeline stage. The sums count
what the `local` layers keep (backends/megatron/layers.py), tensor by tensor, on the CPU; tests compare them with a real
step. CUDA's fused norm keeps less: no normalised rows, and none in float32.

T packed tokens, D hidden size, A queries' width, K keys' width, F feed-forward width, Q patches, W vision width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_vlrl.backends.pipeline import Moment, moments
from megatron_vlrl.models.qwen3_vl.config import Qwen3VLSpec, TextSpec, VisionSpec
from megatron_vlrl.parallel.dims import ParallelDims

Recompute = Literal["none", "selective", "full"]
CHUNK_NUMBERS = 2**26  # logits that exist at once (parallel/logprob.py)
_FLOAT = 4
_FULL = 2  # microbatches for each rank of a pipeline are enough for all that it ever keeps


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The lengths of a packed row: `prompts` times a prompt of `prompt` tokens, `image` of them from images, one image
    a prompt, and `responses` answers of `response` tokens each."""

    prompts: int
    prompt: int
    image: int
    responses: int
    response: int

    @property
    def tokens(self) -> int:
        """Packed tokens: each prompt counts once."""
        return self.prompts * (self.prompt + self.responses * self.response)

    @property
    def logit_rows(self) -> int:
        """Rows that need logits: the last token of an answer predicts nothing."""
        return self.prompts * (1 + self.responses * (self.response - 1))

    @classmethod
    def fill(cls, budget: int, *, prompt: int, image: int, responses: int, response: int) -> Row:
        """As many whole groups as `budget` packed tokens hold, one at least."""
        group = prompt + responses * response
        return cls(prompts=max(1, budget // group), prompt=prompt, image=image, responses=responses, response=response)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes of one layer: `whole` without recompute; `core`, the part inside attention; `feed_forward`, the part after
    it; `entry`, its input; `again`, what is added to a kept `entry` while the layer is computed again."""

    whole: float
    core: float
    feed_forward: float
    entry: float
    again: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Bytes of one of a rank's chunks. text, vision: kept by autograd for each row that waits for its backward step.
    borders: held besides by the schedule, of what stages hand to each other. text_work, vision_work: what exists
    besides while the backward step goes through decoder layers and head, and then through the tower."""

    text: float
    vision: float
    borders: float
    text_work: float
    vision_work: float


def chunk_layers(layers: int, dims: ParallelDims, stage: int, chunk: int) -> range:
    """The decoder layers of a chunk (from 0) of a pipeline rank: chunks are dealt out to the ranks in turn."""
    each = layers // (dims.pipeline * dims.virtual)
    start = (chunk * dims.pipeline + stage) * each
    return range(start, start + each)


@lru_cache(maxsize=1024)
def text_layer(text: TextSpec, row: Row, dims: ParallelDims, width: int, *, mixture: bool) -> Kept:
    """A decoder layer's, at `width` bytes a number. mixture: its tokens go to experts."""
    tokens, hidden = row.tokens, text.hidden_size
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    entry = tokens * hidden * width / _sequence(dims)
    # A norm works on float32 rows, and keeps them and the normalised ones; float32 rows of a stream are not copied.
    norms = 2 * tokens * (2 * hidden * _FLOAT + hidden * width + _FLOAT) / _sequence(dims)
    head_norms = tokens * (2 * queries + keys + text.heads + text.kv_heads) * _FLOAT
    # Keys are part of the projection, which is kept with them; converted to float32 they stand alone.
    head_norms += tokens * (queries + 2 * keys if width == _FLOAT else keys) * _FLOAT
    core = _core(text, row, dims, width)
    rotary = 4 * tokens * text.head_dim * width  # cosine and sine, for queries and for keys
    attention = (head_norms + tokens * queries * width) / dims.tensor + rotary + core
    feed_forward = (_experts if mixture else _mlp)(text, row, dims, width)
    whole = norms + attention + feed_forward
    again = whole - entry if width == _FLOAT else whole
    return Kept(whole=whole, core=core, feed_forward=feed_forward, entry=entry, again=again)


def _mlp(text: TextSpec, row: Row, dims: ParallelDims, width: int) -> float:
    return 5 * row.tokens * text.ffn_size / dims.tensor * width  # gate and up in one, silu, up, product


def _experts(text: TextSpec, row: Row, dims: ParallelDims, width: int) -> float:
    """Of a mixture: a copy of each token for each of its experts. As many come to a rank as leave it, where the router
    is balanced; where it is not, the busiest rank keeps up to `expert` times as much."""
    copies = row.tokens * text.experts_per_token
    inside = 6 * text.expert_ffn_size / dims.tensor  # gate and up, silu, up, product, product by the router's weight
    routing = row.tokens / _sequence(dims) * (text.experts * width + text.experts_per_token * (2 * 8 + width))
    return copies * (text.hidden_size + inside) * width + routing


def _core(text: TextSpec, row: Row, dims: ParallelDims, width: int) -> float:
    """Inside attention: two padded batches of query, key, value and output, and the answers' mask as numbers."""
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    prompt_tokens, answers = row.prompts * row.prompt, row.prompts * row.responses
    answer_tokens, seen = answers * row.response, row.prompt + row.response
    kept = prompt_tokens * (2 * queries + 2 * keys) + answer_tokens * 2 * queries + answers * seen * 2 * keys
    sums = (prompt_tokens + answer_tokens) * text.heads * _FLOAT
    return (kept * width + sums) / dims.tensor + _mask(row) * width


def _mask(row: Row) -> int:
    """Pairs of an answer's token with one of its prompt and itself."""
    return row.prompts * row.responses * row.response * (row.prompt + row.response)


def text_layers(
    spec: Qwen3VLSpec, row: Row, dims: ParallelDims, width: int, recompute: Recompute, numbers: range
) -> tuple[float, float]:
    """(bytes that a row keeps in the decoder layers `numbers`, what exists besides while a layer is computed again)."""
    text = spec.text
    layers = [text_layer(text, row, dims, width, mixture=text.is_mixture(n)) for n in numbers]
    if recompute == "full":
        features = max(0, len(spec.vision.deepstack_layers) - numbers[0]) if row.image else 0
        # What each layer is called with again: rotary angles, the answers' mask as truth values, features.
        shared = row.tokens * text.head_dim * _FLOAT + _mask(row) + features * layers[0].entry
        kept = shared + sum(layer.entry for layer in layers)
        return kept, max(layer.whole - layer.entry for layer in layers)
    if recompute == "selective":
        queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
        # Values are part of the projection, which a norm of float32 keys keeps already.
        projection = 0 if width == _FLOAT else queries + 2 * keys
        inputs = row.tokens * (queries + keys + projection) / dims.tensor * width
        again = max(layer.core - layer.feed_forward for layer in layers)
        return sum(layer.whole - layer.core + inputs for layer in layers), max(0.0, again)
    return sum(layer.whole for layer in layers), 0.0


def vision_tower(spec: VisionSpec, row: Row, dims: ParallelDims, width: int, *, recompute: bool) -> tuple[float, float]:
    """The same two numbers for the vision tower. `recompute`: whole layers are computed again."""
    patches = row.prompts * row.image * spec.merge_size**2
    layer, entry = _vision_layer(spec, patches, dims, width), patches * spec.hidden_size * width
    mergers = (1 + len(spec.deepstack_layers)) * 3 * entry + entry
    embedding = patches * (spec.patch_dim * width + 4 * (8 + width))  # patches, and taps into the position table
    features = (1 + len(spec.deepstack_layers)) * row.prompts * row.image * spec.out_size * width
    kept = spec.depth * (entry if recompute else layer) + mergers + embedding + features
    return kept, layer - entry if recompute else 0.0


def _vision_layer(spec: VisionSpec, patches: int, dims: ParallelDims, width: int) -> float:
    hidden = spec.hidden_size
    streams = 4 * hidden  # of each of two norms: input and output
    attention = (3 + 3) * hidden / dims.tensor + 4 * hidden // spec.heads  # projection; query, key, output; rotary
    feed_forward = 2 * spec.ffn_size / dims.tensor
    sums = _FLOAT * (4 + spec.heads / dims.tensor)
    return patches * ((streams + attention + feed_forward) * width + sums)


def stage_activations(
    spec: Qwen3VLSpec,
    row: Row,
    dims: ParallelDims,
    width: int,
    *,
    stage: int,
    recompute: Recompute,
    recompute_vision: bool,
    microbatches: int | None = None,
) -> dict[str, float]:
    """Bytes kept on a stage at the worst moment of a step of `microbatches` rows, in `text`, `vision` and `borders`.

    None are as many rows as fill the pipeline. What the head keeps is gone when a decoder layer is computed again, and
    those are gone when it is a vision layer's turn.
    """
    chunks = [
        _chunk(spec, row, dims, width, stage=stage, chunk=n, recompute=recompute, recompute_vision=recompute_vision)
        for n in range(dims.virtual)
    ]
    rows = _FULL * dims.pipeline if microbatches is None else microbatches
    parts = [_kept(chunks, moment) for moment in moments(dims, rows, stage)]
    return dict(zip(("text", "vision", "borders"), max(parts, key=sum), strict=True))


def _kept(chunks: Sequence[Chunk], moment: Moment) -> tuple[float, float, float]:
    """(text, vision, borders) at a moment, when the backward step of one of the chunks begins."""
    pairs = list(zip(moment.kept, chunks, strict=True))
    text = sum(rows * chunk.text for rows, chunk in pairs)
    vision = sum(rows * chunk.vision for rows, chunk in pairs)
    borders = sum(rows * chunk.borders for rows, chunk in pairs)
    now = chunks[moment.chunk]
    return text + now.text_work, vision + max(0.0, now.vision_work - now.text - now.text_work), borders


def _chunk(
    spec: Qwen3VLSpec,
    row: Row,
    dims: ParallelDims,
    width: int,
    *,
    stage: int,
    chunk: int,
    recompute: Recompute,
    recompute_vision: bool,
) -> Chunk:
    numbers = chunk_layers(spec.text.layers, dims, stage, chunk)
    text, again = text_layers(spec, row, dims, width, recompute, numbers)
    head = tower = tower_again = 0.0
    if numbers[-1] == spec.text.layers - 1:
        norm = 2 * row.tokens * spec.text.hidden_size * _FLOAT / _sequence(dims)
        head = norm + row.logit_rows * spec.text.hidden_size * width
    if numbers[0] == 0 and row.image:
        tower, tower_again = vision_tower(spec.vision, row, dims, width, recompute=recompute_vision)
    borders = _borders(spec, row, dims, width, recompute, numbers)
    return Chunk(text=text, vision=tower, borders=borders, text_work=max(head, again), vision_work=tower_again)


def _borders(
    spec: Qwen3VLSpec, row: Row, dims: ParallelDims, width: int, recompute: Recompute, numbers: range
) -> float:
    """What a chunk was handed and what it hands on, joined with DeepStack's features that later layers add.

    What comes without features is what the first layer keeps anyway, where it keeps its input as it is.
    """
    features = len(spec.vision.deepstack_layers) if row.image else 0
    arriving, leaving = max(0, features - numbers[0]), max(0, features - numbers[-1] - 1)
    kept_anyway = not arriving and (recompute == "full" or width == _FLOAT)
    received = 0 if numbers[0] == 0 or kept_anyway else 1 + arriving
    sent = 0 if numbers[-1] == spec.text.layers - 1 else 1 + leaving
    return (received + sent) * row.tokens * spec.text.hidden_size * width / _sequence(dims)


def head_workspace(spec: Qwen3VLSpec, row: Row, dims: ParallelDims, width: int) -> float:
    """While the head is differentiated: logits of a chunk, its gradient where it is of another type, and the gradient
    of the head's weight."""
    columns = math.ceil(spec.text.vocab_size / dims.tensor)
    rows = min(row.logit_rows, max(1, CHUNK_NUMBERS // columns))
    copy = width if width != _FLOAT else 0
    return rows * columns * (_FLOAT + copy) + columns * spec.text.hidden_size * width


def _sequence(dims: ParallelDims) -> int:
    return dims.tensor if dims.sequence else 1
