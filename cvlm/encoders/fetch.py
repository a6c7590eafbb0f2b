"""One readable message for everything that can go wrong while weights and configurations are fetched."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cvlm.errors import CvlmError

logger = logging.getLogger(__name__)


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Turn the errors of a hub or a file into one `CvlmError` that names the encoder."""
    try:
        yield
    except CvlmError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        logger.debug("loading %s failed", name, exc_info=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CvlmError(
            f"cannot load {name!r}: {reason} -- check the name and the connection, name a local folder, "
            "use a package: encoder, or set pretrained: false where random weights will do"
        ) from None
