"""A name for what an encoder computes: stored targets and cached features are valid only for the same one."""

import hashlib
from itertools import chain
from operator import itemgetter

import torch
from torch import nn


def fingerprint(encoder: nn.Module) -> str:
    """Hash the weights and the preprocessing of an encoder.

    Covers name, shape, type and bytes of every parameter and buffer, and the string attribute `preprocessing` where
    the encoder has one. Device, train mode and what is frozen do not matter.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256(str(getattr(encoder, "preprocessing", "")).encode())
    for name, tensor in sorted(chain(encoder.named_parameters(), encoder.named_buffers()), key=itemgetter(0)):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # Bytes through a uint8 view, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
