"""Finding the selective scans of a model, whatever family it is of.

An adapter looks at a module tree's structure, never at class names alone, and says how to watch what it found. A new
family is a file with a function ``find(model) -> list[Site]`` and a line below.
"""

from __future__ import annotations

import torch
from torch import nn

from tokendyn.diagnose._adapters import _mixer, _scan_calls
from tokendyn.diagnose._capture import Site
from tokendyn.diagnose._load import ProjectedLayers

_FINDERS = (_scan_calls.find, _mixer.find)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_sites(model: nn.Module) -> list[Site]:
    """Every layer of ``model`` with a selective scan, in the order of the module tree."""
    found: dict[nn.Module, Site] = {}
    for find in _FINDERS:
        for site in find(model):
            found.setdefault(site.module, site)
    order = {module: place for place, module in enumerate(model.modules())}
    sites = sorted(found.values(), key=lambda site: order[site.module])
    mixers = {site.module for site in sites}
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    for site in sites:
        site.block = _block(site.module, parents, mixers)
        site.in_stream = not isinstance(parents.get(site.module), ProjectedLayers)
    return sites


def _block(mixer: nn.Module, parents: dict[nn.Module, nn.Module], mixers: set[nn.Module]) -> nn.Module | None:
    """The module around ``mixer`` that adds it to the residual stream: its parent, if that holds no other mixer."""
    parent = parents.get(mixer)
    if parent is None or isinstance(parent, _CONTAINERS):
        return None
    return parent if sum(module in mixers for module in parent.modules()) == 1 else None


def other_layers(model: nn.Module) -> list[str]:
    """Names of layers that look like state space layers which no adapter reads, for the message."""
    names = []
    for name, module in model.named_modules():
        rates = getattr(module, "A_log", None)
        if isinstance(rates, torch.Tensor):
            kind = "Mamba-2 (SSD)" if rates.ndim == 1 else f"a {type(module).__name__}"
            names.append(f"{name} ({kind})")
    return names
