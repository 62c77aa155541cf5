"""The moving average of weights is torch's."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tokendyn.experiments._moving_average import MovingAverage


def test_it_is_that_of_torch_but_for_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    ours = MovingAverage(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        model(torch.randn(2, 3, 5, 5)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update_parameters(model)
        theirs.update_parameters(model)
    expected = theirs.state_dict()
    assert expected["n_averaged"] == 4
    for name, value in ours.state_dict().items():
        wanted = torch.tensor(4) if name.endswith("num_batches_tracked") else expected[name]
        assert torch.equal(value, wanted), name
