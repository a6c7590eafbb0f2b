"""What the encoders of this package share: a wrapped network, its width, its layers, and frozen parts that stay put."""

from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from cvlm.encoders.idle import drop_idle
from cvlm.encoders.partition import group_by_blocks, keep_frozen_in_eval
from cvlm.errors import CvlmError


class Tower(nn.Module):
    """An encoder around one network; subclasses define `prepare` and `forward` and end their constructor on `settle`.

    Attributes:
        model: the wrapped network.
        width: `d` of the tokens.
        preprocessing: what `prepare` does and which layer is read, in words; part of the fingerprint.
    """

    width: int

    def __init__(self, model: nn.Module, preprocessing: str) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def train(self, mode: bool = True) -> Self:
        """Set train mode, except for frozen parts: they stay in eval, so that their BatchNorm and dropout do too."""
        super().train(mode)
        keep_frozen_in_eval(self)
        return self

    def layers(self) -> list[list[str]]:
        """Partition the parameter names into embeddings and blocks, from the input to the output."""
        return [[f"model.{name}" for name in layer] for layer in group_by_blocks(self.model)]

    def settle(self, probe: Mapping[str, Tensor]) -> None:
        """Run once in eval mode: measure the width, drop what the tokens do not need, refuse what cannot run.

        Raises:
            CvlmError: the network fails on the probe, for instance because of the image size.
        """
        self.eval()

        def tokens() -> Tensor:
            output: Tensor = self(**probe).tokens
            self.width = output.shape[-1]
            return output

        try:
            drop_idle(self.model, tokens)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in probe.items())
            way_out = (
                "leave image_size and layer unset to use the model's own"
                if "pixel_values" in probe
                else "check that the tokenizer belongs to the model"
            )
            raise CvlmError(
                f"{type(self.model).__name__} cannot encode {shapes}: {str(error).rstrip('.')}; {way_out}"
            ) from error
