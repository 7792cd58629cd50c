"""Run a model many times over: Runner folds norms, packs weights, captures graphs, and notices new weights."""

import torch

import fastseg.models
from fastseg.inference import Runner

torch.manual_seed(0)
model = fastseg.models.create("fcn", 4, backbone="resnet18", stride=4).eval()
x = torch.rand(1, 3, 64, 64)
runner = Runner(model, x)
with torch.no_grad():
    expected = model(x)
difference = (runner(x) - expected).abs().max().item()
assert difference < 1e-3 * expected.abs().max().item()
agreement = (runner.predict(x) == expected.argmax(1)).float().mean().item()
assert agreement > 0.999

with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(0.9)
    renewed = model(x)
assert not torch.allclose(renewed, expected)
assert torch.allclose(runner(x), renewed, atol=1e-3 * renewed.abs().max().item())
print(f"largest difference {difference:.1e}; classes agree at {agreement:.2%} of pixels; new weights were noticed")
