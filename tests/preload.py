"""What ranks need, imported once in the process that they are forked from.

It runs nothing else: a fork of one that has run a backward cannot run any where torch knows of another device, as
CUDA builds do once they have made a fake tensor, without a GPU too ("Unable to handle autograd's threading in
combination with fork-based multiprocessing").
"""

import logging
import warnings

import ranks  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.compile_fx  # 2.6 CPU-seconds, which every rank that compiles would spend
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel

import dtron.train.launch  # noqa: F401

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # torch warns of its own internals
logging.getLogger("torch").setLevel(logging.ERROR)
