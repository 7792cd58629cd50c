"""The rules, by library. The order decides which rule takes a class that two know."""

from fastseg.converting.classes import RULES
from fastseg.converting.rules import blocks, smp, smp_pyramids, timm, torchvision, transformers, unets

for _module in (smp, smp_pyramids, transformers, torchvision, timm, unets, blocks):
    for _rule in _module.RULES:
        assert _rule.name not in RULES, _rule.name
        RULES[_rule.name] = _rule
