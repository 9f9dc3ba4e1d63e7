"""FlexAttention with gradients, where there is no GPU."""

import warnings
from contextlib import contextmanager
from unittest.mock import patch

from torch.nn.attention import flex_attention as torch_flex


@contextmanager
def gradients_on_a_cpu():
    """torch refuses them there, though its plain form has them."""
    with patch.object(torch_flex, "_validate_device", lambda *_: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the plain form
        yield
