"""The fusion module: project both modalities to one width, then let them read each other."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from fusion.attention import additive_mask, causal_mask
from fusion.blocks import CoAttentionBlock, CrossAttention, CrossBlock, MergedBlock, Streams
from fusion.positions import grid_positions

BLOCKS: dict[str, type[nn.Module] | None] = {
    "co_attention": CoAttentionBlock,
    "merged": MergedBlock,
    "cross": CrossBlock,
    "none": None,
}
"""Fusion kinds; `none` keeps the projections only, as a dual encoder needs."""


@dataclass(frozen=True, kw_only=True)
class FusionOutput:
    """What fusion returns.

    Attributes:
        text: `[b, n_text, d]`.
        image: `[b, n_image, d]`.
        attention: layer -> cross-modal attention, for the layers that were asked for and no other.
        hidden: layer -> `[b, n_text, d]` text states after that layer, for the layers that were asked for.
        projections: layer -> queries, keys and values `[b, n_text, d]` of its self-attention at the text positions, for
            the layers that were asked for.
    """

    text: Tensor
    image: Tensor
    attention: dict[int, CrossAttention] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


class _Projection(nn.Module):
    """Bring encoder tokens of any width and scale to the fusion width, and mark their modality."""

    def __init__(self, encoder_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(encoder_width)
        self.linear = nn.Linear(encoder_width, width)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out_norm(self.linear(self.norm(tokens)))


class Fusion(nn.Module):
    """A stack of fusion layers over projected encoder tokens.

    Shapes: b batch, n_text and n_image tokens, d width.

    Args:
        kind: a key of `BLOCKS`, or a block class of your own with the signature of `CoAttentionBlock`.
        vision_width: width of the image tokens that come in.
        text_width: width of the text tokens that come in.
        width: d inside.
        depth: number of layers; ignored for `none`.
        heads: attention heads per layer.
        expansion: hidden width of the feed-forward layers, in units of d.
        dropout: on attention, feed-forward and residual updates.

    Raises:
        ValueError: the kind is unknown, depth is below 1, or width is not divisible by heads.
    """

    def __init__(
        self,
        kind: str | type[nn.Module],
        *,
        vision_width: int,
        text_width: int,
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        expansion: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if isinstance(kind, str) and kind not in BLOCKS:
            raise ValueError(f"unknown fusion kind {kind!r}; known: {', '.join(BLOCKS)}")
        if depth < 1:
            raise ValueError(f"fusion depth must be at least 1, got {depth}")
        block = BLOCKS[kind] if isinstance(kind, str) else kind
        self.width = width
        self.text_projection = _Projection(text_width, width)
        self.image_projection = _Projection(vision_width, width)
        self.blocks = nn.ModuleList(block(width, heads, expansion, dropout) for _ in range(depth) if block is not None)
        # A pre-norm stack ends un-normalised. The image stream of `cross` is never written, so it needs no end norm.
        self.text_norm = nn.LayerNorm(width) if block is not None else nn.Identity()
        self.image_norm = nn.LayerNorm(width) if block not in (None, CrossBlock) else nn.Identity()

    @property
    def depth(self) -> int:
        """Number of layers, 0 for `none`."""
        return len(self.blocks)

    @property
    def directions(self) -> frozenset[str]:
        """Names of the attention maps that a layer can give."""
        if not self.blocks:
            return frozenset()
        if isinstance(self.blocks[0], CrossBlock):
            return frozenset({"text_to_image"})
        return frozenset({"text_to_image", "image_to_text"})

    @property
    def projects(self) -> bool:
        """Whether layers can give the queries, keys and values of text tokens; blocks of your own need not."""
        return bool(self.blocks) and all(hasattr(block, "project_text") for block in self.blocks)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        *,
        text_keep: Tensor,
        image_keep: Tensor,
        image_grid: tuple[int, int],
        image_special: int = 0,
        attention_layers: Collection[int] = (),
        hidden_layers: Collection[int] = (),
        projection_layers: Collection[int] = (),
    ) -> FusionOutput:
        """Fuse.

        Args:
            text: `[b, n_text, text_width]` encoder tokens.
            image: `[b, n_image, vision_width]` encoder tokens.
            text_keep: `[b, n_text]` True = keep.
            image_keep: `[b, n_image]` True = keep.
            image_grid: rows and columns of the image tokens.
            image_special: leading image tokens outside the grid.
            attention_layers: layers whose attention is recorded; all others run through fused attention kernels.
            hidden_layers: layers whose text states are recorded.
            projection_layers: layers whose queries, keys and values of text tokens are recorded.

        Raises:
            ValueError: a requested layer does not exist or projects nothing, or the image tokens do not fill the grid.
        """
        return self.fuse(
            self.text_projection(text),
            self.image_projection(image),
            text_keep=text_keep,
            image_keep=image_keep,
            image_grid=image_grid,
            image_special=image_special,
            attention_layers=attention_layers,
            hidden_layers=hidden_layers,
            projection_layers=projection_layers,
        )

    def fuse(
        self,
        text: Tensor,
        image: Tensor,
        *,
        text_keep: Tensor,
        image_keep: Tensor,
        image_grid: tuple[int, int],
        image_special: int = 0,
        causal: bool = False,
        attention_layers: Collection[int] = (),
        hidden_layers: Collection[int] = (),
        projection_layers: Collection[int] = (),
    ) -> FusionOutput:
        """Fuse tokens that `text_projection` and `image_projection` gave, for items that meet many partners.

        Args:
            text: `[b, n_text, d]`.
            image: `[b, n_image, d]`, without positions.
            text_keep: as in `forward`, as all others.
            image_keep: as in `forward`.
            image_grid: as in `forward`.
            image_special: as in `forward`.
            causal: a text token sees no later one, as a decoder needs; only kind `cross` keeps that promise.
            attention_layers: as in `forward`.
            hidden_layers: as in `forward`.
            projection_layers: as in `forward`.

        Raises:
            ValueError: as `forward`; or `causal` with blocks whose image tokens read the text.
        """
        if causal and any(not isinstance(block, CrossBlock) for block in self.blocks):
            raise ValueError("causal fusion needs kind cross: elsewhere a text token sees later ones through the image")
        asked = (*attention_layers, *hidden_layers, *projection_layers)
        missing = {layer for layer in asked if not 0 <= layer < self.depth}
        if missing:
            raise ValueError(f"fusion has layers 0..{self.depth - 1}; asked for {sorted(missing)}")
        cells = image_special + image_grid[0] * image_grid[1]
        if image.shape[1] != cells:  # a grid of one cell would broadcast
            raise ValueError(f"grid {image_grid} and {image_special} special tokens make {cells}, not {image.shape[1]}")
        positions = grid_positions(image_grid, image_special, self.width).to(image.device, image.dtype)
        image = image + positions
        streams = Streams(
            text=text,
            image=image,
            text_mask=(causal_mask if causal else additive_mask)(text_keep, text.dtype),
            image_mask=additive_mask(image_keep, image.dtype),
        )
        if projection_layers and not self.projects:
            raise ValueError("a block of this fusion lacks the method project_text; queries, keys and values need it")
        attention, hidden, projections = {}, {}, {}
        for layer, block in enumerate(self.blocks):
            if layer in projection_layers:
                projections[layer] = cast(Any, block).project_text(streams.text)
            streams, maps = block(streams, layer in attention_layers)
            if maps is not None:
                attention[layer] = maps
            if layer in hidden_layers:
                hidden[layer] = streams.text
        return FusionOutput(
            text=self.text_norm(streams.text),
            image=self.image_norm(streams.image),
            attention=attention,
            hidden=hidden,
            projections=projections,
        )
