"""The install works: one convolution through the backend, in a second."""

from __future__ import annotations

import torch


def test_tiny():
    conv, image = torch.nn.Conv2d(3, 8, 3, padding=1), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        found = torch.compile(conv, backend="ai3", options={"conv2d": "winograd", "rest": "eager"})(image)
        torch.testing.assert_close(found, conv(image), rtol=1e-4, atol=1e-4)
