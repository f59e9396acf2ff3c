"""The second finder: torch-pruning's dependency graph (idea and tracer theirs, behind this file only).

Its groups are translated into the same links as the numeric finder's. They count only where the numeric finder saw
nothing and the equality test passes; everywhere else they are a second opinion.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.graph.ports import Links, Port


def trace_links(model: nn.Module, inputs: dict[str, Tensor], ports: dict[str, Port]) -> Links:
    """Links that torch-pruning's dependency graph knows of.

    Args:
        model: a private copy (its gradients are switched on and its mode is set).
        inputs: example inputs by name.
        ports: every port by name.

    Raises:
        Exception: whatever torch-pruning raises for a model that it cannot trace.
    """
    import torch_pruning as tp

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs, verbose=False)
    names = {module: name for name, module in model.named_modules()}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    links = Links()
    done: set[str] = set()
    for port in ports.values():
        if port.frozen is not None:
            links.freeze_port(port, port.frozen)
        if not port.name.startswith("out:"):
            continue
        for index in range(port.size):
            links.root((port.name, index))
        module = model.get_submodule(port.module)
        if port.name in done or module not in graph.module2node:
            continue
        prune = graph.get_pruner_of_module(module).prune_out_channels
        for item in graph.get_pruning_group(module, prune, list(range(port.size))):
            target = _port_name(graph, item.dep, names, parameters)
            if target in ports:
                done.add(target)
                for root, index in zip(item.root_idxs, item.idxs, strict=True):
                    if index < ports[target].size:
                        links.join((port.name, int(root)), (target, int(index)))
    return links


def _port_name(graph: Any, dep: Any, names: dict[nn.Module, str], parameters: dict[int, str]) -> str:
    target = dep.target.module
    if isinstance(target, nn.Parameter):
        return f"tensor:{parameters.get(id(target), '')}:{dep.target.pruning_dim % max(1, target.ndim)}"
    name = names.get(target, "")
    if isinstance(target, nn.Module) and getattr(target, "groups", 1) > 1 and hasattr(target, "kernel_size"):
        return f"norm:{name}"
    side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"
    both = graph.is_out_channel_pruning_fn(dep.handler) and graph.is_in_channel_pruning_fn(dep.handler)
    return f"norm:{name}" if both else f"{side}:{name}"
