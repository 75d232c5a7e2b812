"""Experts kept busy in a run: the bias and the loss that do it, the metrics of it, and the warning of idle experts."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tinyrun import train_tiny
from torch import nn

from dtron import registry
from dtron.checkpoint.load import read_weights
from dtron.models import families
from dtron.models.llama import LlamaConfig
from dtron.models.moe import MoEConfig
from dtron.observe.metrics import HEAT_MAP, read_metrics
from dtron.registry import cross_entropy
from dtron.train import balance
