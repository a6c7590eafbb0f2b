"""Counting floating-point operations: by running code, and in closed form.

One multiply-add is two FLOPs everywhere in this package. (fvcore counts it as one, and so do most published "FLOPs" of
vision networks: double those before any ratio.)

Only matrix products and convolutions are counted; normalisation, activations, softmax and embedding look-ups are not,
as in ``torch.utils.flop_counter``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Route every operation through kernels that the counter can see, and put the settings back.

    Three fused kernels would count as zero: the fast path of ``nn.TransformerEncoderLayer`` and
    ``nn.MultiheadAttention`` (eval and no grad), scaled-dot-product attention on some CPU builds, and oneDNN's
    recurrent layers.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    onednn: Any = torch.backends.mkldnn  # its stubs do not know that `enabled` is a plain switch
    fast_path, onednn_on = torch.backends.mha.get_fastpath_enabled(), onednn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    onednn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        onednn.enabled = onednn_on


def count_flops(fn: Callable[[], object]) -> int:
    """Run ``fn`` once and count its FLOPs, those of every ``backward`` that it calls included.

    A frozen part needs no special care: autograd does no work for it, so none is counted. Activation checkpointing is
    counted as the second forward that it is (less its last products, where torch stops the recomputation early).

    ``fn`` really runs: gradients accumulate, batch statistics move, random numbers are drawn. Attention runs in the
    unfused kernel, which needs more memory than training does. Count one step and multiply; do not train in here.

    Not seen: third-party kernels that register no FLOP formula (Triton, flash-attn) and ``torch.mv``/``torch.dot``.
    Code behind ``torch.compile`` should be counted before it is compiled.

    Args:
        fn: Work to count, without arguments.

    Returns:
        FLOPs, two per multiply-add.

    Raises:
        CvlmError: ``fn`` uses a cuDNN recurrent layer, which the counter cannot see.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    mapping = {torch.ops.aten._cudnn_rnn: _refuse_cudnn_rnn}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, _countable_kernels():
        fn()
    return int(counter.get_total_flops())


def _refuse_cudnn_rnn(*args: object, **kwargs: object) -> int:
    from cvlm.errors import CvlmError

    raise CvlmError(
        "cannot count the FLOPs of a recurrent layer on the GPU: cuDNN runs it as one kernel that would count as 0. "
        "Count the same step on the CPU."
    )


def linear_flops(tokens: int, width_in: int, width_out: int) -> int:
    """FLOPs of one forward of a linear layer over ``tokens`` rows: 2 n d_in d_out."""
    return 2 * tokens * width_in * width_out


def attention_flops(queries: int, keys: int, width: int) -> int:
    """FLOPs of one forward of the two attention products, all heads together: 4 q k d.

    Args:
        queries: Query tokens.
        keys: Key tokens.
        width: Width over all heads.
    """
    return 4 * queries * keys * width


def transformer_layer_flops(tokens: int, width: int, hidden: int, *, context: int = 0) -> int:
    """FLOPs of one forward of a transformer layer on one sample.

    Args:
        tokens: Tokens of the stream that the layer updates.
        width: Width d of the layer.
        hidden: Width of the feed-forward hidden layer.
        context: Tokens of the other stream. Above 0, a cross-attention block stands between self-attention and
            feed-forward: queries and output projection run on ``tokens``, keys and values on ``context``.
    """
    total = 4 * linear_flops(tokens, width, width) + attention_flops(tokens, tokens, width)
    if context:
        total += 2 * linear_flops(tokens, width, width) + 2 * linear_flops(context, width, width)
        total += attention_flops(tokens, context, width)
    return total + 2 * linear_flops(tokens, width, hidden)


def training_flops(forward: int, *, trains: bool = True, passes_gradient: bool = True) -> int:
    """FLOPs of forward and backward of a part whose work is linear layers, from its forward FLOPs.

    A forward costs 1, the gradient of its weights 1 and the gradient of its input 1. So a frozen part *below* every
    trainable one costs 1, a frozen part *above* a trainable one costs 2, a trainable one costs 3 (2 for the lowest
    layer, whose input needs no gradient). The products of attention have no weights: where gradient passes at all they
    cost 3, so for a frozen upper encoder this is a slight undercount.

    Args:
        forward: Forward FLOPs of the part.
        trains: Its weights receive gradients.
        passes_gradient: Its input receives a gradient.
    """
    return forward * (1 + int(trains) + int(passes_gradient))
