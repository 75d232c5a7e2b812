"""Llama with dropout after every block, registered as a model from outside would be."""

from dataclasses import replace
from typing import Any

from parity.layout import CPU, Case, build_config
from parity.single import MODELS
from torch import Tensor, nn

from dtron import registry
from dtron.mesh import Mesh
from dtron.models.llama import Block, Llama, LlamaConfig
from dtron.models.spec import ModelSpec
from dtron.parallel.compose import ParallelModel, parallelize


class DropoutBlock(Block):
    def __init__(self, c: LlamaConfig, index: int) -> None:
        super().__init__(c, index)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        return self.dropout(super().forward(x, *arguments))


class DropoutLlama(Llama):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for i in self.layers:
            self.layers[i] = DropoutBlock(config, int(i))


def register() -> ModelSpec:
    """The model's specification, by now known as model.name = dropout."""
    name = "dropout"
    if name not in registry._REGISTRY["model"]:
        registry.register("model", name, replace(registry.look_up("model", "llama3", ""), build=DropoutLlama))
    return registry.look_up("model", name, "")


def build(case: Case) -> tuple[Mesh, ParallelModel]:
    """The mesh and this rank's part of the model with dropout, in the case's layout."""
    mesh = Mesh(case.degrees, "cpu")
    spec, dimensions = register(), MODELS[case.model]
    return mesh, parallelize(spec, dimensions, build_config(case), mesh, CPU, registry.cross_entropy, [])
