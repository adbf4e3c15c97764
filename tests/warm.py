"""What the server has ready that tests fork processes from: imports, and kernels."""

import importlib
import importlib.util

import torch
import torch._dynamo  # with the first optimizer

import experiments.harness.train
import launch.train
import lc3.hooks.fsdp2
from lc3.codec import cpu, warm_up
from lc3.wire import rans

__all__ = ["experiments", "launch", "lc3", "torch"]

torch.set_num_threads(1)  # threads would not survive the fork
warm_up(cpu)
rans.warm_up()
for framework in ("lightning.pytorch", "accelerate", "transformers.trainer", "torchft"):
    if importlib.util.find_spec(framework.partition(".")[0]) is not None:
        importlib.import_module(framework)
